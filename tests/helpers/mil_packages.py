"""Writes small Core ML packages value by value, without coremltools' own builder: also such as it would never write."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgebake_targets._coreml_package import proto, write_package

_ARRAYS = {"float16": 65552, "float32": 65568, "int32": 131104}
_FIELDS = {"float32": "floats", "int32": "ints", "bool": "bools", "string": "strings"}
Type = tuple[str, Sequence[int | None]]


def typed(dtype: str, shape: Sequence[int | None]) -> Any:
    """A ValueType; None is an unknown size."""
    made = proto("MIL_pb2").ValueType()
    tensor = made.tensorType
    tensor.dataType = proto("MIL_pb2").DataType.Value(dtype.upper())
    tensor.rank = len(shape)
    for size in shape:
        dimension = tensor.dimensions.add()
        if size is None:
            dimension.unknown.variadic = False
        else:
            dimension.constant.size = size
    return made


def held(value: Any, dtype: str = "") -> Any:
    """A Value kept in the specification: numbers, an array or text."""
    if isinstance(value, str):
        dtype, array = "string", np.asarray([value])
        shape: tuple[int, ...] = ()
    else:
        array = np.asarray(value, dtype or None)
        array = array.astype({"int64": "int32", "float64": "float32"}.get(str(array.dtype), array.dtype))
        dtype, shape = str(array.dtype), array.shape
    made = proto("MIL_pb2").Value(type=typed(dtype, shape))
    if dtype in _FIELDS:
        field = getattr(made.immediateValue.tensor, _FIELDS[dtype])
        field.SetInParent()
        field.values.extend(array.reshape(-1).tolist())
    else:
        made.immediateValue.tensor.bytes.values = array.tobytes()
    return made


def stored(dtype: str, shape: Sequence[int], offset: int, file: str = "@model_path/weights/weight.bin") -> Any:
    """A Value kept in the weight file."""
    made = proto("MIL_pb2").Value(type=typed(dtype, shape))
    made.blobFileValue.fileName = file
    made.blobFileValue.offset = offset
    return made


def operation(kind: str, outputs: Mapping[str, Type], blocks: Sequence[Any] = (), **inputs: Any) -> Any:
    """``inputs``: the name of a value after ``%``, a list of such, a Value, or what ``held`` takes."""
    made = proto("MIL_pb2").Operation(type=kind)
    for parameter, given in inputs.items():
        many = given if isinstance(given, list) and given and str(given[0]).startswith("%") else [given]
        for one in many:
            argument = made.inputs[parameter].arguments.add()
            if isinstance(one, str) and one.startswith("%"):
                argument.name = one[1:]
            else:
                argument.value.CopyFrom(one if hasattr(one, "immediateValue") else held(one))
    for name, (dtype, shape) in outputs.items():
        made.outputs.add(name=name, type=typed(dtype, shape))
    made.attributes["name"].CopyFrom(held(next(iter(outputs), kind)))
    made.blocks.extend(blocks)
    return made


def constant(name: str, value: Any) -> Any:
    """A ``const``; ``value`` is a Value or what ``held`` takes."""
    kept = value if hasattr(value, "immediateValue") else held(value)
    made = proto("MIL_pb2").Operation(type="const")
    made.outputs.add(name=name, type=kept.type)
    made.attributes["val"].CopyFrom(kept)
    return made


def block(operations: Sequence[Any], outputs: Sequence[str], inputs: Mapping[str, Type] | None = None) -> Any:
    """A block; nested ones have inputs."""
    made = proto("MIL_pb2").Block(outputs=list(outputs), operations=list(operations))
    for name, (dtype, shape) in (inputs or {}).items():
        made.inputs.add(name=name, type=typed(dtype, shape))
    return made


def function(
    inputs: Mapping[str, Type],
    operations: Sequence[Any],
    outputs: Sequence[str],
    *,
    states: Mapping[str, Type] | None = None,
) -> Any:
    """A function of iOS 18."""
    made = proto("MIL_pb2").Function(opset="CoreML8")
    for name, (dtype, shape) in inputs.items():
        made.inputs.add(name=name, type=typed(dtype, shape))
    for name, (dtype, shape) in (states or {}).items():
        wrapped = proto("MIL_pb2").ValueType()
        wrapped.stateType.wrappedType.CopyFrom(typed(dtype, shape))
        made.inputs.add(name=name, type=wrapped)
    made.block_specializations["CoreML8"].CopyFrom(block(operations, outputs))
    return made


def model(main: Any, **others: Any) -> Any:
    """A Model with the function ``main`` and others, described as arrays of float32 (int32 stays)."""
    made = proto("Model_pb2").Model(specificationVersion=9)
    functions = {"main": main, **others}
    made.mlProgram.version = 1
    for name, program in functions.items():
        made.mlProgram.functions[name].CopyFrom(program)
        described = made.description.functions.add(name=name) if others else made.description
        _describe(described, program)
    if others:
        made.description.defaultFunctionName = "main"
    return made


def _describe(described: Any, program: Any) -> None:
    for value in program.inputs:
        if value.type.WhichOneof("type") == "stateType":
            feature = described.state.add(name=value.name)
            _array(feature.type.stateType.arrayType, value.type.stateType.wrappedType.tensorType)
        else:
            feature = described.input.add(name=value.name)
            _array(feature.type.multiArrayType, value.type.tensorType)
    body = program.block_specializations[program.opset]
    types = {out.name: out.type for op in body.operations for out in op.outputs}
    for name in body.outputs:
        feature = described.output.add(name=name)
        kind = types[name].tensorType.dataType if name in types else 11
        names = proto("MIL_pb2").DataType
        feature.type.multiArrayType.dataType = _ARRAYS.get(names.Name(kind).lower(), _ARRAYS["float32"])


def _array(array: Any, tensor: Any) -> None:
    names = proto("MIL_pb2").DataType
    array.dataType = _ARRAYS[names.Name(tensor.dataType).lower()]
    sizes = [d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions]
    array.shape.extend(size or 1 for size in sizes)
    if None in sizes:
        for size in sizes:
            array.shapeRange.sizeRanges.add(lowerBound=size or 1, upperBound=size or -1)


def blob(values: NDArray[Any], kind: int) -> bytes:
    """A weight file of one entry, at byte 64; ``kind``: 1 float16, 2 float32, 3 uint8."""
    header = struct.pack("<II", 1, 2).ljust(64, b"\0")
    entry = struct.pack("<IIQQQ", 0xDEADBEEF, kind, values.nbytes, 128, 0).ljust(64, b"\0")
    return header + entry + values.tobytes()


def save(path: Path, spec: Any, weights: bytes = b"") -> Path:
    """Write the package; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".bin")
    file.write_bytes(weights)
    write_package(path, spec, file)
    return path
