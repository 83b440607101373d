"""Low-rank adapters of linear layers, and the layers' weights as they will be rounded with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.models import _low_rank
from edgebake.scheme import Scheme

if TYPE_CHECKING:
    import torch


@dataclass
class Layer:
    """A linear layer of ``scheme``, its parameter's name, and its adapter: ``weight + factor * b a``."""

    linear: torch.nn.Linear
    name: str
    scheme: Scheme
    a: torch.Tensor  # (rank, columns)
    b: torch.Tensor  # (rows, rank)
    factor: float
    weights: Any  # torchao's fake quantiser, and that of dynamic activations
    inputs: Any | None
    rounded: torch.Tensor | None  # the plainly rounded weight, where the adapter stays beside it

    def sum(self) -> torch.Tensor:
        """The weight and its adapter."""
        return self.linear.weight.detach() + self.factor * (self.b @ self.a)


@dataclass
class Adapted:
    """Every layer that is rounded. ``module`` stays the float network until :meth:`finish`."""

    module: torch.nn.Module
    layers: list[Layer]
    keep: bool

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What learns, always in one order."""
        return [tensor for layer in self.layers for tensor in (layer.a, layer.b)]

    @contextmanager
    def rounding(self) -> Iterator[dict[str, torch.Tensor]]:
        """Parameters for ``torch.func.functional_call``; inside, activations are rounded and adapters count."""
        with ExitStack() as hooks:
            for layer in self.layers:
                if layer.inputs is not None:
                    hooks.callback(layer.linear.register_forward_pre_hook(_rounded_input(layer.inputs)).remove)
                if self.keep:
                    hooks.callback(layer.linear.register_forward_hook(_beside(layer)).remove)
            yield {layer.name: self._weight(layer) for layer in self.layers}

    def _weight(self, layer: Layer) -> torch.Tensor:
        if layer.rounded is not None:
            return layer.rounded
        made: torch.Tensor = layer.weights(layer.sum())
        return made

    def reset(self) -> None:
        """Forget what was learned: the sum is the weight alone."""
        for layer in self.layers:
            layer.b.detach().zero_()

    def finish(self) -> None:
        """Put the rounded weights into the layers, and adapters beside them where they are kept."""
        import torch

        for layer in self.layers:
            with torch.no_grad():
                made = self._weight(layer).detach().clone()
            layer.linear.weight = torch.nn.Parameter(made, requires_grad=False)
            if self.keep and bool(layer.b.any()):
                path, _, leaf = layer.name.removesuffix(".weight").rpartition(".")
                b = (layer.factor * layer.b).detach().clone()
                setattr(self.module.get_submodule(path), leaf, _low_rank.adapt(layer.linear, layer.a.detach(), b))


def of(
    module: torch.nn.Module, chosen: Mapping[str, tuple[torch.nn.Linear, Scheme]], options: Mapping[str, Any]
) -> Adapted:
    """Adapters for ``chosen`` layers: A drawn from ``options["seed"]``, B zero."""
    import torch

    paths = {id(part): path for path, part in module.named_modules()}
    generator, keep = torch.Generator().manual_seed(int(options["seed"])), options["adapters"] == "keep"
    made = []
    for linear, scheme in chosen.values():
        rank = min(int(options["rank"]), *linear.weight.shape)
        a = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        weights, inputs = _quantisers(scheme)
        with torch.no_grad():
            rounded = weights(linear.weight.detach()) if keep else None
        made.append(
            Layer(
                linear=linear,
                name=f"{paths[id(linear)]}.weight",
                scheme=scheme,
                a=a.requires_grad_(),
                b=torch.zeros(linear.out_features, rank).requires_grad_(),
                factor=float(options["alpha"]) / rank,
                weights=weights,
                inputs=inputs,
                rounded=rounded,
            )
        )
    return Adapted(module=module, layers=made, keep=keep)


def _quantisers(scheme: Scheme) -> tuple[Any, Any | None]:
    """torchao's fake quantisers of weights and, where the scheme rounds them, of activations by token."""
    import torch
    from torchao.quantization.granularity import PerAxis, PerGroup, PerToken
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    granularity = PerGroup(scheme.group) if scheme.group else PerAxis(0)
    dtype = getattr(torch, f"int{scheme.weight_bits}")

    # An integer times a scale with a mantissa of 8 bits is exact in float32.
    config = IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=True, scale_precision=torch.bfloat16)
    weights = IntxFakeQuantizer(config)
    if not scheme.dynamic:
        return weights, None
    inputs = IntxFakeQuantizeConfig(getattr(torch, f"int{scheme.activation_bits}"), PerToken(), is_symmetric=False)
    return weights, IntxFakeQuantizer(inputs)


def _rounded_input(quantiser: Any) -> Any:
    return lambda _module, args: (quantiser(args[0]),)


def _beside(layer: Layer) -> Any:
    from torch.nn import functional

    def add(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + layer.factor * functional.linear(functional.linear(args[0], layer.a), layer.b)

    return add


# --- what is kept of a part ------------------------------------------------------------------------------------------


def save(file: Path, leaves: list[torch.Tensor], optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
    """Write ``leaves``, the two moments that AdamW keeps of each, how many steps it took, and ``losses``."""
    import torch
    from safetensors.torch import save_file

    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for number, leaf in enumerate(leaves):
        tensors[f"{number}"] = leaf.detach().contiguous()
        for name, value in optimiser.state[leaf].items():
            tensors[f"{number}.{name}"] = value.contiguous()
    save_file(tensors, file)


def restore(file: Path, leaves: list[torch.Tensor], optimiser: torch.optim.Optimizer) -> list[float]:
    """Put what :func:`save` wrote into ``leaves`` and ``optimiser``; the losses. StageFailed for another network's."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    losses: list[float] = tensors.pop("losses").tolist()
    for number, leaf in enumerate(leaves):
        kept = tensors.get(f"{number}")
        if kept is None or kept.shape != leaf.shape:
            raise StageFailed(
                f"{file.name} of a part of training belongs to another network",
                where="compress.steps: qat",
                fix="run `edgebake clean`",
            )
        with torch.no_grad():
            leaf.copy_(kept)
        prefix = f"{number}."
        optimiser.state[leaf] = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return losses
