"""One zip per recipe: artifacts with their manifests and an index, byte for byte the same for the same artifacts."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake.jsonfile import canonical_json, read_json
from edgebake.recipe import Bundle
from edgebake.store_files import replace_file
from edgebake.types import Artifact

INDEX = "index.json"
VERSION = 1
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that the format can say
_MANIFEST = "manifest.json"


def write(artifacts: Sequence[Artifact], out: Path, settings: Bundle) -> Path:
    """Pack ``artifacts``, which lie below ``out`` (the recipe's output folder), into ``out/<its name>.zip``.

    Names in the zip begin with the recipe's name, so that it unpacks to what ``edgebake verify`` takes when the
    reference is in it. Files are stored, not deflated: weights hardly shrink, other zlib versions would give other
    bytes, and an app can map a stored file. StoreError when the disk refuses, ArtifactDamaged when a file is missing.
    """
    path = out / f"{out.name}.zip"
    index = canonical_json(index_of(artifacts, out, settings)).encode("ascii")
    if not _holds(path, index):
        members = dict(_members(artifacts, out, settings))
        replace_file(path, lambda part: _pack(part, index, out.name, members))
    return path


def index_of(artifacts: Sequence[Artifact], out: Path, settings: Bundle) -> dict[str, Any]:
    """What the zip holds: a row per artifact, for whoever loads them in an app."""
    rows = [
        {
            "unit": a.manifest["unit"],
            "entry": (_inside(a.folder, out) / a.manifest["entry"]).as_posix(),
            "format": a.manifest["format"],
            "target": a.manifest["target"],
            "device": a.manifest["device"],
            "scheme": a.manifest["scheme"],
            "bytes": sum(f["bytes"] for f in a.manifest["files"]),
            "licence": a.manifest["model"].get("licence"),
            "manifest": a.manifest["digest"],
            **_proposes_to(a),
        }
        for a in artifacts
    ]
    ordered = sorted(rows, key=lambda row: str(row["entry"]))
    return {"version": VERSION, "recipe": out.name, "reference": settings.include_reference, "artifacts": ordered}


def _proposes_to(artifact: Artifact) -> dict[str, Any]:
    """Of a draft: the unit that it proposes tokens to, and how many at a time."""
    found = artifact.manifest.get("speculative")
    return {} if found is None else {"speculative": {key: found[key] for key in ("target", "tokens")}}


def _inside(folder: Path, out: Path) -> PurePosixPath:
    return PurePosixPath(out.name) / folder.relative_to(out).as_posix()


def _members(artifacts: Sequence[Artifact], out: Path, settings: Bundle) -> Iterator[tuple[str, Path]]:
    for artifact in artifacts:
        names = [_MANIFEST, *(f["path"] for f in artifact.manifest["files"])]
        yield from _files(artifact.folder, names, _inside(artifact.folder, out))
        if settings.include_reference:
            reference = (artifact.folder / artifact.manifest["reference"]["path"]).resolve()
            names = [_MANIFEST, *read_json(reference / _MANIFEST)["files"]]
            yield from _files(reference, names, _inside(reference, out.resolve()))


def _files(folder: Path, names: Sequence[str], inside: PurePosixPath) -> Iterator[tuple[str, Path]]:
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ArtifactDamaged("the file is missing", where=str(path), fix="build the artifact again")
        yield (inside / name).as_posix(), path


def _pack(part: Path, index: bytes, name: str, members: dict[str, Path]) -> None:
    with zipfile.ZipFile(part, "x", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(f"{name}/{INDEX}"), json.dumps(json.loads(index), indent=2) + "\n")
        for inside in sorted(members):
            entry = _entry(inside)
            entry.file_size = members[inside].stat().st_size  # zip64 where it must be
            with members[inside].open("rb") as source, archive.open(entry, "w") as target:
                while block := source.read(1 << 20):
                    target.write(block)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system = 3  # Unix, on every host
    entry.external_attr = 0o644 << 16
    return entry


def _holds(path: Path, index: bytes) -> bool:
    """Is the zip at ``path`` whole and of just these artifacts? Their manifests' digests say which bytes they have."""
    try:
        with zipfile.ZipFile(path) as archive:
            return canonical_json(json.loads(archive.read(f"{path.stem}/{INDEX}"))).encode("ascii") == index
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):  # absent, or no zip of ours: written anew
        return False
