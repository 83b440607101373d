"""Convolutions of one to three spatial dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.half import half_conv, to_half
from edgebake_targets.mil.windows import flat, padding

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """What both convolutions declare; ``extents`` are the kernel's sizes with its dilation."""

    strides: list[int]
    dilations: list[int]
    groups: int
    extents: list[int]


def _geometry(call: Call) -> _Geometry:
    kernel = call["weight"].shape[2:]
    if not 1 <= len(kernel) <= len(_CONV) or call["x"].ndim != len(kernel) + 2:
        raise ValueError(f"{call.operator} of rank {call['x'].ndim} by a kernel of rank {len(kernel) + 2}")
    ones = [1] * len(kernel)
    dilations = call.integers("dilations", ones)
    return _Geometry(
        strides=call.integers("strides", ones),
        dilations=dilations,
        groups=call.integer("groups", 1),
        extents=[(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)],
    )


def _conv(call: Call) -> Tensor:
    return _convolved(call, call["weight"], call.get("bias"))


def _convolved(call: Call, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, geometry = call["x"], _geometry(call)
    amounts = padding(call, x.shape[2:], geometry.extents, geometry.strides)
    inside = 0 if call.half_sums or any(a != b or a < 0 for a, b in amounts) else [a for a, _ in amounts]
    if inside == 0:
        x = functional.pad(x, flat(amounts))
    if call.half_sums:
        options = {"strides": geometry.strides, "dilations": geometry.dilations, "groups": geometry.groups}
        return _add_half(half_conv(x, weight, **options), bias)  # type: ignore[arg-type]
    function = _CONV[weight.ndim - 3]
    return function(x, weight, bias, geometry.strides, inside, geometry.dilations, geometry.groups)


def _conv_transpose(call: Call) -> Tensor:
    """The whole scatter first, then a cut of the declared size: behind it there may be more, or too little (zeros)."""
    x, weight, bias, geometry = call["x"], call["weight"], call.get("bias"), _geometry(call)
    if call.half_sums:
        full = _half_transposed(x, weight, geometry)
    else:
        function = _TRANSPOSED[weight.ndim - 3]
        full = function(x, weight, None, geometry.strides, 0, 0, geometry.groups, geometry.dilations)
    cut: list[tuple[int, int]] = []
    for axis, (begin, size) in enumerate(_cut(call, geometry, full.shape[2:])):
        cut.append((-begin, begin + size - full.shape[axis + 2]))
    full = functional.pad(full, flat(cut)) if any(pair != (0, 0) for pair in cut) else full
    if call.half_sums:
        return _add_half(full, bias)
    return full if bias is None else full + _column(bias, full)


def _cut(call: Call, geometry: _Geometry, full: tuple[int, ...]) -> list[tuple[int, int]]:
    """(begin, size) per dimension of what is kept of the whole scatter."""
    kind, spatial = call.text("pad_type", "valid"), call["x"].shape[2:]
    declared = call.integers("output_shape", [])[2:]
    if kind == "same":
        sizes = declared or [n * stride for n, stride in zip(spatial, geometry.strides, strict=True)]
        return [(max(0, whole - size) // 2, size) for whole, size in zip(full, sizes, strict=True)]
    if kind not in {"valid", "custom"}:
        raise Unsupported(f"conv_transpose with the pad_type {kind}")
    pad = call.integers("pad", [0] * 2 * len(spatial)) if kind == "custom" else [0] * 2 * len(spatial)
    sizes = declared or [whole - a - b for whole, a, b in zip(full, pad[::2], pad[1::2], strict=True)]
    return list(zip(pad[::2], sizes, strict=True))


def _half_transposed(x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """The scatter as a convolution of the spread input by the mirrored kernel: adding zeros rounds nothing."""
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], geometry.strides, strict=True)))
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in geometry.strides))] = x
    spread = functional.pad(spread, flat([(extent - 1, extent - 1) for extent in geometry.extents]))
    mirrored = weight.flip(list(range(2, weight.ndim)))
    filters = mirrored.reshape(geometry.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    ones = [1] * len(geometry.strides)
    return half_conv(spread, filters, strides=ones, dilations=geometry.dilations, groups=geometry.groups)


def _add_half(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else to_half(x + to_half(_column(bias, x)))


def _column(bias: Tensor, x: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * (x.ndim - 2))


def _conv_quantized(call: Call) -> Tensor:
    """A convolution by ``weight * quant_scale + quant_bias``, one of each for all or one per output channel.

    coremltools' documentation of the operator says no more. It has no parameter for the table of ``lut``, and takes a
    ``bias`` of uint8 without a word on its scale.
    """
    kind, bits = call.text("quantization_type"), call.integer("nbits", 8)
    if kind != "linear":
        raise Unsupported(f"conv_quantized with the quantization_type {kind}: it has no input for a table of values")
    if call.get("bias") is not None:
        raise Unsupported("conv_quantized with a bias of uint8, of which nothing says what it stands for")
    if not 1 <= bits <= 8:
        raise ValueError(f"conv_quantized with nbits {bits}, not 1 to 8")
    stored = call["weight"]
    scale, offset = (_per_channel(call, name, stored) for name in ("quant_scale", "quant_bias"))
    weight = stored.float() * scale + offset
    return _convolved(call, to_half(weight) if call.half_sums else weight, None)


def _per_channel(call: Call, name: str, weight: Tensor) -> Tensor:
    """The parameter ``name``, broadcast over ``weight``."""
    value = call[name].float().reshape(-1)
    if value.numel() not in (1, weight.shape[0]):
        raise ValueError(f"conv_quantized with {value.numel()} values of {name} for {weight.shape[0]} output channels")
    return value.reshape(-1, *[1] * (weight.ndim - 1))


OPERATORS: Mapping[str, Operator] = {
    "conv": _conv,
    "conv_quantized": _conv_quantized,
    "conv_transpose": _conv_transpose,
}
