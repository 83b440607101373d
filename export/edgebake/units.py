"""Units: what is built and judged, one per component and target rule of a recipe, overrides merged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from edgebake.errors import RecipeError
from edgebake.merging import with_overrides
from edgebake.recipe import Component, Recipe, Speculative
from edgebake.recipe_words import Key, problems_of


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A component for one target. ``spec`` is everything the recipe says of it; its ``targets`` are empty.

    ``options`` are the target's: as written from ``units_of``, with the target's defaults filled in from ``check``.
    Relative paths of ``spec`` resolve against ``base``.
    """

    recipe: str
    component: str
    target: str
    name: str | None
    device: str | None
    scheme: str
    optional: bool
    options: Mapping[str, Any]
    spec: Component
    base: Path
    description: str = ""  # the recipe's
    # Of what is lowered from files: why a build does not run the float network here, and why not the artifact.
    without_float: str = ""
    without_run: str = ""
    pair: Pair | None = None  # of a draft: what it proposes tokens to

    @property
    def id(self) -> str:
        """``minilm-l6/model@onnx-qnn+sm8650#w8a16``, followed by ``.<name>`` where the rule has one."""
        device = f"+{self.device}" if self.device else ""
        name = f".{self.name}" if self.name else ""
        return f"{self.recipe}/{self.component}@{self.target}{device}#{self.scheme}{name}"

    @property
    def folder(self) -> PurePosixPath:
        """Where it stands below ``dist/``."""
        last = self.name or self.scheme
        return PurePosixPath(self.recipe, self.component, self.target, self.device or "any", last)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The unit that a draft proposes to, ``tokens`` at a time."""

    unit: Unit
    tokens: int


def units_of(recipe: Recipe, base: Path) -> tuple[Unit, ...]:
    """The units of ``recipe``, components and targets in the order of the file.

    RecipeError when an override does not fit the schema (``recipe_yaml.read`` has refused that already, with lines).
    """
    units = [
        _unit(recipe, name, index, base)
        for name, component in recipe.components.items()
        for index in range(len(component.targets))
    ]
    wanted = recipe.speculative
    if wanted is None or wanted.target == wanted.draft:
        return tuple(units)
    return tuple(_with_pair(unit, units, wanted) if unit.component == wanted.draft else unit for unit in units)


def proposing_to(draft: Unit, units: Sequence[Unit], target: str) -> list[Unit]:
    """The units of the component ``target`` beside which ``draft`` can run: several where none has its name."""
    beside = [u for u in units if (u.component, u.target, u.device) == (target, draft.target, draft.device)]
    namesake = [u for u in beside if u.folder.name == draft.folder.name]
    return namesake if len(beside) > 1 and namesake else beside


def _with_pair(draft: Unit, units: Sequence[Unit], wanted: Speculative) -> Unit:
    found = proposing_to(draft, units, wanted.target)
    return replace(draft, pair=Pair(unit=found[0], tokens=wanted.tokens)) if len(found) == 1 else draft


def _unit(recipe: Recipe, name: str, index: int, base: Path) -> Unit:
    component = recipe.components[name]
    rule = component.targets[index]
    plain = component.model_dump(exclude_unset=True)
    data = with_overrides(plain, rule.model_dump(exclude_unset=True))
    try:
        spec = Component.model_validate(data)
    except ValidationError as error:
        place = ("components", name, "targets", index)

        def where(key: Key) -> str:
            return ".".join(str(part) for part in (*place, *key))

        raise RecipeError(problems_of(error, Component, data, where)) from None
    return Unit(
        recipe=recipe.name,
        component=name,
        target=rule.target,
        name=rule.name,
        device=rule.device,
        scheme=spec.compress.scheme,
        optional=rule.optional,
        options=dict(rule.options),
        spec=spec,
        base=base,
        description=recipe.description,
    )
