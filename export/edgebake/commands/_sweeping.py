"""What `edgebake sweep` builds of a recipe: which schemes on which targets, and the limits each is held against.

A scheme that the recipe builds for a target keeps its own rule. Any other is held against the loosest of the limits
that the recipe sets for that target: what its author ships in another scheme is good enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebake.errors import EdgebakeError, RecipeError, UsageError

if TYPE_CHECKING:
    from edgebake.recipe import Component, TargetRule
    from edgebake.recipe_files import RecipeFile
    from edgebake.result import Result
    from edgebake.target import Support
    from edgebake.units import Unit

_SETTINGS = ("metric", "output", "threshold", "tie_margin")  # how a limit is measured: of the target's first rule


def swept(
    file: RecipeFile, schemes: Sequence[str], targets: Sequence[str], *, trust: bool
) -> tuple[RecipeFile | None, list[Result]]:
    """``file`` with a rule per target and scheme, None where none is left, and a result of each that is not built.

    RecipeError, UsageError: a scheme or a target that nothing can do.
    """
    wanted = {name: rules(part, schemes, targets) for name, part in file.recipe.components.items()}
    small, missed = _split(file, wanted, lambda unit, _: _out_of_reach(unit))
    if small is None or schemes or _refusal(small, trust) is None:
        return small, missed
    left = {name: part.targets for name, part in small.recipe.components.items()}
    fitting, refused = _split(file, left, lambda unit, alone: _refused(unit, alone, trust))
    if fitting is None:
        return small, missed  # the recipe itself is wrong: the build says it once
    return fitting, missed + refused


def _split(
    file: RecipeFile,
    wanted: Mapping[str, Sequence[TargetRule]],
    why_not: Callable[[Unit, RecipeFile], Result | None],
) -> tuple[RecipeFile | None, list[Result]]:
    """``file`` with those rules of ``wanted`` that have no result of ``why_not``, None where none is left; results."""
    pairs = [(name, rule) for name, given in wanted.items() for rule in given]
    units = _units(_with_rules(file, wanted))
    kept: dict[str, list[TargetRule]] = {}
    results = []
    for unit, (name, rule) in zip(units, pairs, strict=True):
        result = why_not(unit, _with_rules(file, {name: (rule,)}))
        if result is None:
            kept.setdefault(name, []).append(rule)
        else:
            results.append(result)
    return (_with_rules(file, kept) if kept else None), results


def _with_rules(file: RecipeFile, wanted: Mapping[str, Sequence[TargetRule]]) -> RecipeFile:
    """``file`` with these rules; its lines of single rules are forgotten, they would point to others."""
    components = {
        name: part.model_copy(update={"targets": tuple(wanted.get(name, ()))})
        for name, part in file.recipe.components.items()
        if wanted.get(name)
    }
    marks = {key: mark for key, mark in file.marks.items() if not (len(key) > 3 and key[2] == "targets")}
    return replace(file, recipe=file.recipe.model_copy(update={"components": components}), marks=marks)


def _units(file: RecipeFile) -> Sequence[Unit]:
    from edgebake.units import units_of

    return units_of(file.recipe, file.base)


def _out_of_reach(unit: Unit) -> Result | None:
    """The result of a unit whose weights alone are larger than its limit, which the check would refuse."""
    from edgebake.checks.limits import smallest_of_float
    from edgebake.types import Verdict

    bound, least = unit.spec.limits.size.of_float, smallest_of_float(unit.spec)
    if bound is None or least is None or least <= bound:
        return None
    verdict = Verdict(
        limit="size.of_float", state="fail", value=least, bound=bound, reason="its weights alone; not built"
    )
    return replace(_result(unit), verdicts=(verdict,))


def _refused(unit: Unit, alone: RecipeFile, trust: bool) -> Result | None:
    """The result of a unit that the check refuses: a scheme that nobody asked for by name must not end the sweep."""
    from edgebake.result import Failure

    error = _refusal(alone, trust)
    if error is None:
        return None
    problems = tuple(replace(problem, where="") for problem in error.problems)  # no line of the recipe names this rule
    failure = Failure(stage="check", problems=problems, exit_code=error.exit_code)
    return replace(_result(unit), failure=failure)


def _refusal(file: RecipeFile, trust: bool) -> EdgebakeError | None:
    from edgebake.check import check

    try:
        check([file], trust=trust)
    except EdgebakeError as error:
        return error
    return None


def _result(unit: Unit) -> Result:
    from edgebake.result import Result

    return Result(
        unit=unit.id,
        recipe=unit.recipe,
        component=unit.component,
        target=unit.target,
        device=unit.device,
        scheme=unit.scheme,
    )


def rules(component: Component, schemes: Sequence[str], targets: Sequence[str]) -> tuple[TargetRule, ...]:
    """A rule per target and scheme: of ``targets``, by default the recipe's, those of ``schemes`` that they can do."""
    from edgebake.scheme import parse
    from edgebake.target import find_target

    wanted = [_scheme(s) for s in schemes]
    names = list(dict.fromkeys(targets or [rule.target for rule in component.targets]))
    _refuse_unknown(wanted, names)
    calibrated = component.samples.calibration is not None
    found: list[TargetRule] = []
    for name in names:
        own = _own(component, name)
        base = _base(component, name)
        rows = [row for row in find_target(name).SUPPORTS if not row.override_only]
        able = [row.scheme for row in rows if calibrated or not parse(row.scheme).needs_calibration]
        if not wanted:  # one that is named goes on to the check, which says what it needs
            fitting = {row.scheme for row in rows if row.scheme in own or _allowed(name, row, base)}
            able = [scheme for scheme in able if scheme in fitting]
        for scheme in wanted or able:
            if scheme in able:
                found.append(own.get(scheme) or base.model_copy(update={"scheme": scheme}))
    if not found:
        raise RecipeError(
            f"none of {', '.join(wanted)} can be tried on {', '.join(names)}",
            fix="`edgebake targets` lists what each can do; static activations (w8a8) need calibration samples",
        )
    return tuple(found)


def _own(component: Component, target: str) -> dict[str, TargetRule]:
    """The recipe's rules for ``target`` by their scheme; the first of several."""
    found: dict[str, TargetRule] = {}
    for rule in component.targets:
        if rule.target == target:
            scheme = rule.scheme or rule.compress.get("scheme") or component.compress.scheme
            rest = {key: value for key, value in rule.compress.items() if key != "scheme"}
            found.setdefault(scheme, rule.model_copy(update={"scheme": scheme, "compress": rest}))
    return found


def _base(component: Component, target: str) -> TargetRule:
    """For schemes that the recipe does not build for ``target``: the options of its last rule, the loosest limits."""
    from edgebake.merging import with_overrides
    from edgebake.recipe import TargetRule

    of_target = [rule for rule in component.targets if rule.target == target]
    if not of_target:
        return TargetRule(target=target)
    plain = component.model_dump(exclude_unset=True)
    given = [with_overrides(plain, rule.model_dump(exclude_unset=True)).get("limits", {}) for rule in of_target]
    return of_target[-1].model_copy(update={"name": None, "compress": {}, "limits": loosest(given)})


def loosest(limits: Sequence[Mapping[str, Any]], place: str = "") -> dict[str, Any]:
    """Limits that hold wherever one of ``limits`` (recipe data) holds; null, which takes away, where one is silent."""
    from edgebake.limits import AT_MOST

    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in limits for key in one):
        at = f"{place}{key}"
        values: list[Any] = [one.get(key) for one in limits]
        if any(value is None for value in values):
            found[key] = None
        elif isinstance(values[0], Mapping):
            found[key] = loosest(values, f"{at}.")
        elif key in _SETTINGS:
            found[key] = values[0]
        else:
            found[key] = max(values) if at in AT_MOST or key == "max_drop" else min(values)
    return found


def _allowed(name: str, row: Support, rule: TargetRule) -> bool:
    from edgebake.checks.targets import options_of
    from edgebake.target import find_target, unmet

    return not list(unmet(name, row, options_of(find_target(name), rule.options)))


def _scheme(name: str) -> str:
    from edgebake.scheme import parse

    try:
        return parse(name).name
    except ValueError as error:
        raise UsageError(f"--scheme: {error}", fix="edgebake targets lists what each target supports") from None


def _refuse_unknown(schemes: Sequence[str], targets: Sequence[str]) -> None:
    """A scheme that no target can do would otherwise be missing from the table without a word."""
    from edgebake.target import find_target, support_of

    for scheme in schemes:
        rows = [row for name in targets if (row := support_of(find_target(name), scheme)) is not None]
        if all(row.override_only for row in rows):
            able = {row.scheme: None for name in targets for row in find_target(name).SUPPORTS if not row.override_only}
            raise UsageError(f"{scheme} is supported by none of {', '.join(targets)}", fix=f"known: {', '.join(able)}")
