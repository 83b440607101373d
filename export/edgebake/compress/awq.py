"""AWQ: input channels that carry large activations get finer steps; the factors go into the operator before.

Numerics: Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023 (arXiv:2306.00978), section 3.2: with ``s =
s_X^a`` for each input channel, ``Q(W diag(s)) diag(s)^-1 X`` is held against ``W X`` and the ``a`` of a grid of 20 in
[0, 1) with the least squared error is taken (equations 4 and 5); s is divided by ``sqrt(max s min s)``, as in their
published code. ``s_X`` is the root mean square of a channel over calibration inputs (theirs: mean magnitude), so that
the error follows from ``E[x x^T]`` alone: ``tr(E X X^T E^T)``. Their clipping of weights is left out: gptq.py chooses
scales.

Where factors can go: ``edgebake.compress._channels``. Exact in real arithmetic; what float32 makes of it is told. The
factors of each block are kept in the store: a killed build searches those of no finished one again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebake.compress import _blocks, _channels, _decoder, _options, _rounding
from edgebake.errors import RecipeError
from edgebake.scheme import Scheme
from edgebake.target import ModuleRequest, Option
from edgebake.types import ActsOn, canonical_module_name

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
CALIBRATED = True
DISTRIBUTIONS = ("torch",)
SOURCES = (
    *(f"edgebake.compress.{name}" for name in ("_blocks", "_channels", "_decoder", "_options", "_parts", "_rounding")),
    "edgebake.lattice",
)
_FACTOR, _LOST = "factor", "lost"  # what is kept of a group
OPTIONS = (Option(name="grid", default=20, help="how many exponents of the activations' size are tried"),)


@dataclass
class _Sum:
    plain: float = 0.0
    now: float = 0.0
    groups: int = 0

    def add(self, lost: torch.Tensor) -> None:
        """Of a group: (2,) float64, plainly and now."""
        plain, now = lost.tolist()
        self.plain, self.now, self.groups = self.plain + plain, self.now + now, self.groups + 1


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with scaled channels: the same function; RecipeError for other architectures."""
    options = _options.filled("awq", OPTIONS, request.options)
    if not options["grid"]:
        raise RecipeError("awq: a grid of 0 tries nothing", where="compress.steps: awq", fix=f"grid: {OPTIONS[0].help}")
    chosen = _rounding.rounded_layers(request)
    decoder = _decoder.decoder_of(request.module, "awq")
    names = {id(part): canonical_module_name(path) for path, part in request.module.named_modules()}
    schemes = {name: scheme for name, (_, scheme) in chosen.items()}
    groups = [g for g in _channels.groups(decoder) if any(names[id(linear)] in schemes for linear in g.linears)]
    if not groups:
        raise RecipeError(
            "awq: no linear layer of the decoder gets integer weights with float or grouped dynamic activations",
            where="compress.steps: awq",
            fix="take the step out, or choose such a scheme (w4, w4g32, w4g32a8d)",
        )
    total = _Sum()

    def find(moments: _blocks.Moments) -> _blocks.Found:
        found: _blocks.Found = {}
        for number, group in enumerate(groups):
            known = [(names[id(linear)], linear) for linear in group.linears]
            mine = [(linear, schemes[name]) for name, linear in known if name in schemes and name in moments]
            moment = next((moments[name] for name, _ in known if moments.get(name) is not None), None)
            if mine and moment is not None:
                found |= {f"{number}:{what}": v for what, v in _factors(group, mine, moment, int(options["grid"]))}
        return found

    def use(found: _blocks.Found) -> None:
        for number, group in enumerate(groups):
            if f"{number}:{_FACTOR}" in found:
                _channels.multiply(group, found[f"{number}:{_FACTOR}"])
                total.add(found[f"{number}:{_LOST}"])

    layers = {name: layer for name, (layer, _) in chosen.items() if _inside(layer, groups)}
    with _decoder.same_outputs(request, "awq"):
        _blocks.walk(request, layers, find, use)
    share = total.now / total.plain if total.plain else 1.0
    request.tell(
        f"awq: channels of {total.groups} groups of linear layers scaled; plain rounding then leaves {share:.2f} of "
        "the squared error of their outputs on calibration samples"
    )
    return request.module


def _inside(layer: torch.nn.Linear, groups: list[_channels.Group]) -> bool:
    return any(layer is linear for group in groups for linear in group.linears)


def _factors(
    group: _channels.Group, linears: list[tuple[torch.nn.Linear, Scheme]], moment: torch.Tensor, grid: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The factors of ``group`` and what is lost with them, as they are kept."""
    import torch

    size = moment.diagonal().clamp(min=0).sqrt()
    if group.head:
        size = _shared(size, group)
    size = size.clamp(min=float(size.max()) * 1e-4 + 1e-20)
    best, least, plain = torch.ones_like(size), float("inf"), 0.0
    for step in range(grid):
        factor = size ** (step / grid)
        factor = factor / (factor.max() * factor.min()).sqrt()
        lost = 0.0
        for linear, scheme in linears:
            weight = linear.weight.detach()
            lost += _rounding.squared_error(_rounding.rounded(weight * factor, scheme) / factor - weight, moment)
        plain = lost if step == 0 else plain
        if lost < least:
            best, least = factor, lost
    yield _FACTOR, best
    yield _LOST, torch.tensor([plain, least], dtype=torch.float64)


def _shared(size: torch.Tensor, group: _channels.Group) -> torch.Tensor:
    """Root mean square over the query heads that read the same row of v, for each of their columns of o."""
    apart = _channels.apart(size.square(), group)
    return apart.mean(1, keepdim=True).expand_as(apart).reshape(-1).sqrt()
