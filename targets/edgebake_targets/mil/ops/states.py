"""States: memory that outlives a prediction. A write replaces the tensor, so values read before stay what they were."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgebake_targets.mil.call import Call, Operator, State


def read_state(call: Call) -> torch.Tensor:
    """What the state holds."""
    return _state(call, "input").value


def write_state(call: Call) -> tuple[()]:
    """Keep ``data`` in the state."""
    _write(_state(call, "input"), call["data"])
    return ()


def coreml_update_state(call: Call) -> torch.Tensor:
    """Keep ``value`` in the state, and hand it on."""
    _write(_state(call, "state"), call["value"])
    return call["value"]


def _state(call: Call, parameter: str) -> State:
    found = call.inputs[parameter]
    if not isinstance(found, State):
        raise TypeError(f"{parameter} is no state")
    return found


def _write(state: State, value: torch.Tensor) -> None:
    if value.shape != state.value.shape:
        raise ValueError(f"{tuple(value.shape)} written to the state {state.name} of {tuple(state.value.shape)}")
    state.value = value.to(state.value.dtype)


OPERATORS: Mapping[str, Operator] = {
    "read_state": read_state,
    "write_state": write_state,
    "coreml_update_state": coreml_update_state,
}
