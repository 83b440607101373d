"""Callables that recipes name, ``module:function``: found without importing anything, and imported when they run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import traceback
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from edgebake.errors import RecipeError, StageFailed


def split_callable(name: str) -> tuple[str, str]:
    """``module:function`` in two."""
    module, colon, function = name.partition(":")
    parts = [*module.split("."), function]
    if not colon or not all(part.isidentifier() for part in parts):
        raise RecipeError(f"{name!r} does not name a callable", fix="write it as package.module:function")
    return module, function


def module_file(module: str, base: Path) -> Path:
    """The source file of ``module``, looked for in ``base`` first and then where Python would; nothing is imported."""
    first, *rest = module.split(".")
    spec = PathFinder.find_spec(first, [str(base)])
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        spec = importlib.util.find_spec(first)  # a top-level name: imports no parent package
    name = first
    for part in rest:
        places = None if spec is None else spec.submodule_search_locations
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(places)) if places else None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise RecipeError(
            f"there is no Python module {module!r}",
            fix=f"put {module.replace('.', '/')}.py beside the recipe or install the package that carries it",
        )
    return Path(spec.origin)


def import_module(name: str, base: Path) -> ModuleType:
    """Import ``name``: from the recipe's folder where the file is there, else as Python would.

    StageFailed, with the cause, when the module's own code fails.
    """
    folder = base.resolve()  # a recipe given by a relative path has the base "."
    source = module_file(name, folder)
    local = source.is_relative_to(folder)
    if local and sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) != str(source):
        if not local:
            return loaded
        del sys.modules[name]  # another recipe's folder had a module of this name
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's code raises
        raise StageFailed(
            f"importing {name} failed: {type(error).__name__}: {error}",
            where=str(source.name),
            fix=f"run `python -c 'import {name}'` in the recipe's folder",
        ) from error


def declared_versions(source: Path, where: str) -> dict[str, str]:
    """``{"distribution/<name>": version}`` of what the module in ``source`` says carries its weights or code.

    It says so with a literal, ``DISTRIBUTIONS = ("espeakng-loader",)``. RecipeError, at ``where``, when one is missing.
    """
    found = {}
    for name in _declared(source, where):
        try:
            found[f"distribution/{name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise RecipeError(
                f"{source.name} needs the package {name!r}, which is not installed",
                where=where,
                fix=f"pip install --no-deps {name}",
            ) from None
    return found


def _declared(source: Path, where: str) -> list[str]:
    try:
        tree = ast.parse(source.read_text("utf-8"))
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{source.name} is not valid Python: {error}", where=where, fix="correct it") from error
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == "DISTRIBUTIONS" and isinstance(value, (ast.Tuple, ast.List)):
            return [str(element.value) for element in value.elts if isinstance(element, ast.Constant)]
    return []


def own_code_failed(name: str, error: Exception) -> StageFailed:
    """The failure of the callable ``name`` of a recipe: what it raised, and the last line of its module that ran."""
    module = name.partition(":")[0].rpartition(".")[2]
    ran = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem == module]
    return StageFailed(
        f"{name} raised {type(error).__name__}: {error}",
        where=f"{Path(ran[-1].filename).name}:{ran[-1].lineno}" if ran else name,
        fix="this is code that the recipe names: mend it there; the stage's log has the whole traceback",
    )
