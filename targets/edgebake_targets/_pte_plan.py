"""Walks the execution plans of a .pte file on any system: kernels by torch, delegate calls by whom the caller names.

The plan is taken as it is in the file (``executorch/exir/_serialize/program.fbs``): its values, constants and
instructions. A kernel is torch's operator of the same name and schema in place of ExecuTorch's portable one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import NotMeasured
from edgebake.types import MethodSignature
from edgebake_targets.inspectors import _pte_file as file
from edgebake_targets.inspectors._flatbuffers import Malformed, Table

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# ScalarType of scalar_type.fbs that torch computes with, by its names.
_DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    15: "bfloat16",
}
_STEP_LIMIT = 10**6  # instructions of one call: a loop in a damaged file ends

# ExecuTorch's own operators on numbers, which compute shapes.
_NUMBERS: Mapping[str, Callable[[Any, Any], Any]] = {
    "executorch_prim::add": operator.add,
    "executorch_prim::sub": operator.sub,
    "executorch_prim::mul": operator.mul,
    "executorch_prim::floordiv": operator.floordiv,
    "executorch_prim::truediv": operator.truediv,
    "executorch_prim::mod": operator.mod,
    "executorch_prim::eq": operator.eq,
    "executorch_prim::gt": operator.gt,
    "executorch_prim::lt": operator.lt,
    "executorch_prim::ge": operator.ge,
    "executorch_prim::le": operator.le,
    "executorch_prim::sym_max": max,
    "executorch_prim::sym_min": min,
}
_VIEW, _SIZE = "executorch_prim::et_view", "aten::sym_size"
# ExecuTorch's own, of its library of quantised kernels: they end the process rather than resize what they are given.
_SHAPED = ("quantized_decomposed::quantize_per_tensor", "quantized_decomposed::dequantize_per_tensor")
_WRITE = "aten::copy_"  # into a buffer, behind all that reads it

# A delegate's number and its arguments, ``Declared`` where it writes, to what it writes by the argument's place.
Delegates = Callable[[int, list[Any]], Mapping[int, Any]]


@dataclass(frozen=True, kw_only=True)
class Delegate:
    """One backend's part of a plan: who runs it, and what it is built from."""

    backend: str
    blob: memoryview
    options: Mapping[str, bytes] = field(default_factory=dict)  # what its compiler was told


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One method. ``values`` are the file's own: numbers, lists, constants, and for other tensors their declaration."""

    method: str
    values: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    instructions: tuple[tuple[int, Table], ...]
    kernels: tuple[tuple[str, Any], ...]  # name and torch's operator, None for those on numbers
    delegates: tuple[Delegate, ...]
    named: Mapping[str, memoryview]  # the file's shared data

    def states(self) -> dict[int, torch.Tensor]:
        """Zeros for each buffer outside the delegates that the plan writes to, by its number."""
        import torch

        calls = (call for kind, call in self.instructions if kind == file.KERNEL)
        writes = (call.wholes(1, "i")[0] for call in calls if self.kernels[call.whole(0, "i")][0] == _WRITE)
        return {number: torch.zeros(self.values[number].shape, dtype=self.values[number].dtype) for number in writes}

    def run(
        self, inputs: Sequence[torch.Tensor], delegate: Delegates, states: dict[int, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Outputs in the plan's order; ``states`` hold what was written afterwards."""
        held: dict[int, Any] = {**states, **dict(zip(self.inputs, inputs, strict=True))}
        at = steps = 0
        while at < len(self.instructions):
            steps += 1
            if steps > _STEP_LIMIT:
                raise ArtifactDamaged(f"method {self.method!r} does not end")
            kind, call = self.instructions[at]
            at += 1
            if kind == file.KERNEL:
                name, kernel = self.kernels[call.whole(0, "i")]
                self._kernel(name, kernel, call.wholes(1, "i"), held)
            elif kind == file.DELEGATE:
                numbers = call.wholes(1, "i")
                found = delegate(call.whole(0, "i"), [self._value(number, held) for number in numbers])
                _put(held, {numbers[place]: value for place, value in found.items()})
            elif kind == file.MOVE:
                _put(held, {call.whole(1, "i"): self._value(call.whole(0, "i"), held)})
            elif kind == file.JUMP_FALSE and not bool(self._value(call.whole(0, "i"), held)):
                at = call.whole(1, "i")
        states.update({number: held[number] for number in states})
        return [self._value(number, held) for number in self.outputs]

    def _value(self, number: int, held: Mapping[int, Any]) -> Any:
        if number in held:
            return held[number]
        value = self.values[number]
        if isinstance(value, _List):
            return [None if item < 0 else self._value(item, held) for item in value.items]
        return self._viewed(value, held) if isinstance(value, Declared) and value.place is not None else value

    def _viewed(self, value: Declared, held: Mapping[int, Any]) -> Any:
        """What was last written to the memory of ``value``, in its shape; ``value`` itself where nothing was.

        ExecuTorch gives a view of a fixed shape the memory of what it is a view of, and no instruction.
        """
        for number in reversed(held):
            other = self.values[number]
            if isinstance(other, Declared) and (other.place, other.dtype) == (value.place, value.dtype):
                found: torch.Tensor = held[number]
                return found.reshape(value.shape) if found.numel() == prod(value.shape) else value
        return value

    def _kernel(self, name: str, kernel: Any, numbers: Sequence[int], held: dict[int, Any]) -> None:
        if name in _NUMBERS:
            first, second, to = numbers
            _put(held, {to: _NUMBERS[name](self._value(first, held), self._value(second, held))})
            return
        if name == _VIEW:
            source, sizes, to = numbers
            _put(held, {to: self._value(source, held).reshape(self._value(sizes, held))})
            return
        if name == _SIZE:
            source, axis, to = numbers
            _put(held, {to: self._value(source, held).shape[self._value(axis, held)]})
            return
        if name == _WRITE:
            to, source = numbers[:2]
            # earlier readers keep what they were given
            _put(held, {to: held[to].clone().copy_(self._value(source, held))})
            return
        # The instruction lists every argument of the schema, ``out`` among them, then what the kernel returns.
        schema = kernel._schema.arguments
        bound = dict(zip((argument.name for argument in schema), numbers, strict=False))
        outs = [bound.pop(argument.name) for argument in schema if argument.is_out]
        arguments = [self._value(bound[a.name], held) for a in schema if not a.is_out and not a.kwarg_only]
        given = {to: fresh(self.values[to], arguments[0].shape if name in _SHAPED else (0,)) for to in outs}
        named = {a.name: self._value(bound[a.name], held) for a in schema if not a.is_out and a.kwarg_only}
        names = [argument.name for argument in schema if argument.is_out]
        kernel(*arguments, **named, **{n: given[to] for n, to in zip(names, outs, strict=True)})
        _put(held, given)


def _put(held: dict[int, Any], written: Mapping[int, Any]) -> None:
    """Add ``written`` to ``held``, whose order is that of writing."""
    for number, value in written.items():
        held.pop(number, None)
        held[number] = value


@dataclass(frozen=True)
class Declared:
    """A tensor that is computed or passed in: its dtype and shape, sizes at their upper bounds.

    ``place``: number of the arena and offset there, None where the caller brings its memory.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    place: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class _List:
    """A list of other values by their number; -1 stands for none."""

    items: tuple[int, ...]


def fresh(value: Any, shape: Sequence[int] = (0,)) -> torch.Tensor:
    """A tensor for a kernel's result, empty where it may resize it."""
    import torch

    return torch.empty(tuple(shape), dtype=value.dtype)


def as_declared(array: NDArray[Any], declared: Declared) -> torch.Tensor:
    """A delegate's output in the type and rank of the plan, as ExecuTorch's runtime copies it there."""
    import torch

    value = torch.from_numpy(array).to(declared.dtype)
    return value.reshape(()) if not declared.shape and value.numel() == 1 else value


def tensors(plan: Plan, specs: MethodSignature, inputs: Mapping[str, NDArray[Any]]) -> list[torch.Tensor]:
    """Inputs in the order and the dtypes of the signature. ArtifactDamaged when the plan takes others."""
    import numpy as np
    import torch

    found, promised = (len(plan.inputs), len(plan.outputs)), (len(specs.inputs), len(specs.outputs))
    if found != promised:
        raise ArtifactDamaged(
            f"method {plan.method!r} takes {found[0]} inputs and returns {found[1]} outputs; its signature says "
            f"{promised[0]} and {promised[1]}"
        )
    absent = [spec.name for spec in specs.inputs if spec.name not in inputs]
    if absent:
        raise StageFailed(f"method {plan.method!r} was called without its input {absent[0]!r}", where="validate")
    return [torch.from_numpy(np.array(inputs[spec.name], dtype=spec.dtype)) for spec in specs.inputs]


def call(
    plan: Plan,
    specs: MethodSignature,
    inputs: Mapping[str, NDArray[Any]],
    delegate: Delegates,
    states: dict[int, torch.Tensor],
) -> dict[str, NDArray[Any]]:
    """Outputs of one call by the signature's names, in its dtypes; ``states`` hold what was written afterwards."""
    try:
        results = plan.run(tensors(plan, specs, inputs), delegate, states)
    except RuntimeError as error:  # torch's word for shapes that do not go together
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise StageFailed(f"the program cannot be run with {shapes}: {error}", where="validate") from error
    named = zip(specs.outputs, results, strict=True)
    return {spec.name: value.detach().clone().numpy().astype(spec.dtype) for spec, value in named}


def open_plans(path: Path, methods: Sequence[str]) -> dict[str, Plan]:
    """The plans of ``methods``. ArtifactDamaged: no program, or it lacks one; NotMeasured names what cannot be run."""
    try:
        program = file.opened(file.mapped(path))
        tables = {table.text(0): table for table in program.table.tables(1)}
        absent = sorted(set(methods) - set(tables))
        if absent:
            raise ArtifactDamaged(
                f"it has no method {absent[0]!r}; its methods: {', '.join(sorted(tables))}", where=str(path)
            )
        return {method: _plan(program, tables[method]) for method in methods}
    except (Malformed, OSError, ValueError) as error:
        raise ArtifactDamaged(f"this is no whole ExecuTorch program: {error}", where=str(path)) from error


def _plan(program: Any, table: Table) -> Plan:
    kernels = [(kernel.text(0), kernel.text(1)) for kernel in table.tables(6)]
    found = [(name, _operator(name, overload)) for name, overload in kernels]
    absent = sorted({name for name, kernel in found if kernel is None and not _own(name)})
    if absent:
        raise NotMeasured(f"nothing here computes the operators outside the delegates: {', '.join(absent)}")
    return Plan(
        method=table.text(0),
        values=tuple(_read(program, value) for value in table.tables(2)),
        inputs=table.wholes(3, "i"),
        outputs=table.wholes(4, "i"),
        instructions=tuple(file.instructions(table)),
        kernels=tuple(found),
        delegates=tuple(
            Delegate(
                backend=delegate.text(0),
                blob=file.blob_of(program, delegate),
                options={spec.text(0): bytes(spec.blob(1)) for spec in delegate.tables(2)},
            )
            for delegate in table.tables(7)
        ),
        named=program.named,
    )


def _own(name: str) -> bool:
    return name in _NUMBERS or name in (_VIEW, _SIZE, _WRITE)


def _operator(name: str, overload: str) -> Any:
    """torch's operator, None where it has none or where it would change its argument, as states do."""
    import torch

    space, _, base = name.partition("::")
    packet = getattr(getattr(torch.ops, space), base, None)
    found = getattr(packet, overload or "default", None) if packet is not None else None
    if found is None or not any(argument.is_out for argument in found._schema.arguments):
        return None
    return found


def _read(program: Any, value: Table) -> Any:
    kind, held = value.whole(0, "B"), value.table(1)
    if held is None or kind == file.NULL:
        return None
    if kind == file.TENSOR:
        return _tensor(program, held)
    if kind in (file.INTS, file.TENSORS, file.OPTIONALS):
        return _List(held.wholes(0, "q" if kind == file.INTS else "i"))
    if kind in (file.DOUBLES, file.BOOLS):
        return list(held.wholes(0, "d" if kind == file.DOUBLES else "?"))
    if kind == file.STRING:
        return held.text(0)
    if kind == file.INT:
        return held.whole(0, "q")
    return held.real(0, "d") if kind == file.DOUBLE else bool(held.whole(0, "?"))


def _tensor(program: Any, table: Table) -> Any:
    """A constant's values, or the declaration of a tensor that is computed."""
    import torch

    name, shape = _DTYPES.get(table.whole(0, "b")), table.wholes(2, "i")
    if name is None:
        raise NotMeasured(f"a tensor outside the delegates is of ScalarType {table.whole(0, 'b')}")
    dtype = getattr(torch, name)
    constant = file.stored(program, table, "")
    if constant is None:
        at = table.table(6)  # AllocationDetails
        place = None if at is None else (at.whole(0, "I"), at.whole(1, "I"), at.whole(2, "I"))
        return Declared(dtype, shape, place)
    if constant.mutable:
        raise NotMeasured("the program keeps a state outside the delegates that does not start at zero")
    order = list(table.blob(3))
    if order != sorted(order):
        raise NotMeasured("a constant outside the delegates lies in another order than that of its dimensions")
    if not len(constant.data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(constant.data, dtype=dtype).reshape(shape)
