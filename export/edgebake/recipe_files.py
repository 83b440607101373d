"""Recipe files: as read, and found by path, by the name of a shipped recipe, or from ``extends``."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from edgebake.errors import RecipeError
from edgebake.recipe import Recipe
from edgebake.recipe_layers import Layer, Mark
from edgebake.recipe_words import Key
from edgebake.wording import did_you_mean, nearest, said, visible

MAX_BYTES = 1 << 20
SUFFIXES = (".yaml", ".yml")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe as read: relative paths in it resolve against ``base``; ``marks`` say where each key was written.

    ``marks`` is keyed by the full path of the key, ``("components", "model", "limits")``, also for the short form.
    """

    recipe: Recipe
    path: Path
    base: Path
    marks: Mapping[Key, Mark]

    @property
    def lines(self) -> Mapping[Key, int]:
        """The line of each key, in whichever file it was written; 0 for ``--set``."""
        return {key: mark.line for key, mark in self.marks.items()}

    def where(self, *key: str | int) -> str:
        """``file:line:key`` of the nearest written key at or above ``key``."""
        return Layer({}, self.marks).where(key)


def recipes_folder() -> Path:
    """The shipped recipes: beside this module in an installed wheel, else at the root of the checkout."""
    beside = Path(__file__).with_name("recipes")
    return beside if beside.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


@lru_cache
def list_shipped() -> Mapping[str, Path]:
    """Every shipped recipe by name (its file's name), sorted."""
    found = sorted(recipes_folder().rglob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: path for path in found if path.is_file()}


def find(given: str | Path) -> Path:
    """The file that ``given`` names: a path, or the name of a shipped recipe; RecipeError with the nearest names."""
    path, text = Path(given), str(given)
    if not str(given).strip():
        raise RecipeError("an empty name names no recipe", fix="give a .yaml file or the name of a shipped recipe")
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        fix = "give yourself permission to its folder, or name another file"
        raise RecipeError(f"cannot be reached: {error.strerror}", where=visible(text), fix=fix) from None
    except (OSError, ValueError):
        mode = 0
    if stat.S_ISREG(mode):
        return path
    if text in list_shipped():
        return list_shipped()[text]
    if stat.S_ISDIR(mode):
        raise RecipeError(f"{said(text)} is a folder, not a recipe", fix="name the .yaml file in it")
    if mode:
        raise RecipeError(f"{said(text)} is not an ordinary file", fix="save the recipe as a .yaml file and name that")
    if os.path.islink(text):  # noqa: PTH114 - a name that is no path at all is no error here
        raise RecipeError(f"{said(text)} is a link that leads nowhere", fix="mend the link, or name the file itself")
    raise RecipeError(f"there is no recipe {said(text)}", fix=_near(path))


def read_text(path: Path, shown: str) -> str:
    """The file's text; RecipeError when it is too large, not UTF-8 or unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        fix = "give yourself permission to read it, or name another file"
        raise RecipeError(f"cannot be read: {error.strerror}", where=visible(shown), fix=fix) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(
            f"is larger than {MAX_BYTES >> 20} MiB: no recipe is",
            where=visible(shown),
            fix="name the recipe's .yaml file",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"is not UTF-8 text (byte 0x{data[error.start]:02x})",
            where=f"{visible(shown)}:{line}",
            fix="save the recipe as UTF-8" if path.suffix in SUFFIXES else "a recipe is a .yaml file; name that",
        ) from None


def find_extended(value: object, child: Path, where: str) -> Path:
    """The file that ``extends: value`` in ``child`` names: inside the child's folder, or a shipped recipe."""
    if not isinstance(value, str) or not value:
        raise RecipeError(
            "extends must name one recipe", where=where, fix="a file in this folder, or a shipped recipe's name"
        )
    if _NAME.fullmatch(value) and not value.endswith(SUFFIXES):
        if value not in list_shipped():
            raise RecipeError(
                f"there is no shipped recipe {said(value)}", where=where, fix=did_you_mean(value, list_shipped())
            )
        return list_shipped()[value]
    inside = PurePosixPath(value)
    if inside.is_absolute() or ".." in inside.parts or "\\" in value or ":" in value or value.startswith("~"):
        raise RecipeError(
            f"extends may not leave the recipe's folder ({said(value)})",
            where=where,
            fix="put the extended recipe into this folder or below it, or name a shipped recipe",
        )
    return _inside(child, inside, where)


def _inside(child: Path, relative: PurePosixPath, where: str) -> Path:
    path = child.parent / relative
    if not path.resolve().is_relative_to(child.parent.resolve()):
        raise RecipeError(
            f"extends may not leave the recipe's folder ({said(str(relative))} is a link that does)", where=where
        )
    if not path.is_file():
        others = (p.name for p in sorted(path.parent.glob("*.y*ml")) if p != child) if path.parent.is_dir() else ()
        raise RecipeError(
            f"there is no file {said(str(relative))} beside this recipe",
            where=where,
            fix=did_you_mean(path.name, others),
        )
    return path


def _near(path: Path) -> str:
    """The nearest recipes, as they would be written in the place of ``path``."""
    places = {name: name for name in list_shipped()}
    with suppress(OSError, ValueError):  # the folder may not exist either
        places |= {e.name: str(e) for e in path.parent.iterdir() if e.suffix in SUFFIXES and e.is_file()}
    near = nearest(path.name, places)
    head = f"did you mean '{visible(places[near])}'? " if near else ""
    return f"{head}known: {', '.join(map(visible, sorted(places)))}"
