"""What the store asks of the file system: hash, sync, replace, clone, remove, on every system."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgebake.errors import StoreError

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_STALE_PART_S = 3600.0  # a half-written file of a killed process; nobody takes an hour to write one file
_NEARLY_FULL_BYTES = 1 << 20


def storage_error(error: OSError, doing: str, path: Path) -> StoreError:
    """``error`` in words: what could not be done to ``path`` and what helps."""
    if error.errno in _FULL:
        return disk_full(path, doing)
    if doing.startswith("read"):
        fix = remedy(error)
    else:
        allowed = "give yourself permission to write there, or " if error.errno in _REFUSED else ""
        store = "" if doing in ("write", "deliver") else " (the store: EDGEBAKE_STORE)"
        fix = f"{allowed}choose another folder{store}"
    return StoreError(f"cannot {doing}: {error.strerror or error}", where=str(path), fix=fix)


def remedy(error: OSError) -> str:
    """What helps against what the system refuses, whatever it was asked for."""
    if error.errno in _FULL:
        return "free some space (`edgebake clean` empties the store), or choose another disk"
    if error.errno == errno.ENAMETOOLONG:
        return "use a shorter name"
    if error.errno == errno.EIO:
        return "the disk does not answer as it should: copy what is on it, and check it"
    return "give yourself permission to it, or name another place"


def disk_full(path: Path, doing: str = "write") -> StoreError:
    """The error that says that there is no room at ``path``."""
    if "the store" in doing:
        fix = "run `edgebake clean`, free some space, or put the store elsewhere: EDGEBAKE_STORE"
    else:
        fix = "free some space, or write to another disk; `edgebake clean` helps where the store is on this one"
    return StoreError(
        f"cannot {doing}: the disk is full, or a quota or size limit is reached", where=str(path), fix=fix
    )


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """OSErrors inside become StoreErrors that say what could not be done to ``path``."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, doing, path) from error


def blames_storage(error: OSError, folder: Path) -> bool:
    """Is ``error`` the disk's doing, or a refused write below ``folder``, rather than the program's?"""
    if error.errno in _FULL or error.errno in {errno.EIO, errno.EROFS}:
        return True
    inside = error.filename is not None and str(error.filename).startswith(str(folder))
    return inside and error.errno in _REFUSED


def nearly_full(folder: Path) -> bool:
    """Is there less than a MiB left? Native writers (torch, safetensors) hide ENOSPC in errors of their own."""
    return shutil.disk_usage(folder).free < _NEARLY_FULL_BYTES


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Have the file's bytes on disk."""
    with path.open("rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the folder's names on disk, where the system can sync a folder (Windows cannot)."""
    flag: int | None = getattr(os, "O_DIRECTORY", None)
    if flag is None:
        return
    descriptor = os.open(path, os.O_RDONLY | flag)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[str]:
    """Paths of all files below ``folder``, relative, with ``/``, sorted. StoreError for links and special files."""
    found: list[str] = []
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            for item in listing:
                if item.is_dir(follow_symlinks=False):
                    waiting.append(Path(item.path))
                elif item.is_file(follow_symlinks=False):
                    found.append(Path(item.path).relative_to(folder).as_posix())
                else:
                    raise StoreError("only plain files can be stored, this is a link or a device", where=item.path)
    return sorted(found)


def bytes_below(folder: Path) -> int:
    """Sum of the sizes of all files below ``folder``; files that vanish meanwhile count 0."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def clone_or_copy(source: Path, destination: Path) -> None:
    """Fill the new file ``destination`` from ``source``: shared blocks where the file system can, else a copy."""
    with source.open("rb") as reading, destination.open("xb") as writing:
        if not _clone(reading.fileno(), writing.fileno()):
            shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())


def _clone(source: int, destination: int) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fcntl.ioctl(destination, _FICLONE, source)
    except OSError:  # not this file system, or not the same one: the copy that follows reports real trouble
        return False
    return True


def part_name(path: Path) -> Path:
    """A fresh name beside ``path`` to write to before the rename."""
    return path.with_name(f".{path.name[:80]}.{os.urandom(6).hex()}.part")


def remove_stale_parts(folder: Path) -> None:
    """Remove what killed processes left half written in ``folder``."""
    for part in folder.glob(".*.part"):
        try:
            if time.time() - part.stat().st_mtime > _STALE_PART_S:
                part.unlink()
        except FileNotFoundError:  # another process was quicker
            continue


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """``fill(part)`` writes a new file beside ``path``, which takes its place at once. StoreError when it cannot."""
    part = part_name(path)
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def replace_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``: a reader sees the old file or the new one. StoreError when it cannot."""

    def fill(part: Path) -> None:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    replace_file(path, fill)


def remove_tree(folder: Path) -> None:
    """Remove ``folder`` and all below it; nothing to do when it is not there."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except PermissionError:  # Windows does not remove read-only files, nor does POSIX from read-only folders
        for parent, _, names in os.walk(folder):
            Path(parent).chmod(stat.S_IRWXU)
            for name in names:
                Path(parent, name).chmod(stat.S_IRWXU)
        shutil.rmtree(folder)
