"""Recurrent operators against torch's layers where these know the options, else against one step at a time in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

SIZES = [(1, 1, 1, 1), (3, 1, 2, 4), (1, 2, 3, 2), (5, 3, 1, 3), (8, 2, 6, 5)]  # steps, batch, inputs, hidden


def _random(*shape: int, seed: int = 0) -> Array:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.5
    return values.astype(np.float16).astype(np.float32)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


FUNCTIONS: dict[str, Any] = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": _sigmoid,
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "linear": lambda x: x,
}


def _check(operator: str, expected: tuple[Array, ...], outputs: Array, **inputs: Any) -> None:
    for whole in (True, False):
        sequence = outputs if whole else outputs[-1:]
        for result, wanted in zip(run(operator, **inputs, output_sequence=whole), (sequence, *expected), strict=True):
            assert_close(result, wanted, 3e-5)
    worst = run(operator, **inputs, output_sequence=True, outputs=("float16",) * 3, rounding=Mode.FP16_WORST)
    assert_close(worst[0], outputs, 0.02)


def _ordered(layer: Any, name: str, order: Any) -> torch.Tensor:
    """A parameter of torch's layer with its gates in another order, detached."""
    parts = getattr(layer, name).detach().chunk(len(order))
    return torch.cat([parts[i] for i in order])


@pytest.mark.parametrize(("steps", "batch", "width", "hidden"), SIZES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False])
def test_rnn_is_torchs(steps: int, batch: int, width: int, hidden: int, direction: str, bias: bool) -> None:
    """Read backwards, outputs stay in the order of reading."""
    torch.manual_seed(steps)
    layer: Any = torch.nn.RNN(width, hidden, bias=bias)
    x, h = torch.tensor(_random(steps, batch, width)), torch.tensor(_random(batch, hidden, seed=1))
    with torch.no_grad():
        outputs, last = layer(x.flip(0) if direction == "reverse" else x, h[None])
    inputs = {"weight_ih": layer.weight_ih_l0.detach(), "weight_hh": layer.weight_hh_l0.detach()}
    if bias:
        inputs["bias"] = (layer.bias_ih_l0 + layer.bias_hh_l0).detach()
    _check("rnn", (last[0].numpy(),), outputs.numpy(), x=x, initial_h=h, direction=direction, **inputs)


@pytest.mark.parametrize("name", [*FUNCTIONS, "sigmoid_hard"])
def test_rnn_activations(name: str) -> None:
    x, h, weight_ih, weight_hh = (_random(*s, seed=i) for i, s in enumerate([(3, 2, 3), (2, 4), (4, 3), (4, 4)]))
    function, state, outputs = FUNCTIONS["hard_sigmoid" if name == "sigmoid_hard" else name], h.astype(np.float64), []
    for step in x:
        state = function(step @ weight_ih.T + state @ weight_hh.T)
        outputs.append(state)
    inputs = {"x": x, "initial_h": h, "weight_ih": weight_ih, "weight_hh": weight_hh, "activation": name}
    _check("rnn", (state,), np.stack(outputs), **inputs)


@pytest.mark.parametrize(("steps", "batch", "width", "hidden"), SIZES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gru_with_reset_after_is_torchs(steps: int, batch: int, width: int, hidden: int, direction: str) -> None:
    """Torch has its gates in the order reset, update, new."""
    torch.manual_seed(steps)
    layer = torch.nn.GRU(width, hidden)
    x, h = torch.tensor(_random(steps, batch, width)), torch.tensor(_random(batch, hidden, seed=1))
    with torch.no_grad():
        outputs, last = layer(x.flip(0) if direction == "reverse" else x, h[None])
    names = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0", "input_bias": "bias_ih_l0", "bias": "bias_hh_l0"}
    inputs: dict[str, Any] = {name: _ordered(layer, own, (0, 2, 1)) for name, own in names.items()}
    inputs |= {"reset_after": True, "direction": direction}
    _check("gru", (last[0].numpy(),), outputs.numpy(), x=x, initial_h=h, **inputs)


@pytest.mark.parametrize(("steps", "batch", "width", "hidden"), SIZES)
@pytest.mark.parametrize("given", [(), ("bias",), ("bias", "input_bias")])
@pytest.mark.parametrize("functions", [("sigmoid", "tanh"), ("tanh", "sigmoid"), ("hard_sigmoid", "relu")])
def test_gru_resets_the_state_before_the_product(
    steps: int, batch: int, width: int, hidden: int, given: tuple[str, ...], functions: tuple[str, str]
) -> None:
    x, h, weight_ih, weight_hh = (
        _random(*shape, seed=seed)
        for seed, shape in enumerate(
            [(steps, batch, width), (batch, hidden), (3 * hidden, width), (3 * hidden, hidden)]
        )
    )
    biases = {name: _random(3 * hidden, seed=9 + len(name)) for name in given}
    inner, outer = (FUNCTIONS[name] for name in functions)
    (w_r, w_o, w_z), (u_r, u_o, u_z) = np.split(weight_ih, 3), np.split(weight_hh, 3)
    b_r, b_o, b_z = np.split(sum(biases.values(), np.zeros(3 * hidden)), 3)
    state, outputs = h.astype(np.float64), []
    for step in x:
        reset = inner(step @ w_r.T + state @ u_r.T + b_r)
        update = inner(step @ w_z.T + state @ u_z.T + b_z)
        new = outer(step @ w_o.T + (reset * state) @ u_o.T + b_o)
        state = (1 - update) * new + update * state
        outputs.append(state)
    inputs: dict[str, Any] = {"x": x, "initial_h": h, "weight_ih": weight_ih, "weight_hh": weight_hh, **biases}
    inputs |= {"recurrent_activation": functions[0], "activation": functions[1]}
    _check("gru", (state,), np.stack(outputs), **inputs)


def _lstm_inputs(layer: Any, suffix: str = "") -> dict[str, torch.Tensor]:
    """Torch has its gates in the order input, forget, cell, output."""
    order = (0, 1, 3, 2)
    inputs = {"weight_ih": _ordered(layer, f"weight_ih_l0{suffix}", order)}
    inputs["weight_hh"] = _ordered(layer, f"weight_hh_l0{suffix}", order)
    if layer.bias:
        inputs["bias"] = _ordered(layer, f"bias_ih_l0{suffix}", order) + _ordered(layer, f"bias_hh_l0{suffix}", order)
    return inputs


@pytest.mark.parametrize(("steps", "batch", "width", "hidden"), SIZES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False])
def test_lstm_is_torchs(steps: int, batch: int, width: int, hidden: int, direction: str, bias: bool) -> None:
    torch.manual_seed(steps)
    layer = torch.nn.LSTM(width, hidden, bias=bias)
    x, h, c = (torch.tensor(_random(*s)) for s in ((steps, batch, width), (batch, hidden), (batch, hidden)))
    with torch.no_grad():
        outputs, (last_h, last_c) = layer(x.flip(0) if direction == "reverse" else x, (h[None], c[None]))
    inputs = {"x": x, "initial_h": h, "initial_c": c, "direction": direction, **_lstm_inputs(layer)}
    _check("lstm", (last_h[0].numpy(), last_c[0].numpy()), outputs.numpy(), **inputs)


@pytest.mark.parametrize(("steps", "batch", "width", "hidden"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_lstm_both_ways_is_torchs(steps: int, batch: int, width: int, hidden: int, bias: bool) -> None:
    """The way back is put into the order of the input; its last output is that of the first step."""
    torch.manual_seed(steps)
    layer = torch.nn.LSTM(width, hidden, bias=bias, bidirectional=True)
    x, h, c = (torch.tensor(_random(*s)) for s in ((steps, batch, width), (2, batch, hidden), (2, batch, hidden)))
    with torch.no_grad():
        outputs, (last_h, last_c) = layer(x, (h, c))
    back = {f"{name}_back": value for name, value in _lstm_inputs(layer, "_reverse").items()}
    inputs = {"x": x, **_lstm_inputs(layer), **back, "direction": "bidirectional"}
    inputs |= {"initial_h": torch.cat([*h], -1), "initial_c": torch.cat([*c], -1)}
    last = torch.cat([outputs[-1:, :, :hidden], outputs[:1, :, hidden:]], -1)
    states = torch.cat([*last_h], -1).numpy(), torch.cat([*last_c], -1).numpy()
    for whole, wanted in ((True, outputs), (False, last)):
        results = run("lstm", **inputs, output_sequence=whole)
        for result, expected in zip(results, (wanted.numpy(), *states), strict=True):
            assert_close(result, expected, 3e-5)


@pytest.mark.parametrize("clip", [None, 50.0, 0.2, 0.01])
@pytest.mark.parametrize("peephole", [True, False])
@pytest.mark.parametrize("outer", ["relu", "scaled_tanh", "hard_sigmoid", "linear"])
def test_lstm_peephole_clip_and_activations(clip: float | None, peephole: bool, outer: str) -> None:
    """Input and forget gate see the old cell state, the output gate the new one, which is clipped before."""
    steps, batch, width, hidden = 6, 3, 4, 2
    x, weight_ih = _random(steps, batch, width), _random(4 * hidden, width, seed=1)
    weight_hh, bias = _random(4 * hidden, hidden, seed=2), _random(4 * hidden, seed=3)
    p = _random(3 * hidden, seed=4) if peephole else np.zeros(3 * hidden, np.float32)
    h = c = np.zeros((batch, hidden))
    (w_i, w_f, w_o, w_z), (u_i, u_f, u_o, u_z) = np.split(weight_ih, 4), np.split(weight_hh, 4)
    (b_i, b_f, b_o, b_z), (p_i, p_f, p_o) = np.split(bias, 4), np.split(p, 3)
    outputs = []
    for step in x:
        i = _sigmoid(step @ w_i.T + h @ u_i.T + b_i + c * p_i)
        f = _sigmoid(step @ w_f.T + h @ u_f.T + b_f + c * p_f)
        c = f * c + i * np.tanh(step @ w_z.T + h @ u_z.T + b_z)
        c = c if clip is None else np.clip(c, -clip, clip)
        o = _sigmoid(step @ w_o.T + h @ u_o.T + b_o + c * p_o)
        h = o * FUNCTIONS[outer](c)
        outputs.append(h)
    inputs = {"x": x, "weight_ih": weight_ih, "weight_hh": weight_hh, "bias": bias, "clip": clip, "activation": outer}
    inputs |= {"initial_h": np.zeros((batch, hidden)), "initial_c": np.zeros((batch, hidden))}
    _check("lstm", (h, c), np.stack(outputs), **inputs, peephole=p if peephole else None)


def test_refusals() -> None:
    common = {"x": np.ones((1, 1, 1)), "initial_h": np.ones((1, 1)), "weight_ih": np.ones((1, 1))}
    common["weight_hh"] = np.ones((1, 1))
    with pytest.raises(Unsupported, match="rnn with the activation softsign; known are hard_sigmoid, linear"):
        run("rnn", **common, activation="softsign")
    with pytest.raises(Unsupported, match="gru with the direction bidirectional"):
        run("gru", **common, direction="bidirectional")
    with pytest.raises(Unsupported, match="no weights for the way back"):
        run("lstm", **common, initial_c=np.ones((1, 1)), direction="bidirectional")
