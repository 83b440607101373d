"""The content-addressed store: what a stage made, found again by the key of everything that went into it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from edgebake import store_entry as sealed
from edgebake import store_home as home
from edgebake.errors import EdgebakeError, StoreError
from edgebake.jsonfile import digest_of
from edgebake.store_deliver import deliver
from edgebake.store_entry import Entry
from edgebake.store_files import (
    blames_storage,
    bytes_below,
    disk_full,
    nearly_full,
    remove_tree,
    storage_error,
    storage_errors,
    sync_folder,
)
from edgebake.store_index import DigestIndex

__all__ = ["Cleaned", "Damage", "Entry", "Store", "Stored", "holds_store"]

_LAYOUT = "v1"  # a later layout gets a folder of its own: neither reads the other
_BEGUN_KEPT_S = 7 * 86400.0
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

_log = logging.getLogger(__name__)

Write = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Damage:
    """A stored entry whose files are not what was written; it has been moved to ``moved_to`` and counts as absent."""

    stage: str
    key: str
    files: tuple[str, ...]
    moved_to: Path

    def __str__(self) -> str:
        return f"stored files of stage {self.stage} are damaged ({', '.join(self.files)}; kept in {self.moved_to})"


@dataclass(frozen=True)
class Stored:
    """One row of ``entries()``; ``used`` is the time of its last use, in seconds since 1970."""

    stage: str
    key: str
    folder: Path
    bytes: int
    used: float
    pinned: bool


@dataclass(frozen=True)
class Cleaned:
    """What ``clean`` removed, and what it left because a running build may be reading it."""

    entries: int
    bytes: int
    in_use: int

    def __str__(self) -> str:
        kept = f"; {self.in_use} kept because a running build uses them" if self.in_use else ""
        return f"{self.entries} entries removed, {self.bytes / 2**20:.1f} MiB freed{kept}"


def holds_store(root: Path) -> bool:
    """Has edgebake kept something in ``root`` before?"""
    return (root.expanduser() / _LAYOUT / "entries").is_dir()


class Store:
    """A folder of entries shared by processes; threads may share one object.

    ``root``: default EDGEBAKE_STORE, else the user's cache folder. StoreError when it cannot be used.
    ``damaged`` lists the entries that ``find`` has thrown out. ``close()`` (also at exit) removes its temporary folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home.default_root()).expanduser().absolute()
        self.damaged: list[Damage] = []
        self._base = self.root / _LAYOUT
        self._verified: set[tuple[str, str]] = set()
        self._touched: set[tuple[str, str]] = set()
        with storage_errors("use the store", self.root):
            for folder in (
                self.root,
                self._base,
                *(self._base / name for name in ("entries", "tmp", "begun", "locks", "pins", "damaged")),
            ):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            home.refuse_foreign(self._base)
            alive, self._own = home.take_own_folder(self._base / "tmp")
        self._index = DigestIndex(self._base / "digests.sqlite")
        self.close = weakref.finalize(self, _leave, alive, self._own, self._index, os.getpid())

    def find(self, stage: str, key: str, *, verify: bool = True) -> Entry | None:
        """The entry, or None. ``verify``: hash every file (once per process); else trust size, mtime and inode.

        An entry that is not what was written is moved away and noted in ``damaged``: the stage has to run again.
        """
        folder = self._entry_folder(stage, key)
        try:
            seen = folder.stat().st_ino
        except FileNotFoundError:
            return None
        with storage_errors("read the store", folder):
            entry, bad = self._examine(folder, stage, key, verify)
            if entry is None:
                self._move_away(folder, seen, Damage(stage, key, bad, self._base / "damaged" / _fresh(stage, key)))
                return None
        if (stage, key) not in self._touched:
            self._touched.add((stage, key))
            try:
                os.utime(folder)  # `clean` removes what was not used for longest
            except OSError:  # a store that can only be read
                return entry
        return entry

    def _examine(self, folder: Path, stage: str, key: str, verify: bool) -> tuple[Entry | None, tuple[str, ...]]:
        manifest = sealed.read_manifest(folder, stage, key)
        if manifest is None:
            return None, (sealed.MANIFEST,)
        entry = sealed.to_entry(folder, manifest)
        unchanged = sealed.looks_unchanged(folder, manifest)
        if unchanged and (not verify or (stage, key) in self._verified):
            return entry, ()
        bad = sealed.damaged_files(folder, manifest)
        if bad:
            return None, bad
        self._verified.add((stage, key))
        if not unchanged:  # restored from a backup, say: whole, but every stamp differs
            sealed.refresh_stamps(folder, manifest, self._own)
        return entry, ()

    def _move_away(self, folder: Path, seen: int, damage: Damage) -> None:
        try:
            if folder.stat().st_ino != seen:
                return  # another process has already replaced it
            folder.rename(damage.moved_to)
        except FileNotFoundError:
            return
        self._verified.discard((damage.stage, damage.key))
        self.damaged.append(damage)

    def commit(self, stage: str, key: str, write: Write, *, begun: bool = False) -> Entry:
        """``write(folder)`` fills an empty folder and returns facts (plain JSON), which becomes the entry at once.

        If another process was quicker, its entry stays. Whatever goes wrong, nothing is left behind; StoreError when
        it is the disk's doing. With ``begun``, for whoever holds the lock, the folder is the one that a killed process
        began to fill, where there is one.
        """
        final = self._entry_folder(stage, key)
        temporary = self._base / "begun" / f"{stage}-{key}" if begun else self._own / _fresh(stage, key)
        try:
            with storage_errors("write to the store", final):
                temporary.mkdir(mode=0o700, exist_ok=begun)
                final.parent.mkdir(mode=0o700, exist_ok=True)
            facts = _run_write(write, temporary)
            with storage_errors("write to the store", final):
                manifest = sealed.seal(temporary, stage, key, facts)
            return self._publish(temporary, sealed.to_entry(final, manifest))
        finally:
            remove_tree(temporary)

    def _publish(self, temporary: Path, entry: Entry) -> Entry:
        for attempt in range(2):
            try:
                temporary.rename(entry.folder)
                break
            except OSError as error:
                theirs = self.find(entry.stage, entry.key)
                if theirs is not None:
                    return theirs
                if attempt:
                    raise storage_error(error, "write to the store", entry.folder) from error
        with storage_errors("write to the store", entry.folder):
            sync_folder(entry.folder.parent)
        self._verified.add((entry.stage, entry.key))
        self._touched.add((entry.stage, entry.key))
        return entry

    @property
    def scratch(self) -> Path:
        """A folder of this process's own, for temporary files: gone with the process, however that ends."""
        return self._own

    @contextmanager
    def lock(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Held by one thread of one process at a time; the system releases it when the process dies. Not reentrant.

        ``waiting`` is called about once a second while another holds it.
        """
        path = self._lock_file(name)
        lock = FileLock(path)
        with storage_errors("lock", path):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _log.info("waiting for another edgebake that is at %s", name)
                _await(lock, waiting)
        try:
            yield
        finally:
            lock.release()

    def get_or_run(
        self, stage: str, key: str, write: Write, *, verify: bool = True, begun: bool = False
    ) -> tuple[Entry, bool]:
        """The entry and whether ``write`` ran for it; processes that ask for the same key wait for the first.

        ``begun``: ``write`` goes on in the folder that a killed process left, and takes of it what is whole.
        """
        entry = self.find(stage, key, verify=verify)
        if entry is not None:
            return entry, False
        with self.lock(f"{stage}-{key}"):
            entry = self.find(stage, key, verify=verify)
            if entry is not None:
                return entry, False
            return self.commit(stage, key, write, begun=begun), True

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a file anywhere, remembered for as long as its path, size, times and inode stay."""
        return self._index.digests([path])[0]

    def folder_digest(self, path: Path, patterns: Sequence[str] = ("**/*",)) -> str:
        """Digest of the names and bytes of the files below ``path`` that match one of ``patterns`` (Path.glob)."""
        if not path.is_dir():
            raise StoreError("there is no such folder", where=str(path))
        files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
        digests = self._index.digests(files)
        return digest_of({file.relative_to(path).as_posix(): d for file, d in zip(files, digests, strict=True)})

    def deliver(self, source: Entry | Path, destination: Path, files: Iterable[str] | None = None) -> tuple[str, ...]:
        """Put ``files`` (default: all) of ``source`` into the folder ``destination``; returns what was not there.

        Blocks are shared where the file system can. Each file appears whole or not at all; one that is identical
        already is left alone. A name may be a folder (``model.mlpackage``): what else the delivered one holds goes.
        """
        return deliver(source, destination, files, self._index)

    def sweep(self) -> int:
        """Remove what processes that died left in the store's temporary folder; returns how many there were.

        What may be gone on with stays for a week.
        """
        with storage_errors("clean", self._base / "tmp"):
            home.sweep_begun(self._base / "begun", self._lock_file, _BEGUN_KEPT_S)
            return home.sweep(self._base / "tmp", self._own)

    def entries(self) -> tuple[Stored, ...]:
        """All entries, those not used for longest first."""
        rows = []
        for folder in (self._base / "entries").glob("*/*"):
            try:
                used = folder.stat().st_mtime
            except FileNotFoundError:  # another process is cleaning
                continue
            pinned = (self._base / "pins" / folder.name).exists()
            rows.append(Stored(folder.parent.name, folder.name, folder, bytes_below(folder), used, pinned))
        return tuple(sorted(rows, key=lambda row: (row.used, row.stage, row.key)))

    def size_bytes(self) -> int:
        """Bytes of everything in the store."""
        return bytes_below(self._base)

    def pin(self, key: str) -> None:
        """Have ``clean`` keep the entry."""
        with storage_errors("pin", self._base / "pins"):
            (self._base / "pins" / _checked(key)).touch()

    def unpin(self, key: str) -> None:
        """Undo ``pin``."""
        with storage_errors("unpin", self._base / "pins"):
            (self._base / "pins" / _checked(key)).unlink(missing_ok=True)

    def clean(self, max_bytes: int | None = None, older_than_s: float | None = None) -> Cleaned:
        """Remove damaged entries, then those not used for ``older_than_s``, then the oldest beyond ``max_bytes``.

        What a killed process began goes with the damaged. Pinned entries stay, and so do those that another process
        has used since it began.
        """
        self.sweep()
        rows = self.entries()
        left, now = sum(row.bytes for row in rows), time.time()
        in_use_since = home.oldest_other(self._base / "tmp", self._own)
        removed = in_use = 0
        with storage_errors("clean", self._base):
            freed = home.sweep_begun(self._base / "begun", self._lock_file, 0)
            for folder in (self._base / "damaged").iterdir():
                freed += bytes_below(folder)
                remove_tree(folder)
            for row in rows:
                too_old = older_than_s is not None and now - row.used > older_than_s
                if row.pinned or not (too_old or (max_bytes is not None and left > max_bytes)):
                    continue
                if row.used >= in_use_since:
                    in_use += 1
                elif self._remove(row):
                    left, freed, removed = left - row.bytes, freed + row.bytes, removed + 1
        return Cleaned(removed, freed, in_use)

    def _remove(self, row: Stored) -> bool:
        doomed = self._own / _fresh(row.stage, row.key)
        try:
            row.folder.rename(doomed)  # nobody ever sees half an entry
        except (FileNotFoundError, PermissionError):  # gone already; or open in another process, on Windows
            return False
        remove_tree(doomed)
        self._verified.discard((row.stage, row.key))
        return True

    def _lock_file(self, name: str) -> Path:
        return self._base / "locks" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"

    def _entry_folder(self, stage: str, key: str) -> Path:
        return self._base / "entries" / _checked(stage) / _checked(key)


def _await(lock: BaseFileLock, waiting: Callable[[], None]) -> None:
    while True:
        waiting()
        try:
            lock.acquire(timeout=1.0)
        except Timeout:
            continue
        return


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for something in the store")
    return name


def _fresh(stage: str, key: str) -> str:
    return f"{stage}-{key[:16]}-{os.urandom(4).hex()}"


def _leave(lock: BaseFileLock, own: Path, index: DigestIndex, process: int) -> None:
    if os.getpid() == process:  # not in a forked child: all of it is its parent's
        index.close()
        home.leave_own_folder(lock, own)


def _run_write(write: Write, folder: Path) -> Mapping[str, Any]:
    try:
        return write(folder)
    except EdgebakeError:
        raise
    except OSError as error:
        if blames_storage(error, folder):
            raise storage_error(error, "write to the store", folder) from error
        raise
    except Exception as error:  # native code tells of a full disk in types and words of its own
        if nearly_full(folder):
            raise disk_full(folder, "write to the store") from error
        raise
