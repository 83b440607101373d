"""The Python API: what the verbs build, check, verify and bundle do, as typed functions. Importing it stays light.

::

    import edgebake

    for result in edgebake.build("minilm-l6", only=["*@onnx-cpu*"]):
        print(result.unit, result.state, result.folder)

A failed stage or a missed limit is a result, not an exception; what is wrong with the recipe or the arguments raises
:class:`edgebake.errors.EdgebakeError`, whose ``problems`` say what, where and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgebake.errors import Problem
    from edgebake.recipe import Recipe
    from edgebake.recipe_files import RecipeFile
    from edgebake.result import Result
    from edgebake.units import Unit

    Given = str | PathLike[str] | Recipe

Observer = Callable[[Mapping[str, Any]], None]


def build(
    recipe: Given | Sequence[Given],
    *,
    settings: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    out: str | PathLike[str] = "dist",
    store: str | PathLike[str] | None = None,
    jobs: int = 1,
    fail_fast: bool = False,
    timeout_s: float | None = None,
    memory_mib: float | None = None,
    check_files: bool = False,
    trust: bool = False,
    observe: Observer | None = None,
) -> list[Result]:
    """Build, run and judge artifacts, as ``edgebake build`` does: one result each, in the recipes' order.

    ``recipe``: a file, the name of a shipped recipe, a :class:`edgebake.Recipe` (its relative paths resolve against
    the current folder), or several of them. ``settings``: overrides of recipe files, ``"compress.scheme=w8"``, one or
    several. ``only``: globs on artifacts, ``"minilm*@onnx-*"``, one or several. ``out``: folder for artifacts.
    ``store``: default EDGEBAKE_STORE, else the user's cache folder. ``jobs``: components built at once. ``timeout_s``
    counts per stage, ``memory_mib`` bounds a worker with its children. ``check_files``: hash every stored and
    delivered file.
    ``trust``: allow files that count as code. ``observe`` is told of stages, samples of memory, warnings and failures.

    RecipeError, UsageError, TrustError: nothing was built. StoreError: the store cannot be used.
    """
    from edgebake.commands.build import built
    from edgebake.pipeline import BuildOptions

    options = BuildOptions(
        out=Path(out),
        store=None if store is None else Path(store),
        jobs=jobs,
        only=_several(only),
        fail_fast=fail_fast,
        timeout_s=timeout_s,
        memory_mib=memory_mib,
        check=check_files,
        trust=trust,
    )
    results, _ = built(_files(recipe, settings), options, observe or (lambda _: None))
    return results


def check(
    recipe: Given | Sequence[Given], *, settings: str | Sequence[str] = (), trust: bool = False
) -> tuple[tuple[Unit, ...], tuple[Problem, ...]]:
    """What would be built, and warnings; nothing is loaded. RecipeError with every problem of every recipe."""
    from edgebake.check import check as checked

    return checked(_files(recipe, settings), trust=trust)


def verify(
    folder: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    timeout_s: float = 3600.0,
    memory_mib: float | None = None,
) -> list[Result]:
    """Judge existing artifacts again, as ``edgebake verify`` does: a result per artifact at or below ``folder``.

    Each is read and run in a process with limits: ``timeout_s`` per artifact, ``memory_mib`` (default three quarters
    of this machine's memory). Damage is a result with a failure. UsageError when ``folder`` holds no artifact.
    """
    from edgebake.commands.verify import verified

    given = [folder] if isinstance(folder, str | PathLike) else folder
    return verified([Path(f) for f in given], timeout_s=timeout_s, memory_mib=memory_mib)


def bundle(
    recipe: Given | Sequence[Given],
    *,
    formats: str | Sequence[str] = (),
    settings: str | Sequence[str] = (),
    out: str | PathLike[str] = "dist",
    trust: bool = False,
) -> list[Path]:
    """Pack artifacts that were built into ``out``, as ``edgebake bundle`` does; returns the bundles.

    ``formats``: default those that the recipe asks for. RecipeError, UsageError: unknown format, artifacts not built or
    built from another version of the recipe. ArtifactDamaged. An artifact that fails its limits is refused.
    """
    from edgebake.commands.bundle import pack

    return pack(_files(recipe, settings), Path(out), _several(formats), trust=trust)


def _several(given: str | Sequence[str]) -> tuple[str, ...]:
    """A text is one, not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def _files(given: Given | Sequence[Given], settings: str | Sequence[str]) -> list[RecipeFile]:
    from edgebake.commands._shared import read_recipes
    from edgebake.errors import UsageError
    from edgebake.recipe import Recipe
    from edgebake.recipe_files import RecipeFile

    files: list[RecipeFile] = []
    for one in [given] if isinstance(given, str | PathLike | Recipe) else given:
        if not isinstance(one, Recipe):
            files += read_recipes([str(one)], _several(settings))
        elif settings:
            raise UsageError("settings override the keys of recipe files", fix="use Recipe.model_copy(update=...)")
        else:
            files.append(RecipeFile(recipe=one, path=Path(one.name), base=Path.cwd(), marks={}))
    if not files:
        raise UsageError("no recipe is given", fix="give a file, the name of a shipped recipe, or a Recipe")
    return files
