"""GPTQ: a weight's columns are rounded one after the other, and those that follow make up for what each one lost.

Numerics: Frantar, Ashkboos, Hoefler, Alistarh 2022 (arXiv:2210.17323). With ``H = E[x x^T]`` over calibration inputs,
rounding column ``q`` of ``W`` costs ``(w_q - quant(w_q))^2 / [H^-1]_qq`` and moves the rest by
``-(w_q - quant(w_q)) / [H^-1]_qq * (H^-1)_q,:`` (equations 2 and 3); the inverses of all trailing blocks of H are the
rows of the upper Cholesky factor of H^-1 (section 3.3, step 3), columns go in blocks of 128 (step 2), and the mean of
H's diagonal times ``damping`` is added to it (section 3.3). ``activation_order`` takes the columns with the largest
inputs first, as their published code does; each keeps the scale of the group it stands in.

Scales: per output channel or group, before anything is rounded, the one for 1/2 to 1 times ``max |w|`` that leaves the
least squared error weighted by H's diagonal, in a mantissa of 8 bits (bfloat16, as XNNPACK stores them): an integer
times such a scale is exact in float32, so that every quantiser finds the same integers again (``edgebake.lattice``).

Layers of a block see the block's inputs from the network as it is rounded up to there; the statistics of one block are
held at a time. Integers and scales of each block are kept in the store: a killed build rounds no finished one again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgebake.compress import _blocks, _options, _rounding
from edgebake.errors import RecipeError, StageFailed
from edgebake.lattice import bounds
from edgebake.scheme import Scheme
from edgebake.target import ModuleRequest, Option
from edgebake.types import ActsOn

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
CALIBRATED = True
LAST = True  # steps after it would take its weights off the integers that it chose
DISTRIBUTIONS = ("torch",)
SOURCES = (
    *(f"edgebake.compress.{name}" for name in ("_blocks", "_options", "_parts", "_rounding")),
    "edgebake.lattice",
)
OPTIONS = (
    Option(
        name="damping",
        default=0.01,
        help="share of the mean of the Hessian's diagonal that is added to it; more where calibration samples are few",
    ),
    Option(
        name="activation_order",
        default=True,
        help="round the columns with the largest inputs first",
        choices=(True, False),
    ),
)
_COLUMNS = 128  # rounded before the columns behind them are brought up to date
_FRACTIONS = 16
_SMALLEST = 0.5  # of max |w|, that a scale may be made for
_INTEGERS, _SCALES, _LOST = "integers", "scales", "lost"  # what is kept of a layer


@dataclass
class _Sum:
    """What all layers lost: squared error of their outputs, plainly rounded and by this method."""

    plain: float = 0.0
    now: float = 0.0
    layers: set[str] = field(default_factory=set)

    def add(self, name: str, lost: torch.Tensor) -> None:
        """Of the layer ``name``: (2,) float64, plainly and now."""
        plain, now = lost.tolist()
        self.plain, self.now = self.plain + plain, self.now + now
        self.layers.add(name)


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with the weights of its integer linear layers rounded; lowering keeps them bit for bit.

    RecipeError without such layers, or where a group does not divide one. What was gained is told.
    """
    import torch

    options = _options.filled("gptq", OPTIONS, request.options)
    chosen = _rounding.rounded_layers(request)
    _check(chosen)
    total = _Sum()

    def find(moments: _blocks.Moments) -> _blocks.Found:
        found: _blocks.Found = {}
        for name, moment in moments.items():
            if moment is not None:
                found |= {f"{name}:{what}": value for what, value in _of_layer(name, *chosen[name], moment, options)}
        return found

    def use(found: _blocks.Found) -> None:
        for name, (layer, _) in chosen.items():
            if f"{name}:{_INTEGERS}" in found:
                made = product(found[f"{name}:{_INTEGERS}"], found[f"{name}:{_SCALES}"])
                layer.weight = torch.nn.Parameter(made, requires_grad=False)
                total.add(name, found[f"{name}:{_LOST}"])

    _blocks.walk(request, {name: layer for name, (layer, _) in chosen.items()}, find, use)
    share = total.now / total.plain if total.plain else 1.0
    request.tell(
        f"gptq: {len(total.layers)} linear layers rounded; the squared error of their outputs on calibration samples "
        f"is {share:.2f} of what plain rounding leaves"
    )
    idle = [name for name in chosen if name not in total.layers]
    if idle:
        request.tell(f"gptq: no calibration sample reaches {', '.join(idle)}: rounded plainly")
    return request.module


def _check(chosen: dict[str, tuple[torch.nn.Linear, Scheme]]) -> None:
    if not chosen:
        raise RecipeError(
            "gptq: no linear layer gets integer weights with float or grouped dynamic activations",
            where="compress.steps",
            fix="take the step out, or choose such a scheme (w4, w4g32, w4g32a8d, w8)",
        )
    _rounding.refuse_indivisible("gptq", chosen)


def _of_layer(
    name: str, layer: torch.nn.Linear, scheme: Scheme, moment: torch.Tensor, options: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is kept of a layer, by what it is; StageFailed where its inputs do not allow it."""
    import torch

    if not bool(torch.isfinite(moment).all()):
        raise StageFailed(
            f"gptq: the inputs of {name} on calibration samples are not finite, or overflow when squared",
            where="compress.steps: gptq",
            fix="check the calibration samples and the weights; the float network gives the same there",
        )
    weight = layer.weight.detach()
    try:
        integers, scale = found(weight, moment, scheme, **options)
    except ArithmeticError as error:
        raise StageFailed(
            f"gptq: the inputs of {name} on calibration samples span too few directions to invert their Hessian",
            where="compress.steps: gptq",
            fix="raise its damping (0.01), or give more calibration samples",
        ) from error
    plain = _rounding.squared_error(_rounding.rounded(weight, scheme) - weight, moment)
    now = _rounding.squared_error(product(integers, scale) - weight, moment)
    yield _INTEGERS, integers
    yield _SCALES, scale
    yield _LOST, torch.tensor([plain, now], dtype=torch.float64)


def rounded(
    weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme, *, damping: float, activation_order: bool
) -> torch.Tensor:
    """``weight`` (rows, columns) on the integers of ``scheme`` times their scales; ``moment`` is E[x x^T]."""
    return product(*found(weight, moment, scheme, damping=damping, activation_order=activation_order))


def product(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight (rows, columns) float32 of :func:`found`'s integers and scales: exact, hence no other each time."""
    made: torch.Tensor = integers.float() * _by_column(scale, integers.shape[1])
    return made


def _by_column(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """(rows, groups) -> (rows, columns) float32."""
    return scale.float().repeat_interleave(columns // scale.shape[1], dim=1)


def found(
    weight: torch.Tensor, moment: torch.Tensor, scheme: Scheme, *, damping: float, activation_order: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) int8 and (rows, groups) bfloat16 for ``weight`` (rows, columns); ``moment`` is E[x x^T]."""
    import torch

    diagonal = moment.diagonal()
    scale = scales(weight, diagonal, scheme)
    by_column = _by_column(scale, weight.shape[1])
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else torch.arange(len(diagonal))
    factor = _inverse_factor(moment[order][:, order], damping)
    q = _columns(weight[:, order].clone(), by_column[:, order], factor, bounds(scheme.weight_bits))
    made = torch.empty_like(weight, dtype=torch.int8)
    made[:, order] = q.to(torch.int8)
    return made, scale.to(torch.bfloat16)


def scales(weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """(rows, groups): the scale that leaves the least squared error weighted by ``importance`` (columns,)."""
    import torch

    low, high = bounds(scheme.weight_bits)
    groups = _rounding.grouped(weight, scheme)
    weights = (importance + 1e-6 * importance.mean() + 1e-30).reshape(-1, groups.shape[-1])
    peak = groups.abs().amax(-1)
    best, least = torch.ones_like(peak), torch.full_like(peak, float("inf"))
    for step in range(_FRACTIONS + 1):
        fraction = 1 - (1 - _SMALLEST) * step / _FRACTIONS
        tried = (peak * (fraction / (high + 0.5))).to(torch.bfloat16).to(weight.dtype)
        tried = torch.where(tried > 0, tried, torch.ones_like(tried))[..., None]
        loss = (
            (torch.clamp(torch.round(groups / tried), low, high).mul_(tried) - groups).square_().mul_(weights).sum(-1)
        )
        better = loss < least
        best, least = torch.where(better, tried[..., 0], best), torch.where(better, loss, least)
    return best


def _inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of ``moment`` with ``damping``; float32, computed in float64.

    ArithmeticError where it cannot be inverted.
    """
    import torch

    damped = moment.double()
    diagonal = damped.diagonal()
    diagonal += max(damping * float(diagonal.mean()), 1e-9)  # also where no input ever differs from zero
    lower, singular = torch.linalg.cholesky_ex(damped)
    if not singular:
        factor, singular = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if singular:
        raise ArithmeticError("not positive definite")
    found: torch.Tensor = factor.float()
    return found


def _columns(weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor, limits: tuple[int, int]) -> torch.Tensor:
    """Integers for ``weight``, which is used up; columns in the order in which they are rounded."""
    import torch

    made = torch.empty_like(weight)
    for start in range(0, weight.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, weight.shape[1])
        part, errors = weight[:, start:end], torch.empty(len(weight), end - start)
        for j in range(end - start):
            row: Any = factor[start + j]
            q = torch.clamp(torch.round(part[:, j] / scale[:, start + j]), *limits)
            made[:, start + j] = q
            error = (part[:, j] - q * scale[:, start + j]) / row[start + j]
            part[:, j:].addr_(error, row[start + j : end], alpha=-1)
            errors[:, j] = error
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return made
