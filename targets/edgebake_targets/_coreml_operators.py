"""Puts rounded and pruned weights into the Core ML program: one ``constexpr_*`` operator, or one that feeds another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake.scheme import Scheme, parse
from edgebake_targets._coreml_compress import channel_scales, mask_of, palettise, palettise_blocks, quantise
from edgebake_targets._coreml_schemes import counts_of
from edgebake_targets._coreml_vectors import palettise_vectors
from edgebake_targets._coreml_weights import Held

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Dtype = type[np.floating[Any]]


def replace(held: Held, name: str) -> None:
    """Put the compressed constant ``name`` in the place of ``held.operation``, whose block has to be entered."""
    import numpy as np
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

    operation = held.operation
    old = operation.outputs[0]
    dtype = np.float16 if old.val.dtype == np.float16 else np.float32
    # A program from torch.export is only valid when every operator has these two scopes.
    scopes = (ScopeSource.EXIR_STACK_TRACE, ScopeSource.EXIR_DEBUG_HANDLE)
    with mb.scope(*(ScopeInfo(source=source, data=[None]) for source in scopes)):
        new = _constant(held, dtype, name)
    block = operation.enclosing_block
    block.replace_uses_of_var_after_op(anchor_op=operation, old_var=old, new_var=new, no_check_var_types=True)
    block.remove_ops([operation])


def _add(operator: str, held: Held, name: str, **parts: Any) -> Any:
    from coremltools.converters.mil import Builder as mb

    return getattr(mb, operator)(**parts, name=name, before_op=held.operation)


def _modern() -> bool:
    """Whether the program is in the op set of iOS 18."""
    from coremltools.converters.mil._deployment_compatibility import AvailableTarget
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with

    return bool(is_current_opset_version_compatible_with(AvailableTarget.iOS18))


def _constant(held: Held, dtype: Dtype, name: str) -> Any:
    """The variable that holds the weight in its scheme."""
    scheme = parse(held.scheme)
    if scheme.family == "sparse":
        return _sparse(held, scheme, dtype, name)
    if scheme.vector > 1:
        return _vector_palette(held, scheme, dtype, name)
    if scheme.scaled:
        return _scaled_palette(held, scheme, dtype, name)
    counts = counts_of(held.scheme, held.values.shape, held.axis)
    if scheme.family == "integer":
        q, scale = quantise(held.values, counts, scheme.weight_bits, dtype)
        if _modern():
            data = q.astype(_narrow(f"int{scheme.weight_bits}"))
            return _add("constexpr_blockwise_shift_scale", held, name, data=data, scale=scale)
        return _add("constexpr_affine_dequantize", held, name, **_affine(q, scale, held.axis))
    indices, tables = palettise_blocks(held.values, counts, scheme.weight_bits, dtype, held.sensitivity)
    pack = _grouped_table if _modern() else _packed_table
    return _add("constexpr_lut_to_dense", held, name, **pack(indices, tables, scheme.weight_bits))


def _vector_palette(held: Held, scheme: Scheme, dtype: Dtype, name: str) -> Any:
    """iOS 18: an index for each vector of neighbouring output channels."""
    import numpy as np

    width, bits = scheme.vector, scheme.weight_bits
    indices, table = palettise_vectors(held.values, held.axis, width, bits, dtype, held.sensitivity)
    parts = {
        "indices": indices.astype(_narrow(f"uint{bits}")),
        "lut": table.reshape(*(1 for _ in held.values.shape), *table.shape),
        "vector_axis": np.int32(held.axis),
    }
    return _add("constexpr_lut_to_dense", held, name, **parts)


def _scaled_palette(held: Held, scheme: Scheme, dtype: Dtype, name: str) -> Any:
    """iOS 18: a palette of the weight divided by a scale per output channel, which the second operator multiplies."""
    import numpy as np

    scale = channel_scales(held.values, held.axis, dtype)
    divided = (held.values / np.where(scale == 0, 1, scale).astype(np.float64)).astype(np.float32)
    sensitivity = None if held.sensitivity is None else held.sensitivity * scale.astype(np.float32) ** 2
    counts = counts_of(held.scheme, held.values.shape, held.axis)
    indices, tables = palettise_blocks(divided, counts, scheme.weight_bits, dtype, sensitivity)
    table = _grouped_table(indices, tables, scheme.weight_bits)
    inner = _add("constexpr_lut_to_dense", held, f"{name}_divided", **table)
    return _add("constexpr_blockwise_shift_scale", held, name, data=inner, scale=scale)


def _sparse(held: Held, scheme: Scheme, dtype: Dtype, name: str) -> Any:
    """What is not zero, in row-major order, and one bit for each place; since iOS 18 also rounded."""
    import numpy as np

    mask = mask_of(scheme, held.values, held.axis)
    values = held.values[mask]
    if not _modern():
        stream = np.packbits(mask.ravel(), bitorder="little")
        parts = {"nonzero_data": values.astype(dtype), "mask": stream, "shape": np.array(mask.shape, np.uint32)}
        return _add("constexpr_sparse_to_dense", held, name, **parts)
    bits = mask.astype(_narrow("uint1"))
    if scheme.inner is None:
        return _add("constexpr_sparse_to_dense", held, name, nonzero_data=values.astype(dtype), mask=bits)
    if scheme.inner.family == "integer":
        counts = counts_of(held.scheme, held.values.shape, held.axis)
        q, scale = quantise(held.values * mask, counts, scheme.weight_bits, dtype)
        data = q[mask].astype(_narrow(f"int{scheme.weight_bits}"))
        parts = {"data_mask": bits, "nonzero_data": data, "scale": scale}
        places, dense = _add("constexpr_sparse_blockwise_shift_scale", held, f"{name}_stored", **parts)
    else:
        sensitivity = None if held.sensitivity is None else held.sensitivity[mask]
        indices, table = palettise(values, scheme.weight_bits, dtype, sensitivity)
        stored = indices.astype(_narrow(f"uint{scheme.weight_bits}"))
        lut = table.reshape(*(1 for _ in mask.shape), -1, 1)
        parts = {"indices_mask": bits, "indices_nonzero_data": stored, "lut": lut}
        places, dense = _add("constexpr_lut_to_sparse", held, f"{name}_stored", **parts)
    return _add("constexpr_sparse_to_dense", held, name, nonzero_data=dense, mask=places)


def _affine(q: NDArray[np.int8], scale: NDArray[Any], axis: int) -> dict[str, Any]:
    """iOS 16: one scale per channel, or one."""
    import numpy as np

    flat = scale.reshape(() if scale.size == 1 else -1)
    return {"quantized_data": q, "zero_point": np.zeros(flat.shape, np.int8), "scale": flat, "axis": np.int32(axis)}


def _packed_table(indices: NDArray[np.uint8], tables: NDArray[Any], bits: int) -> dict[str, Any]:
    """iOS 16: indices as one little-endian stream of bits, one table."""
    import numpy as np

    planes = np.unpackbits(indices.reshape(-1, 1), axis=1, bitorder="little")[:, :bits]
    return {
        "indices": np.packbits(planes.ravel(), bitorder="little"),
        "lut": tables.reshape(-1),
        "shape": np.array(indices.shape, np.uint32),
    }


def _grouped_table(indices: NDArray[np.uint8], tables: NDArray[Any], bits: int) -> dict[str, Any]:
    """iOS 18: indices in their own type, one table per block; vectors of one value."""
    return {"indices": indices.astype(_narrow(f"uint{bits}")), "lut": tables[..., None]}


def _narrow(name: str) -> Any:
    """numpy's type for MIL's type ``name``, which coremltools marks as narrower than a byte."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(name))
