"""The parts of a Llama-architecture decoder by what they do, wherever in a network it stands.

RMSNorm, attention and a gated MLP as Llama, Qwen2, Qwen3, Mistral and SmolLM have them, with transformers' names of
their parts. Names alone prove little: normalisations are computed to see what they are, and methods that use these
parts hold the network's outputs against those before (``same_outputs``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.buffers import untouched
from edgebake.errors import RecipeError, StageFailed
from edgebake.types import canonical_module_name

if TYPE_CHECKING:
    import torch

    from edgebake.target import ModuleRequest

    Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named inputs

LEAST_DB = 80.0  # that rewriting weights in float32 may leave between outputs before and after
_LAYER_PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer; ``head`` is the size of an attention head."""

    name: str
    attention_norm: torch.nn.Module
    q: torch.nn.Linear
    k: torch.nn.Linear
    v: torch.nn.Linear
    o: torch.nn.Linear
    mlp_norm: torch.nn.Module
    gate: torch.nn.Linear
    up: torch.nn.Linear
    down: torch.nn.Linear
    head: int


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder with its table of embeddings, final normalisation and head."""

    table: torch.nn.Embedding
    layers: tuple[Layer, ...]
    norm: torch.nn.Module
    head: torch.nn.Linear

    @property
    def tied(self) -> bool:
        """Do table and head share their weight?"""
        return self.table.weight is self.head.weight


class _Enough(Exception):
    """Ends a calibration run whose first call is all that is needed."""


def decoder_of(module: torch.nn.Module, method: str) -> Decoder:
    """The decoder in ``module``; RecipeError naming what is missing or is not as in Llama."""
    import torch

    outer = next((m for m in module.modules() if hasattr(m, "lm_head") and hasattr(m, "model")), None)
    inner: Any = getattr(outer, "model", None)
    if outer is None or not all(hasattr(inner, part) for part in ("embed_tokens", "layers", "norm")):
        raise _refusal(method, "the network has no embed_tokens, layers, norm and lm_head")
    names = {id(part): canonical_module_name(path) for path, part in module.named_modules()}
    layers = tuple(_layer(layer, names[id(layer)], method) for layer in inner.layers)
    found = Decoder(table=inner.embed_tokens, layers=layers, norm=inner.norm, head=outer.lm_head)  # type: ignore[arg-type]
    norms = [found.norm, *(n for layer in layers for n in (layer.attention_norm, layer.mlp_norm))]
    for norm in norms:
        if not _is_rms_norm(norm):
            kind = type(norm).__name__
            raise _refusal(method, f"{names[id(norm)]} is a {kind}, which is no x / rms(x) * weight")
    if not isinstance(found.table, torch.nn.Embedding) or not isinstance(found.head, torch.nn.Linear):
        raise _refusal(method, "its embed_tokens is no Embedding, or its lm_head no Linear")
    return found


def _layer(layer: torch.nn.Module, name: str, method: str) -> Layer:
    import torch

    parts: list[Any] = []
    for path in _LAYER_PARTS:
        try:
            part = layer.get_submodule(path)
        except AttributeError:
            raise _refusal(method, f"{name} has no {path}") from None
        if "norm" not in path and not isinstance(part, torch.nn.Linear):
            raise _refusal(method, f"{name}.{path} is a {type(part).__name__}, not a Linear")
        parts.append(part)
    head = getattr(layer.get_submodule("self_attn"), "head_dim", None)
    if not isinstance(head, int):
        raise _refusal(method, f"{name}.self_attn has no head_dim")
    attention_norm, q, k, v, o, mlp_norm, gate, up, down = parts
    return Layer(
        name=name,
        attention_norm=attention_norm,
        q=q,
        k=k,
        v=v,
        o=o,
        gate=gate,
        up=up,
        down=down,
        mlp_norm=mlp_norm,
        head=head,
    )


def _refusal(method: str, why: str) -> RecipeError:
    return RecipeError(
        f"{method} works on decoders built like Llama, and {why}",
        where=f"compress.steps: {method}",
        fix="take the step out; gptq works on every network with linear layers",
    )


def _is_rms_norm(norm: Any) -> bool:
    """Is it ``weight * x / sqrt(mean(x^2) + eps)``? Gemma's has ``1 + weight``, LayerNorm subtracts the mean."""
    import torch

    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or getattr(norm, "bias", None) is not None:
        return False
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    x = torch.linspace(-1, 3, weight.numel()).sin()[None] + 0.5
    with torch.no_grad():
        wanted = weight * x / (x.square().mean() + (eps or 0.0)).sqrt()
        return bool(torch.allclose(norm(x), wanted, rtol=1e-4, atol=1e-6))


def put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Give ``module`` a new parameter in float32; the old one may belong to the float reference, too."""
    import torch

    setattr(module, name, torch.nn.Parameter(value.detach().float().contiguous(), requires_grad=False))


def fold_norms(decoder: Decoder) -> None:
    """Move the weights of all normalisations into the linear layers that read them; table and head come apart."""
    import torch

    readers: list[tuple[torch.nn.Module, tuple[torch.nn.Linear, ...]]] = [(decoder.norm, (decoder.head,))]
    readers += [(layer.attention_norm, (layer.q, layer.k, layer.v)) for layer in decoder.layers]
    readers += [(layer.mlp_norm, (layer.gate, layer.up)) for layer in decoder.layers]
    for norm, linears in readers:
        weight = norm.get_parameter("weight").detach()
        for linear in linears:
            put(linear, "weight", linear.weight.detach().double() * weight.double())
        put(norm, "weight", torch.ones_like(weight))


# --- the same function ------------------------------------------------------------------------------------------------


def calls_of(request: ModuleRequest, most: int | None = None) -> list[Call]:
    """What the network is given in its calls on calibration samples, the first ``most``; RecipeError without any.

    Of a network that keeps caches, those calls that find them as they are now: others make no sense by themselves.
    """
    import torch

    found: list[Call] = []
    start = [(buffer, buffer.clone()) for buffer in request.module.buffers()]

    def watch(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if all(torch.equal(buffer, value) for buffer, value in start):
            found.append((args, dict(kwargs)))
        if len(found) == most:
            raise _Enough

    hook = request.module.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with torch.no_grad(), untouched(request.module), suppress(_Enough):
            request.run_calibration(request.module)
    finally:
        hook.remove()
    if not found:
        raise RecipeError(
            "no calibration sample calls the network", where="samples.calibration", fix="give at least one that does"
        )
    return found


def first_tensor(output: Any) -> torch.Tensor:
    """The first floating tensor of what a network returns: a language model's logits."""
    import torch

    values = output.values() if isinstance(output, dict) else output
    if isinstance(values, torch.Tensor):
        return values
    return next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())


@contextmanager
def same_outputs(request: ModuleRequest, method: str) -> Iterator[None]:
    """What runs inside must leave the network's outputs as they are; how near they stayed is told.

    StageFailed below ``LEAST_DB``, by the first output of the first call on calibration samples.
    """
    call = calls_of(request, most=1)[0]
    before = _outputs(request.module, call)
    yield
    ratio = decibels(before, _outputs(request.module, call))
    if not ratio >= LEAST_DB:
        raise StageFailed(
            f"{method} changed what the network computes: its outputs are {ratio:.1f} dB from those before, not "
            f"{LEAST_DB:g}",
            where=f"compress.steps: {method}",
            fix="the network is not built as its names say: take the step out",
        )
    request.tell(f"{method}: float outputs unchanged to {min(ratio, 200):.0f} dB")


def decibels(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Signal over the squared difference; infinite where there is none."""
    noise = float((wanted.double() - got.double()).square().sum())
    signal = float(wanted.double().square().sum())
    return 10 * math.log10(signal / noise) if noise and signal else math.inf if not noise else -math.inf


def _outputs(module: torch.nn.Module, call: Call) -> torch.Tensor:
    import torch

    with torch.no_grad(), untouched(module):
        return first_tensor(module(*call[0], **call[1])).detach().clone()
