"""Sliding windows over spatial dimensions: what convolution and pooling share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edgebake_targets.mil.call import Call, Unsupported

Amounts = list[tuple[int, int]]  # (before, after) of every spatial dimension


def windows(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Every window of an ``(n, c, *spatial)`` tensor as a view ``(n, c, *outputs, *kernel)``."""
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x


def padding(call: Call, spatial: Sequence[int], extents: Sequence[int], strides: Sequence[int]) -> Amounts:
    """How far each dimension is padded for a window of these extents (dilation included).

    ``same`` makes the output ceil(size / stride) long; an odd rest goes behind, with ``same_lower`` in front.
    """
    kind = call.text("pad_type", "valid").lower()
    if kind == "valid":
        return [(0, 0)] * len(spatial)
    if kind == "custom":
        pad = call.integers("pad", [0] * 2 * len(spatial))
        return list(zip(pad[::2], pad[1::2], strict=True))
    if kind not in {"same", "same_lower"} or (kind == "same_lower" and not call.since(6)):
        raise Unsupported(f"{call.operator} with the pad_type {kind} in op set {call.opset}")
    missing = [
        max(0, -(-size // stride) * stride - size + extent - stride)
        for size, extent, stride in zip(spatial, extents, strides, strict=True)
    ]
    if kind == "same":
        return [(total // 2, total - total // 2) for total in missing]
    return [(total - total // 2, total // 2) for total in missing]


def flat(amounts: Amounts) -> list[int]:
    """The amounts as ``torch.nn.functional.pad`` wants them: last dimension first."""
    return [n for pair in reversed(amounts) for n in pair]
