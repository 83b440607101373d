"""Control flow, states and lists on random values and sizes, against plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgebake_targets.mil.call import Call, State
from edgebake_targets.mil.operators import operators
from mil_ops import run

SHAPES = [(), (1,), (5,), (2, 1, 3), (0, 4), (3, 2, 2, 1)]


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), np.float32))


def call(operator: str, *blocks: Any, **inputs: Any) -> Any:
    return operators()[operator](Call(operator=operator, inputs=inputs, outputs=(), blocks=blocks))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pred", [True, False])
def test_cond_gives_all_values_of_one_block(shape: tuple[int, ...], pred: bool) -> None:
    x, y = numbers(shape, 0), numbers(shape, 1)
    flag = torch.tensor(pred) if len(shape) % 2 else torch.tensor([pred])
    found = call("cond", lambda: (x + y, x), lambda: (x * y, y), pred=flag)
    expected = (x.numpy() + y.numpy(), x.numpy()) if pred else (x.numpy() * y.numpy(), y.numpy())
    for result, value in zip(found, expected, strict=True):
        np.testing.assert_array_equal(result.numpy(), value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_while_loop_goes_round_as_often_as_its_block_says(shape: tuple[int, ...], rounds: int) -> None:
    """x grows by y, and y by a half; the count is an integer of rank 0."""
    x, y = numbers(shape, 2), numbers(shape, 3)
    count, last, after = call(
        "while_loop",
        lambda n, *_: (n < rounds,),
        lambda n, total, step: (n + 1, total + step, step * 1.5),
        loop_vars=[torch.tensor(0), x, y],
    )
    expected, step = x.numpy(), y.numpy()
    for _ in range(rounds):
        expected, step = expected + step, step * np.float32(1.5)
    assert int(count) == rounds
    np.testing.assert_array_equal(last.numpy(), expected)
    np.testing.assert_array_equal(after.numpy(), step)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_holds_what_was_written_last(shape: tuple[int, ...]) -> None:
    """A value read before a write stays what it was, and so does the one that was written."""
    first, second, third = (numbers(shape, seed) for seed in range(3))
    state = State(name="memory", value=first.clone())
    read = call("read_state", input=state)
    assert call("write_state", input=state, data=second) == ()
    np.testing.assert_array_equal(call("read_state", input=state).numpy(), second.numpy())
    np.testing.assert_array_equal(call("coreml_update_state", state=state, value=third).numpy(), third.numpy())
    np.testing.assert_array_equal(state.value.numpy(), third.numpy())
    np.testing.assert_array_equal(read.numpy(), first.numpy())


def _model(length: int, shape: tuple[int, ...]) -> list[NDArray[Any]]:
    return [np.zeros(shape, np.float32) for _ in range(length)]


def _grown(model: list[NDArray[Any]], index: int, value: NDArray[Any]) -> list[NDArray[Any]]:
    longer = model + [np.zeros_like(value) for _ in range(index + 1 - len(model))]
    return [value if at == index else old for at, old in enumerate(longer)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [0, 1, 4])
def test_lists_follow_python_lists(shape: tuple[int, ...], length: int) -> None:
    """Random writes inside and behind the end, scattered ones, and every way to read them back."""
    random = np.random.default_rng([length, *shape])
    held = run("make_list", init_length=length, elem_shape=tuple(shape)) if shape else [torch.zeros(())] * length
    model = _model(length, shape)
    for _ in range(4):
        index, value = int(random.integers(0, 7)), numbers(shape, int(random.integers(99)))
        held = call("list_write", ls=held, index=torch.tensor(index), value=value)
        model = _grown(model, index, value.numpy())
    places = random.permutation(9)[:3]
    values = numbers((3, *shape), 5)
    held = call("list_scatter", ls=held, indices=torch.from_numpy(places), value=values)
    for index, one in zip(places.tolist(), values, strict=True):
        model = _grown(model, index, one.numpy())
    assert call("list_length", ls=held).item() == len(model)
    for index, expected in enumerate(model):
        np.testing.assert_array_equal(call("list_read", ls=held, index=torch.tensor(index)).numpy(), expected)
    order = random.integers(0, len(model), 5)
    found = call("list_gather", ls=held, indices=torch.from_numpy(order))
    np.testing.assert_array_equal(found.numpy(), np.stack([model[index] for index in order]))
