"""Digests of files outside the store, remembered by what changes when a file does."""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

from edgebake.errors import StoreError
from edgebake.store_files import sha256_file, storage_error

_VERSION = 1
_TABLE = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT NOT NULL)"
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
# A file changed twice in one tick of its clock keeps its stamp; FAT ticks every 2 s. Younger files are not remembered.
_SETTLED_S = 2.0


class DigestIndex:
    """SQLite table path -> (stamp, SHA-256). Only a memory: whatever is wrong with it costs time, never truth."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._connection: sqlite3.Connection | None = None

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """SHA-256 of each file, links followed. StoreError for a file that cannot be read."""
        found, new = [], []
        for path in paths:
            try:
                real = path.resolve(strict=True)
                stamp, settled = _stamp(real)
                digest = self._recall(str(real), stamp)
                if digest is None:
                    digest = sha256_file(real)
                    if settled and _stamp(real)[0] == stamp:
                        new.append((str(real), stamp, digest))
            except OSError as error:
                raise storage_error(error, "read", path) from error
            found.append(digest)
        self._store(new)
        return found

    def remember(self, digests: Iterable[tuple[Path, str]]) -> None:
        """Files that this process has just written, with the digests they are known to have."""
        self._store([(str(real), _stamp(real)[0], digest) for real, digest in ((p.resolve(), d) for p, d in digests)])

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _recall(self, path: str, stamp: str) -> str | None:
        rows = self._run("SELECT sha256 FROM digests WHERE path = ? AND stamp = ?", [(path, stamp)])
        return rows[0][0] if rows else None

    def _store(self, rows: Sequence[tuple[str, str, str]]) -> None:
        if rows:
            self._run("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)

    def _run(self, statement: str, rows: Sequence[tuple[str, ...]]) -> list[tuple[str]]:
        with self._lock:
            for _ in range(2):
                try:
                    return self._attempt(statement, rows)
                except sqlite3.DatabaseError as error:
                    if getattr(error, "sqlite_errorcode", None) not in _BROKEN:
                        break  # busy, read-only or full: go without memory
                    self._start_over()
            return []

    def _attempt(self, statement: str, rows: Sequence[tuple[str, ...]]) -> list[tuple[str]]:
        if self._connection is None:
            self._connection = self._open(str(self._path))
        if statement.startswith("SELECT"):
            return self._connection.execute(statement, rows[0]).fetchall()
        with self._connection:  # one transaction
            self._connection.executemany(statement, rows)
        return []

    def _open(self, name: str) -> sqlite3.Connection:
        connection = sqlite3.connect(name, timeout=5.0, check_same_thread=False)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                connection.execute("DROP TABLE IF EXISTS digests")
                version = 0
            if version == 0:
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _start_over(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        try:
            for suffix in ("", "-journal", "-wal", "-shm"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        except OSError:  # Windows: another process has it open; remember for this process only
            self._connection = self._open(":memory:")


def _stamp(path: Path) -> tuple[str, bool]:
    """What changes when the file at ``path`` does, and whether its clock has moved on since."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise StoreError("this is not a file", where=str(path))
    settled = time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_S
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}", settled
