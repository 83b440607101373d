"""Which module gets which scheme: the recipe's rules held against the modules that the network really has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from edgebake.errors import Problem, RecipeError
from edgebake.target import Target, support_of
from edgebake.types import Assignment, Module


def _matching(glob: str, modules: Sequence[Module]) -> list[Module]:
    return [m for m in modules if fnmatchcase(m.name, glob)]


def _no_match(glob: str, scheme: str, modules: Sequence[Module]) -> Problem:
    near = get_close_matches(glob, [m.name for m in modules], 3, 0.4)
    shown = ", ".join(near or [m.name for m in modules[:3]])
    return Problem(
        what=f"the rule `{glob}: {scheme}` matches no linear, conv or embedding module",
        where=f"compress.modules.{glob}",
        fix=f"nearest module names: {shown}" if shown else "the network has no module that can be compressed",
    )


def assign(
    scheme: str, rules: Mapping[str, str], modules: Sequence[Module], target: Target, target_name: str
) -> Assignment:
    """Scheme per module; the last matching rule wins, ``fp32`` keeps a module float.

    Raises RecipeError for a rule that matches no module or gives a module a scheme that the target lacks for its kind.
    """
    default = support_of(target, scheme)
    if default is None:
        raise RecipeError(f"{target_name} does not support {scheme}")
    chosen = {m.name: scheme for m in modules if m.kind in default.kinds and scheme != "fp32"}
    problems: list[Problem] = []
    for glob, rule in rules.items():
        matched = _matching(glob, modules)
        if not matched:
            problems.append(_no_match(glob, rule, modules))
        row = support_of(target, rule)
        for module in matched:
            if rule == "fp32":
                chosen.pop(module.name, None)
            elif row is None or module.kind not in row.kinds:
                able = [s.scheme for s in target.SUPPORTS if module.kind in s.kinds]
                problems.append(
                    Problem(
                        what=f"{target_name} cannot give the {module.kind} module {module.name!r} the scheme {rule}",
                        where=f"compress.modules.{glob}",
                        fix=f"for {module.kind} modules it has: {', '.join(able)}",
                    )
                )
            else:
                chosen[module.name] = rule
    if not problems and scheme != "fp32" and default.kinds and not chosen:
        problems.append(
            Problem(
                what=f"{scheme} compresses nothing here: the network has no {' or '.join(default.kinds)} module left",
                where="compress.scheme",
                fix="choose another scheme or loosen compress.modules",
            )
        )
    if problems:
        raise RecipeError(problems)
    return Assignment(schemes=chosen, kinds={m.name: m.kind for m in modules})
