"""Convolutions against sums over every input element, written as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

WORST = {"outputs": ("float16",), "rounding": Mode.FP16_WORST}


def _random(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _convolve(
    x: Array,
    weight: Array,
    bias: Array | None,
    strides: list[int],
    dilations: list[int],
    groups: int,
    pads: Any,
    sizes: list[int],
) -> Array:
    """Every output element on its own; what lies outside is zero."""
    expected = np.zeros((x.shape[0], weight.shape[0], *sizes))
    inner, outer = weight.shape[1], weight.shape[0] // groups
    for n, out, *at in np.ndindex(expected.shape):
        total = 0.0 if bias is None else float(bias[out])
        for channel, *offset in np.ndindex(weight.shape[1:]):
            place = [p * s + k * d - a for p, s, k, d, (a, _) in zip(at, strides, offset, dilations, pads, strict=True)]
            if all(0 <= p < size for p, size in zip(place, x.shape[2:], strict=True)):
                total += float(x[(n, out // outer * inner + channel, *place)]) * float(weight[(out, channel, *offset)])
        expected[(n, out, *at)] = total
    return expected


def _scatter(
    x: Array,
    weight: Array,
    bias: Array | None,
    strides: list[int],
    dilations: list[int],
    groups: int,
    begin: list[int],
    sizes: list[int],
) -> Array:
    """Every input element adds its kernel to the outputs it reaches."""
    expected = np.zeros((x.shape[0], weight.shape[1] * groups, *sizes))
    if bias is not None:
        expected += bias.reshape(-1, *[1] * len(sizes))
    inner = x.shape[1] // groups
    for n, channel, *at in np.ndindex(x.shape):
        for out, *offset in np.ndindex(weight.shape[1:]):
            place = [p * s + k * d - b for p, s, k, d, b in zip(at, strides, offset, dilations, begin, strict=True)]
            if all(0 <= p < size for p, size in zip(place, sizes, strict=True)):
                into = (n, channel // inner * weight.shape[1] + out, *place)
                expected[into] += float(x[(n, channel, *at)]) * float(weight[(channel, out, *offset)])
    return expected


CUSTOM = pytest.mark.parametrize(
    ("x_shape", "kernel", "outputs", "groups", "strides", "dilations", "pad"),
    [
        ((2, 3, 8), (3,), 4, 1, [1], [1], [0, 0]),
        ((1, 4, 7), (2,), 6, 2, [3], [2], [2, 1]),
        ((1, 1, 1), (1,), 1, 1, [1], [1], [0, 0]),
        ((2, 4, 6, 5), (3, 2), 6, 2, [2, 1], [1, 2], [1, 0, 2, 1]),
        ((1, 3, 5, 7), (1, 1), 3, 3, [3, 4], [1, 1], [0, 0, 0, 0]),
        ((1, 2, 4, 4), (3, 3), 2, 1, [1, 1], [1, 1], [1, 1, 1, 1]),
        ((1, 2, 3, 4, 5), (2, 1, 3), 4, 2, [1, 2, 2], [1, 1, 2], [1, 0, 0, 0, 1, 2]),
    ],
)


@CUSTOM
@pytest.mark.parametrize("with_bias", [True, False])
def test_conv_with_custom_padding(
    x_shape: tuple[int, ...],
    kernel: tuple[int, ...],
    outputs: int,
    groups: int,
    strides: list[int],
    dilations: list[int],
    pad: list[int],
    with_bias: bool,
) -> None:
    x, weight = _random(x_shape), _random((outputs, x_shape[1] // groups, *kernel), 1)
    bias = _random((outputs,), 2) if with_bias else None
    pads = list(zip(pad[::2], pad[1::2], strict=True))
    sizes = [
        (n + sum(p) - (k - 1) * d - 1) // s + 1
        for n, p, k, d, s in zip(x_shape[2:], pads, kernel, dilations, strides, strict=True)
    ]
    expected = _convolve(x, weight, bias, strides, dilations, groups, pads, sizes)
    inputs = {"x": x, "weight": weight, "bias": bias, "strides": strides, "dilations": dilations, "groups": groups}
    assert_close(run("conv", **inputs, pad_type="custom", pad=pad), expected)
    assert_close(run("conv", **inputs, pad_type="custom", pad=pad, **WORST), expected, 0.01)


@pytest.mark.parametrize("kind", ["same", "same_lower"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation"), [(7, 2, 1, 1), (7, 3, 2, 1), (8, 4, 3, 1), (5, 2, 3, 2), (4, 1, 2, 1)]
)
def test_same_padding_makes_outputs_of_size_over_stride(
    kind: str, size: int, kernel: int, stride: int, dilation: int
) -> None:
    x, weight = _random((1, 2, size, size)), _random((3, 2, kernel, kernel), 1)
    outputs = -(-size // stride)
    total = max(0, (outputs - 1) * stride + (kernel - 1) * dilation + 1 - size)
    short, long = total // 2, total - total // 2
    pads = [(short, long) if kind == "same" else (long, short)] * 2
    both: dict[str, Any] = {"strides": [stride] * 2, "dilations": [dilation] * 2, "groups": 1}
    expected = _convolve(x, weight, None, **both, pads=pads, sizes=[outputs] * 2)
    assert_close(run("conv", x=x, weight=weight, pad_type=kind, **both), expected)


def test_conv_with_everything_left_out_is_valid_and_ignores_pad() -> None:
    x, weight = _random((1, 2, 5)), _random((3, 2, 2), 1)
    expected = _convolve(x, weight, None, [1], [1], 1, [(0, 0)], [4])
    assert_close(run("conv", x=x, weight=weight), expected)
    assert_close(run("conv", x=x, weight=weight, pad_type="valid", pad=[3, 3]), expected)


def test_an_empty_batch_stays_empty() -> None:
    assert run("conv", x=np.zeros((0, 2, 5, 5)), weight=np.ones((3, 2, 2, 2))).shape == (0, 3, 4, 4)


def test_conv_refusals() -> None:
    x, weight = np.ones((1, 1, 4)), np.ones((1, 1, 2))
    with pytest.raises(Unsupported, match="conv with the pad_type same_lower in op set CoreML5"):
        run("conv", x=x, weight=weight, pad_type="same_lower", opset="CoreML5")
    with pytest.raises(Unsupported, match="conv with the pad_type reflect"):
        run("conv", x=x, weight=weight, pad_type="reflect")
    with pytest.raises(ValueError, match="conv of rank 3 by a kernel of rank 4"):
        run("conv", x=x, weight=np.ones((1, 1, 2, 2)))


@pytest.mark.parametrize(
    ("x_shape", "kernel", "outputs", "groups", "bits", "per_channel"),
    [
        ((1, 2, 9), (3,), 4, 1, 8, True),
        ((2, 4, 6, 5), (3, 2), 6, 2, 8, True),
        ((1, 3, 5, 5), (1, 1), 2, 1, 4, False),
        ((1, 4, 4, 4), (2, 2), 4, 4, 1, True),
        ((1, 2, 3, 4, 3), (2, 2, 2), 3, 1, 6, True),
        ((1, 1, 1), (1,), 1, 1, 2, False),
    ],
)
def test_conv_quantized(
    x_shape: tuple[int, ...], kernel: tuple[int, ...], outputs: int, groups: int, bits: int, per_channel: bool
) -> None:
    """Each element of the kernel is its integer times the scale, plus the offset, of its output channel."""
    random = np.random.default_rng(bits)
    stored = random.integers(0, 2**bits, (outputs, x_shape[1] // groups, *kernel), dtype=np.uint8)
    scale, offset = random.uniform(0.1, 2, outputs), random.uniform(-1, 1, outputs)
    if not per_channel:
        scale[:], offset[:] = scale[0], offset[0]
    weight = np.stack([stored[i] * scale[i] + offset[i] for i in range(outputs)])
    sizes = [size - extent + 1 for size, extent in zip(x_shape[2:], kernel, strict=True)]
    ones = [1] * len(kernel)
    expected = _convolve(_random(x_shape), weight, None, ones, ones, groups, [(0, 0)] * len(kernel), sizes)
    given = (scale, offset) if per_channel else (float(scale[0]), [float(offset[0])])
    found = run(
        "conv_quantized",
        x=_random(x_shape),
        weight=stored,
        quantization_type="linear",
        nbits=bits,
        quant_scale=given[0],
        quant_bias=given[1],
        groups=groups,
    )
    assert_close(found, expected)


def test_conv_quantized_in_half_sums_rounds_the_kernel_too() -> None:
    weight = np.array([[[255]]], np.uint8)
    given = {"quantization_type": "linear", "quant_scale": 1 / 255, "quant_bias": 1e-4}
    x = np.full((1, 1, 1), 1000.0)
    found = run("conv_quantized", x=x, weight=weight, **given, **WORST)
    assert float(found) == 1000.0  # 1.0001 is 1 in float16
    assert float(run("conv_quantized", x=x, weight=weight, **given)) == pytest.approx(1000.1)


def test_conv_quantized_refusals() -> None:
    x, weight = np.ones((1, 1, 4)), np.ones((2, 1, 2), np.uint8)
    given = {"x": x, "weight": weight, "quant_scale": 1.0, "quant_bias": 0.0}
    with pytest.raises(Unsupported, match="quantization_type lut: it has no input for a table of values"):
        run("conv_quantized", **given, quantization_type="lut")
    with pytest.raises(Unsupported, match="a bias of uint8, of which nothing says what it stands for"):
        run("conv_quantized", **given, quantization_type="linear", bias=np.ones(2, np.uint8))
    with pytest.raises(ValueError, match="nbits 9, not 1 to 8"):
        run("conv_quantized", **given, quantization_type="linear", nbits=9)
    with pytest.raises(ValueError, match="3 values of quant_scale for 2 output channels"):
        run("conv_quantized", **{**given, "quant_scale": np.ones(3)}, quantization_type="linear")


@CUSTOM
@pytest.mark.parametrize("kind", ["custom", "valid", "same"])
def test_conv_transpose(
    x_shape: tuple[int, ...],
    kernel: tuple[int, ...],
    outputs: int,
    groups: int,
    strides: list[int],
    dilations: list[int],
    pad: list[int],
    kind: str,
) -> None:
    x, weight, bias = _random(x_shape), _random((x_shape[1], outputs // groups, *kernel), 1), _random((outputs,), 2)
    whole = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x_shape[2:], strides, kernel, dilations, strict=True)]
    if kind == "same":
        sizes = [n * s for n, s in zip(x_shape[2:], strides, strict=True)]
        begin = [max(0, w - size) // 2 for w, size in zip(whole, sizes, strict=True)]
    else:
        used = pad if kind == "custom" else [0] * len(pad)
        begin, sizes = used[::2], [w - a - b for w, a, b in zip(whole, used[::2], used[1::2], strict=True)]
    expected = _scatter(x, weight, bias, strides, dilations, groups, begin, sizes)
    inputs = {"x": x, "weight": weight, "bias": bias, "strides": strides, "dilations": dilations, "groups": groups}
    assert_close(run("conv_transpose", **inputs, pad_type=kind, pad=pad), expected)
    assert_close(run("conv_transpose", **inputs, pad_type=kind, pad=pad, **WORST), expected, 0.01)


@pytest.mark.parametrize(
    ("kind", "pad", "sizes"),
    [("valid", [0, 0, 0, 0], [12, 9]), ("same", [0, 0, 0, 0], [9, 7]), ("custom", [1, 0, 0, 2], [9, 8])],
)
def test_a_declared_output_shape_decides(kind: str, pad: list[int], sizes: list[int]) -> None:
    """Longer than the scatter: the rest holds the bias alone. Shorter: it is cut behind."""
    x, weight, bias = _random((2, 3, 4, 3)), _random((3, 2, 3, 3), 1), _random((2,), 2)
    strides = [3, 3]
    whole = [(n - 1) * 3 + 3 for n in (4, 3)]
    begin = [max(0, w - s) // 2 for w, s in zip(whole, sizes, strict=True)] if kind == "same" else pad[::2]
    expected = _scatter(x, weight, bias, strides, [1, 1], 1, begin, sizes)
    inputs = {"x": x, "weight": weight, "bias": bias, "strides": strides, "output_shape": [2, 2, *sizes]}
    assert_close(run("conv_transpose", **inputs, pad_type=kind, pad=pad), expected)
    assert_close(run("conv_transpose", **inputs, pad_type=kind, pad=pad, **WORST), expected, 0.01)


def test_conv_transpose_refuses_same_lower() -> None:
    with pytest.raises(Unsupported, match="conv_transpose with the pad_type same_lower"):
        run("conv_transpose", x=np.ones((1, 1, 2)), weight=np.ones((1, 1, 2)), pad_type="same_lower")
