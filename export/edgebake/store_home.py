"""Where the store lies, who may write to it, and which of its temporary folders belong to living processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgebake.errors import StoreError
from edgebake.store_files import bytes_below, remove_tree

if TYPE_CHECKING:
    from filelock import BaseFileLock

_ALIVE = ".alive"


def default_root() -> Path:
    """EDGEBAKE_STORE, else ``edgebake`` in the user's cache folder."""
    named = os.environ.get("EDGEBAKE_STORE")
    if named:
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("edgebake", appauthor=False)


def refuse_foreign(folder: Path) -> None:
    """Stored programs are run without asking, so nobody else may be able to put some there. StoreError."""
    if sys.platform == "win32":  # folders below the profile are the user's own
        return
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise StoreError("the store belongs to another user", where=str(folder), fix="choose a folder: EDGEBAKE_STORE")
    if status.st_mode & 0o022:
        raise StoreError("others can write to the store", where=str(folder), fix=f"chmod -R go-w {folder}")


def take_own_folder(temporary: Path) -> tuple[BaseFileLock, Path]:
    """A fresh folder for this process in ``temporary``, and the lock that the system drops when the process dies."""
    from filelock import FileLock, Timeout  # with sockets and logging: more than a light verb reads

    while True:
        own = temporary / os.urandom(8).hex()
        marker = own.with_suffix(_ALIVE)
        lock = FileLock(marker, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # a sweep has just taken it for dead
            continue
        if marker.exists():
            own.mkdir(mode=0o700)
            return lock, own
        lock.release()


def leave_own_folder(lock: BaseFileLock, own: Path) -> None:
    """Remove the folder and let go of its lock."""
    remove_tree(own)
    lock.release()
    try:
        own.with_suffix(_ALIVE).unlink(missing_ok=True)
    except PermissionError:  # Windows: a sweep is looking at it, and will remove it
        return


def sweep(temporary: Path, own: Path) -> int:
    """Remove the folders of dead processes; returns how many there were."""
    from filelock import FileLock, Timeout

    dead = 0
    for marker in _others(temporary, own):
        lock = FileLock(marker)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        leave_own_folder(lock, marker.with_suffix(""))
        dead += 1
    return dead


def sweep_begun(begun: Path, lock_file: Callable[[str], Path], untouched_s: float) -> int:
    """Remove folders of ``begun`` that nobody works in or has written to for ``untouched_s``; returns their bytes.

    ``lock_file``: of the lock that whoever works in the folder of a name holds.
    """
    from filelock import FileLock, Timeout

    freed = 0
    for folder in sorted(begun.iterdir()):
        lock = FileLock(lock_file(folder.name))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            if folder.is_dir() and time.time() - _last_written(folder) >= untouched_s:
                freed += bytes_below(folder)
                remove_tree(folder)
        finally:
            lock.release()
    return freed


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def oldest_other(temporary: Path, own: Path) -> float:
    """When the oldest other process that still uses the store began (seconds since 1970); infinity without one."""
    begun = [float("inf")]
    for marker in _others(temporary, own):
        try:
            begun.append(marker.stat().st_mtime)
        except FileNotFoundError:  # it has just ended
            continue
    return min(begun)


def _others(temporary: Path, own: Path) -> list[Path]:
    return sorted(marker for marker in temporary.glob(f"*{_ALIVE}") if marker.stem != own.name)
