"""The store on disks that are full and in folders that are not its own."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebake.errors import StoreError
from edgebake.store import Store
from storing import KEY, MODEL, POSIX, leftovers, run_python, writes

# --- trouble with the disk --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_store_error_and_nothing_is_left(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    store.commit("trace", KEY, writes({"f": b"x"}))
    before = shutil.disk_usage(small_disk).free
    with pytest.raises(StoreError, match="disk is full") as raised:
        store.get_or_run("lower", KEY, writes({"a": b"x" * (1 << 20), "b": b"x" * (8 << 20)}))
    assert "EDGEBAKE_STORE" in raised.value.problems[0].fix
    assert store.find("lower", KEY) is None
    assert not leftovers(store)
    assert shutil.disk_usage(small_disk).free > before - 65536
    assert store.find("trace", KEY) is not None
    assert store.get_or_run("lower", KEY, writes({"f": b"small"}))[1]


def test_a_native_writer_that_hides_enospc_is_seen_through(small_disk: Path) -> None:
    def write(folder: Path) -> Mapping[str, Any]:
        try:
            (folder / "f").write_bytes(b"x" * (8 << 20))
        except OSError as error:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0") from error
        return {}

    with pytest.raises(StoreError, match="disk is full"):
        Store(small_disk / "store").commit("lower", KEY, write)


def test_a_full_disk_leaves_the_delivered_file_as_it_was(small_disk: Path, store: Store) -> None:
    (small_disk / "model.bin").write_bytes(b"old")
    entry = store.commit("lower", KEY, writes({"model.bin": b"x" * (8 << 20)}))
    with pytest.raises(StoreError, match="disk is full"):
        store.deliver(entry, small_disk)
    assert [(p.name, p.read_bytes()) for p in small_disk.iterdir()] == [("model.bin", b"old")]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from edgebake.errors import StoreError
from edgebake.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
try:
    store.commit("lower", sys.argv[2], lambda folder: (folder / "f").write_bytes(b"x" * 100000))
except StoreError as error:
    print(error)
print(store.find("lower", sys.argv[2]), list((store.root / "v1" / "entries").glob("*/*")))
"""


@POSIX
def test_a_file_size_limit_is_a_store_error(store: Store) -> None:
    out, err = run_python(LIMITED, str(store.root), KEY).communicate(timeout=30)
    assert "size limit" in out, err
    assert out.endswith("None []\n")
    assert not leftovers(store)


def test_errors_of_the_program_are_not_blamed_on_the_disk(store: Store) -> None:
    def missing(folder: Path) -> Mapping[str, Any]:
        return {"x": (folder / "not there").read_text()}

    def refused(folder: Path) -> Mapping[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", "/home/user/weights.bin")

    with pytest.raises(FileNotFoundError):
        store.commit("lower", KEY, missing)
    with pytest.raises(PermissionError):
        store.commit("lower", KEY, refused)


# --- the root ---------------------------------------------------------------------------------------------------------


def test_the_environment_names_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBAKE_STORE", str(tmp_path / "named"))
    assert Store().root == tmp_path / "named"
    monkeypatch.delenv("EDGEBAKE_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if sys.platform == "linux":
        assert Store().root == tmp_path / "cache" / "edgebake"


def test_a_root_that_cannot_be_used_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot use the store"):
        Store(tmp_path / "file" / "store")


@POSIX
def test_only_the_user_can_look_into_the_store_and_one_that_others_can_write_to_is_refused(store: Store) -> None:
    entry = store.commit("lower", KEY, MODEL)
    base = store.root / "v1"
    for folder in (store.root, base, base / "entries", entry.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    base.chmod(0o770)
    with pytest.raises(StoreError, match="others can write"):
        Store(store.root)
    if os.geteuid() == 0:
        base.chmod(0o700)
        os.chown(base, 12345, -1)
        with pytest.raises(StoreError, match="another user"):
            Store(store.root)
