"""What several verbs need: recipes and artifact folders found, text, problems and JSON printed, reports written."""

from __future__ import annotations

import glob
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import EdgebakeError, Problem, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from edgebake.recipe_yaml import RecipeFile
    from edgebake.result import Result

REPORT_SUFFIXES = {".json": "json", ".md": "markdown", ".xml": "junit", ".html": "html"}


def console(*, stderr: bool = False) -> Console:
    """A rich console that leaves plain lines alone when piped and never takes markup from data."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True, emoji=False)


def say(text: str) -> None:
    """``text`` on standard output as it is, control characters made visible; a plain answer needs no rich."""
    sys.stdout.write(_harmless(text) + "\n")


def say_aside(text: str) -> None:
    """As :func:`say`, on standard error: what a reader wants to know and a program that reads the answer does not."""
    sys.stderr.write(_harmless(text) + "\n")


def _harmless(text: str) -> str:
    from edgebake.wording import visible

    return "\n".join(visible(line) for line in text.split("\n"))


def print_problems(problems: Sequence[Problem]) -> None:
    """Every problem on standard error."""
    head = "error" if len(problems) == 1 else f"{len(problems)} problems"
    say_aside("\n  ".join([f"{head}:", *(str(problem).replace("\n", "\n  ") for problem in problems)]))


def print_json(value: Any) -> None:
    """Indented strict JSON on standard output: paths as text, numbers that are not finite as null."""
    sys.stdout.write(json.dumps(_strict(value), indent=2, default=str, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def kib_or_mib(size: float) -> str:
    """Bytes for people: ``0.5 KiB``, ``21.94 MiB``."""
    return f"{size / 2**20:.2f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def counted(count: int, noun: str) -> str:
    """``1 artifact``, ``2 artifacts``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def read_recipes(names: Sequence[str], settings: Sequence[str]) -> list[RecipeFile]:
    """Recipes by file, shipped name or glob; all problems of all of them at once."""
    from edgebake.recipe_yaml import read

    problems = []
    files = []
    for name in expand(names):
        try:
            files.append(read(name, settings))
        except EdgebakeError as error:
            problems += error.problems
            code = type(error)
    if problems:
        raise code(problems)
    return files


def expand(names: Sequence[str]) -> list[str]:
    """``names`` with globs replaced by the files (or shipped names) that they match."""
    from fnmatch import filter as matching

    from edgebake.recipe_files import SUFFIXES, list_shipped
    from edgebake.wording import said

    found: list[str] = []
    for name in names:
        if not glob.has_magic(name) or Path(name).exists():
            found.append(name)
            continue
        files = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
        hits = [file for file in files if Path(file).suffix in SUFFIXES and Path(file).is_file()]
        hits = hits or sorted(matching(list_shipped(), name))
        if not hits:
            others = f" (what it matches is no .yaml file, such as {said(Path(files[0]).name)})" if files else ""
            raise UsageError(
                f"{said(name)} matches no recipe file and no shipped recipe{others}",
                fix="check the path; ** goes into folders below, as in 'recipes/**/*.yaml'",
            )
        found += hits
    return list(dict.fromkeys(found))


def artifact_folders(paths: Sequence[Path]) -> list[Path]:
    """Artifact folders at or below ``paths``, links not followed; UsageError when a path holds none."""
    found: list[Path] = []
    for path in paths:
        below = sorted(_below(path)) if path.is_dir() else []
        if not below:
            raise UsageError(_why_none(path), fix="give a folder that `edgebake build` wrote, such as dist")
        found += below
    return list(dict.fromkeys(found))


def _why_none(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if not path.is_dir():
        return f"{path} is a file, not an artifact folder"
    return f"{path} holds " + ("recorded float outputs, " if _is_reference(path) else "") + "no artifact"


def _is_reference(path: Path) -> bool:
    """Is it the folder of recorded float outputs, which has a manifest of another kind, or the one above them?"""
    from edgebake.reference import OUTPUTS

    return path.name == "reference" or (path / OUTPUTS).is_file()


def _below(path: Path) -> Iterator[Path]:
    from edgebake.delivery import MANIFEST
    from edgebake.reference import OUTPUTS

    for parent, folders, names in os.walk(path):
        if MANIFEST in names:  # exactly: a Core ML package has a Manifest.json
            folders.clear()
            if OUTPUTS not in names:
                yield Path(parent)
        folders[:] = [f for f in folders if not f.startswith(".")]


def write_reports(results: Sequence[Result], paths: Sequence[Path], title: str) -> None:
    """Write a report per path; the suffix chooses the format."""
    import importlib

    from edgebake.store_files import replace_bytes

    for path in paths:
        kind = REPORT_SUFFIXES[path.suffix]
        text = importlib.import_module(f"edgebake.reports.{kind}").render(results, title=title)
        replace_bytes(path, text.encode())


def check_report_paths(paths: Sequence[Path]) -> None:
    """Refuse what cannot be written before minutes of building."""
    for path in paths:
        if path.suffix not in REPORT_SUFFIXES:
            raise UsageError(
                f"--report {path}: reports are told apart by suffix", fix=f"use one of {', '.join(REPORT_SUFFIXES)}"
            )
        if path.is_dir():
            raise UsageError(f"--report {path} is a folder", fix="name a file in it")
        check_folder(path.parent, "--report")


def check_folder(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made because something on its path is no folder."""
    standing = next((p for p in (folder, *folder.parents) if p.exists()), None)
    if standing is not None and not standing.is_dir():
        raise UsageError(f"{option} {folder}: {standing} is not a folder", fix=f"choose another {option}")
    if standing is not None and not os.access(standing, os.W_OK):
        raise UsageError(f"{option} {folder}: {standing} cannot be written to", fix=f"choose another {option}")


def show(results: Sequence[Result], title: str, *, as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    """The results on standard output: a table, or the JSON report with ``more`` at its end."""
    if as_json:
        from edgebake.reports.json import document

        print_json({**document(results, title=title), **(more or {})})
        return
    from edgebake.reports.console import show as show_table

    show_table(results, console(), title=title)
