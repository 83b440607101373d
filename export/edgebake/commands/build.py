"""`edgebake build`: recipes, or one model without a recipe, to judged artifacts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared
from edgebake.errors import UsageError

if TYPE_CHECKING:
    from edgebake.pipeline import BuildOptions
    from edgebake.recipe_files import RecipeFile
    from edgebake.result import Result

_MODEL_FILES = (".gguf", ".pt2")


def run(
    *,
    recipes: Sequence[str],
    targets: Sequence[str],
    scheme: str | None,
    settings: Sequence[str],
    strict: bool,
    quiet: bool,
    reports: Sequence[Path],
    as_json: bool,
    **options: Any,
) -> int:
    """Build with ``options`` (the fields of BuildOptions), pack and report; returns the exit code."""
    from edgebake.commands._progress import watching
    from edgebake.pipeline import BuildOptions
    from edgebake.result import exit_code

    _shared.check_report_paths(reports)
    files = _shared.read_recipes(_recipes(recipes, targets, scheme), settings)
    with watching(quiet=quiet or as_json) as observe:
        results, bundles = built(files, BuildOptions(**options), observe)
    title = ", ".join(file.recipe.name for file in files)
    _shared.write_reports(results, reports, title)
    _shared.show(results, title, as_json=as_json, more={"bundles": [str(path) for path in bundles]})
    if not as_json:
        for path in bundles:
            _shared.say(f"bundle  {path} ({_shared.kib_or_mib(path.stat().st_size)})")
    return exit_code(results, strict=strict)


def built(
    files: Sequence[RecipeFile], options: BuildOptions, observe: Callable[[Mapping[str, Any]], None]
) -> tuple[list[Result], list[Path]]:
    """A result per artifact, and the bundles that recipes ask for when none of their artifacts failed."""
    from edgebake.commands.bundle import pack_built
    from edgebake.pipeline import build

    _shared.check_folder(options.out, "--out")
    results = build(files, options, observe)
    return results, [] if options.only else pack_built(files, results, options.out)


def _recipes(names: Sequence[str], targets: Sequence[str], scheme: str | None) -> list[str]:
    """The recipes to read; for a model without one, the recipe that is written for it."""
    if targets or scheme:
        if len(names) != 1:
            what = f"--target and --scheme build one model without a recipe, here are {len(names)}"
            raise UsageError(what, fix="give one model folder or hub id; recipes name their own targets and schemes")
        _refuse_recipe(names[0])
        from edgebake.commands.init import one_shot

        return [str(one_shot(names[0], targets, scheme))]
    for name in names:
        if (Path(name) / "config.json").is_file() or (Path(name).suffix in _MODEL_FILES and Path(name).is_file()):
            typed = shlex.quote(name)
            raise UsageError(
                f"{name} is a model, not a recipe",
                fix=f"edgebake build {typed} --target onnx-cpu --scheme fp32, or edgebake init {typed}",
            )
    return list(names)


def _refuse_recipe(name: str) -> None:
    from edgebake.recipe_yaml import list_shipped

    if Path(name).suffix in (".yaml", ".yml") or (name in list_shipped() and not Path(name).exists()):
        raise UsageError(
            f"{name} is a recipe: --target and --scheme build a model that has none",
            fix="choose among its artifacts with --only '*@onnx-cpu*', change it with --set compress.scheme=w8, "
            "or try several schemes with edgebake sweep",
        )
