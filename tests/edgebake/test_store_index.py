"""Digests of files outside the store: computed once, and again when a file has changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from edgebake.errors import StoreError
from edgebake.store import Store


def aged(path: Path, data: bytes) -> Path:
    """A file that has not changed for a while, in so far as a file can pretend."""
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    return path


def test_a_file_is_hashed_again_only_when_it_has_changed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgebake import store_index

    monkeypatch.setattr(store_index, "_SETTLED_S", 0.0)
    hashed: list[str] = []
    really = store_index.sha256_file
    monkeypatch.setattr(store_index, "sha256_file", lambda path: hashed.append(path.name) or really(path))
    path = aged(tmp_path / "w.bin", b"one")
    first = store.file_digest(path)
    assert (
        Store(store.root).file_digest(path)
        == first
        == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    )
    assert hashed == ["w.bin"]
    aged(path, b"two")  # the same size and modification time
    assert store.file_digest(path) != first
    assert hashed == ["w.bin", "w.bin"]


def test_a_file_that_has_just_changed_is_not_remembered(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    for data in (b"one", b"two", b"six"):  # faster than the tick of a coarse clock
        path.write_bytes(data)
        os.utime(path, ns=(time.time_ns() // 10**9 * 10**9,) * 2)
        assert store.file_digest(path) == hashlib.sha256(data).hexdigest()


def test_a_destroyed_index_is_made_anew(store: Store, tmp_path: Path) -> None:
    path = aged(tmp_path / "w.bin", b"one")
    index = store.root / "v1" / "digests.sqlite"
    store.close()
    for garbage in (b"", b"not a database at all " * 100, b"SQLite format 3\0" + bytes(5000)):
        index.write_bytes(garbage)
        later = Store(store.root)
        assert later.file_digest(path) == later.file_digest(path)
        later.close()
    assert index.read_bytes().startswith(b"SQLite format 3\0")


def test_a_folder_digest_covers_names_and_bytes_of_what_matches(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.py").write_text("1")
    (folder / "sub" / "b.py").write_text("2")
    first = store.folder_digest(folder, ("**/*.py",))
    (folder / "notes.txt").write_text("x")
    assert store.folder_digest(folder, ("**/*.py",)) == first
    (folder / "a.py").rename(folder / "c.py")
    assert store.folder_digest(folder, ("**/*.py",)) != first
    with pytest.raises(StoreError, match="no such folder"):
        store.folder_digest(folder / "none")


def test_the_digest_of_nothing_is_an_error_for_people(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot read"):
        store.file_digest(tmp_path / "none")
    with pytest.raises(StoreError, match="not a file"):
        store.file_digest(tmp_path)
