"""``params.json`` of a checkpoint as Meta publishes it, and the transformers configuration that says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgebake.errors import RecipeError

WEIGHTS, PARAMS, WORDS = "consolidated.00.pth", "params.json", "tokenizer.model"
# What params.json leaves to the code that reads it: Llama 3.2's rope scaling and reach, by the model's published
# configuration (Llama 3.1 had a factor of 8).
_ROPE_FACTOR, _LOW_FREQUENCY, _ORIGINAL_REACH, _REACH = 32.0, 1.0, 8192, 131072


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False, defer_build=True)


class Quantised(_Read):
    """How integers of the linear layers were chosen. ``spinquant``: a Hadamard rotation stands before ``w2``."""

    scheme: Literal["int4_weight_int8_dynamic_activation"] = "int4_weight_int8_dynamic_activation"
    group_size: int = Field(ge=2)
    spinquant: bool | None = None
    spin_quant: bool | None = None  # ExecuTorch's word for it

    @property
    def rotates(self) -> bool | None:
        """Is there an online rotation? None where the file does not say it."""
        return self.spin_quant if self.spinquant is None else self.spinquant


class Adapters(_Read):
    """Low-rank adapters: ``y += scale * B A x``."""

    rank: int = Field(ge=1)
    scale: float = 2.0  # ExecuTorch's where the file says nothing


class Params(_Read):
    """What ``params.json`` says; keys that are not listed here say nothing of the network's function."""

    dim: int = Field(ge=2)
    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int | None = Field(None, ge=1)
    vocab_size: int = Field(ge=2)
    hidden_dim: int | None = Field(None, ge=2)
    ffn_dim_multiplier: float | None = None
    multiple_of: int = Field(256, ge=1)
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    rope_scale_factor: float | None = None
    high_freq_factor: float = 4.0
    quantization_args: Quantised | None = None
    lora_args: Adapters | None = None

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers: two thirds of ``4 dim``, scaled and rounded up as Meta's code does."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.dim // self.n_heads


def read(folder: Path) -> Params:
    """Of ``folder``; RecipeError naming the key that is missing or wrong."""
    file = folder / PARAMS
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{PARAMS} of {folder.name!r} cannot be read: {error}", where="model.path", fix="copy the checkpoint again"
        ) from None
    try:
        found = Params.model_validate(raw)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"])) or "it"
        raise RecipeError(
            f"{PARAMS} of {folder.name!r}: {key}: {detail['msg']}",
            where="model.path",
            fix="give the params.json of a Llama 3 checkpoint, as it was published",
        ) from None
    if found.dim % found.n_heads or found.n_heads % (found.n_kv_heads or found.n_heads) or found.head % 2:
        raise RecipeError(
            f"{PARAMS} of {folder.name!r}: {found.n_heads} heads and {found.n_kv_heads} key/value heads do not "
            f"divide {found.dim} values evenly",
            where="model.path",
            fix="give the params.json that belongs to the checkpoint",
        )
    return found


def check_folder(folder: Path) -> None:
    """RecipeError where ``folder`` is no checkpoint in one part as Meta publishes it."""
    missing = [name for name in (PARAMS, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise RecipeError(
            f"{folder.name!r} has no {' and no '.join(missing)}",
            where="model.path",
            fix=f"give the folder with {WEIGHTS}, {PARAMS} and {WORDS}, as Meta publishes it",
        )
    parts = sorted(file.name for file in folder.glob("consolidated.*.pth"))
    if len(parts) > 1:
        raise RecipeError(
            f"{folder.name!r} holds its weights in {len(parts)} parts ({parts[-1]})",
            where="model.path",
            fix="only checkpoints in one part are read; larger models come as transformers folders",
        )
    if not any((folder / name).is_file() for name in (WORDS, "tokenizer.json")):
        raise RecipeError(
            f"{folder.name!r} has no {WORDS}", where="model.path", fix=f"copy {WORDS} or a tokenizer.json beside it"
        )


def configuration(params: Params, *, tied: bool) -> dict[str, Any]:
    """``config.json`` of the same network; ``tied``: the head's weights are the embedding's.

    Rope scaling by wavelength (Llama 3.1, https://arxiv.org/abs/2407.21783) as transformers' ``llama3`` has it.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
    if params.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": params.rope_scale_factor or _ROPE_FACTOR,
            "low_freq_factor": _LOW_FREQUENCY,
            "high_freq_factor": params.high_freq_factor,
            "original_max_position_embeddings": _ORIGINAL_REACH,
        }
    first = params.vocab_size - 256  # of the special tokens, which are the last
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params.dim,
        "intermediate_size": params.inner,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "head_dim": params.head,
        "vocab_size": params.vocab_size,
        "max_position_embeddings": _REACH if params.use_scaled_rope else _ORIGINAL_REACH,
        "rms_norm_eps": params.norm_eps,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        **({"bos_token_id": first, "eos_token_id": [first + 1, first + 8, first + 9]} if first > 0 else {}),
    }
