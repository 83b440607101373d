"""Copies of stored files in a folder of the user's: whole or not at all, and untouched when they are there already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from edgebake.errors import StoreError
from edgebake.store_entry import MANIFEST, Entry
from edgebake.store_files import clone_or_copy, files_below, remove_stale_parts, replace_file, storage_errors
from edgebake.store_index import DigestIndex


def deliver(
    source: Entry | Path, destination: Path, files: Iterable[str] | None, index: DigestIndex
) -> tuple[str, ...]:
    """See ``Store.deliver``."""
    folder = source.folder if isinstance(source, Entry) else source
    known = source.files if isinstance(source, Entry) else {}
    changed: list[tuple[Path, str]] = []
    with storage_errors("deliver", destination):
        wanted, folders = _expand(folder, files)
        for below in {(destination / name).parent for name in wanted}:
            remove_stale_parts(below)
        for name in wanted:
            digest = known.get(name) or index.digests([folder / name])[0]
            if not _is_there(destination / name, folder / name, digest, index):
                replace_file(destination / name, partial(clone_or_copy, folder / name))
                changed.append((destination / name, digest))
        for name in folders:
            _remove_others(destination, name, wanted)
        index.remember(changed)
    return tuple(path.relative_to(destination).as_posix() for path, _ in changed)


def _is_there(delivered: Path, stored: Path, digest: str, index: DigestIndex) -> bool:
    if delivered.is_symlink() or not delivered.is_file():
        return False
    return delivered.stat().st_size == stored.stat().st_size and index.digests([delivered]) == [digest]


def _expand(folder: Path, files: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Names of the plain files to deliver, and which of ``files`` are folders. StoreError for names that lead out."""
    if files is None:
        return [name for name in files_below(folder) if name != MANIFEST], []
    wanted: set[str] = set()
    folders = []
    for name in files:
        pure = PurePosixPath(name)
        if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
            raise StoreError(f"{name!r} is not a name inside the folder", where=str(folder))
        if (folder / name).is_dir():
            folders.append(name)
            wanted.update(f"{pure}/{below}" for below in files_below(folder / name))
        elif (folder / name).is_file():
            wanted.add(str(pure))
        else:
            raise StoreError(f"there is no file {name!r} to deliver", where=str(folder))
    return sorted(wanted), folders


def _remove_others(destination: Path, name: str, wanted: Sequence[str]) -> None:
    for below in files_below(destination / name):
        if f"{PurePosixPath(name)}/{below}" not in wanted:
            (destination / name / below).unlink()
