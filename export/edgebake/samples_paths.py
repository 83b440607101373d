"""Finds the files that sample specifications name, without importing anything that a recipe names."""

from __future__ import annotations

import importlib.util
import traceback
from importlib.machinery import PathFinder
from pathlib import Path

from edgebake.errors import RecipeError, StageFailed
from edgebake.recipe_files import recipes_folder
from edgebake.wording import said

PACKAGE = "pkg://"
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def resolve(name: str, base: Path) -> Path:
    """The file or folder ``name``: ``pkg://package/folder`` inside an installed package, else relative to ``base``."""
    if not name.startswith(PACKAGE):
        return base / name
    package, _, inner = name[len(PACKAGE) :].partition("/")
    if ".." in Path(inner).parts:
        raise RecipeError(f"{name!r} leaves the package {package!r}", fix="give a path without `..`")
    if package == "edgebake" and inner.startswith("recipes/"):  # not inside the package in an editable install
        return recipes_folder() / inner.removeprefix("recipes/")
    if not package.isidentifier():
        raise RecipeError(f"{said(name)} names no package", fix="write pkg://package/folder, as Python imports it")
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise RecipeError(
            f"the package {package!r} of {name!r} is not installed", fix="pip install the distribution that carries it"
        )
    found = [Path(folder) / inner for folder in folders]
    return next((path for path in found if path.exists()), found[0])


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


def split_callable(name: str) -> tuple[str, str]:
    """``module:function`` in two."""
    module, colon, function = name.partition(":")
    parts = [*module.split("."), function]
    if not colon or not all(part.isidentifier() for part in parts):
        raise RecipeError(f"{name!r} does not name a callable", fix="write it as package.module:function")
    return module, function


def list_images(folder: Path, pattern: str) -> list[Path]:
    """Image files in ``folder`` whose name matches ``pattern``, sorted by name; RecipeError when there are none."""
    if not folder.is_dir():
        raise RecipeError(f"there is no image folder {folder}", fix="correct `samples: images`")
    files = (file for file in folder.glob(pattern) if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES)
    found = sorted(files, key=lambda file: file.name)
    if not found:
        raise RecipeError(f"{folder} holds no image that matches {pattern!r}", fix="correct `samples: pattern`")
    return found


def own_code_failed(name: str, error: Exception) -> StageFailed:
    """The failure of the callable ``name`` of a recipe: what it raised, and the last line of its module that ran."""
    module = name.partition(":")[0].rpartition(".")[2]
    ran = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem == module]
    return StageFailed(
        f"{name} raised {type(error).__name__}: {error}",
        where=f"{Path(ran[-1].filename).name}:{ran[-1].lineno}" if ran else name,
        fix="this is code that the recipe names: mend it there; the stage's log has the whole traceback",
    )
