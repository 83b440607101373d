"""Tiny random decoders of several architectures with outlier channels, and what a step makes of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import transformers

from edgebake.compress import _decoder
from edgebake.target import ModuleRequest
from edgebake.types import Assignment, ModuleKind

HIDDEN, INNER, VOCABULARY, LENGTH = 96, 192, 128, 24
GPTQ = {"damping": 0.01, "activation_order": True}  # its options where a recipe says nothing
_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


class Network(torch.nn.Module):
    """As model sources wrap decoders: ids -> (logits,)."""

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.wrapped(input_ids=ids, use_cache=False).logits,)


def network(kind: str = "Llama", *, tied: bool = False, **more: Any) -> Network:
    """A ``kind`` decoder, always the same; a few channels of its residual stream are much larger than the others."""
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, "tie_word_embeddings": tied, **more})
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for parameter in made.parameters():
            parameter.requires_grad_(False).mul_(3 if parameter.ndim > 1 else 1)
        for name, parameter in made.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(0.5, 1.5)
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
        made.model.embed_tokens.weight[:, ::31] *= 12
        for layer in made.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[::31] *= 6
    return Network(made)


def any_network(kind: str, **more: Any) -> Network:
    """A ``kind`` decoder as it is made, whatever its parts are called."""
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **more})
    return Network(getattr(transformers, f"{kind}ForCausalLM")(config).eval())


def ids(count: int = 4, seed: int = 1) -> list[torch.Tensor]:
    """Calls' inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator) for _ in range(count)]


def linears(module: torch.nn.Module, scheme: str) -> dict[str, str]:
    """``scheme`` for every linear layer inside the decoder layers."""
    names = [n.removeprefix("wrapped.") for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
    return {name: scheme for name in names if "lm_head" not in name}


def request(
    module: torch.nn.Module,
    schemes: Mapping[str, str],
    said: list[str] | None = None,
    calls: list[torch.Tensor] | None = None,
    **options: Any,
) -> ModuleRequest:
    """A step's request whose calibration samples are ``calls``."""
    given = ids() if calls is None else calls

    def run(network: torch.nn.Module) -> None:
        for call in given:
            network(call)

    kinds: dict[str, ModuleKind] = dict.fromkeys(schemes, "linear")
    return ModuleRequest(
        module=module,
        assignment=Assignment(schemes=schemes, kinds=kinds),
        options=options,
        run_calibration=run,
        tell=(said if said is not None else []).append,
    )


def after(
    method: ModuleType,
    module: torch.nn.Module,
    scheme: str = "w4",
    calls: list[torch.Tensor] | None = None,
    **options: Any,
) -> tuple[Any, list[str]]:
    """A changed copy of ``module``, whose tensors it shares until they change, and what ``method`` told."""
    said: list[str] = []
    shared = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    return method.apply(request(shared, linears(shared, scheme), said, calls, **options)), said


def logits(module: torch.nn.Module, seed: int = 2) -> torch.Tensor:
    """On ids that are not among the calibration samples."""
    with torch.no_grad():
        return torch.cat([module(call)[0] for call in ids(4, seed)])


def decibels(wanted: torch.nn.Module, got: torch.nn.Module) -> float:
    """How near the logits are."""
    return _decoder.decibels(logits(wanted), logits(got))
