"""What rounding to a symmetric integer scheme makes of a weight, and which layers of a network such a scheme rounds.

Numerics: torchao's symmetric mapping, ``scale = max |w| / ((2^b - 1) / 2)`` for each output channel or group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgebake.errors import RecipeError
from edgebake.lattice import bounds
from edgebake.scheme import Scheme, parse
from edgebake.target import ModuleRequest
from edgebake.types import canonical_module_name

if TYPE_CHECKING:
    import torch


def rounded_layers(request: ModuleRequest) -> dict[str, tuple[torch.nn.Linear, Scheme]]:
    """Linear layers whose weights alone become integers, per output channel or group: ``{name: (layer, scheme)}``.

    Layers with 8-bit activations besides (w8a8, w8a8d) are left out: a target's own quantizer rounds those, and eight
    bits lose little. RecipeError for groups with zero points, which no method here chooses.
    """
    import torch

    found: dict[str, tuple[torch.nn.Linear, Scheme]] = {}
    for path, module in request.module.named_modules():
        scheme = parse(request.assignment.schemes.get(canonical_module_name(path), "fp32"))
        if scheme.zero_points:
            raise RecipeError(
                f"methods that choose integers round symmetrically, and {scheme.name} of "
                f"{canonical_module_name(path)} has zero points",
                where="compress.steps",
                fix=f"take the step out, or give the module {scheme.name.replace('z', '')}",
            )
        alone = scheme.activation_bits is None or (scheme.group is not None and scheme.dynamic)
        integers = scheme.family == "integer" and not scheme.whole and scheme.weight_bits <= 8
        if isinstance(module, torch.nn.Linear) and integers and alone:
            found[canonical_module_name(path)] = (module, scheme)
    return found


def grouped(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """``weight`` (rows, columns) as (rows, groups, size)."""
    return weight.reshape(len(weight), -1, scheme.group or weight.shape[1])


def rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """``weight`` (rows, columns) after plain rounding to ``scheme``."""
    import torch

    low, high = bounds(scheme.weight_bits)
    groups = grouped(weight, scheme)
    peak = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak / (2 ** (scheme.weight_bits - 1) - 0.5), torch.ones_like(peak))
    return (torch.clamp(torch.round(groups / scale), low, high) * scale).reshape(weight.shape)


def squared_error(difference: torch.Tensor, moment: torch.Tensor) -> float:
    """Mean over positions of ``|D x|^2``, which is ``tr(D E[x x^T] D^T)``."""
    return float((difference @ moment).mul_(difference).sum())


def refuse_indivisible(method: str, chosen: Mapping[str, tuple[torch.nn.Linear, Scheme]]) -> None:
    """RecipeError of ``method`` for a layer of :func:`rounded_layers` whose rows its scheme's groups do not divide."""
    for name, (layer, scheme) in chosen.items():
        if scheme.group and layer.in_features % scheme.group:
            raise RecipeError(
                f"{method}: {scheme.name} needs input features divisible by {scheme.group}, but {name} has "
                f"{layer.in_features}",
                where="compress",
                fix=f'give it another scheme, for example modules: {{"{name}": w8}}',
            )
