"""What artifact folders say, whoever filled them: nothing in a manifest or in measurements is taken on trust."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from edgebake import delivery
from edgebake.errors import ArtifactDamaged
from edgebake.recipe import MAX_TOKENS, Limits

MAX_JSON = 64 << 20  # bytes; the manifest of a network with 100,000 modules has a quarter of that
# <component>/<target>/<device>/<scheme> -> <component>/reference/<digest>
_BESIDE = re.compile(r"(\.\./){1,3}reference/[a-z0-9][a-z0-9._-]*")
# A draft's -> its target's: another component of the same recipe
_OTHER = re.compile(r"(\.\./){4}[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*){3}")
_TEXTS = ("unit", "recipe", "component", "target", "scheme", "entry", "edgebake")
_MAPPINGS = ("limits", "reference", "signature", "assignment", "delegation", "model")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest in ``folder``, its types and paths checked. UsageError, ArtifactDamaged."""
    path = folder / delivery.MANIFEST
    _refuse_huge(path)
    try:
        found = delivery.read_manifest(folder)
        wrong = list(_oddities(found))
    except (TypeError, RecursionError) as error:
        raise ArtifactDamaged(f"this is no manifest of edgebake: {error}", where=str(path)) from None
    if wrong:
        raise ArtifactDamaged(
            f"this is no manifest of edgebake: {'; '.join(wrong)}", where=str(path), fix="build the artifact again"
        )
    _refuse_escapes(folder, found, path)
    return found


def measurements_of(folder: Path) -> dict[str, Any]:
    """The measurements in ``folder``; ArtifactDamaged when they are missing or changed."""
    _refuse_huge(folder / delivery.MEASUREMENTS)
    try:
        return delivery.read_measurements(folder)
    except (TypeError, RecursionError) as error:
        raise ArtifactDamaged(f"not what edgebake writes: {error}", where=str(folder / delivery.MEASUREMENTS)) from None


def limits_of(manifest: Mapping[str, Any], folder: Path) -> Limits:
    """The limits in the manifest of ``folder``; ArtifactDamaged when they are none."""
    try:
        return Limits.model_validate(manifest["limits"])
    except ValidationError as error:
        raise not_ours("limits", folder, error) from None


def not_ours(what: str, folder: Path, error: Exception) -> ArtifactDamaged:
    """The refusal of ``folder`` whose ``what`` cannot be read."""
    return ArtifactDamaged(
        f"its {what} are not what edgebake writes ({type(error).__name__})",
        where=str(folder),
        fix="build the artifact again",
    )


def _refuse_huge(path: Path) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size > MAX_JSON:
        raise ArtifactDamaged(f"it has {size >> 20} MiB: edgebake writes no such file", where=str(path))


def _oddities(found: Mapping[str, Any]) -> Iterator[str]:
    for key in _TEXTS:
        if not isinstance(found.get(key), str):
            yield f"{key} is not text"
    for key in _MAPPINGS:
        if not isinstance(found.get(key), Mapping):
            yield f"{key} is not a mapping"
    files = found.get("files")
    listed = files if isinstance(files, list) else []
    fine = all(isinstance(f, Mapping) and isinstance(f.get("path"), str) and f.get("sha256") for f in listed)
    if not listed or not fine:
        yield "files is not a list of paths and digests"


def _refuse_escapes(folder: Path, found: Mapping[str, Any], path: Path) -> None:
    """Files lie in the folder; the reference beside the artifacts of the component, never anywhere else."""
    names = [f["path"] for f in found["files"]]
    for name in (*names, found["entry"]):
        if not _plain(name) or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ArtifactDamaged(f"{name!r} leaves the artifact folder", where=str(path), fix="do not trust this file")
    entry = found["entry"]
    if not any(name == entry or name.startswith(f"{entry}/") for name in names):
        raise ArtifactDamaged(f"its entry {entry!r} is none of its files", where=str(path))
    reference = found["reference"].get("path")
    if not isinstance(reference, str) or not _BESIDE.fullmatch(reference):
        raise ArtifactDamaged(
            f"its reference {reference!r} is not beside the artifact", where=str(path), fix="do not trust this file"
        )


def target_of(folder: Path, manifest: Mapping[str, Any]) -> tuple[Path, int] | None:
    """The artifact to which that in ``folder`` proposes tokens, and how many at a time; None where it is no draft.

    ArtifactDamaged where ``manifest`` names something else than another component's artifact beside it.
    """
    said = manifest.get("speculative")
    if said is None:
        return None
    path, tokens = (said.get("path"), said.get("tokens")) if isinstance(said, Mapping) else (None, None)
    if (
        not isinstance(path, str)
        or not _OTHER.fullmatch(path)
        or type(tokens) is not int
        or not 0 < tokens <= MAX_TOKENS
    ):
        raise ArtifactDamaged(
            f"its target {path!r} is no artifact beside it", where=str(folder), fix="do not trust this file"
        )
    return (folder.resolve() / path).resolve(), tokens


def _plain(name: str) -> bool:
    inside = PurePosixPath(name)
    return bool(name) and not inside.is_absolute() and ".." not in inside.parts and not set(name) & set("\\:\0")
