"""Tensors read from safetensors a few rows at a time, and checkpoints that are not whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from edgebake.errors import RecipeError
from edgebake.llm.shards import Shards

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
Tensors = Mapping[str, NDArray[np.generic]]


def write(path: Path, tensors: Tensors) -> Path:
    """A safetensors file, written by the format's description."""
    header, data = {}, b""
    for name, value in tensors.items():
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": CODES[value.dtype.name], "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def values() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((37, 24), dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16], ids=str)
def test_rows_in_any_float_come_as_float32(tmp_path: Path, values: NDArray[np.float32], dtype: object) -> None:
    stored = values.astype(np.dtype(dtype))  # type: ignore[call-overload]
    write(tmp_path / "model.safetensors", {"before": values[:1], "weight": stored})
    shards = Shards(tmp_path)
    chunks = list(shards.rows("weight", chunk_bytes=5 * 24 * 4))
    assert [len(chunk) for chunk in chunks] == [5] * 7 + [2]
    np.testing.assert_array_equal(np.concatenate(chunks), stored.astype(np.float32))
    np.testing.assert_array_equal(shards.whole("weight"), stored.astype(np.float32))
    assert (shards.shape("weight"), shards.names) == ((37, 24), ("before", "weight"))


def test_several_files_are_one_checkpoint(tmp_path: Path, values: NDArray[np.float32]) -> None:
    write(tmp_path / "model-00001-of-00002.safetensors", {"a": values})
    write(tmp_path / "model-00002-of-00002.safetensors", {"b": values[:2]})
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = Shards(tmp_path)
    assert shards.names == ("a", "b")
    assert shards.largest_bytes == values.nbytes
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"'model-00002-of-00002\.safetensors', which is missing"):
        Shards(tmp_path)


def test_weights_in_another_form_beside_the_checkpoint_are_not_read(
    tmp_path: Path, values: NDArray[np.float32]
) -> None:
    write(tmp_path / "consolidated.safetensors", {"other": values})
    assert Shards(tmp_path).names == ("other",)
    write(tmp_path / "part.safetensors", {"a": values})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert Shards(tmp_path).names == ("a",)
    write(tmp_path / "model.safetensors", {"b": values})
    assert Shards(tmp_path).names == ("b",)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _headless(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def _no_json(path: Path) -> None:
    path.write_bytes((8).to_bytes(8, "little") + b"not json")


def _other_header(path: Path) -> None:
    path.write_bytes((9).to_bytes(8, "little") + b'{"a": {}}')


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (_cut, "model.safetensors is cut off: the tensor 'a' ends at byte 3663 of 3662"),
        (_headless, "model.safetensors is cut off or no safetensors file"),
        (_no_json, "the header of model.safetensors is not safetensors'"),
        (_other_header, "the header of model.safetensors is not safetensors'"),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path, values: NDArray[np.float32], harm: Callable[[Path], None], what: str
) -> None:
    harm(write(tmp_path / "model.safetensors", {"a": values}))
    with pytest.raises(RecipeError) as error:
        Shards(tmp_path)
    (problem,) = error.value.problems
    assert (problem.what, problem.fix) == (what, "copy the model again")
    assert problem.where.endswith("model.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, values: NDArray[np.float32]) -> None:
    path = write(tmp_path / "model.safetensors", {"a": values})
    shards = Shards(tmp_path)
    _cut(path)
    with pytest.raises(RecipeError, match=r"model\.safetensors is cut off in the tensor 'a'"):
        list(shards.rows("a"))


def test_what_is_no_float_checkpoint(tmp_path: Path, values: NDArray[np.float32]) -> None:
    with pytest.raises(RecipeError, match=r"has no \*\.safetensors"):
        Shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RecipeError, match="has its weights as pickles only"):
        Shards(tmp_path)


def test_integers_are_refused_where_a_weight_is_made_of_them(tmp_path: Path, values: NDArray[np.float32]) -> None:
    write(tmp_path / "model.safetensors", {"a": np.arange(4), "b": values})
    shards = Shards(tmp_path)  # a mask, say, that nothing reads
    assert (shards.names, shards.shape("a"), shards.largest_bytes) == (("a", "b"), (4,), values.nbytes)
    np.testing.assert_array_equal(shards.whole("b"), values)
    with pytest.raises(RecipeError, match="the tensor 'a' is 'I64', not one of F32, F16, BF16"):
        shards.whole("a")


def test_a_tensor_that_is_not_there_names_the_nearest(tmp_path: Path, values: NDArray[np.float32]) -> None:
    write(tmp_path / "model.safetensors", {"model.norm.weight": values})
    with pytest.raises(RecipeError) as error:
        Shards(tmp_path).shape("model.norn.weight")
    assert error.value.problems[0].what == "the checkpoint has no tensor 'model.norn.weight'"
    assert "did you mean 'model.norm.weight'?" in error.value.problems[0].fix
