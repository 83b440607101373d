"""The constants of a Core ML program and how compressed ones decode, by the op set's text and without coremltools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake_targets import _coreml_decompress as decompress
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
_DEEPEST = 8  # constants that feed each other; coremltools writes three


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A ``const`` or ``constexpr_*`` operator.

    ``parts`` are MIL values by parameter, ``fed`` the constants that it reads and which of their outputs, and
    ``unknown`` parameters that come from elsewhere. ``depth``: of constants that feed each other.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    parts: Mapping[str, Any]
    fed: Mapping[str, tuple[Constant, int]]
    unknown: tuple[str, ...]
    depth: int


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
    """Constants that hold a tensor of numbers, by the name of their first output, in program order."""
    found = {}
    made: dict[str, tuple[Constant, int]] = {}
    for operation in operations(package):
        if operation.type in PAYLOADS:
            constant = _constant(operation, made)
            if constant is not None:
                found[constant.name] = constant
                made.update({output.name: (constant, i) for i, output in enumerate(operation.outputs)})
    return found


def _constant(operation: Any, made: Mapping[str, tuple[Constant, int]]) -> Constant | None:
    output = operation.outputs[0]
    if output.type.WhichOneof("type") != "tensorType" or output.type.tensorType.dataType == 2:  # 2: string
        return None
    parts = {name: value for name, value in operation.attributes.items() if name != "name"}
    fed: dict[str, tuple[Constant, int]] = {}
    unknown = []
    for name, argument in operation.inputs.items():
        binding = argument.arguments[0]
        if binding.WhichOneof("binding") == "value":
            parts[name] = binding.value
        elif binding.name not in made or made[binding.name][0].depth == _DEEPEST:
            unknown.append(name)
        elif made[binding.name][0].operator == "const":
            parts[name] = made[binding.name][0].parts["val"]
        else:
            fed[name] = made[binding.name]
    shape = tuple(int(d.constant.size) for d in output.type.tensorType.dimensions)
    return Constant(
        name=output.name,
        operator=operation.type,
        shape=shape,
        parts=parts,
        fed=fed,
        unknown=tuple(unknown),
        depth=1 + max((source.depth for source, _ in fed.values()), default=0),
    )


def stored_parts(constant: Constant) -> dict[str, Any]:
    """The MIL values that the constant and those that feed it store, by parameter; the innermost where two agree."""
    parts = dict(constant.parts)
    for source in {source.name: source for source, _ in constant.fed.values()}.values():
        parts |= stored_parts(source)
    return parts


def payload_name(constant: Constant) -> str:
    """The parameter, of the constant or of the one that feeds it, that holds what is stored."""
    name = PAYLOADS[constant.operator]
    return payload_name(constant.fed[name][0]) if name in constant.fed else name


def payload(package: Package, constant: Constant) -> Payload | None:
    """What the constant, or the one that feeds it, stores; None when it comes from elsewhere."""
    value = stored_parts(constant).get(payload_name(constant))
    return None if value is None else payload_of(package, value)


def format_of(package: Package, constant: Constant) -> str:
    """``float16``, ``int8``, ``int4``, ``palette6``, ``palette4-vector2``, ``sparse-float16``, ``sparse-int8`` …"""
    source = constant.fed.get(PAYLOADS[constant.operator])
    if source is not None:
        name = format_of(package, source[0])
        return f"{name}-scaled" if constant.operator == "constexpr_blockwise_shift_scale" else name
    stored = payload(package, constant)
    if constant.operator.startswith("constexpr_lut"):
        name = f"palette{_table_bits(package, constant)}{_vector(package, constant)}"
    else:
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


def _vector(package: Package, constant: Constant) -> str:
    table = constant.parts.get("lut")
    shape = payload_of(package, table).shape if table is not None else ()
    return f"-vector{shape[-1]}" if len(shape) > 1 and shape[-1] > 1 else ""


def decode(package: Package, constant: Constant) -> NDArray[np.float64]:
    """The weights before the runtime rounds them to the program's precision; float64 of ``constant.shape``.

    ValueError for constants that are read from elsewhere, and for those of two outputs, which feed others.
    """
    decoded = _outputs(package, constant)
    if len(decoded) > 1:
        raise ValueError(f"{constant.name} is a {constant.operator} that feeds another constant: decode that one")
    found: NDArray[np.float64] = decoded[0].astype("float64", copy=False)
    if found.shape != constant.shape:
        raise ArtifactDamaged(
            f"{constant.name} decodes to {found.shape}, not {constant.shape}", where=str(package.path)
        )
    return found


def _outputs(package: Package, constant: Constant) -> tuple[NDArray[Any], ...]:
    decoder = _DECODERS.get(constant.operator)
    if decoder is None or constant.unknown:
        raise ValueError(f"{constant.name} is a {constant.operator} that edgebake cannot decode")
    parts = {name: _wide(array_of(payload_of(package, value))) for name, value in constant.parts.items()}
    parts |= {name: _outputs(package, source)[index] for name, (source, index) in constant.fed.items()}
    found = decoder(parts)
    return found if isinstance(found, tuple) else (found,)


def _wide(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype("float64") if values.dtype.kind == "f" else values


def _table(parts: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    indices, table = parts["indices"], parts["lut"]
    if "shape" in parts:
        return decompress.packed_table(indices, table, parts["shape"].tolist())
    return decompress.table(indices, table, _vector_axis(parts))


def _vector_axis(parts: Mapping[str, NDArray[Any]]) -> int | None:
    return int(parts["vector_axis"]) if "vector_axis" in parts else None


def _sparse(parts: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    values, mask = parts["nonzero_data"], parts["mask"]
    return (
        decompress.packed_sparse(values, mask, parts["shape"].tolist())
        if "shape" in parts
        else decompress.sparse(values, mask)
    )


_DECODERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "const": lambda parts: parts["val"],
    "constexpr_affine_dequantize": lambda parts: decompress.affine(
        parts["quantized_data"], parts["scale"], parts["zero_point"], int(parts["axis"])
    ),
    "constexpr_blockwise_shift_scale": lambda parts: decompress.blockwise(
        parts["data"], parts["scale"], parts.get("offset")
    ),
    "constexpr_lut_to_dense": _table,
    "constexpr_lut_to_sparse": lambda parts: decompress.table_sparse(
        parts["indices_mask"], parts["indices_nonzero_data"], parts["lut"], _vector_axis(parts)
    ),
    "constexpr_sparse_blockwise_shift_scale": lambda parts: decompress.blockwise_sparse(
        parts["data_mask"], parts["nonzero_data"], parts["scale"], parts.get("offset")
    ),
    "constexpr_sparse_to_dense": _sparse,
}
