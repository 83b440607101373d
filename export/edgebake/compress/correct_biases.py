"""Bias correction: what rounding a layer's weights adds to its output on average is taken off its bias.

Numerics: Nagel, van Baalen, Blankevoort, Welling 2019 (Data-Free Quantization Through Weight Equalization and Bias
Correction, arXiv:1906.04721), section 4.2: with the error ``e`` of the rounded weights, ``E[(W + e) x] - E[W x]`` is
``E[e x]`` for each output channel. The mean is taken on calibration samples in the place of their batch statistics, and
of what the layer really multiplies, the zeros around an image included. Inputs are those of the float network, so that
one run over the samples serves all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.scheme import Scheme, parse
from edgebake.target import ModuleRequest
from edgebake.types import ActsOn, canonical_module_name

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
CALIBRATED = True  # looks at calibration samples
DISTRIBUTIONS = ("torch",)


@dataclass
class _Layer:
    """One layer, the error of its rounded weights, and the sum of what that adds to each output channel."""

    module: Any
    error: torch.Tensor
    total: torch.Tensor
    count: int = 0

    def watch(self, _module: Any, args: tuple[Any, ...], _output: Any) -> None:
        """A forward hook."""
        import torch

        if isinstance(self.module, torch.nn.Linear):
            added = torch.nn.functional.linear(args[0], self.error).reshape(-1, len(self.total))
        else:
            added = self.module._conv_forward(args[0], self.error, None).movedim(1, -1).reshape(-1, len(self.total))
        self.total += added.sum(0, dtype=torch.float64)
        self.count += len(added)

    def correct(self) -> None:
        """Give the layer its new bias; the old one may belong to the float reference, too."""
        import torch

        if not self.count:
            return  # no sample reaches it
        mean = (self.total / self.count).to(self.error.dtype)
        bias = -mean if self.module.bias is None else self.module.bias.detach() - mean
        self.module.bias = torch.nn.Parameter(bias, requires_grad=False)


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with corrected biases of the linear layers and convolutions whose weights become integers.

    Of weights with one scale for each output channel, rounded to the nearest, as every target rounds them; groups and
    palettes are left as they are. RecipeError where nothing is left to correct.
    """
    import torch

    layers = []
    for path, module in request.module.named_modules():
        scheme = parse(request.assignment.schemes.get(canonical_module_name(path), "fp32"))
        if _corrected(module, scheme):
            weight = module.weight.detach()
            error = rounded(weight, scheme.weight_bits) - weight
            layers.append(_Layer(module=module, error=error, total=torch.zeros(len(weight), dtype=torch.float64)))
    if not layers:
        raise RecipeError(
            "correct-biases: no linear layer or convolution gets integer weights with a scale for each output channel",
            where="compress.steps",
            fix="take the step out, or choose such a scheme (w8a8)",
        )
    hooks = [layer.module.register_forward_hook(layer.watch) for layer in layers]
    with torch.no_grad():
        request.run_calibration(request.module)
        for layer in layers:
            layer.correct()
    for hook in hooks:
        hook.remove()
    return request.module


def _corrected(module: torch.nn.Module, scheme: Scheme) -> bool:
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, kinds) and scheme.family == "integer" and not scheme.group and not scheme.whole


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """``weight`` after rounding to symmetric integers of ``bits``, one scale for each index of its first axis."""
    import torch

    largest = 2 ** (bits - 1) - 1
    peak = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    scale = torch.where(peak > 0, peak / largest, torch.ones_like(peak))
    return torch.clamp(torch.round(weight / scale), -largest, largest) * scale
