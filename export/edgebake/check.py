"""Refuses everything refusable before a weight is read: every problem of every recipe at once, with file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from edgebake.checks import decoder_folders, decoders, inputs, limits, models, samples, speculative, targets, whole
from edgebake.checks.case import Case
from edgebake.errors import Problem, RecipeError
from edgebake.recipe_files import RecipeFile
from edgebake.target import find_target
from edgebake.units import Unit, units_of


def check(files: Sequence[RecipeFile], *, trust: bool) -> tuple[tuple[Unit, ...], tuple[Problem, ...]]:
    """The units of ``files``, target options filled in, and warnings; RecipeError with all problems.

    ``trust``: the user agreed that files which count as code may be loaded. Nothing that a recipe names is imported.
    """
    problems: list[Problem] = []
    cases: list[Case] = []
    for file in files:
        problems += whole.problems(file)
        cases += (own := _cases(file))
        problems += speculative.problems(file, own)
    for case in cases:
        problems += _problems(case, trust)
    problems += whole.duplicates(cases)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    warnings = dict.fromkeys(w for case in cases for w in (*limits.warnings(case), *targets.warnings(case)))
    return tuple(_finished(case.unit) for case in cases), tuple(warnings)


def _cases(file: RecipeFile) -> list[Case]:
    places = (index for component in file.recipe.components.values() for index in range(len(component.targets)))
    return [Case(file, unit, index) for unit, index in zip(units_of(file.recipe, file.base), places, strict=True)]


def _problems(case: Case, trust: bool) -> Iterator[Problem]:
    yield from targets.problems(case)
    yield from models.problems(case, trust)
    yield from inputs.problems(case)
    yield from decoders.problems(case)
    yield from decoder_folders.problems(case)
    yield from samples.problems(case)
    yield from limits.problems(case)


def _finished(unit: Unit) -> Unit:
    pair = unit.pair and replace(unit.pair, unit=_finished(unit.pair.unit))
    return replace(unit, options=targets.options_of(find_target(unit.target), unit.options), pair=pair)
