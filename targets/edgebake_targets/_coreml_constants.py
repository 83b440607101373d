"""The constants of a Core ML program and how compressed ones decode, by the op set's text and without coremltools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreml_package import Package, Payload, array_of, payload_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The parameter that holds the payload of each operator; the others hold scales, offsets, tables and masks.
PAYLOADS = {
    "const": "val",
    "constexpr_affine_dequantize": "quantized_data",
    "constexpr_blockwise_shift_scale": "data",
    "constexpr_cast": "source_val",
    "constexpr_lut_to_dense": "indices",
    "constexpr_lut_to_sparse": "indices_nonzero_data",
    "constexpr_sparse_blockwise_shift_scale": "nonzero_data",
    "constexpr_sparse_to_dense": "nonzero_data",
}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A ``const`` or ``constexpr_*`` operator: ``parts`` are MIL values by parameter, ``inputs`` other constants."""

    name: str
    operator: str
    shape: tuple[int, ...]
    parts: Mapping[str, Any]
    inputs: Mapping[str, str]


def operations(package: Package) -> Iterator[Any]:
    """Every operation of every function, those of nested blocks (loops, conditions) included."""
    program = package.spec.mlProgram
    for name in sorted(program.functions):
        function = program.functions[name]
        yield from _of_block(function.block_specializations[function.opset])


def _of_block(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for nested in operation.blocks:
            yield from _of_block(nested)


def constants(package: Package) -> dict[str, Constant]:
    """Constants that hold a tensor of numbers, by output name, in program order."""
    found = {}
    for operation in operations(package):
        if operation.type in PAYLOADS:
            constant = _constant(operation)
            if constant is not None:
                found[constant.name] = constant
    return found


def _constant(operation: Any) -> Constant | None:
    output = operation.outputs[0]
    if output.type.WhichOneof("type") != "tensorType" or output.type.tensorType.dataType == 2:  # 2: string
        return None
    parts = {name: value for name, value in operation.attributes.items() if name != "name"}
    inputs = {}
    for name, argument in operation.inputs.items():
        binding = argument.arguments[0]
        if binding.WhichOneof("binding") == "value":
            parts[name] = binding.value
        else:
            inputs[name] = binding.name
    shape = tuple(int(d.constant.size) for d in output.type.tensorType.dimensions)
    return Constant(name=output.name, operator=operation.type, shape=shape, parts=parts, inputs=inputs)


def payload(package: Package, constant: Constant) -> Payload | None:
    """What the constant stores, or None when another constant feeds it."""
    value = constant.parts.get(PAYLOADS[constant.operator])
    return None if value is None else payload_of(package, value)


def format_of(package: Package, constant: Constant) -> str:
    """``float16``, ``int8``, ``int4``, ``palette6``, ``sparse-float16`` …"""
    stored = payload(package, constant)
    if constant.operator.startswith("constexpr_lut"):
        return f"palette{_table_bits(package, constant)}"
    name = stored.dtype if stored else "nested"
    return f"sparse-{name}" if "sparse" in constant.operator else name


def _table_bits(package: Package, constant: Constant) -> int:
    table = constant.parts.get("lut")
    if table is None:
        stored = payload(package, constant)
        return stored.bits if stored else 0
    shape = payload_of(package, table).shape
    entries = shape[0] if len(shape) == 1 else shape[-2]
    return entries.bit_length() - 1


def decode(package: Package, constant: Constant) -> NDArray[np.float64]:
    """The weights before the runtime rounds them to the program's precision; float64 of ``constant.shape``.

    ValueError for the operators that edgebake does not write (sparse and nested ones).
    """
    parts = {name: array_of(payload_of(package, value)) for name, value in constant.parts.items()}
    decoder = {
        "const": _plain,
        "constexpr_affine_dequantize": _affine,
        "constexpr_blockwise_shift_scale": _blockwise,
        "constexpr_lut_to_dense": _table,
    }.get(constant.operator)
    if decoder is None or constant.inputs:
        raise ValueError(f"{constant.name} is a {constant.operator} that edgebake cannot decode")
    decoded = decoder(parts)
    if decoded.shape != constant.shape:
        raise ArtifactDamaged(
            f"{constant.name} decodes to {decoded.shape}, not {constant.shape}", where=str(package.path)
        )
    return decoded


def _plain(parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = parts["val"].astype("float64")
    return values


def _affine(parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """iOS 16: ``scale * (data - zero_point)``, scale and zero point along ``axis``."""
    data = parts["quantized_data"].astype("float64")
    along = [1] * data.ndim
    along[int(parts["axis"])] = -1
    scale = parts["scale"].astype("float64").reshape(along if parts["scale"].ndim else [1] * data.ndim)
    zero = parts["zero_point"].astype("float64").reshape(along if parts["zero_point"].ndim else [1] * data.ndim)
    values: NDArray[np.float64] = (data - zero) * scale
    return values


def _blockwise(parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """iOS 18: ``scale * (data - offset)``, each scale repeated over its block."""
    data = parts["data"].astype("float64")
    scale = _repeated(parts["scale"].astype("float64"), data.shape)
    if "offset" in parts:
        data = data - _repeated(parts["offset"].astype("float64"), data.shape)
    values: NDArray[np.float64] = data * scale
    return values


def _repeated(blocks: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    for axis, size in enumerate(shape):
        blocks = blocks.repeat(size // blocks.shape[axis], axis=axis)
    return blocks


def _table(parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """iOS 16: flat table and a packed stream of indices; iOS 18: indices of the weight's shape, one table per group."""
    import numpy as np

    table = parts["lut"].astype("float64")
    if table.ndim == 1:
        bits = table.size.bit_length() - 1
        count = int(np.prod(parts["shape"], dtype=np.int64))
        packed = Payload(
            dtype=f"uint{bits}", bits=bits, shape=(count,), data=memoryview(parts["indices"].tobytes()), key=None
        )
        return np.asarray(table[array_of(packed)].reshape(parts["shape"]), np.float64)
    if table.shape[-1] != 1:
        raise ValueError("edgebake cannot decode a table of vectors")
    indices = parts["indices"]
    groups = table.shape[:-2]
    group = [np.arange(size) // (size // count) for size, count in zip(indices.shape, groups, strict=True)]
    where = np.meshgrid(*group, indexing="ij", sparse=True)
    return np.asarray(table[(*where, indices, 0)], np.float64)
