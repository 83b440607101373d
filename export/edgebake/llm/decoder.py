"""A transformers decoder with a static key/value cache: ``tokens (1, seq), input_pos (1) -> logits (1, seq, words)``.

One method serves prefill and decode, called as ExecuTorch's own language-model runner calls it. Attention goes through
transformers' attention interface: families that use it need no code here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.mapped import clear
from edgebake.recipe import DECODER_INPUTS

if TYPE_CHECKING:
    import torch

ATTENTION = "edgebake-cached"
TOKENS, POSITION = DECODER_INPUTS
CACHES = ("key_cache", "value_cache")
_START = "edgebake_start"  # the keyword that carries the row of the first token through the network


def with_caches(network: torch.nn.Module, context: int) -> torch.nn.Module:
    """``network`` with buffers for ``context`` keys and values in each of its attention modules; changed in place.

    RecipeError where the network reaches less far than ``context``, or does not attend through that interface.
    """
    import torch
    from transformers import AttentionInterface

    from edgebake.llm import operators

    operators.register()
    refuse(network.config, context)
    shapes: dict[torch.nn.Module, tuple[int, ...]] = {}

    def record(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> Any:
        shapes[module] = (1, context, key.shape[1], key.shape[3])
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register(ATTENTION, record)
    network.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    with torch.no_grad():
        network(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    AttentionInterface.register(ATTENTION, _attention)
    if not shapes:
        raise RecipeError(
            f"{type(network).__name__} does not attend through transformers' attention interface",
            where="model.context",
            fix="remove context: the network is then built without a cache",
        )
    for module, shape in shapes.items():
        for name in CACHES:  # (1, context, heads, width), as ExecuTorch's operators have it
            empty = torch.zeros(shape)
            clear(empty)  # no memory for rows that nobody wrote yet
            module.register_buffer(name, empty, persistent=False)
    return network


def first_layers(network: torch.nn.Module, count: int, where: str = "model.layers") -> torch.nn.Module:
    """``network`` with its first ``count`` layers alone, under its own norm and head; changed in place.

    RecipeError where it has no more than ``count``, or its layers are not in one list.
    """
    import torch

    config: Any = network.config.get_text_config()  # type: ignore[operator, union-attr]
    total = config.num_hidden_layers
    lists = [m for m in network.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == total]
    if count >= total or len(lists) != 1:
        what = f"the model has {total} layers" if count >= total else f"{type(network).__name__} has no list of layers"
        fix = f"give layers: {total - 1} or fewer" if count >= total else "take layers: out"
        raise RecipeError(f"{what}: its first {count} cannot be taken", where=where, fix=fix)
    del lists[0][count:]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    return network


def shortened(before: Mapping[str, torch.nn.Module], after: Mapping[str, torch.nn.Module]) -> str:
    """The configuration of the networks ``after`` where they have fewer layers than ``before``; "" otherwise."""
    found = [next((n for m in side.values() if (n := configured(m)) is not None), None) for side in (before, after)]
    if None in found or depth(found[0]) == depth(found[1]):
        return ""
    network: Any = found[1]
    return str(network.config.to_json_string(use_diff=False))


def configured(module: torch.nn.Module) -> Any:
    """The outermost network of transformers in ``module``; None without one."""
    return next((m for m in module.modules() if hasattr(getattr(m, "config", None), "get_text_config")), None)


def depth(network: Any) -> int | None:
    """Decoder layers of what :func:`configured` gave; None where its configuration does not count them."""
    return getattr(network.config.get_text_config(), "num_hidden_layers", None)


def call(network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of all tokens, (1, seq, words); keys and values of earlier calls are read from the caches."""
    import torch

    tokens, position = given[TOKENS], given[POSITION]
    start = position[0].item()
    context = next(b.shape[1] for name, b in network.named_buffers() if name.endswith(CACHES[0]))
    check: Any = torch._check  # what torch.export may rely on; update_cache says it to whoever runs the network
    check(start >= 0)
    check(start + tokens.shape[1] <= context)
    positions = position + torch.arange(tokens.shape[1])
    made = network(input_ids=tokens, position_ids=positions[None], use_cache=False, **{_START: start})
    return {"logits": made.logits}


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """(1, heads, tokens, width) each -> (1, tokens, heads, width), as transformers' attention interface has it."""
    import torch

    from edgebake.llm import operators

    scale = more.get("scaling") or query.shape[-1] ** -0.5
    window, cap = more.get("sliding_window"), more.get("softcap")
    context = getattr(module, CACHES[0]).shape[1]
    exporting = torch.compiler.is_exporting()  # eager code is differentiable, operators are not
    if exporting:
        _refuse_limited(window, cap, context, "this network")
    put: Any = torch.ops.edgebake.update_cache if exporting else operators.update
    attend: Any = torch.ops.edgebake.cached_attention if exporting else operators.attend
    caches: list[Any] = [getattr(module, name) for name in CACHES]
    for cache, rows in zip(caches, (key, value), strict=True):
        put(rows.transpose(1, 2), cache, more[_START])
    limits = {} if exporting else {"window": window, "cap": cap}
    return attend(query.transpose(1, 2), *caches, more[_START], scale, **limits), None


def refuse(config: Any, context: int) -> None:
    """RecipeError where a network of ``config`` does not reach over ``context`` tokens."""
    longest = getattr(config, "max_position_embeddings", None) or context
    if context > longest:
        raise RecipeError(
            f"the model reaches over {longest} tokens, not {context}",
            where="model.context",
            fix=f"give at most context: {longest}",
        )


def refuse_traced(config: Any, context: int) -> None:
    """RecipeError where the operators of a traced network of ``config`` cannot attend over ``context`` tokens."""
    _refuse_limited(_window(config), getattr(config, "attn_logit_softcapping", None), context, config.model_type)


def _refuse_limited(window: int | None, cap: float | None, context: int, which: str) -> None:
    if window is not None and context > window:
        raise RecipeError(
            f"some layers look back over {window} tokens only, and the cache keeps all {context}",
            where="model.context",
            fix=f"give at most context: {window}, within which these layers see everything, or use onnx-genai",
        )
    if cap:
        raise RecipeError(
            f"{which} caps its attention scores, which the operator of a traced network does not",
            where="model.context",
            fix="use onnx-genai, or remove context: the network is then built without a cache",
        )


def _window(config: Any) -> int | None:
    """Tokens that layers with a sliding or chunked window look back over; None without such layers."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not {"sliding_attention", "chunked_attention"} & set(kinds):
        return None
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((tokens for tokens in found if tokens), default=None)
