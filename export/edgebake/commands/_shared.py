"""What several verbs need: reading recipes, printing problems, JSON and reports."""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import EdgebakeError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from edgebake.recipe_yaml import RecipeFile
    from edgebake.result import Result

REPORT_SUFFIXES = {".json": "json", ".md": "markdown", ".xml": "junit", ".html": "html"}


def console(*, stderr: bool = False) -> Console:
    """A rich console that leaves plain lines alone when piped and never takes markup from data."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True, emoji=False)


def print_problems(error: EdgebakeError) -> None:
    """Every problem of ``error`` on standard error."""
    from edgebake.wording import visible

    head = "error" if len(error.problems) == 1 else f"{len(error.problems)} problems"
    print(f"{head}:", file=sys.stderr)  # noqa: T201
    for problem in error.problems:
        print("  " + visible_lines(str(problem), visible), file=sys.stderr)  # noqa: T201


def visible_lines(text: str, visible: Any) -> str:
    """``text`` with control characters made visible, line breaks kept."""
    return "\n  ".join(visible(line) for line in text.splitlines())


def print_json(value: Any) -> None:
    """Indented JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")


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

    from edgebake.recipe_yaml import list_shipped

    found: list[str] = []
    for name in names:
        if not glob.has_magic(name):
            found.append(name)
            continue
        hits = sorted(glob.glob(name, recursive=True)) or sorted(matching(list_shipped(), name))  # noqa: PTH207
        if not hits:
            raise UsageError(f"{name!r} matches no recipe file, no shipped recipe", fix="quote globs; check the path")
        found += hits
    return list(dict.fromkeys(found))


def write_reports(results: Sequence[Result], paths: Sequence[Path], title: str) -> None:
    """Write a report per path; the suffix chooses the format."""
    import importlib

    from edgebake.store_files import replace_bytes

    for path in paths:
        kind = REPORT_SUFFIXES.get(path.suffix)
        if kind is None:
            known = ", ".join(REPORT_SUFFIXES)
            raise UsageError(f"{path}: reports are told apart by suffix", fix=f"use one of {known}")
        text = importlib.import_module(f"edgebake.reports.{kind}").render(results, title=title)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, text.encode())


def check_report_paths(paths: Sequence[Path]) -> None:
    """Refuse a wrong suffix before minutes of building."""
    write_reports([], [p for p in paths if p.suffix not in REPORT_SUFFIXES], "")


def artifact_folders(paths: Sequence[Path]) -> list[Path]:
    """Artifact folders at or below ``paths``; UsageError when a path holds none."""
    from edgebake.delivery import MANIFEST

    found: list[Path] = []
    for path in paths:
        below = sorted(p.parent for p in path.rglob(MANIFEST)) if path.is_dir() else []
        artifacts = [f for f in below if "reference" not in f.relative_to(path).parts[-2:] and _is_artifact(f)]
        if not artifacts:
            raise UsageError(
                f"{path} holds no artifact" if path.exists() else f"{path} does not exist",
                fix="give a folder that `edgebake build` wrote, such as dist or dist/<recipe>",
            )
        found += artifacts
    return list(dict.fromkeys(found))


def _is_artifact(folder: Path) -> bool:
    return folder.parent.name != "reference" and not any(part.startswith(".") for part in folder.parts if part != "..")


def show(results: Sequence[Result], title: str, *, as_json: bool) -> None:
    """The results on standard output: a table, or the JSON report."""
    import importlib

    if as_json:
        sys.stdout.write(importlib.import_module("edgebake.reports.json").render(results, title=title) + "\n")
        return
    importlib.import_module("edgebake.reports.console").show(results, console(), title=title)
