"""A unit together with the file it comes from, so that problems carry file, line and key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgebake.errors import EdgebakeError, Problem
from edgebake.recipe import TargetRule
from edgebake.recipe_files import RecipeFile
from edgebake.recipe_words import path_in
from edgebake.units import Unit


@dataclass(frozen=True)
class Case:
    """A unit and its place: target rule number ``index`` of its component in ``file``."""

    file: RecipeFile
    unit: Unit
    index: int

    @property
    def rule(self) -> TargetRule:
        """The target rule as written."""
        return self.file.recipe.components[self.unit.component].targets[self.index]

    def where(self, *key: str | int) -> str:
        """Where ``key`` of the component was written: in the target's overrides, else in the component."""
        rule = self.rule.model_dump(exclude_unset=True)
        if key == ("compress", "scheme") and rule.get("scheme") is not None:
            return self.where_rule("scheme")
        if key and path_in(rule, key) == key:
            return self.where_rule(*key)
        return self.file.where("components", self.unit.component, *key)

    def where_rule(self, *key: str | int) -> str:
        """Where ``key`` of the target rule was written."""
        return self.file.where("components", self.unit.component, "targets", self.index, *key)


def moved(error: EdgebakeError, where: str) -> Iterator[Problem]:
    """The problems of ``error``, at ``where``."""
    for problem in error.problems:
        yield Problem(what=problem.what, where=where, fix=problem.fix)
