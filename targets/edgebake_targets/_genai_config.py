"""What a decoder's graph for onnxruntime-genai needs to know, read off config.json, and genai_config.json beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
GRAPH, CONFIG = "model.onnx", "genai_config.json"
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_WINDOWED = ("gemma2", "gemma3_text", "mistral")
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
# What reads the folder: ``written_for`` is the release whose settings are written and whose text the tests hold against
# ours; ``oldest`` the first that knows every family here, and with the oldest ONNX Runtime whose kernels hold 8 bits
# gives the same tokens (llama, qwen2 and qwen3; fp32, w4g32a8d).
RUNTIME = {
    "name": "onnxruntime-genai",
    "written_for": "0.18",
    "oldest": "0.9.0",
    "oldest_onnxruntime": "1.22.0",
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One decoder: sizes, and where its family departs from Llama's. ``rope`` is config.json's, scaling included.

    ``windows``: how many tokens each layer looks back over, its own included; None: all. ``local_rope``: of layers with
    a window, where it is another. ``fused``: one matrix for queries, keys and values, one for gate and up. ``softcap``
    of attention scores and ``final_softcap`` of logits, ``c tanh(x / c)`` (Gemma 2, arXiv:2408.00118, section 2).
    """

    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    rope: Mapping[str, Any]
    activation: str = "silu"
    norm_offset: float = 0.0  # what normalisations add to their weight
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    softcap: float = 0.0
    final_softcap: float = 0.0
    post_norms: bool = False  # attention and MLP are normalised once more before they are added
    fused: bool = False
    windows: tuple[int | None, ...] = ()
    local_rope: Mapping[str, Any] | None = None


def read_spec(folder: Path) -> Spec:
    """Of ``folder``/config.json; RecipeError as of :func:`spec_of`."""
    return spec_of(json.loads((folder / "config.json").read_text("utf-8")))


def spec_of(raw: Mapping[str, Any]) -> Spec:
    """Of a parsed config.json; RecipeError for families and rotary embeddings that the graph has no nodes for."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        what = f"there is no onnxruntime-genai graph for {family!r} models"
        raise RecipeError(what, where="model.path", fix=f"families that have one: {', '.join(FAMILIES)}")
    activation = _activation(raw, family)
    rope, local = _ropes(raw, family)
    absent = [name for name in _SIZES if raw.get(name) is None]
    if absent:
        fix = "save the configuration in full: AutoConfig.from_pretrained(...).save_pretrained(folder)"
        raise RecipeError(f"config.json does not say {', '.join(absent)}", where="model.path", fix=fix)
    attention_bias = bool(raw.get("attention_bias", False))
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or _HEAD_DIMS.get(family) or raw["hidden_size"] // heads
    return Spec(
        family=family,
        hidden=raw["hidden_size"],
        inner=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocabulary=raw["vocab_size"],
        positions=raw.get("max_position_embeddings", 2048),
        epsilon=raw.get("rms_norm_eps", 1e-5 if family == "phi3" else 1e-6),
        tied=bool(raw.get("tie_word_embeddings", family in _GEMMAS)),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=family != "qwen2" and attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        head_norms=family in ("qwen3", "gemma3_text"),
        rope=rope,
        local_rope=local,
        activation=activation,
        windows=tuple(_windows(raw, family)),
        **(_gemma(raw, family) if family in _GEMMAS else {"fused": family == "phi3"}),
    )


_HEAD_DIMS = {"qwen3": 128, **dict.fromkeys(_GEMMAS, 256)}  # where config.json does not say it


def _activation(raw: Mapping[str, Any], family: str) -> str:
    key = "hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"
    found = str(raw.get(key) or ("gelu_pytorch_tanh" if family in _GEMMAS else "silu"))
    if found not in _ACTIVATIONS:
        what = f"the activation {found!r} has no nodes here"
        raise RecipeError(what, where="model.path", fix=f"use a model with one of {', '.join(_ACTIVATIONS)}")
    return found


def _gemma(raw: Mapping[str, Any], family: str) -> dict[str, Any]:
    """As modeling_gemma.py, modeling_gemma2.py and modeling_gemma3.py compute (transformers 5)."""
    scalar, capped = raw.get("query_pre_attn_scalar", 256), family == "gemma2"
    return {
        "norm_offset": 1.0,
        "embedding_scale": raw["hidden_size"] ** 0.5,
        "attention_scale": None if family == "gemma" else scalar**-0.5,
        "softcap": float(raw.get("attn_logit_softcapping", 50.0 if capped else None) or 0.0),
        "final_softcap": float(raw.get("final_logit_softcapping", 30.0 if capped else None) or 0.0),
        "post_norms": family != "gemma",
    }


def _windows(raw: Mapping[str, Any], family: str) -> Iterator[int | None]:
    """Of each layer, as transformers fills in what config.json leaves out.

    Gemma 2 has one in every other layer, Gemma 3 in all but every sixth, Qwen from ``max_window_layers`` on.
    """
    window, kinds = raw.get("sliding_window", 4096 if family in _WINDOWED else None), raw.get("layer_types")
    if family not in _WINDOWED and not raw.get("use_sliding_window", family == "phi3"):
        window = None
    every = raw.get("sliding_window_pattern", {"gemma2": 2, "gemma3_text": 6}.get(family, 0))
    first = raw.get("max_window_layers", 28) if family.startswith("qwen") else 0
    for layer in range(raw["num_hidden_layers"]):
        wide = kinds[layer] == "full_attention" if kinds else layer < first or bool(every and not (layer + 1) % every)
        yield None if wide else window


def _ropes(raw: Mapping[str, Any], family: str) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Rotary embeddings of layers that see everything, and of those with a window where they have others."""
    given = raw.get("rope_parameters") or {}
    whole, local = {**(raw.get("rope_scaling") or {}), **given}, None
    if "full_attention" in given:
        whole, local = given["full_attention"], _rope(given["sliding_attention"], 10000.0)
    elif family == "gemma3_text":
        local = _rope({"rope_theta": raw.get("rope_local_base_freq", 10000.0)}, 10000.0)
    return _rope(whole, raw.get("rope_theta", 1e6 if family == "gemma3_text" else 10000.0)), local


def _rope(rope: Mapping[str, Any], theta: float) -> Mapping[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        what = f"rotary embeddings of the kind {kind!r} have no nodes here"
        what = what if kind not in ("default", "linear", "llama3") else "rotary embeddings of a part have no nodes here"
        raise RecipeError(what, where="model.path", fix="kinds that have: default, linear, llama3, of whole heads")
    return {**rope, "rope_type": kind, "rope_theta": float(rope.get("rope_theta", theta))}


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def rotary_tables(rope: Mapping[str, Any], head_dim: int, context: int) -> tuple[Floats, Floats]:
    """Cosines and sines, (context, head_dim / 2): Su 2021 (RoFormer), equation 15.

    ``linear`` divides positions by a factor (Chen 2023); ``llama3`` divides low frequencies only, as Llama 3.1's
    reference code does: wavelengths beyond ``original / low_freq_factor`` in full, those below ``original /
    high_freq_factor`` not at all, and those between by their share.
    """
    import numpy as np

    steps = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = 1.0 / rope["rope_theta"] ** steps
    if rope["rope_type"] == "linear":
        frequencies /= rope["factor"]
    elif rope["rope_type"] == "llama3":
        low, high, original = (rope[f"{k}"] for k in ("low_freq_factor", "high_freq_factor", _ORIGINAL))
        wavelengths = 2 * math.pi / frequencies
        share = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (share + (1 - share) / rope["factor"])
    angles = np.arange(context, dtype=np.float64)[:, None] * frequencies[None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


_ORIGINAL = "original_max_position_embeddings"


def write_config(folder: Path, spec: Spec, source: Path, context: int, stop: Sequence[int] = ()) -> str:
    """Write genai_config.json and return its name. The tokenizer's files travel apart.

    ``source`` holds config.json and, where the model has defaults, generation_config.json; ``stop``: the tokens that
    end a text, those of ``source`` where none are given.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    generation = source / "generation_config.json"
    config |= json.loads(generation.read_text("utf-8")) if generation.is_file() else {}
    eos, pad = list(stop) or config.get("eos_token_id"), config.get("pad_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    numbers = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": eos}
    document = {
        "model": {
            "type": spec.family,
            "context_length": context,
            "vocab_size": spec.vocabulary,
            **{name: number for name, number in numbers.items() if number is not None},
            "pad_token_id": first_eos if pad is None else pad,
            "decoder": _decoder(spec),
        },
        "search": _search(config, context),
    }
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    return CONFIG


def _decoder(spec: Spec) -> dict[str, Any]:
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _search(config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The model's own generation defaults; one buffer holds the cache before and after a step."""
    return {
        "do_sample": bool(config.get("do_sample", False)),
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": float(config.get("repetition_penalty") or 1.0),
        "temperature": float(config.get("temperature") or 1.0),
        "top_k": int(config.get("top_k") or 50),
        "top_p": float(config.get("top_p") or 1.0),
    }
