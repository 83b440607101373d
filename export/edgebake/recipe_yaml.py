"""Reading a recipe: YAML to Recipe, ``extends`` and ``--set`` applied, every problem at once with its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgebake.errors import Problem, RecipeError
from edgebake.merging import OVERRIDES, component_without_nulls, with_overrides
from edgebake.recipe import Component, Recipe
from edgebake.recipe_files import RecipeFile, find, find_extended, list_shipped, read_text, recipes_folder
from edgebake.recipe_layers import Layer, laid_over, layer_of, with_settings
from edgebake.recipe_paths import rebased
from edgebake.recipe_words import Key, findings, path_in, problems_of

__all__ = ["RecipeFile", "list_shipped", "read", "recipes_folder"]

MAX_SHOWN = 100


def read(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read the recipe at ``path`` (a file, or a shipped recipe's name) with ``a.b.c=value`` overrides.

    RecipeError with all problems, each at ``file:line:key``; nothing that the recipe names is opened or imported.
    """
    found = find(path)
    problems: list[Problem] = []
    layer = with_settings(_layers(found, problems), overrides, problems)
    data = _plain(layer.data)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += problems_of(error, Recipe, data, layer.where)
    problems += _override_problems(data, layer)
    if problems or recipe is None:
        raise RecipeError(_shown(problems))
    return RecipeFile(recipe=recipe, path=found, base=found.parent, marks=layer.marks)


def _layers(path: Path, problems: list[Problem]) -> Layer:
    own = layer_of(read_text(path, str(path)), str(path), problems)
    if "extends" not in own.data:
        return own
    where = own.where(("extends",))
    below = Layer({key: value for key, value in own.data.items() if key != "extends"}, own.marks)
    try:
        extended = find_extended(own.data["extends"], path, where)
        if extended.resolve() == path.resolve():
            raise RecipeError("a recipe cannot extend itself", where=where)
        under = layer_of(read_text(extended, str(extended)), str(extended), problems)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from None
    if "extends" in under.data:
        what = f"extends a recipe that itself extends another ({under.where(('extends',))})"
        fix = "one level is allowed: extend that other one, or write its keys out"
        problems.append(Problem(what=what, where=where, fix=fix))
        under = Layer({key: value for key, value in under.data.items() if key != "extends"}, under.marks)
    return laid_over(Layer(rebased(under.data, extended.parent, path.parent), under.marks), below, problems)


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in data.items() if value is not None}
    components = given.get("components")
    if isinstance(components, Mapping):
        given["components"] = {name: component_without_nulls(value) for name, value in components.items()}
    return given


def _override_problems(data: Mapping[str, Any], layer: Layer) -> Iterator[Problem]:
    """What a target's overrides make wrong, at the target's own lines."""
    components = data.get("components")
    for name, component in components.items() if isinstance(components, Mapping) else ():
        rules = component.get("targets") if isinstance(component, Mapping) else None
        for index, rule in enumerate(rules if isinstance(rules, list) else ()):
            if isinstance(rule, Mapping) and any(isinstance(rule.get(key), Mapping) for key in OVERRIDES):
                place: Key = ("components", name, "targets", index)
                yield from _problems_of_rule(component, rule, place, layer)


def _problems_of_rule(
    component: Mapping[str, Any], rule: Mapping[str, Any], place: Key, layer: Layer
) -> Iterator[Problem]:
    fitting = {key: value for key, value in rule.items() if key not in OVERRIDES or isinstance(value, Mapping)}
    changed = with_overrides(component, {key: value for key, value in fitting.items() if key != "scheme"})
    try:
        Component.model_validate(changed)
    except ValidationError as error:
        for key, what, fix in findings(error, Component, changed):
            if key and path_in(rule, key) == key:
                yield Problem(what=what, where=layer.where((*place, *key)), fix=fix)


def _shown(problems: list[Problem]) -> list[Problem]:
    ordered = sorted(dict.fromkeys(problems), key=_order)
    more = [Problem(what=f"and {len(ordered) - MAX_SHOWN} more problems")] if len(ordered) > MAX_SHOWN else []
    return [*ordered[:MAX_SHOWN], *more]


def _order(problem: Problem) -> tuple[str, int]:
    parts = problem.where.split(":")
    return parts[0], int(parts[1]) if len(parts) > 1 and parts[1].isdecimal() else 0
