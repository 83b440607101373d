"""``wide_activations``: which modules' values have 16 bits in a network of 8: named by recipes, found by a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from edgebake.errors import Problem, RecipeError

ITSELF = "."  # operators that belong to no module, which are the network's own
SEARCH = "auto"
WITHIN_DB = 1.0  # of what 16 bits everywhere give
PLENTY_DB = 30.0  # at an output; nothing that follows asks for more


def words(options: Mapping[str, Any]) -> list[str]:
    """The parts of the option ``wide_activations``."""
    return str(options["wide_activations"]).replace(",", " ").split()


def named(options: Mapping[str, Any], modules: Collection[str]) -> list[str]:
    """Those of ``modules``, all that have operators, that the option names; RecipeError for a glob without any."""
    globs = [word for word in words(options) if word != SEARCH]
    problems = []
    for glob in globs:
        if not any(_is_named(module, glob) for module in modules):
            near = get_close_matches(glob, sorted(modules), 1) or sorted(modules)[:1]
            what = f"wide_activations: no module with operators matches {glob!r}"
            problems.append(Problem(what=what, fix=f"name one with an operator of its own, such as {near[0]!r}"))
    if problems:
        raise RecipeError(problems)
    return [module for module in sorted(modules) if any(_is_named(module, glob) for glob in globs)]


def _is_named(module: str, glob: str) -> bool:
    return module == glob or (module != ITSELF and fnmatchcase(module, glob))


@dataclass(frozen=True, kw_only=True)
class Found:
    """Modules whose values need 16 bits besides those that were named, and what reports say of the search."""

    modules: tuple[str, ...]
    notes: tuple[str, ...]


def found(
    ends: Sequence[str], others: Sequence[str], alone: Callable[[str], float], loss: Callable[[Sequence[str]], float]
) -> Found:
    """``ends``, and the fewest of ``others`` with which the network comes near one that is wide everywhere.

    ``alone``: what the outputs lose, noise to signal, where one module's values alone are rounded to 8 bits; ``loss``:
    what they lose where the values of the given ones of ``others``, and of ``ends``, have 16 bits and all others 8.
    """
    now, best = loss(()), loss(others)
    enough = max(best * 10 ** (WITHIN_DB / 10), 10 ** (-PLENTY_DB / 10))
    count, order, lost = 0, list[str](), now
    if now > enough:
        losses = {module: alone(module) for module in others}
        order = sorted((m for m in others if losses[m] > 0.0), key=lambda module: -losses[module])
        if order:
            count, lost = _fewest(len(order), lambda n: loss(order[:n]), enough, best)
    modules = (*ends, *order[:count])
    text = f"{_db(lost)} on calibration samples, {_db(now)} with the outputs alone, {_db(best)} with 16 bits everywhere"
    listed = ", ".join("the network itself" if module == ITSELF else module for module in modules)
    head = f"{len(modules)} of {len(ends) + len(others)} modules have 16-bit activations"
    return Found(modules=modules, notes=(f"wide_activations: auto: {head}: {text}: {listed}",))


def _fewest(most: int, loss: Callable[[int], float], enough: float, best: float) -> tuple[int, float]:
    """The least count whose loss is enough, and that loss; by bisection, since more modules lose less."""
    below, count, lowest = 0, most, best
    while count - below > 1:
        middle = (below + count) // 2
        lost = loss(middle)
        if lost <= enough:
            count, lowest = middle, lost
        else:
            below = middle
    return count, lowest


def _db(loss: float) -> str:
    return f"{-10 * math.log10(loss):.1f} dB" if loss > 0.0 else "exact"
