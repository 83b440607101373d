"""Rearranging operators against numpy and naive loops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgebake_targets.mil.call import Unsupported
from mil_ops import run

SHAPES = [(1,), (5,), (2, 3), (1, 4, 1), (2, 3, 4), (0, 3), (3, 1, 2, 2), (2, 1, 3, 2, 2)]
DTYPES = [np.float32, np.int32, np.bool_, np.int8]


def numbers(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    return (np.random.default_rng(seed).standard_normal(shape) * 50).astype(dtype)


def same(result: Tensor, expected: Any) -> None:
    expected = np.asarray(expected)
    assert tuple(result.shape) == expected.shape
    assert result.numpy().dtype == expected.dtype
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize(
    ("shape", "asked", "opset", "expected"),
    [
        ((2, 3, 4), [4, 6], "CoreML5", (4, 6)),
        ((2, 3, 4), [-1], "CoreML5", (24,)),
        ((2, 3, 4), [0, -1, 2], "CoreML5", (2, 6, 2)),
        ((2, 3, 4), [0, 0, 0], "CoreML6", (2, 3, 4)),
        ((4, 3, 2), [2, 0, -1], "CoreML6", (2, 3, 4)),
        ((2, 50), [1, 0, -1, 0], "CoreML7", (1, 1, 2, 50)),
        ((2, 3, 4), [-1, 0], "CoreML8", (6, 4)),
        ((2, 3), [0, 0, 0], "CoreML8", (1, 2, 3)),
        ((1,), [], "CoreML8", ()),
        ((), [1, 1], "CoreML8", (1, 1)),
        ((0, 3), [0, -1], "CoreML8", None),
        ((0, 3), [3, -1], "CoreML8", (3, 0)),
    ],
)
def test_reshape(shape: tuple[int, ...], asked: Any, opset: str, expected: tuple[int, ...] | None) -> None:
    x = numbers(shape)
    asked = np.array(asked, np.int32)
    if expected is None:
        with pytest.raises(ValueError, match="-1 has no size that fits"):
            run("reshape", x=x, shape=asked, opset=opset)
    else:
        same(run("reshape", x=x, shape=asked, opset=opset), np.array(list(x.flat), np.float32).reshape(expected))


def test_reshape_like_takes_parts_of_other_shapes() -> None:
    x = numbers((2, 3, 30))
    references = (np.zeros((2, 3, 4)), np.zeros((1, 5, 6)))
    result = run("reshape_like", x=x, ref_tensors=references, begins=(0, 1), ends=(2, 0), end_masks=(False, True))
    same(result, x.reshape(2, 3, 5, 6))
    last = run("reshape_like", x=x, ref_tensors=(np.zeros((7, 180)),), begins=(-1,), ends=(2,), end_masks=(False,))
    same(last, x.reshape(180))


@pytest.mark.parametrize("seed", range(6))
def test_reshape_like_of_random_parts(seed: int) -> None:
    """The sizes that are asked for lie somewhere in a reference each, some of them 1, one case without any value."""
    random = np.random.default_rng(seed)
    sizes = [int(size) for size in random.integers(1 if seed else 0, 4, 4)]
    cut = int(random.integers(1, 4))
    references, begins, ends = [], [], []
    for part in (sizes[:cut], sizes[cut:]):
        before, after = ([1 + int(r) for r in random.integers(0, 4, int(random.integers(0, 3)))] for _ in range(2))
        references.append(np.zeros((*before, *part, *after)))
        begins.append(len(before))
        ends.append(-len(after) if seed % 2 else len(before) + len(part))
    masks = [end == 0 for end in ends]  # as -0 is no place from the end
    x = numbers((int(np.prod(sizes)), 1), seed)
    parts = {"ref_tensors": references, "begins": begins, "ends": ends, "end_masks": masks}
    same(run("reshape_like", x=x, **{name: tuple(values) for name, values in parts.items()}), x.reshape(sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axes"), [((), [0]), ((3,), [0]), ((3,), [-1, 0]), ((2, 3), [1, 3]), ((2, 3), [-2])])
def test_expand_dims(shape: tuple[int, ...], axes: list[int], dtype: Any) -> None:
    x = numbers(shape, dtype=dtype)
    same(run("expand_dims", x=x, axes=axes), np.expand_dims(x, tuple(axes)))


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((1, 3, 1), None, (3,)),
        ((1,), None, ()),
        ((1, 3, 1), [0], (3, 1)),
        ((1, 3, 1), [-1], (1, 3)),
        ((2, 3, 4), [0, 1], (2, 3, 4)),
        ((2, 1, 4), [0, 1], (2, 4)),
    ],
)
def test_squeeze_leaves_axes_that_are_not_one(
    shape: tuple[int, ...], axes: list[int] | None, expected: tuple[int, ...]
) -> None:
    x = numbers(shape)
    same(run("squeeze", x=x, axes=axes), x.reshape(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_transpose(shape: tuple[int, ...], seed: int) -> None:
    x = numbers(shape, dtype=DTYPES[seed])
    order = np.random.default_rng(seed).permutation(len(shape))
    expected = np.transpose(x, order)
    same(run("transpose", x=x, perm=order), expected)
    same(run("transpose", x=x, perm=order - len(shape)), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_reverse(shape: tuple[int, ...]) -> None:
    x = numbers(shape)
    same(run("reverse", x=x), x[tuple([slice(None, None, -1)] * x.ndim)])
    same(run("reverse", x=x, axes=[-1]), x[..., ::-1])
    same(run("reverse", x=x, axes=[0, -1] if x.ndim > 1 else [0]), np.flip(x, tuple({0, x.ndim - 1})))


@pytest.mark.parametrize(
    ("shape", "along", "batch"),
    [((3, 5), 1, 0), ((5, 3), 0, 1), ((2, 4, 3), -1, 0), ((2, 4, 3), 1, -1), ((1, 1), 0, 1)],
)
def test_reverse_sequence(shape: tuple[int, ...], along: int, batch: int) -> None:
    x = numbers(shape)
    lengths = np.random.default_rng(1).integers(0, shape[along] + 1, shape[batch]).astype(np.int32)
    expected = x.copy()
    for place in np.ndindex(*shape):
        source, length = list(place), lengths[place[batch]]
        if place[along] < length:
            source[along] = length - 1 - place[along]
        expected[place] = x[tuple(source)]
    same(run("reverse_sequence", x=x, lengths=lengths, seq_axis=along, batch_axis=batch), expected)


@pytest.mark.parametrize(
    ("shape", "axis", "size", "stride"),
    [((7,), 0, 3, 2), ((7,), 0, 7, None), ((2, 6, 3), 1, 2, 5), ((2, 6, 3), -1, 1, 1), ((1, 4), -2, 1, None)],
)
def test_sliding_windows(shape: tuple[int, ...], axis: int, size: int, stride: int | None) -> None:
    x = numbers(shape)
    starts = range(0, shape[axis] - size + 1, stride or 1)
    windows = [np.take(x, range(start, start + size), axis) for start in starts]
    expected = np.stack(windows, axis % x.ndim)
    same(run("sliding_windows", x=x, axis=axis, size=size, stride=stride), expected)


def _blocks(n: int, c: int, h: int, w: int, block: int) -> Iterator[tuple[int, ...]]:
    return itertools.product(range(n), range(c), range(h), range(w), range(block), range(block))


@pytest.mark.parametrize(
    ("n", "c", "h", "w", "block"),
    [(1, 1, 1, 1, 2), (2, 3, 2, 1, 2), (1, 2, 3, 2, 3), (2, 1, 1, 4, 2), (1, 3, 2, 2, 4), (0, 2, 1, 3, 2)],
)
def test_depth_and_space(n: int, c: int, h: int, w: int, block: int) -> None:
    """The place in the block counts first in the channels of depth, last in those of a pixel shuffle."""
    small = numbers((n, c * block * block, h, w))
    large, shuffled = np.zeros((2, n, c, h * block, w * block), np.float32)
    for i, j, y, x, dy, dx in _blocks(n, c, h, w, block):
        large[i, j, y * block + dy, x * block + dx] = small[i, (dy * block + dx) * c + j, y, x]
        shuffled[i, j, y * block + dy, x * block + dx] = small[i, j * block * block + dy * block + dx, y, x]
    same(run("depth_to_space", x=small, block_size=block), large)
    same(run("space_to_depth", x=large, block_size=block), small)
    same(run("pixel_shuffle", x=small, upscale_factor=block), shuffled)
    same(run("pixel_unshuffle", x=shuffled, downscale_factor=block), small)


def test_space_to_batch_as_core_ml_shows_it() -> None:
    """The example that coremltools runs on Apple's runtime."""
    x = np.array([[[[1, 2, 3, 4], [5, 6, 7, 8]]], [[[9, 10, 11, 12], [13, 14, 15, 16]]]], np.float32)
    rows = [[0, 1, 3], [0, 9, 11], [0, 2, 4], [0, 10, 12], [0, 5, 7], [0, 13, 15], [0, 6, 8], [0, 14, 16]]
    batches = np.array(rows, np.float32).reshape(8, 1, 1, 3)
    same(run("space_to_batch", x=x, block_shape=[2, 2], paddings=[[0, 0], [2, 0]]), batches)
    same(run("batch_to_space", x=batches, block_shape=[2, 2], crops=[[0, 0], [2, 0]]), x)


@pytest.mark.parametrize(
    ("shape", "block", "edges"),
    [
        ((1, 1, 2, 2), (2, 2), (0, 0, 0, 0)),
        ((2, 3, 4, 3), (2, 3), (1, 1, 0, 3)),
        ((2, 1, 5, 1), (1, 2), (0, 0, 1, 0)),
        ((3, 2, 6, 4), (3, 1), (0, 0, 0, 0)),
        ((1, 4, 1, 1), (3, 3), (1, 1, 2, 0)),
    ],
)
def test_space_to_batch(shape: tuple[int, ...], block: tuple[int, int], edges: tuple[int, int, int, int]) -> None:
    x = numbers(shape)
    top, bottom, left, right = edges
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    parts = [
        padded[i : i + 1, :, dy :: block[0], dx :: block[1]]
        for dy in range(block[0])
        for dx in range(block[1])
        for i in range(len(x))
    ]
    batches = np.concatenate(parts)
    pairs = np.array(edges).reshape(2, 2)
    same(run("space_to_batch", x=x, block_shape=list(block), paddings=pairs), batches)
    same(run("batch_to_space", x=batches, block_shape=list(block), crops=pairs), x)


X = np.zeros((2, 3), np.float32)
IMAGE = np.zeros((1, 4, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("reshape", {"x": X, "shape": [0, 0, 1], "opset": "CoreML6"}, "before iOS 17 a 0 needs the same rank"),
        ("reverse_sequence", {"x": X, "lengths": [1, 1]}, "seq_axis and batch_axis both 0"),
        ("reverse_sequence", {"x": X, "lengths": [1, 4], "seq_axis": 1}, "with lengths .1, 4."),
    ],
)
def test_what_does_not_fit_is_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        run(operator, **inputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("reshape", {"x": X, "shape": [5]}, "reshape of .2, 3. to .5.: 6 values do not fit"),
        ("reshape", {"x": X, "shape": [-2, -3]}, "6 values do not fit"),
        ("reshape", {"x": X, "shape": [-1, -1]}, "more than one -1"),
        ("reshape", {"x": X, "shape": [-1, 4]}, "-1 has no size that fits"),
        (
            "reshape_like",
            {"x": X, "ref_tensors": (X,), "begins": (0,), "ends": (1,), "end_masks": (False,)},
            "do not fit",
        ),
        ("reshape_like", {"x": X, "ref_tensors": (X,), "begins": (), "ends": (), "end_masks": ()}, "different lengths"),
        ("expand_dims", {"x": X, "axes": [4]}, "expand_dims along axis 4 of a tensor of rank 3"),
        ("expand_dims", {"x": X, "axes": [0, -4]}, "one is named twice"),
        ("transpose", {"x": X, "perm": [0, 0]}, "transpose of a tensor of rank 2 with perm"),
        ("sliding_windows", {"x": X, "axis": 1, "size": 4}, "sliding_windows of 4 every 1 on an axis of 3"),
        ("space_to_depth", {"x": X, "block_size": 2}, "it needs images of rank 4"),
        ("space_to_depth", {"x": IMAGE, "block_size": 3}, "space_to_depth by 3 of sizes .2, 2."),
        ("depth_to_space", {"x": IMAGE, "block_size": 3}, "depth_to_space by 9"),
        ("batch_to_space", {"x": np.zeros((4, 1, 1, 1)), "block_shape": [2, 2], "crops": [[2, 1], [0, 0]]}, "crops"),
    ],
)
def test_sizes_that_contradict_each_other_cannot_be(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(operator, **inputs)


def test_nothing_is_changed_in_place() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    run("reverse_sequence", x=x, lengths=[2, 3], seq_axis=1)
    run("slice_update", x=x, update=np.zeros((1, 3)), begin=[0, 0], end=[1, 3])
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
