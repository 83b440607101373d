"""`edgebake build`: recipes, or one model without a recipe, to judged artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgebake.commands import _shared
from edgebake.errors import UsageError


def run(
    *,
    recipes: Sequence[str],
    targets: Sequence[str],
    scheme: str | None,
    settings: Sequence[str],
    only: Sequence[str],
    out: Path,
    store: Path | None,
    jobs: int,
    fail_fast: bool,
    timeout: float | None,
    memory: float | None,
    check_files: bool,
    trust: bool,
    strict: bool,
    quiet: bool,
    reports: Sequence[Path],
    as_json: bool,
) -> int:
    """Build and report; returns the exit code."""
    from edgebake.commands._progress import watching
    from edgebake.pipeline import BuildOptions, build
    from edgebake.result import exit_code

    _shared.check_report_paths(reports)
    names = list(recipes)
    if targets or scheme:
        from edgebake.commands.init import one_shot

        if len(names) != 1:
            raise UsageError(
                "--target and --scheme build one model without a recipe", fix="give one model folder or id"
            )
        names = [str(one_shot(names[0], targets, scheme))]
    files = _shared.read_recipes(names, settings)
    options = BuildOptions(
        out=out,
        store=store,
        jobs=jobs,
        only=tuple(only),
        fail_fast=fail_fast,
        timeout_s=timeout,
        memory_mib=memory,
        check=check_files,
        trust=trust,
    )
    with watching(quiet=quiet or as_json) as observe:
        results = build(files, options, observe)
    title = ", ".join(file.recipe.name for file in files)
    _shared.write_reports(results, reports, title)
    _shared.show(results, title, as_json=as_json)
    return exit_code(results, strict=strict)
