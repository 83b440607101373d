"""Whole networks for the interpreter: shipped recipes with their weights, and small ones of other families."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coreml_cases import ask, spec
from edgebake import devices
from edgebake.recipe_yaml import read
from edgebake.store import Store
from edgebake.trace import example_inputs, live_modules, trace
from edgebake.types import DimBounds, Loaded, MethodSignature, Signature, TensorSpec
from edgebake.units import units_of
from edgebake.workbench import Bench, load, read_samples
from edgebake_targets import coreml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A network in eval mode, and what it is called with."""

    loaded: Loaded
    photos: tuple[dict[str, torch.Tensor], ...] = ()

    @property
    def module(self) -> nn.Module:
        return self.loaded.methods["forward"]

    def calls(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inputs by name: photos where the network takes images, else of a small size and of the largest."""
        yield from self.photos
        if self.photos:  # on noise the last sums of an image network nearly cancel, in torch's float32 as well
            return
        names = [s.name for s in self.loaded.signature.methods["forward"].inputs]
        for seed, size in ((0, "small"), (1, "max")):
            yield dict(zip(names, example_inputs(self.loaded.signature, "forward", seed, size), strict=True))  # type: ignore[arg-type]

    def outputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """What the float network gives."""
        names = [s.name for s in self.loaded.signature.methods["forward"].outputs]
        with torch.inference_mode():
            return {n: v.numpy() for n, v in zip(names, self.module(*inputs.values()), strict=True)}

    def package(self, folder: Path, scheme: str = "fp32", system: str = "iOS17") -> Path:
        """The network as the coreml target lowers it, every module in ``scheme``."""
        schemes = {m.name: scheme for m in live_modules(self.loaded)}
        lowered = coreml.lower(trace(self.loaded), ask(folder, schemes, scheme, system))
        return folder / lowered.entry


def shipped(recipe: str) -> Whole:
    """The network of a shipped recipe; its weights come from a pip package or a seed."""
    file = read(next(RECIPES.glob(f"*/{recipe}.yaml")))
    unit = units_of(file.recipe, file.base)[0]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(store=Store(Path(scratch)), emit=lambda *_, **__: None, trust=False, device=devices.row)
        loaded = load(bench, unit)
        photos: tuple[dict[str, torch.Tensor], ...] = ()
        if unit.spec.samples.evaluation.kind == "images":
            calls = (sample.calls[0].tensors() for sample in islice(read_samples(bench, unit, "evaluation"), 2))
            photos = tuple({name: torch.from_numpy(value) for name, value in call.items()} for call in calls)
        return Whole(loaded=loaded, photos=photos)


def own(net: nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec], **dims: DimBounds) -> Whole:
    """A network that returns a tuple, with its signature."""
    signature = Signature(methods={"forward": MethodSignature(inputs=tuple(inputs), outputs=tuple(outputs))}, dims=dims)
    return Whole(loaded=Loaded(methods={"forward": net.eval()}, signature=signature, facts={}))


class UNetBlock(nn.Module):
    """Down, attention over the pixels with a text beside it, up again with the skip connection: Stable Diffusion's."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time = nn.Linear(16, width)
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.attention = nn.MultiheadAttention(2 * width, 4, kdim=24, vdim=24, batch_first=True)
        self.layer_norm, self.mix = nn.LayerNorm(2 * width), nn.Linear(2 * width, 4 * width)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.join = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        """x: (1, width, 16, 16), time: (1, 16), text: (1, 7, 24)."""
        silu = nn.functional.silu
        hidden = self.conv1(silu(self.norm1(x))) + self.time(silu(time))[:, :, None, None]
        skip = x + self.conv2(silu(self.norm2(hidden)))
        small = self.down(skip)
        rows = small.flatten(2).transpose(1, 2)
        rows = rows + self.attention(rows, text, text, need_weights=False)[0]
        gate, value = self.mix(self.layer_norm(rows)).chunk(2, dim=-1)
        rows = rows + nn.functional.gelu(gate) * value
        large = nn.functional.interpolate(rows.transpose(1, 2).reshape(small.shape), scale_factor=2.0, mode="nearest")
        return (self.join(torch.cat([self.up(large), skip], dim=1)),)


def unet() -> Whole:
    torch.manual_seed(0)
    inputs = [spec("x", 1, 32, 16, 16), spec("time", 1, 16), spec("text", 1, 7, 24)]
    return own(UNetBlock(), inputs, [spec("y", 1, 32, 16, 16)])


class Hidden(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor]:
        """features: (1, 16, 120)."""
        return (self.network(features).last_hidden_state,)


def whisper() -> Whole:
    """The encoder of a tiny Whisper."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    config = WhisperConfig(
        num_mel_bins=16,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        max_source_positions=60,
    )
    network = WhisperEncoder._from_config(config, attn_implementation="sdpa")
    return own(Hidden(network), [spec("features", 1, 16, 120)], [spec("hidden", 1, 60, 64)])


LENGTH = 32


@dataclass(frozen=True)
class Cache:
    """The part of a transformers cache that attention layers call; ``here`` is true at the new token's place."""

    owner: nn.Module
    here: torch.Tensor

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new key and value, and hand out all of them."""
        held = []
        for name, new in (("keys", key), ("values", value)):
            buffer: Any = getattr(self.owner, f"{name}_{layer}")
            buffer.copy_(torch.where(self.here, new.to(buffer.dtype), buffer))
            held.append(buffer.to(new.dtype))
        return held[0], held[1]


class Decoder(nn.Module):
    """A tiny Llama that decodes a token at a time; its keys and values lie in buffers that it writes."""

    def __init__(self, cache: torch.dtype) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            attn_implementation="eager",
        )
        self.network = LlamaForCausalLM(config).eval().requires_grad_(False)
        shape = (1, 2, LENGTH, 12)
        for layer in range(2):
            self.register_buffer(f"keys_{layer}", torch.zeros(shape, dtype=cache))
            self.register_buffer(f"values_{layer}", torch.zeros(shape, dtype=cache))

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """token: (1, 1), position: (1,) -> logits (1, 1, 96)."""
        model = self.network.model
        steps = torch.arange(LENGTH, dtype=position.dtype)
        cache = Cache(self, (steps == position)[None, None, :, None])
        mask = torch.where(steps <= position, 0.0, -1e4)[None, None, None]
        hidden = model.embed_tokens(token)
        rotary = model.rotary_emb(hidden, position[None])
        for layer in model.layers:
            found = layer(hidden, mask, None, cache, position_embeddings=rotary)  # its name varies by version
            hidden = found[0] if isinstance(found, tuple) else found
        return self.network.lm_head(model.norm(hidden))
