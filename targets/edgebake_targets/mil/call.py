"""What an operator sees when it is evaluated: the contract between the interpreter and the operator families.

How values are held. A tensor is a ``torch.Tensor`` on the CPU: every float type as float32 (the interpreter rounds
results to the declared type where its mode says so; an operator never does), bool as bool, integers of 8 to 64 bits
in torch's type of that name; uint16 and uint32 in int32 and int64; sub-byte integers unpacked in int8 or uint8.
A string is a ``str``, a list of tensors (``make_list`` and its kin) a Python list that is never changed in place, a
tuple of values in one parameter (``values`` of ``concat``) likewise a Python list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

Value = Any  # torch.Tensor | str | list[Value] | State
Operator = Callable[["Call"], Any]  # the value of the only output, or a tuple of values in the outputs' order


class Mode(StrEnum):
    """How floats are rounded: not at all, to the declared type of every value, or with half sums as well."""

    FP32 = "fp32"
    DECLARED = "declared"
    FP16_WORST = "fp16-worst"


class Unsupported(Exception):
    """This operator, or this use of it, cannot be evaluated; the text says which and why."""


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """``dtype`` as MIL names it in lower case (float16, int32, uint4, bool, string); None for an unknown size."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(kw_only=True)
class State:
    """Mutable memory that outlives a prediction (``read_state``, ``coreml_update_state``)."""

    name: str
    value: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operation about to be evaluated. ``blocks`` evaluate the nested blocks on the values of their inputs."""

    operator: str
    inputs: Mapping[str, Value]
    outputs: tuple[Any, ...]  # declared types
    name: str = ""
    opset: str = "CoreML8"  # CoreML5 is iOS 15, CoreML8 iOS 18
    mode: Mode = Mode.FP32
    blocks: tuple[Callable[..., tuple[Value, ...]], ...] = field(default=())

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor of a required parameter."""
        value: torch.Tensor = self.inputs[name]
        return value

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor of an optional parameter."""
        return self.inputs.get(name)

    def many(self, name: str) -> list[torch.Tensor]:
        """The tensors of a variadic parameter; one alone is a list of one."""
        value = self.inputs[name]
        return list(value) if isinstance(value, list | tuple) else [value]

    def integer(self, name: str, default: int | None = None) -> int:
        """A scalar integer (a tensor of one element)."""
        return int(self._scalar(name, default))

    def number(self, name: str, default: float | None = None) -> float:
        """A scalar float."""
        return float(self._scalar(name, default))

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A scalar truth value."""
        return bool(self._scalar(name, default))

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        return str(self._scalar(name, default))

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """A vector of integers; a scalar is a vector of one."""
        value = self.inputs.get(name)
        if value is None:
            if default is None:
                raise Unsupported(f"{self.operator} without {name}")
            return list(default)
        return [int(v) for v in value.reshape(-1).tolist()]

    def flags(self, name: str, default: Sequence[bool] | None = None) -> list[bool]:
        """A vector of truth values."""
        value = self.inputs.get(name)
        if value is None:
            if default is None:
                raise Unsupported(f"{self.operator} without {name}")
            return list(default)
        return [bool(v) for v in value.reshape(-1).tolist()]

    def since(self, generation: int) -> bool:
        """Whether the op set is that of Core ML ``generation`` or a later one (5 is iOS 15, 8 is iOS 18)."""
        return int(self.opset.removeprefix("CoreML")) >= generation

    @property
    def half_sums(self) -> bool:
        """Whether products and partial sums of this operation are to be rounded to float16."""
        return self.mode is Mode.FP16_WORST and getattr(self.outputs[0], "dtype", "") == "float16"

    def _scalar(self, name: str, default: Any) -> Any:
        value = self.inputs.get(name, default)
        if value is None:
            raise Unsupported(f"{self.operator} without {name}")
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise Unsupported(f"{self.operator} with a {name} of {value.numel()} values where one belongs")
            return value.reshape(()).item()
        return value
