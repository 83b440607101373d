"""`edgebake bundle`: pack built artifacts for app developers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared
from edgebake.errors import ArtifactDamaged, LimitNotMet, Problem, RecipeError, UsageError

if TYPE_CHECKING:
    from edgebake.recipe_files import RecipeFile
    from edgebake.result import Result
    from edgebake.types import Artifact
    from edgebake.units import Unit


def run(
    *,
    recipes: Sequence[str],
    formats: Sequence[str],
    settings: Sequence[str],
    out: Path,
    trust: bool,
    as_json: bool,
) -> int:
    """Pack every recipe's artifacts in every format asked for; nothing is built."""
    files = _shared.read_recipes(recipes, settings)
    written = pack(files, out, formats, trust=trust)
    if as_json:
        _shared.print_json({"bundles": [{"path": path, "bytes": path.stat().st_size} for path in written]})
        return 0
    for path in written:
        _shared.say(f"{path}: {_shared.kib_or_mib(path.stat().st_size)}")
    return 0


def pack(files: Sequence[RecipeFile], out: Path, formats: Sequence[str] = (), *, trust: bool = False) -> list[Path]:
    """The bundles of ``files``, artifacts hashed first. Errors for those that are missing, old, changed or failed."""
    from edgebake.check import check
    from edgebake.target import BUNDLES

    written: list[Path] = []
    for file in files:
        wanted = formats or file.recipe.bundle.formats
        if not wanted:
            raise RecipeError(
                f"{file.recipe.name} asks for no bundle",
                where=file.where("bundle"),
                fix="add `bundle: [zip]` to the recipe, or give --format zip",
            )
        for name in wanted:
            BUNDLES.find(name)
        units, _ = check([file], trust=trust)
        problems: list[Problem] = []
        artifacts = list(
            _artifacts(units, out, problems, f"edgebake build {_called(file)}, with the same --out and --set")
        )
        if problems:
            raise UsageError(problems)
        written += _write(file, artifacts, out, wanted)
    return written


def pack_built(files: Sequence[RecipeFile], results: Sequence[Result], out: Path) -> list[Path]:
    """The bundles that recipes ask for, after a build of all their artifacts in which nothing failed."""
    from edgebake.artifacts import manifest_of
    from edgebake.types import Artifact

    written: list[Path] = []
    for file in files:
        own = [r for r in results if r.recipe == file.recipe.name]
        skipped = [r for r in own if r.optional and r.state == "toolchain missing"]
        built = [r for r in own if r.state in ("pass", "not measured") and r.folder is not None]
        if file.recipe.bundle.formats and built and len(built) + len(skipped) == len(own):
            found = [Artifact(folder=r.folder, manifest=manifest_of(r.folder)) for r in built if r.folder]
            written += _write(file, found, out, file.recipe.bundle.formats)
    return written


def _write(file: RecipeFile, artifacts: Sequence[Artifact], out: Path, formats: Sequence[str]) -> Iterator[Path]:
    from edgebake.target import BUNDLES

    for name in dict.fromkeys(formats):
        module: Any = BUNDLES.find(name)
        path: Path = module.write(artifacts, out / file.recipe.name, file.recipe.bundle)
        yield path


def _called(file: RecipeFile) -> str:
    """What to call the recipe on the command line."""
    from edgebake.recipe_files import list_shipped

    return file.recipe.name if list_shipped().get(file.recipe.name) == file.path else str(file.path)


def _artifacts(units: Sequence[Unit], out: Path, problems: list[Problem], fix: str) -> Iterator[Artifact]:
    """The artifacts of ``units`` below ``out``; what is wrong with them goes to ``problems``."""
    from edgebake.artifacts import manifest_of
    from edgebake.delivery import MANIFEST
    from edgebake.jsonfile import digest_of
    from edgebake.types import Artifact

    failed: list[Problem] = []
    for unit in units:
        folder = out / unit.folder
        if not (folder / MANIFEST).is_file():
            if not unit.optional:
                problems.append(Problem(what=f"{unit.id} is not built", where=str(folder), fix=fix))
            continue
        manifest = manifest_of(folder)
        if manifest.get("recipe_digest") != digest_of(unit.spec.model_dump(mode="json")):
            what = f"{unit.id} was built from an earlier version of the recipe"
            problems.append(Problem(what=what, where=str(folder), fix=fix))
            continue
        _check_files(folder, manifest)
        failed += _failed_limits(folder)
        yield Artifact(folder=folder, manifest=manifest)
    if failed and not problems:
        raise LimitNotMet(failed)


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    from edgebake.store_files import sha256_file

    for file in manifest["files"]:
        path = folder / file["path"]
        if not path.is_file() or sha256_file(path) != file["sha256"]:
            raise ArtifactDamaged(
                "the file is missing, or not what its manifest says", where=str(path), fix="build the artifact again"
            )


def _failed_limits(folder: Path) -> list[Problem]:
    from edgebake.commands._results import recorded

    return [
        Problem(
            what=f"{verdict.limit} is {verdict.value:.6g}, the limit {verdict.bound:.6g}"
            if verdict.value is not None and verdict.bound is not None
            else f"{verdict.limit} is not met",
            where=str(folder),
            fix="an artifact that fails its limits is not packed: change the recipe, build again",
        )
        for verdict in recorded(folder).verdicts
        if verdict.state == "fail"
    ]
