"""Blocks of pixels moved into channels or batches and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from edgebake_targets.mil.call import Call, Operator


def _images(call: Call) -> torch.Tensor:
    x = call["x"]
    if x.ndim != 4:
        raise ValueError(f"{call.operator} of a tensor of rank {x.ndim}; it needs images of rank 4")
    return x


def _divides(call: Call, block: int, *sizes: int) -> None:
    if block < 1 or any(size % block for size in sizes):
        raise ValueError(f"{call.operator} by {block} of sizes {list(sizes)}, which it does not divide")


def space_to_depth(call: Call) -> torch.Tensor:
    """Channels of the result: place in the block first, channel of ``x`` second (TensorFlow's order)."""
    x, block = _images(call), call.integer("block_size")
    n, c, h, w = x.shape
    _divides(call, block, h, w)
    parts = x.reshape(n, c, h // block, block, w // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)


def depth_to_space(call: Call) -> torch.Tensor:
    """The inverse of ``space_to_depth``."""
    x, block = _images(call), call.integer("block_size")
    n, c, h, w = x.shape
    _divides(call, block * block, c)
    parts = x.reshape(n, block, block, c // (block * block), h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (block * block), h * block, w * block)


def pixel_shuffle(call: Call) -> torch.Tensor:
    """Channel of the result first, place in the block second (torch's order)."""
    x, factor = _images(call), call.integer("upscale_factor")
    _divides(call, factor * factor, x.shape[1])
    return F.pixel_shuffle(x, factor)


def pixel_unshuffle(call: Call) -> torch.Tensor:
    """The inverse of ``pixel_shuffle``. torch's own gives another shape where there are no values (2.13)."""
    x, factor = _images(call), call.integer("downscale_factor")
    _divides(call, factor, *x.shape[2:])
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // factor, factor, w // factor, factor).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(n, c * factor * factor, h // factor, w // factor)


def space_to_batch(call: Call) -> torch.Tensor:
    """Batches of the result: place in the block first, batch of ``x`` second."""
    x, (rows, columns) = _images(call), call.integers("block_shape")
    top, bottom, left, right = call.integers("paddings")
    x = F.pad(x, (left, right, top, bottom))
    n, c, h, w = x.shape
    _divides(call, rows, h)
    _divides(call, columns, w)
    parts = x.reshape(n, c, h // rows, rows, w // columns, columns)
    return parts.permute(3, 5, 0, 1, 2, 4).reshape(rows * columns * n, c, h // rows, w // columns)


def batch_to_space(call: Call) -> torch.Tensor:
    """The inverse of ``space_to_batch``."""
    x, (rows, columns) = _images(call), call.integers("block_shape")
    top, bottom, left, right = call.integers("crops")
    n, c, h, w = x.shape
    _divides(call, rows * columns, n)
    parts = x.reshape(rows, columns, n // (rows * columns), c, h, w)
    whole = parts.permute(2, 3, 4, 0, 5, 1).reshape(n // (rows * columns), c, h * rows, w * columns)
    if min(top, bottom, left, right) < 0 or top + bottom > h * rows or left + right > w * columns:
        raise ValueError(f"batch_to_space crops {[top, bottom, left, right]} from {[h * rows, w * columns]}")
    return whole[:, :, top : h * rows - bottom, left : w * columns - right]


OPERATORS: Mapping[str, Operator] = {
    "batch_to_space": batch_to_space,
    "depth_to_space": depth_to_space,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
}
