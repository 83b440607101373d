"""What concerns a recipe, or several, as a whole: names, wiring, bundles, units that would overwrite each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgebake.checks.case import Case
from edgebake.errors import Problem
from edgebake.recipe import Recipe
from edgebake.recipe_files import RecipeFile
from edgebake.target import BUNDLES
from edgebake.wording import did_you_mean, said


def problems(file: RecipeFile) -> Iterator[Problem]:
    """Components without targets, unknown bundle formats, wiring that leads nowhere."""
    for name, component in file.recipe.components.items():
        if not component.targets:
            fix = "add targets: [executorch-xnnpack] or another (edgebake targets lists them)"
            what = f"the component {said(name)} has no targets"
            yield Problem(what=what, where=file.where("components", name, "targets"), fix=fix)
    for position, format_ in enumerate(file.recipe.bundle.formats):
        if format_ not in BUNDLES.names():
            where = file.where("bundle", "formats", position)
            if where == file.where("bundle"):
                where = file.where("bundle", position)  # the short form, a list
            what = f"there is no bundle format {said(format_)}"
            yield Problem(what=what, where=where, fix=did_you_mean(format_, BUNDLES.names()))
    for source, sink in file.recipe.wiring.items():
        yield from _wire(file, source, sink)


def _wire(file: RecipeFile, source: str, sink: str) -> Iterator[Problem]:
    where, recipe = file.where("wiring", source), file.recipe
    ends = [_split(recipe, text) for text in (source, sink)]
    for text, end in zip((source, sink), ends, strict=True):
        if end is None:
            what = f"{said(text)} names no component of this recipe"
            fix = "write component.tensor; " + did_you_mean(text.partition(".")[0], recipe.components)
            yield Problem(what=what, where=where, fix=fix)
    if ends[0] is not None and ends[1] is not None and ends[0][0] == ends[1][0]:
        fix = "use role: state and state_from in its inputs"
        yield Problem(what=f"{said(ends[0][0])} is wired to itself", where=where, fix=fix)
    if ends[1] is not None:
        component, name = ends[1]
        inputs = {key for ins in recipe.components[component].all_methods.values() for key in ins}
        if inputs and name not in inputs:
            what = f"the component {said(component)} has no input {said(name)}"
            yield Problem(what=what, where=where, fix=did_you_mean(name, inputs))


def _split(recipe: Recipe, text: str) -> tuple[str, str] | None:
    """Component and tensor; component names may hold dots, so the longest that fits counts."""
    fitting = [name for name in recipe.components if text.startswith(f"{name}.") and len(text) > len(name) + 1]
    longest = max(fitting, key=len, default=None)
    return (longest, text[len(longest) + 1 :]) if longest is not None else None


def duplicates(cases: Sequence[Case]) -> Iterator[Problem]:
    """Units that share a folder below ``dist/`` or an id."""
    seen: dict[str, Case] = {}
    for case in cases:
        key = str(case.unit.folder).lower()  # macOS and Windows do not tell case apart
        first = seen.setdefault(key, case)
        if first is not case:
            yield Problem(
                what=f"{case.unit.id} stands twice (first at {first.where_rule()})",
                where=case.where_rule(),
                fix="give one of the two target rules a name: of its own"
                if first.file.path == case.file.path
                else "give the two recipes different names",
            )
