"""rnn, gru and lstm over (steps, batch, features).

What the operators' own text leaves open is taken from what they are tested to do on Macs: with the direction
``reverse`` the outputs stay in the order in which they were computed, the backward half of ``bidirectional`` is put
back into the order of the input; ``clip`` limits the cell state; ``scaled_tanh`` is tanh, ``hard_sigmoid`` 0.2x + 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.half import half_matmul, to_half

_Function = Callable[[Tensor], Tensor]


def _hard_sigmoid(x: Tensor) -> Tensor:
    return torch.clamp(0.2 * x + 0.5, 0, 1)


def _linear(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: Mapping[str, _Function] = {
    "hard_sigmoid": _hard_sigmoid,
    "linear": _linear,
    "relu": torch.relu,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sigmoid_hard": _hard_sigmoid,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class _Arithmetic:
    """How this call multiplies matrices and rounds every value in between."""

    multiply: Callable[[Tensor, Tensor], Tensor]
    rounded: _Function

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ weightᵀ + bias``."""
        product = self.multiply(x, weight.transpose(0, 1))
        return product if bias is None else self.rounded(product + bias)

    def peeped(self, gate: Tensor, state: Tensor, weight: Tensor | None) -> Tensor:
        """``gate + state * weight``, element by element."""
        return gate if weight is None else self.rounded(gate + self.rounded(state * weight))


def _arithmetic(call: Call) -> _Arithmetic:
    if call.half_sums:
        return _Arithmetic(multiply=half_matmul, rounded=to_half)
    return _Arithmetic(multiply=torch.matmul, rounded=_linear)


def _activation(call: Call, parameter: str, default: str) -> _Function:
    name = call.text(parameter, default).lower()
    if name not in _ACTIVATIONS:
        raise Unsupported(f"{call.operator} with the {parameter} {name}; known are {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def _steps(call: Call) -> Tensor:
    """The input in the order in which it is read."""
    x, direction = call["x"], call.text("direction", "forward")
    if direction not in {"forward", "reverse"}:
        raise Unsupported(f"{call.operator} with the direction {direction}")
    return x.flip(0) if direction == "reverse" else x


def _sequence(call: Call, outputs: list[Tensor]) -> Tensor:
    return torch.stack(outputs) if call.flag("output_sequence", False) else outputs[-1].unsqueeze(0)


def _rnn(call: Call) -> tuple[Tensor, Tensor]:
    by, activation = _arithmetic(call), _activation(call, "activation", "tanh")
    h, outputs = call["initial_h"], []
    for x in by.affine(_steps(call), call["weight_ih"], call.get("bias")):
        h = by.rounded(activation(by.rounded(x + by.affine(h, call["weight_hh"]))))
        outputs.append(h)
    return _sequence(call, outputs), h


def _gru(call: Call) -> tuple[Tensor, Tensor]:
    """Gates in the order reset, output, update.

    The reset gate multiplies the hidden state, or with ``reset_after`` its product with the weights and ``bias``.
    """
    by, size = _arithmetic(call), call["weight_hh"].shape[1]
    recurrent, activation = (
        _activation(call, "recurrent_activation", "sigmoid"),
        _activation(call, "activation", "tanh"),
    )
    weight, bias, after = call["weight_hh"], call.get("bias"), call.flag("reset_after", False)
    bias = torch.zeros(3 * size) if bias is None else bias
    h, outputs = call["initial_h"], []
    for x in by.affine(_steps(call), call["weight_ih"], call.get("input_bias")):
        gates = by.affine(h, weight, bias)
        reset, _, update = by.rounded(recurrent(by.rounded(x + gates))).chunk(3, -1)
        rows = slice(size, 2 * size)
        inner = (
            by.rounded(reset * gates[:, rows]) if after else by.affine(by.rounded(reset * h), weight[rows], bias[rows])
        )
        output = by.rounded(activation(by.rounded(x[:, rows] + inner)))
        h = by.rounded(by.rounded((1 - update) * output) + by.rounded(update * h))
        outputs.append(h)
    return _sequence(call, outputs), h


def _lstm(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x, h, c = call["x"], call["initial_h"], call["initial_c"]
    if call.text("direction", "forward") != "bidirectional":
        outputs, h, c = _lstm_one_way(call, _steps(call), h, c, "")
        return _sequence(call, outputs), h, c
    if call.get("weight_ih_back") is None or call.get("weight_hh_back") is None:
        raise Unsupported("lstm with the direction bidirectional and no weights for the way back")
    halves = zip(h.chunk(2, -1), c.chunk(2, -1), strict=True)
    (forward, h_forward, c_forward), (back, h_back, c_back) = (
        _lstm_one_way(call, steps, *state, suffix)
        for steps, state, suffix in zip((x, x.flip(0)), halves, ("", "_back"), strict=True)
    )
    if call.flag("output_sequence", False):
        back = back[::-1]
    both = [torch.cat(pair, -1) for pair in zip(forward, back, strict=True)]
    return _sequence(call, both), torch.cat([h_forward, h_back], -1), torch.cat([c_forward, c_back], -1)


def _lstm_one_way(call: Call, steps: Tensor, h: Tensor, c: Tensor, suffix: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gates in the order input, forget, output, cell; the peephole of the output gate sees the new cell state."""
    by, recurrent = _arithmetic(call), _activation(call, "recurrent_activation", "sigmoid")
    cell, activation = _activation(call, "cell_activation", "tanh"), _activation(call, "activation", "tanh")
    weight, peephole = call[f"weight_hh{suffix}"], call.get(f"peephole{suffix}")
    p_input, p_forget, p_output = (None,) * 3 if peephole is None else peephole.chunk(3)
    limit = call.number("clip") if call.get("clip") is not None else None
    outputs = []
    for x in by.affine(steps, call[f"weight_ih{suffix}"], call.get(f"bias{suffix}")):
        i, f, o, z = by.rounded(x + by.affine(h, weight)).chunk(4, -1)
        i = by.rounded(recurrent(by.peeped(i, c, p_input)))
        f = by.rounded(recurrent(by.peeped(f, c, p_forget)))
        c = by.rounded(by.rounded(f * c) + by.rounded(i * by.rounded(cell(z))))
        c = c if limit is None else c.clamp(-limit, limit)
        o = by.rounded(recurrent(by.peeped(o, c, p_output)))
        h = by.rounded(o * by.rounded(activation(c)))
        outputs.append(h)
    return outputs, h, c


OPERATORS: Mapping[str, Operator] = {"gru": _gru, "lstm": _lstm, "rnn": _rnn}
