"""The weights of a transformers decoder, read off its ``config.json`` alone: no torch, no transformers, no weights.

Every family below is written as its ``modeling_<family>.py`` builds it (transformers 5): which projections have a
bias, how many norms stand in a layer, what ties the head to the embedding when ``config.json`` does not say it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgebake.errors import RecipeError
from edgebake.wording import said

Part = Literal["embedding", "attention", "mlp", "norms", "head"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "norms", "head")
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One module's parameters.

    ``shape``: (output channels, input channels), (rows, width) of an embedding, (width,) of a norm. ``tied``: the
    values are the embedding's, so that a checkpoint stores them once; a runtime may need them twice.
    """

    name: str
    part: Part
    kind: Literal["linear", "embedding", "norm"]
    shape: tuple[int, ...]
    bias: int = 0
    tied: bool = False

    @property
    def values(self) -> int:
        """How many numbers the weight holds, its bias left out."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What predictions need to know of a decoder. Windows of attention are left out: caches here keep all tokens."""

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    layers: int
    weights: tuple[Weight, ...]

    @property
    def parameters(self) -> int:
        """Parameters as a checkpoint counts them: tied ones once."""
        return sum(w.bias + (0 if w.tied else w.values) for w in self.weights)

    @property
    def tied(self) -> bool:
        """Whether the head reads the embedding's values."""
        return any(weight.tied for weight in self.weights)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How a model type departs from Llama: a gated MLP without biases and two norms a layer."""

    tied: bool = False  # where config.json does not say it
    head_dim: int | None = None  # where config.json does not say it: None means hidden / heads
    qkv_bias: bool = False
    head_norms: bool = False  # queries and keys are normalised per head
    norms: int = 2  # in a layer
    fused: bool = False  # one weight for queries, keys and values, one for gate and up
    plain: bool = False  # Phi: fc1 and fc2, biases everywhere, LayerNorms with bias, one of them a layer


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(),
    "smollm3": _Family(tied=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(head_dim=128, head_norms=True),
    "gemma": _Family(tied=True, head_dim=256),
    "gemma2": _Family(tied=True, head_dim=256, norms=4),
    "gemma3_text": _Family(tied=True, head_dim=256, norms=4, head_norms=True),
    "phi": _Family(plain=True, norms=1),
    "phi3": _Family(fused=True),
}
FAMILIES = tuple(_FAMILIES)


class _Config(BaseModel):
    """What is read of config.json; other keys are none of our business."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    model_type: str
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, le=1000)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    vocab_size: int = Field(ge=1)
    max_position_embeddings: int = Field(2048, ge=1)
    tie_word_embeddings: bool | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_layernorm: bool = False


def first_layers(decoder: Decoder, count: int) -> Decoder:
    """``decoder`` with its first ``count`` layers alone, under its own norm and head."""
    kept = {f"model.layers.{layer}" for layer in range(count)}
    inside = (w for w in decoder.weights if not w.name.startswith("model.layers."))
    layers = (w for w in decoder.weights if ".".join(w.name.split(".")[:3]) in kept)
    return replace(decoder, layers=min(count, decoder.layers), weights=(*inside, *layers))


def read_config(folder: Path) -> Decoder:
    """The decoder that ``folder``/config.json describes; RecipeError when it is none that can be predicted."""
    file = folder / CONFIG
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        what = f"{said(file.name)} of {said(folder.name)} cannot be read: {error}"
        raise RecipeError(what, where="model.path", fix="give a transformers model folder") from None
    return decoder_of(raw)


def decoder_of(raw: Any) -> Decoder:
    """The decoder of a parsed ``config.json``; RecipeError names what is missing or which families are known."""
    if isinstance(raw, dict) and isinstance(raw.get("text_config"), dict):
        raw = raw["text_config"]  # a model of several modalities: its language model
    try:
        config = _Config.model_validate(raw)
    except ValidationError as error:
        keys = sorted({".".join(map(str, detail["loc"])) or "it" for detail in error.errors()})
        what = f"{CONFIG} describes no decoder: {', '.join(keys)} missing or of the wrong kind"
        raise RecipeError(what, where="model.path", fix="give a transformers decoder's folder") from None
    if config.model_type not in _FAMILIES:
        raise RecipeError(
            f"sizes of {said(config.model_type)} models cannot be predicted",
            where="model.path",
            fix=f"families that can be: {', '.join(FAMILIES)}",
        )
    return _decoder(config, _FAMILIES[config.model_type])


def _decoder(config: _Config, family: _Family) -> Decoder:
    head_dim = config.head_dim or family.head_dim or config.hidden_size // config.num_attention_heads
    return Decoder(
        family=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        weights=tuple(_weights(config, family, head_dim)),
    )


def _weights(config: _Config, family: _Family, head_dim: int) -> Iterator[Weight]:
    hidden, vocabulary = config.hidden_size, config.vocab_size
    tied = family.tied if config.tie_word_embeddings is None else config.tie_word_embeddings
    yield Weight(name="model.embed_tokens", part="embedding", kind="embedding", shape=(vocabulary, hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield from _attention(config, family, head_dim, f"{prefix}.self_attn")
        yield from _mlp(config, family, f"{prefix}.mlp")
        for number in range(family.norms):
            yield _norm(f"{prefix}.norm{number}", hidden, family)
    yield _norm("model.norm", hidden, family)
    bias = vocabulary if family.plain else 0
    yield Weight(name="lm_head", part="head", kind="linear", shape=(vocabulary, hidden), bias=bias, tied=tied)


def _norm(name: str, width: int, family: _Family) -> Weight:
    return Weight(name=name, part="norms", kind="norm", shape=(width,), bias=width if family.plain else 0)


def _attention(config: _Config, family: _Family, head_dim: int, prefix: str) -> Iterator[Weight]:
    queries = config.num_attention_heads * head_dim
    keys = (config.num_key_value_heads or config.num_attention_heads) * head_dim
    biased = family.plain or family.qkv_bias or config.attention_bias
    rows = {"qkv_proj": queries + 2 * keys} if family.fused else {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    for name, size in rows.items():
        yield _linear(f"{prefix}.{name}", "attention", (size, config.hidden_size), biased=biased)
    out = "dense" if family.plain else "o_proj"
    biased = family.plain or config.attention_bias
    yield _linear(f"{prefix}.{out}", "attention", (config.hidden_size, queries), biased=biased)
    if family.head_norms or (family.plain and config.qk_layernorm):
        yield _norm(f"{prefix}.q_norm", head_dim, family)
        yield _norm(f"{prefix}.k_norm", head_dim, family)


def _mlp(config: _Config, family: _Family, prefix: str) -> Iterator[Weight]:
    hidden, inner = config.hidden_size, config.intermediate_size
    rows: Mapping[str, tuple[int, int]]
    if family.plain:
        rows = {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    elif family.fused:
        rows = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    else:
        rows = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for name, shape in rows.items():
        yield _linear(f"{prefix}.{name}", "mlp", shape, biased=family.plain or config.mlp_bias)


def _linear(name: str, part: Part, shape: tuple[int, int], *, biased: bool) -> Weight:
    return Weight(name=name, part=part, kind="linear", shape=shape, bias=shape[0] if biased else 0)
