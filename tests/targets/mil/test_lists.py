"""Lists of tensors and the classifier's last operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgebake_targets.mil.call import Call, Unsupported
from edgebake_targets.mil.ops import lists
from mil_ops import run


def _list(length: int = 2, **parameters: Any) -> list[Tensor]:
    return run("make_list", init_length=length, elem_shape=(2,), **parameters)


def test_a_list_grows_and_gaps_are_zero() -> None:
    """The example that coremltools runs on Apple's runtime."""
    start = _list()
    assert run("list_read", ls=tuple(start), index=0).tolist() == [0, 0]
    grown = run("list_write", ls=tuple(start), index=0, value=[1.0, 3.0])
    grown = run("list_write", ls=tuple(grown), index=4, value=[2.0, 4.0])
    grown = run("list_scatter", ls=tuple(grown), indices=[2, 1], value=[[-1.0, -2.0], [-4.0, -5.0]])
    assert run("list_gather", ls=tuple(grown), indices=[4, 2, 3, 0]).tolist() == [[2, 4], [-1, -2], [0, 0], [1, 3]]
    assert run("list_length", ls=tuple(grown)).item() == 5
    assert run("list_length", ls=tuple(start)).dtype == torch.int32
    assert [value.tolist() for value in start] == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float32), ("fp32", torch.float32), ("int32", torch.int32), ("bool", torch.bool)]
)
def test_elements_have_the_type_of_the_list(name: str, dtype: Any) -> None:
    assert [value.dtype for value in _list(3, dtype=name)] == [dtype] * 3


def test_defaults() -> None:
    (element,) = run("make_list", elem_shape=(2, 3))
    assert (element.shape, element.dtype) == ((2, 3), torch.float32)


@pytest.mark.parametrize("elem_shape", [("length", 2), None])
def test_the_first_write_decides_an_unknown_shape(elem_shape: Any) -> None:
    start = run("make_list", init_length=2, elem_shape=elem_shape)
    assert start == [None, None]
    write = Call(operator="list_write", inputs={"ls": start, "index": 0, "value": torch.ones(1, 2)}, outputs=())
    assert [value.tolist() for value in lists.list_write(write)] == [[[1, 1]], [[0, 0]]]
    with pytest.raises(Unsupported, match="at index 1, where nothing was written and the shape is unknown"):
        lists.list_read(Call(operator="list_read", inputs={"ls": start, "index": 1}, outputs=()))


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("make_list", {"elem_shape": (2,), "dtype": "int4"}, "make_list of int4"),
        ("make_list", {"elem_shape": (2,), "init_length": -1}, "make_list of -1 elements"),
        ("make_list", {"elem_shape": (2**20, 2**20)}, "more than 2147483648 values"),
        ("list_read", {"ls": ([1.0],), "index": 1}, "list_read at index 1 of a list of 1"),
        ("list_gather", {"ls": ([1.0],), "indices": [0, -1]}, "list_gather at index -1 of a list of 1"),
        ("list_gather", {"ls": (), "indices": np.zeros(0, np.int32)}, "list_gather of nothing from a list of unknown"),
        ("list_write", {"ls": ([1.0],), "index": -1, "value": [1.0]}, "list_write at the indices .-1."),
        ("list_write", {"ls": ([1.0],), "index": 2**30, "value": [1.0]}, "list_write at the indices .1073741824."),
        ("list_scatter", {"ls": ([1.0],), "indices": [0], "value": [[1.0], [2.0]]}, "list_scatter of 2 values to 1"),
        ("classify", {"probabilities": np.zeros(0), "classes": ()}, "classify without classes"),
    ],
)
def test_what_does_not_fit_is_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        run(operator, **inputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("classify", {"probabilities": [0.5, 0.5], "classes": ("a",)}, "classify of 2 probabilities with 1 classes"),
    ],
)
def test_sizes_that_contradict_each_other_cannot_be(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(operator, **inputs)


def test_nothing_gathered_has_the_shape_of_the_elements() -> None:
    assert run("list_gather", ls=([1.0, 2.0],), indices=np.zeros(0, np.int32)).shape == (0, 2)


@pytest.mark.parametrize(
    ("probabilities", "classes", "label"),
    [([0.1, 0.7, 0.2], ("cat", "dog", "bee"), "dog"), ([[0.5, 0.5]], (7, 9), 7), ([1.0], ("only",), "only")],
)
def test_classify(probabilities: Any, classes: tuple[Any, ...], label: Any) -> None:
    """The first of the most probable classes, and the probability of each."""
    result = run("classify", probabilities=probabilities, classes=classes)
    assert result[0] == label
    assert list(result[1]) == list(classes)
    np.testing.assert_allclose(list(result[1].values()), np.ravel(probabilities), rtol=1e-7)
