"""Finds the files that sample specifications name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edgebake.errors import RecipeError
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


def list_images(folder: Path, pattern: str) -> list[Path]:
    """Image files in ``folder`` whose name matches ``pattern``, sorted by name; RecipeError when there are none."""
    if not folder.is_dir():
        raise RecipeError(f"there is no image folder {folder}", fix="correct `samples: images`")
    files = (file for file in folder.glob(pattern) if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES)
    found = sorted(files, key=lambda file: file.name)
    if not found:
        raise RecipeError(f"{folder} holds no image that matches {pattern!r}", fix="correct `samples: pattern`")
    return found
