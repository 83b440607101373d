"""Compressed constants (``constexpr_*``); their parameters may themselves be results of such operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgebake_targets import _coreml_decompress as decompress
from edgebake_targets.mil.call import Call, Operator, Unsupported


def _array(call: Call, name: str) -> Any:
    return call[name].numpy()


def _optional(call: Call, name: str) -> Any:
    value = call.get(name)
    return None if value is None else value.numpy()


def _axis(call: Call) -> int | None:
    return call.integer("vector_axis") if call.get("vector_axis") is not None else None


def constexpr_affine_dequantize(call: Call) -> torch.Tensor:
    """8-bit numbers with a scale and a zero point per tensor or channel."""
    data, scale, zero_point = (_array(call, name) for name in ("quantized_data", "scale", "zero_point"))
    return torch.from_numpy(decompress.affine(data, scale, zero_point, call.integer("axis")))


def constexpr_blockwise_shift_scale(call: Call) -> torch.Tensor:
    """Numbers with a scale, and perhaps an offset, per block."""
    parts = (_array(call, "data"), _array(call, "scale"), _optional(call, "offset"))
    return torch.from_numpy(decompress.blockwise(*parts))


def constexpr_cast(call: Call) -> torch.Tensor:
    """float16 kept in the package, float32 in the program."""
    if call.text("output_dtype") not in ("fp32", "float32"):
        raise Unsupported(f"constexpr_cast to {call.text('output_dtype')}")
    return call["source_val"].float()


def constexpr_lut_to_dense(call: Call) -> torch.Tensor:
    """With ``shape`` that of iOS 16, whose indices are packed; else that of iOS 18."""
    indices, table = _array(call, "indices"), _array(call, "lut")
    if call.get("shape") is not None:
        return torch.from_numpy(decompress.packed_table(indices, table, call.integers("shape")))
    return torch.from_numpy(decompress.table(indices, table, _axis(call)))


def constexpr_lut_to_sparse(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the values."""
    mask, indices, table = (_array(call, name) for name in ("indices_mask", "indices_nonzero_data", "lut"))
    mask, values = decompress.table_sparse(mask, indices, table, _axis(call))
    return torch.from_numpy(mask), torch.from_numpy(values)


def constexpr_sparse_to_dense(call: Call) -> torch.Tensor:
    """With ``shape`` that of iOS 16, whose mask is packed; else that of iOS 18."""
    values, mask = _array(call, "nonzero_data"), _array(call, "mask")
    if call.get("shape") is not None:
        return torch.from_numpy(decompress.packed_sparse(values, mask, call.integers("shape")))
    return torch.from_numpy(decompress.sparse(values, mask))


def constexpr_sparse_blockwise_shift_scale(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the values."""
    parts = (_array(call, "data_mask"), _array(call, "nonzero_data"), _array(call, "scale"), _optional(call, "offset"))
    mask, values = decompress.blockwise_sparse(*parts)
    return torch.from_numpy(mask), torch.from_numpy(values)


OPERATORS: Mapping[str, Operator] = {
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
    "constexpr_cast": constexpr_cast,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "constexpr_lut_to_sparse": constexpr_lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": constexpr_sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": constexpr_sparse_to_dense,
}
