"""Activations: functions of one element, and softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.half import half_sum, to_half


def _plain(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call["x"])


def _clamped_relu(call: Call) -> Tensor:
    x, alpha, beta = call["x"], call["alpha"], call["beta"]
    return torch.minimum(torch.where(x >= 0, x, alpha * x), beta)


def _elu(call: Call) -> Tensor:
    x = call["x"]
    return torch.where(x > 0, x, call["alpha"] * torch.expm1(x))


def _gelu(call: Call) -> Tensor:
    x, mode = call["x"], call.text("mode", "EXACT")
    if mode == "EXACT":
        return functional.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return functional.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise Unsupported(f"gelu with the mode {mode}")


def _leaky_relu(call: Call) -> Tensor:
    x = call["x"]
    return torch.where(x >= 0, x, call["alpha"] * x)


def _linear_activation(call: Call) -> Tensor:
    return call["alpha"] * call["x"] + call["beta"]


def _prelu(call: Call) -> Tensor:
    x = call["x"]
    return torch.where(x > 0, x, _per_channel(call, "alpha") * x)


def _scaled_tanh(call: Call) -> Tensor:
    return call["alpha"] * torch.tanh(call["beta"] * call["x"])


def _sigmoid_hard(call: Call) -> Tensor:
    return torch.clamp(call["alpha"] * call["x"] + call["beta"], 0, 1)


def _softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + torch.relu(x)


def _softplus_parametric(call: Call) -> Tensor:
    return _per_channel(call, "alpha") * _softplus(_per_channel(call, "beta") * call["x"])


def _softmax(call: Call) -> Tensor:
    x, axis = call["x"], call.integer("axis", -1)
    return half_softmax(x, axis) if call.half_sums else torch.softmax(x, axis)


def half_softmax(x: Tensor, axis: int) -> Tensor:
    """Softmax with every step rounded to float16; the largest element is subtracted first."""
    powers = to_half(torch.exp(to_half(x - x.amax(axis, keepdim=True))))
    return to_half(powers / half_sum(powers, [axis], keepdim=True))


def _thresholded_relu(call: Call) -> Tensor:
    x = call["x"]
    return torch.where(x >= call["alpha"], x, torch.zeros_like(x))


def _per_channel(call: Call, name: str) -> Tensor:
    """A vector over the second dimension, shaped so that it broadcasts against x."""
    return call[name].reshape(-1, *[1] * (call["x"].ndim - 2))


OPERATORS: Mapping[str, Operator] = {
    "clamped_relu": _clamped_relu,
    "elu": _elu,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "linear_activation": _linear_activation,
    "prelu": _prelu,
    "relu": _plain(torch.relu),
    "relu6": _plain(functional.relu6),
    "scaled_tanh": _scaled_tanh,
    "sigmoid": _plain(torch.sigmoid),
    "sigmoid_hard": _sigmoid_hard,
    "silu": _plain(functional.silu),
    "softmax": _softmax,
    "softplus": _plain(_softplus),
    "softplus_parametric": _softplus_parametric,
    "softsign": _plain(functional.softsign),
    "thresholded_relu": _thresholded_relu,
}
