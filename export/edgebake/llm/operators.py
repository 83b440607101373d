"""Two operators that an exported decoder keeps its keys and values with, whatever runtime it goes to.

``edgebake::update_cache(value, cache, start_pos)`` and ``edgebake::cached_attention(query, key_cache, value_cache,
start_pos, scale)``: a target that has ``DECODES`` puts operators of its own in their place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REGISTER = "edgebake.llm.operators:register"  # how stored programs name what registers their operators
SCHEMAS = (
    "update_cache(Tensor value, Tensor(a!) cache, SymInt start_pos) -> Tensor",
    "cached_attention(Tensor query, Tensor key_cache, Tensor value_cache, SymInt start_pos, float scale) -> Tensor",
)


@lru_cache
def register() -> Any:
    """Make ``torch.ops.edgebake``; what is returned, torch's library of it, keeps it."""
    import torch

    made: Any = torch.library.Library
    library = made("edgebake", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    for name, computed, shaped in (
        ("update_cache", update, _update_shape),
        ("cached_attention", attend, _attend_shape),
    ):
        library.impl(name, computed, "CPU")
        library.impl(name, shaped, "Meta")
    return library


def update(value: torch.Tensor, cache: torch.Tensor, start: int) -> torch.Tensor:
    """Write ``value``, (1, tokens, heads, width), into ``cache``, (1, context, heads, width), from row ``start`` on.

    Returns a tensor of one element that says nothing: runtimes want every operator to return one.
    """
    import torch

    end = start + value.shape[1]
    if end > cache.shape[1]:
        raise ValueError(f"rows {start} to {end - 1} are past the end of a cache of {cache.shape[1]} tokens")
    cache[:, start:end] = value
    if not value.requires_grad:
        torch.autograd.graph.increment_version(cache)  # below autograd, where an operator runs, nothing counts writes
    return value.new_zeros(1)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    *,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Causal attention of ``query``, (1, tokens, heads, width), over the rows of the caches up to each token's own.

    Token i of the query stands at row ``start + i``. Heads of the query share those of the caches in equal groups
    (grouped-query attention, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

    Only where the float network runs, not in the operator: ``window`` tokens are seen at most, the own one included,
    and scores are ``cap tanh(score / cap)`` (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
    """
    import torch

    tokens, end = query.shape[1], start + query.shape[1]
    if window is not None or cap:
        return _limited(query, keys[:, :end], values[:, :end], start, scale, window or end, cap)
    found = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys[:, :end].transpose(1, 2),
        values[:, :end].transpose(1, 2),
        attn_mask=torch.ones(tokens, end, dtype=torch.bool).tril(diagonal=start),
        scale=scale,
        enable_gqa=query.shape[2] != keys.shape[2],
    )
    return found.transpose(1, 2).contiguous()


def _limited(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    window: int,
    cap: float | None,
) -> torch.Tensor:
    import torch

    tokens, end, shared = query.shape[1], keys.shape[1], query.shape[2] // keys.shape[2]
    keys, values = (rows.repeat_interleave(shared, dim=2) for rows in (keys, values))
    scores = torch.einsum("bqhw,bkhw->bhqk", query, keys) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    seen = torch.ones(tokens, end, dtype=torch.bool).tril(diagonal=start).triu(diagonal=start - window + 1)
    shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhw->bqhw", shares, values).contiguous()


def _update_shape(value: torch.Tensor, _cache: torch.Tensor, _start: int) -> torch.Tensor:
    return value.new_empty(1)


def _attend_shape(
    query: torch.Tensor, _keys: torch.Tensor, _values: torch.Tensor, _start: int, _scale: float
) -> torch.Tensor:
    return query.new_empty(query.shape)
