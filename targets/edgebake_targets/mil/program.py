"""The program of a Core ML package as frozen data, checked while it is read: a hostile one is refused here.

What is checked: every name is defined once and before its use, every type and constant is whole, no declared value is
absurdly large. What an operator makes of its inputs is checked when it is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreml_package import Package, Payload, payload_of, proto
from edgebake_targets.mil.call import TensorType, Unsupported

LARGEST = 2**34  # bytes of one declared value, as float32; more is damage
_RANK = 16
_NESTING = 32


@dataclass(frozen=True, kw_only=True)
class AnyType:
    """A list, a tuple, a dictionary or a tensor of unknown rank: nothing is held against it."""

    kind: str
    dtype: str = ""


@dataclass(frozen=True, kw_only=True)
class StateType:
    """Memory that holds a tensor."""

    wrapped: TensorType


Type = TensorType | StateType | AnyType


@dataclass(frozen=True, kw_only=True)
class Named:
    """A value and its declared type."""

    name: str
    type: Type


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A value kept in the package: a tensor (``payload``), or text, or a list of constants (``items``)."""

    type: Type
    payload: Payload | None = None
    text: str | None = None
    items: tuple[Constant, ...] = ()


Binding = str | Constant  # the name of a value, or the value itself


@dataclass(frozen=True, kw_only=True)
class Operation:
    """``inputs``: one binding per parameter, several where the parameter is a tuple."""

    operator: str
    name: str
    inputs: Mapping[str, tuple[Binding, ...]]
    outputs: tuple[Named, ...]
    attributes: Mapping[str, Constant]
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Block:
    """Operations in the order of their evaluation."""

    inputs: tuple[Named, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def walk(self) -> Iterator[Operation]:
        """Every operation, those of nested blocks included."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True, kw_only=True)
class Function:
    """An entry point. ``opset``: CoreML5 (iOS 15) to CoreML8 (iOS 18)."""

    name: str
    opset: str
    inputs: tuple[Named, ...]
    block: Block
    specializations: Mapping[str, Block] = field(default_factory=dict)  # the block for each op set, ``block`` included


@dataclass(frozen=True, kw_only=True)
class Program:
    """All functions by name."""

    functions: Mapping[str, Function]


def program_of(package: Package) -> Program:
    """The ML Program of ``package``; Unsupported when it holds another kind of model, ArtifactDamaged when broken."""
    kind = package.spec.WhichOneof("Type")
    if kind != "mlProgram":
        raise Unsupported(f"{package.path.name} holds a {kind}; only ML Programs can be interpreted")
    reader = _Reader(package=package)
    functions = package.spec.mlProgram.functions
    if not functions:
        raise ArtifactDamaged("its program has no function", where=str(package.path))
    return Program(functions={name: reader.function(name, functions[name]) for name in sorted(functions)})


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads one package; what is wrong is raised with the place it was found."""

    package: Package

    def damaged(self, what: str) -> ArtifactDamaged:
        return ArtifactDamaged(what, where=str(self.package.path), fix="build or copy the package again")

    def function(self, name: str, found: Any) -> Function:
        if found.opset not in found.block_specializations:
            raise self.damaged(f"function {name} has no block for its op set {found.opset!r}")
        inputs = self.named(found.inputs)
        blocks = {}
        for opset in sorted(found.block_specializations):
            known: set[str] = set()
            for value in inputs:
                self.define(value.name, known)
            blocks[opset] = self.block(found.block_specializations[opset], known, 0)
        return Function(name=name, opset=found.opset, inputs=inputs, block=blocks[found.opset], specializations=blocks)

    def define(self, name: str, known: set[str]) -> None:
        if not name or name in known:
            raise self.damaged(f"the value {name!r} is defined twice" if name else "a value has no name")
        known.add(name)

    def block(self, found: Any, known: set[str], depth: int) -> Block:
        """``known``: the names that can be seen; those that the block defines are taken out again."""
        if depth > _NESTING:
            raise self.damaged(f"blocks are nested deeper than {_NESTING}")
        inputs = self.named(found.inputs)
        for value in inputs:
            if depth or value.name not in known:
                self.define(value.name, known)
        operations = tuple(self.operation(operation, known, depth) for operation in found.operations)
        outputs = tuple(str(name) for name in found.outputs)
        for name in outputs:
            if name not in known:
                raise self.damaged(f"a block returns {name!r}, which nothing defines")
        if depth:
            known.difference_update(value.name for value in inputs)
            known.difference_update(output.name for operation in operations for output in operation.outputs)
        return Block(inputs=inputs, operations=operations, outputs=outputs)

    def operation(self, found: Any, known: set[str], depth: int) -> Operation:
        names = ", ".join(output.name for output in found.outputs)
        place = f"{found.type or 'an operation'} {names or 'without outputs'}"
        inputs = {}
        for parameter in sorted(found.inputs):
            inputs[parameter] = tuple(
                self.binding(argument, known, f"{place}: {parameter}") for argument in found.inputs[parameter].arguments
            )
        attributes = {name: self.constant(found.attributes[name], place) for name in sorted(found.attributes)}
        blocks = tuple(self.block(block, known, depth + 1) for block in found.blocks)
        outputs = self.named(found.outputs)
        for output in outputs:
            self.define(output.name, known)
        label = attributes.pop("name", None)
        name = label.text if label is not None and label.text else (outputs[0].name if outputs else "")
        operator = str(found.type)
        return Operation(
            operator=operator, name=name, inputs=inputs, outputs=outputs, attributes=attributes, blocks=blocks
        )

    def binding(self, argument: Any, known: set[str], place: str) -> Binding:
        if argument.WhichOneof("binding") == "value":
            return self.constant(argument.value, place)
        if argument.name not in known:
            raise self.damaged(f"{place} reads {argument.name!r}, which nothing before it defines")
        return str(argument.name)

    def named(self, values: Any) -> tuple[Named, ...]:
        return tuple(Named(name=value.name, type=self.type(value.type, value.name)) for value in values)

    def type(self, found: Any, place: str) -> Type:
        kind = found.WhichOneof("type")
        if kind == "tensorType":
            return self.tensor(found.tensorType, place)
        if kind == "stateType":
            wrapped = self.type(found.stateType.wrappedType, place)
            if not isinstance(wrapped, TensorType) or None in wrapped.shape:
                raise self.damaged(f"{place} is a state without a fixed shape")
            return StateType(wrapped=wrapped)
        if kind is None:
            raise self.damaged(f"{place} has no type")
        return AnyType(kind=kind.removesuffix("Type"))

    def tensor(self, found: Any, place: str) -> TensorType | AnyType:
        dtype = _dtype(found.dataType)
        if not dtype:
            raise self.damaged(f"{place} has values of the unknown type {found.dataType}")
        if found.rank < 0 or any(
            d.WhichOneof("dimension") == "unknown" and d.unknown.variadic for d in found.dimensions
        ):
            return AnyType(kind="tensor", dtype=dtype)
        if len(found.dimensions) > _RANK or found.rank not in (0, len(found.dimensions)):
            raise self.damaged(f"{place} is of rank {found.rank} with {len(found.dimensions)} dimensions")
        shape = tuple(
            int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None for d in found.dimensions
        )
        size = 4
        for known in shape:
            size *= max(known or 1, 1)
        if size > LARGEST:
            raise self.damaged(f"{place} is declared with the shape {shape}, more than {LARGEST >> 30} GiB")
        return TensorType(dtype=dtype, shape=shape)

    def constant(self, value: Any, place: str, depth: int = 0) -> Constant:
        declared = self.type(value.type, place)
        held = value.WhichOneof("value")
        if held is None:
            raise self.damaged(f"{place} has no value")
        if held == "immediateValue":
            inside = value.immediateValue
            if inside.WhichOneof("value") in ("list", "tuple"):
                items = getattr(inside, inside.WhichOneof("value")).values
                if depth > _NESTING:
                    raise self.damaged(f"{place} is nested deeper than {_NESTING}")
                return Constant(type=declared, items=tuple(self.constant(v, place, depth + 1) for v in items))
            if inside.WhichOneof("value") != "tensor":
                raise Unsupported(f"{place} holds a {inside.WhichOneof('value')}")
            if inside.tensor.WhichOneof("value") == "strings":
                return self.strings(inside.tensor.strings.values, declared, place)
        if not isinstance(declared, TensorType) or None in declared.shape or declared.dtype == "string":
            raise self.damaged(f"{place} is a constant without a fixed type")
        payload = payload_of(self.package, value)
        if payload.key is not None and payload.dtype != declared.dtype:
            raise self.damaged(f"{place} is declared as {declared.dtype} and stored as {payload.dtype}")
        return Constant(type=declared, payload=payload)

    def strings(self, values: Any, declared: Type, place: str) -> Constant:
        if isinstance(declared, TensorType) and not declared.shape:
            if len(values) != 1:
                raise self.damaged(f"{place} holds {len(values)} texts where one belongs")
            return Constant(type=declared, text=str(values[0]))
        text = TensorType(dtype="string", shape=())
        return Constant(type=declared, items=tuple(Constant(type=text, text=str(value)) for value in values))


def _dtype(number: int) -> str:
    """The name in lower case; empty for a number that MIL does not know."""
    names = proto("MIL_pb2").DataType
    found = {value: name for name, value in names.items()}.get(number, "")
    return "" if found == "UNUSED_TYPE" else found.lower()
