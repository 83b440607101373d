"""Small checkpoints in the layouts that Meta publishes, written from seeded weights."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch

from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.types import Loaded

DIM, LAYERS, HEADS, KEPT, INNER, WORDS, GROUP, RANK, SCALE = 64, 2, 4, 2, 256, 512, 32, 4, 2.0
PARAMS: dict[str, Any] = {
    "dim": DIM,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 128,
    "n_heads": HEADS,
    "n_kv_heads": KEPT,
    "n_layers": LAYERS,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": WORDS,
}
QUANTISED = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": GROUP}
MORE: dict[str, dict[str, Any]] = {
    "float": {},
    "spinquant": {"quantization_args": {**QUANTISED, "spinquant": True}},
    "qlora": {"quantization_args": QUANTISED, "lora_args": {"rank": RANK, "scale": SCALE}},
}
INPUTS = {"input_ids": {"shape": [1, "seq"], "dtype": "int64"}}
CACHED = {"tokens": {"shape": [1, "seq"], "dtype": "int64"}, "input_pos": {"shape": [1], "dtype": "int64"}}
SCHEMES = {"model.embed_tokens": "w8", "lm_head": "w8a8d"}


def floats(*, seed: int = 0, head: bool = True) -> dict[str, torch.Tensor]:
    """Float weights under Meta's names."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    made = {"tok_embeddings.weight": drawn(WORDS, DIM, scale=0.6), "norm.weight": 1 + drawn(DIM, scale=0.1)}
    if head:
        made["output.weight"] = drawn(WORDS, DIM, scale=0.3)
    kept = DIM // HEADS * KEPT
    sizes = {"wq": (DIM, DIM), "wk": (kept, DIM), "wv": (kept, DIM), "wo": (DIM, DIM)}
    for layer in range(LAYERS):
        made |= {f"layers.{layer}.attention.{name}.weight": drawn(*size) for name, size in sizes.items()}
        for name, size in {"w1": (INNER, DIM), "w2": (DIM, INNER), "w3": (INNER, DIM)}.items():
            made[f"layers.{layer}.feed_forward.{name}.weight"] = drawn(*size)
        for name in ("attention_norm", "ffn_norm"):
            made[f"layers.{layer}.{name}.weight"] = 1 + drawn(DIM, scale=0.1)
    return made


def quantised(weights: dict[str, torch.Tensor], *, adapters: bool) -> dict[str, torch.Tensor]:
    """Integers and scales in the place of matrices: 4 bits in groups inside layers, 8 bits by row outside."""
    generator, made = torch.Generator().manual_seed(7), {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            made[name] = weight
            continue
        inside = name.startswith("layers.")
        bits, groups = (4, weight.reshape(len(weight), -1, GROUP)) if inside else (8, weight[:, None])
        scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
        q = torch.clamp(torch.round(groups / scale[..., None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        own = name.removesuffix(".weight")
        made[name], made[f"{own}.scales"] = q.reshape(weight.shape).to(torch.int8), scale
        if adapters and inside:
            a = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
            b = torch.randn(len(weight), RANK, generator=generator) * 0.1
            made |= {f"{own}.adaptor.A.weight": a.bfloat16(), f"{own}.adaptor.B.weight": b.bfloat16()}
    return made


def write(folder: Path, kind: str = "spinquant", *, head: bool = True, **params: Any) -> dict[str, torch.Tensor]:
    """A checkpoint of ``kind`` with its tokenizer of single bytes; what its tensors are. ``params`` replace keys."""
    folder.mkdir(parents=True, exist_ok=True)
    state = floats(head=head)
    if kind != "float":
        state = quantised(state, adapters=kind == "qlora")
    save(folder, state)
    said = {**PARAMS, **MORE[kind], **params}
    (folder / "params.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    words = (f"{base64.b64encode(bytes([code])).decode()} {code}" for code in range(256))
    (folder / "tokenizer.model").write_text("\n".join(words) + "\n")
    return state


def save(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """The tensors as the checkpoint in ``folder`` keeps them."""
    torch.save(state, folder / "consolidated.00.pth")


def dequantised(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 weights under Meta's names, adapters merged."""
    made = {}
    for name, stored in state.items():
        own = name.removesuffix(".weight")
        if ".adaptor." in name or name.endswith(".scales"):
            continue
        weight = stored.float()
        if f"{own}.scales" in state:
            scales = state[f"{own}.scales"].reshape(len(stored), -1, 1)
            weight = (weight.reshape(len(stored), scales.shape[1], -1) * scales).reshape(stored.shape)
        if f"{own}.adaptor.A.weight" in state:
            a, b = (state[f"{own}.adaptor.{part}.weight"].float() for part in "AB")
            weight = weight + SCALE * b @ a
        made[name] = weight
    return made


def component(folder: Path, *, context: int | None = None, **options: Any) -> dict[str, Any]:
    """What a recipe says of the checkpoint in ``folder``."""
    cached = {} if context is None else {"context": context}
    return {
        "model": {"source": "meta", "path": str(folder), "options": options, **cached},
        "inputs": INPUTS if context is None else CACHED,
        "dims": {"seq": {"min": 2 if context is None else 1, "max": 16}},
    }


def request(folder: Path, *, context: int | None = None, **options: Any) -> LoadRequest:
    """To load the checkpoint in ``folder``."""
    asked = Component.model_validate(component(folder, context=context, **options))
    return LoadRequest(model=asked.model, component=asked, base=folder.parent)


def loaded(folder: Path, *, context: int | None = None, **options: Any) -> Loaded:
    """The checkpoint in ``folder`` as the source loads it."""
    from edgebake.models import meta

    return meta.load(request(folder, context=context, **options))
