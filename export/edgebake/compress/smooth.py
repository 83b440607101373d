"""SmoothQuant: input channels that carry large activations hand part of their size to the weights behind them.

Numerics: Xiao, Lin, Seznec, Wu, Demouth, Han 2022 (arXiv:2211.10438), equations 3 and 4: ``Y = (X diag(s)^-1) (diag(s)
W)`` with ``s_j = max |X_j|^a / max |W_j|^(1 - a)`` for each input channel, the maxima over calibration inputs and over
the rows of all layers that read them. Theirs reach what normalisations write; rows of ``v_proj`` and ``up_proj`` take
factors too, so that the inputs of ``o_proj`` and of ``down_proj``, whose outliers are the largest of a gated MLP, are
smoothed as well. A token's 8-bit scale then fits its channels better, and weights of 8 bits bear what they get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake.buffers import untouched
from edgebake.compress import _channels, _decoder, _options
from edgebake.errors import RecipeError
from edgebake.scheme import parse
from edgebake.target import ModuleRequest, Option
from edgebake.types import ActsOn, canonical_module_name

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
CALIBRATED = True
DISTRIBUTIONS = ("torch",)
SOURCES = tuple(f"edgebake.compress.{name}" for name in ("_channels", "_decoder", "_options"))
OPTIONS = (
    Option(name="strength", default=0.5, help="the exponent a: 0 makes weights alike, 1 activations; between 0 and 1"),
    Option(
        name="head", default=True, help="smooth what the head reads; it parts from the embedding", choices=(True, False)
    ),
)
_SMALLEST = 1e-5  # of a maximum: channels that nothing uses would get factors without bound, as in the published code


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with smoothed channels: the same function, told in dB; RecipeError for other architectures."""
    options = _options.filled("smooth", OPTIONS, request.options)
    strength = float(options["strength"])
    if not 0 <= strength <= 1:
        raise RecipeError(
            f"smooth: a strength of {strength:g} is none",
            where="compress.steps: smooth",
            fix=f"strength: {OPTIONS[0].help}",
        )
    decoder = _decoder.decoder_of(request.module, "smooth")
    names = {id(part): canonical_module_name(path) for path, part in request.module.named_modules()}
    schemes = {name: parse(scheme) for name, scheme in request.assignment.schemes.items()}
    rounded = {name for name, scheme in schemes.items() if scheme.activation_bits is not None}
    able = [*_channels.groups(decoder), *([_channels.head(decoder)] if options["head"] else [])]
    found = [group for group in able if any(names[id(linear)] in rounded for linear in group.linears)]
    if not found:
        raise RecipeError(
            "smooth: no linear layer of the decoder gets rounded activations",
            where="compress.steps: smooth",
            fix="take the step out, or choose such a scheme (w8a8d, w4g32a8d)",
        )
    if decoder.tied and found[-1].linears[0] is decoder.head:
        request.tell(
            "smooth: the embedding and the head shared one weight and are two now, as what the head reads is scaled: "
            f"{decoder.head.weight.numel():,} more values to store where a runtime keeps one copy"
        )
    with _decoder.same_outputs(request, "smooth"):
        largest = _largest(request, [group.linears[0] for group in found])
        for group in found:
            if (seen := largest.get(id(group.linears[0]))) is not None:
                _channels.multiply(group, _factor(group, seen, strength))
    request.tell(f"smooth: channels of {len(found)} groups of linear layers scaled")
    return request.module


def _largest(request: ModuleRequest, linears: list[torch.nn.Linear]) -> dict[int, torch.Tensor]:
    """The largest magnitude of each input channel over calibration samples, (channels,), by layer."""
    import torch

    found: dict[int, torch.Tensor] = {}

    def watch(linear: torch.nn.Module, args: tuple[Any, ...]) -> None:
        peak = args[0].detach().abs().reshape(-1, args[0].shape[-1]).amax(0)
        seen = found.get(id(linear))
        found[id(linear)] = peak if seen is None else torch.maximum(seen, peak)

    hooks = [linear.register_forward_pre_hook(watch) for linear in linears]
    try:
        with torch.no_grad(), untouched(request.module):
            request.run_calibration(request.module)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _factor(group: _channels.Group, activations: torch.Tensor, strength: float) -> torch.Tensor:
    import torch

    weights = torch.stack([linear.weight.detach().abs().amax(0) for linear in group.linears]).amax(0)
    if group.head:
        activations, weights = (_shared(size, group) for size in (activations, weights))
    activations, weights = (size.clamp(min=_SMALLEST) for size in (activations, weights))
    return activations**strength / weights ** (1 - strength)


def _shared(size: torch.Tensor, group: _channels.Group) -> torch.Tensor:
    """The largest of the query heads that read the same row of v, for each of their columns of o."""
    heads = _channels.apart(size, group)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)
