"""One entry of the store: the manifest that says what its files must be, written and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebake.errors import StoreError
from edgebake.jsonfile import check_signature, sign, write_json_atomic
from edgebake.store_files import files_below, sha256_file, sync_file, sync_folder

MANIFEST = "entry.json"
_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """What a stage made: ``files`` maps each path in ``folder`` to its SHA-256; ``meta`` is what ``write`` returned."""

    key: str
    stage: str
    folder: Path
    meta: Mapping[str, Any]
    files: Mapping[str, str]
    bytes: int


def seal(folder: Path, stage: str, key: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Sync every file in ``folder``, write its manifest, and return it."""
    names = files_below(folder)
    if MANIFEST in names:
        raise ValueError(f"a stage may not write {MANIFEST}: it is the store's")
    files = {}
    for name in names:
        sync_file(folder / name)
        files[name] = {"sha256": sha256_file(folder / name), **_stamp(folder / name)}
    manifest = sign({"version": _VERSION, "stage": stage, "key": key, "meta": dict(meta), "files": files})
    for parent in sorted({(folder / name).parent for name in names}):
        sync_folder(parent)
    write_json_atomic(folder / MANIFEST, manifest)
    as_read: dict[str, Any] = json.loads(json.dumps(manifest))  # a tuple is a list from the first
    return as_read


def read_manifest(folder: Path, stage: str, key: str) -> dict[str, Any] | None:
    """The manifest of the entry in ``folder``; None when it is missing, damaged, or another entry's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not check_signature(manifest):
        return None
    expected = {"version": _VERSION, "stage": stage, "key": key}
    return manifest if {name: manifest.get(name) for name in expected} == expected else None


def to_entry(folder: Path, manifest: Mapping[str, Any]) -> Entry:
    """``manifest`` as the rest of the program sees it."""
    files = manifest["files"]
    return Entry(
        key=manifest["key"],
        stage=manifest["stage"],
        folder=folder,
        meta=manifest["meta"],
        files={name: facts["sha256"] for name, facts in files.items()},
        bytes=sum(facts["bytes"] for facts in files.values()),
    )


def looks_unchanged(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Has every file the size, modification time and inode that it was stored with?"""
    try:
        return all(
            _stamp(folder / name) == {field: facts[field] for field in ("bytes", "mtime_ns", "inode")}
            for name, facts in manifest["files"].items()
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def damaged_files(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that are missing, that nobody stored, or whose bytes are not what was stored. Reads everything."""
    stored = manifest["files"]
    there = set(files_below(folder)) - {MANIFEST}
    bad = there.symmetric_difference(stored)
    for name in there.intersection(stored):
        if sha256_file(folder / name) != stored[name]["sha256"]:
            bad.add(name)
    return tuple(sorted(bad))


def refresh_stamps(folder: Path, manifest: Mapping[str, Any], temporary: Path) -> None:
    """Note the present times and inodes of files just found whole; ``temporary`` is a folder on the same disk."""
    files = {name: {**facts, **_stamp(folder / name)} for name, facts in manifest["files"].items()}
    fresh = temporary / f"{manifest['key'][:16]}.json"
    try:
        write_json_atomic(fresh, sign({**manifest, "files": files}))
        fresh.replace(folder / MANIFEST)
    except (OSError, StoreError):  # a full or read-only store: the next process hashes once more
        return


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
