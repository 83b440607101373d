"""Sentence embeddings: what a sentence-transformers folder does after the encoder, as one exportable module."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError

if TYPE_CHECKING:
    import torch

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "last",
}
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A linear layer after pooling, with its activation's class name in torch.nn."""

    folder: Path
    activation: str


@dataclass(frozen=True, kw_only=True)
class Head:
    """Pooling modes (concatenated), dense layers and normalisation, as the folder's files say."""

    modes: tuple[str, ...] = ("mean",)
    dense: tuple[Dense, ...] = ()
    normalise: bool = False


def is_sentence_transformer(folder: Path) -> bool:
    """Does ``folder`` say how sentences are pooled?"""
    return (folder / "modules.json").is_file()


def read_head(folder: Path) -> Head:
    """The head that ``modules.json`` describes; mean pooling, not normalised, where there is none."""
    if not is_sentence_transformer(folder):
        return Head()
    modes: tuple[str, ...] = ("mean",)
    dense: list[Dense] = []
    normalise = False
    for module in _json(folder / "modules.json"):
        kind, inner = str(module["type"]).rpartition(".")[2], _inside(folder, str(module.get("path", "")))
        if kind == "Pooling":
            modes = _modes(_json(inner / "config.json"))
        elif kind == "Normalize":
            normalise = True
        elif kind == "Dense":
            dense.append(_dense(inner))
        elif kind != "Transformer":
            raise RecipeError(
                f"modules.json asks for {kind!r}, which sentence-embedding does not know",
                where="model.task",
                fix="use task feature-extraction, or a python model that computes the embedding",
            )
    return Head(modes=modes, dense=tuple(dense), normalise=normalise)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        raise RecipeError(f"{file.name} is missing or not JSON", where=str(file), fix="copy the model again") from None


def _inside(folder: Path, path: str) -> Path:
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise RecipeError(f"modules.json names {path!r}, which lies outside the model's folder", where=str(folder))
    return folder / path


def _modes(config: dict[str, Any]) -> tuple[str, ...]:
    on = tuple(mode for key, mode in _MODES.items() if config.get(key))
    unknown = [k for k, v in config.items() if k.startswith("pooling_mode_") and v is True and k not in _MODES]
    if unknown or not on:
        named = config.get("pooling_mode")
        if not unknown and isinstance(named, str) and named in _MODES.values():
            return (named,)
        raise RecipeError(f"pooling {unknown or named!r} is not known", where="1_Pooling/config.json")
    return on


def _dense(folder: Path) -> Dense:
    activation = str(_json(folder / "config.json").get("activation_function", "Identity")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise RecipeError(f"the activation {activation!r} is not known", where=str(folder / "config.json"))
    if not (folder / "model.safetensors").is_file():
        raise RecipeError("the dense layer has no model.safetensors", where=str(folder))
    return Dense(folder=folder, activation=activation)


def _pool(mode: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``f(tokens (batch, seq, width) float32, mask (batch, seq, 1) float32 of 0 and 1) -> (batch, width)``."""
    import torch

    def mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # At least one token is visible, so 1 never binds; sentence-transformers' 1e-9 is 0 in half precision.
        return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1.0)

    def mean_sqrt_len(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1.0).sqrt()

    def largest(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask == 0, -1e4, tokens).amax(1)

    def last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counted = mask.cumsum(1)
        is_last = (counted == counted[:, -1:]) & (mask != 0)
        return (tokens * is_last.to(tokens.dtype)).sum(1)

    def cls(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 - one shape for all modes
        return tokens[:, 0]

    return {"mean": mean, "mean_sqrt_len": mean_sqrt_len, "max": largest, "last": last, "cls": cls}[mode]


def _dense_layers(head: Head) -> torch.nn.Sequential:
    import torch
    from safetensors.torch import load_file

    layers: list[torch.nn.Module] = []
    for dense in head.dense:
        weights = load_file(dense.folder / "model.safetensors")
        width_out, width_in = weights["linear.weight"].shape
        linear = torch.nn.Linear(width_in, width_out, bias="linear.bias" in weights)
        linear.load_state_dict({k.removeprefix("linear."): v.float() for k, v in weights.items()})
        layers += [linear, getattr(torch.nn, dense.activation)()]
    return torch.nn.Sequential(*layers)


def sentence_embedding(encoder: torch.nn.Module, head: Head) -> torch.nn.Module:
    """``encoder`` and ``head`` as one module with the output ``sentence_embedding`` (batch, width) float32.

    ``forward(pooling_mask, **inputs)``: ``pooling_mask`` (batch, seq), 0 for tokens to leave out, None for all.
    """
    import torch

    class SentenceEmbedding(torch.nn.Module):
        """The encoder is ``wrapped``; dense layers after pooling are ``dense``."""

        def __init__(self) -> None:
            super().__init__()
            self.wrapped = encoder
            self.dense = _dense_layers(head)

        def forward(self, pooling_mask: torch.Tensor | None, **inputs: Any) -> dict[str, torch.Tensor]:
            tokens = self.wrapped(**inputs).last_hidden_state
            mask = torch.ones_like(tokens[:, :, :1]) if pooling_mask is None else pooling_mask[:, :, None].to(tokens)
            pooled = torch.cat([_pool(mode)(tokens, mask) for mode in head.modes], dim=1)
            vector = self.dense(pooled)
            vector = torch.nn.functional.normalize(vector, dim=1) if head.normalise else vector
            return {"sentence_embedding": vector}

    return SentenceEmbedding()
