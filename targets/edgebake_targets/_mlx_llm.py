"""Decoders for ExecuTorch's MLX backend: its own operators for a key/value cache in the place of ``edgebake``'s.

They are ``mlx::kv_cache_update`` and ``mlx::custom_sdpa`` (``backends/mlx/custom_ops.py`` of ExecuTorch), which keep
heads before rows: a cache is (1, heads, context, width), where ``edgebake``'s is (1, context, heads, width).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake.types import Traced
from edgebake_targets._decoders import heads_first, without_caches

if TYPE_CHECKING:
    import torch


def with_own_operators(traced: Traced) -> Traced:
    """``traced`` with MLX's operators in the place of ``edgebake``'s; itself where it is no decoder.

    Weights are shared. Its caches are no buffers that a call begins with: a row is written before it is read.
    """
    if traced.signature.language is None:
        return traced
    import executorch.backends.mlx.custom_ops  # noqa: F401  registers torch.ops.mlx
    import torch

    ((name, program),) = traced.programs.items()
    size = traced.signature.methods[name].inputs[0].shape[1]
    varies = {}
    if isinstance(size, str):
        bounds = traced.signature.dims[size]
        varies = {1: torch.export.Dim(size, min=bounds.min, max=bounds.max)}
    with torch.no_grad():
        exported = torch.export.export(
            _rewritten(program), program.example_inputs[0], dynamic_shapes=(varies, {}), strict=False
        )
    return Traced(programs={name: exported}, signature=without_caches(traced.signature))


def _rewritten(program: torch.export.ExportedProgram) -> torch.nn.Module:
    import torch

    module: Any = program.module(check_guards=False)
    heads_first(module)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.edgebake.update_cache.default:
            node.target = _put
        elif node.target is torch.ops.edgebake.cached_attention.default:
            node.target = _attend
    module.graph.lint()
    module.recompile()
    return module  # type: ignore[no-any-return]


def _put(value: torch.Tensor, cache: torch.Tensor, start: int) -> torch.Tensor:
    import torch

    found: torch.Tensor = torch.ops.mlx.kv_cache_update(cache, value.transpose(1, 2), start)
    return found


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """(1, tokens, heads, width) each for query and result; caches (1, shared heads, context, width)."""
    import torch

    given = (query.transpose(1, 2), keys, values, start)
    found: torch.Tensor = torch.ops.mlx.custom_sdpa(*given, is_causal=True, scale=scale)
    return found.transpose(1, 2)
