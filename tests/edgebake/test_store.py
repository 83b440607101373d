"""The store against real damage: flipped bytes, killed processes, races, full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import edgebake
from edgebake.errors import StageFailed, StoreError
from edgebake.jsonfile import digest_of
from edgebake.store import Store

KEY, OTHER = digest_of("key"), digest_of("other")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and modes")
Write = Callable[[Path], Mapping[str, Any]]


def writes(files: Mapping[str, bytes], **meta: Any) -> Write:
    def write(folder: Path) -> Mapping[str, Any]:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return meta

    return write


MODEL = writes({"model.bin": b"weights" * 1000, "model.mlpackage/Data/w.bin": b"\1" * 64}, shape=(1, 2))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    made.close()


def leftovers(store: Store) -> list[str]:
    """Files in the store that are neither entries nor its own bookkeeping."""
    return [str(p) for p in (store.root / "v1" / "tmp").rglob("*") if p.is_file() and p.suffix != ".alive"]


def flip(path: Path, keep_stamp: bool) -> None:
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    with path.open("rb+") as file:
        file.write(data)
    if keep_stamp:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def run_python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(edgebake.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# --- entries ----------------------------------------------------------------------------------------------------------


def test_what_was_committed_is_found_by_this_and_by_later_processes(store: Store) -> None:
    assert store.find("lower", KEY) is None
    made = store.commit("lower", KEY, MODEL)
    again = Store(store.root).find("lower", KEY)
    assert made == again == store.find("lower", KEY, verify=False)
    assert again is not None
    assert again.meta == {"shape": [1, 2]}
    assert (again.folder / "model.bin").read_bytes() == b"weights" * 1000
    assert set(again.files) == {"model.bin", "model.mlpackage/Data/w.bin"}
    assert again.bytes == 7064
    assert store.find("trace", KEY) is None


def test_a_stage_runs_once_for_a_key(store: Store) -> None:
    runs = []

    def write(folder: Path) -> Mapping[str, Any]:
        runs.append(1)
        return MODEL(folder)

    assert [store.get_or_run("lower", KEY, write)[1] for _ in range(3)] == [True, False, False]
    assert len(runs) == 1


@pytest.mark.parametrize("name", ["model.bin", "model.mlpackage/Data/w.bin", "entry.json"])
def test_a_flipped_byte_is_found_reported_and_the_stage_runs_again(store: Store, name: str) -> None:
    entry = store.commit("lower", KEY, MODEL)
    flip(entry.folder / name, keep_stamp=True)
    later = Store(store.root)
    again, ran = later.get_or_run("lower", KEY, MODEL)
    assert ran
    assert [(d.stage, d.key, d.files) for d in later.damaged] == [("lower", KEY, (name,))]
    assert later.damaged[0].moved_to.is_dir()
    assert str(later.damaged[0]).startswith(f"stored files of stage lower are damaged ({name};")
    assert (again.folder / "model.bin").read_bytes() == b"weights" * 1000


def test_a_quick_look_notices_every_change_that_leaves_a_trace(store: Store) -> None:
    entry = store.commit("lower", KEY, MODEL)
    flip(entry.folder / "model.bin", keep_stamp=False)
    assert store.find("lower", KEY, verify=False) is None
    assert store.damaged[0].files == ("model.bin",)


@pytest.mark.parametrize("damage", ["missing", "extra", "no manifest", "another entry's manifest"])
def test_entries_with_files_too_few_or_too_many_are_thrown_out(store: Store, damage: str) -> None:
    entry = store.commit("lower", KEY, MODEL)
    if damage == "missing":
        (entry.folder / "model.bin").unlink()
    elif damage == "extra":
        (entry.folder / "model.mlpackage" / "stray").write_bytes(b"")
    elif damage == "no manifest":
        (entry.folder / "entry.json").unlink()
    else:
        other = store.commit("lower", OTHER, MODEL)
        shutil.copy(other.folder / "entry.json", entry.folder)
    assert Store(store.root).find("lower", KEY) is None
    assert store.get_or_run("lower", KEY, MODEL)[1]


def test_a_store_restored_from_a_backup_is_hashed_once_and_then_trusted(store: Store, tmp_path: Path) -> None:
    store.commit("lower", KEY, MODEL)
    shutil.copytree(store.root / "v1" / "entries", tmp_path / "copy" / "v1" / "entries")  # new times, new inodes
    copy = Store(tmp_path / "copy")
    entry = copy.find("lower", KEY, verify=False)
    assert entry is not None
    assert not copy.damaged
    flip(entry.folder / "model.bin", keep_stamp=True)
    assert copy.find("lower", KEY, verify=False) is not None  # the new stamps were kept: nothing was read


def test_a_failing_stage_leaves_nothing_behind(store: Store) -> None:
    def write(folder: Path) -> Mapping[str, Any]:
        (folder / "half").write_bytes(b"x")
        raise StageFailed("no")

    with pytest.raises(StageFailed):
        store.get_or_run("lower", KEY, write)
    assert store.find("lower", KEY) is None
    assert not leftovers(store)


def test_links_are_not_stored(store: Store, tmp_path: Path) -> None:
    def write(folder: Path) -> Mapping[str, Any]:
        (folder / "link").symlink_to(tmp_path)
        return {}

    with pytest.raises(StoreError, match="plain files"):
        store.commit("lower", KEY, write)
    assert store.find("lower", KEY) is None


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", "a:b"])
def test_names_cannot_lead_out_of_the_store(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        store.find(name, KEY)
    with pytest.raises(ValueError, match="no name"):
        store.find("lower", name)


def test_lookups_are_quick(store: Store) -> None:
    keys = [digest_of(i) for i in range(50)]
    for key in keys:
        store.commit("lower", key, MODEL)
    later, took = Store(store.root), []
    for _ in range(3):  # the best of three: the machine may be busy
        begun = time.perf_counter()
        assert all(later.find("lower", key, verify=False) for key in keys)
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.1  # so 150, for 18 units, take less than 0.3 s


# --- processes --------------------------------------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
from edgebake.store import Store
def write(folder):
    (folder / "half.bin").write_bytes(b"x" * 100000)
    print("writing", flush=True)
    time.sleep(60)
Store(Path(sys.argv[1])).get_or_run("lower", sys.argv[2], write)
"""


@POSIX
def test_a_process_killed_in_the_middle_leaves_no_entry_and_a_sweep_cleans_up(store: Store) -> None:
    process = run_python(KILLED, str(store.root), KEY)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert leftovers(store)
    assert store.sweep() == 0  # it lives: its files stay
    assert leftovers(store)
    process.kill()
    process.communicate()
    assert store.find("lower", KEY) is None
    assert store.sweep() == 1
    assert not leftovers(store)
    assert store.get_or_run("lower", KEY, MODEL)[1]  # and its lock is free


RACER = """
import sys, time
from pathlib import Path
from edgebake.store import Store
def write(folder):
    with open(sys.argv[3], "a") as runs:
        runs.write("run\\n")
    time.sleep(0.3)
    (folder / "f").write_bytes(b"x")
    return {}
store = Store(Path(sys.argv[1]))
while time.time() < float(sys.argv[4]):
    time.sleep(0.001)
print(store.get_or_run("lower", sys.argv[2], write)[1])
"""


def test_of_processes_that_race_for_a_key_one_writes_and_all_get_the_entry(store: Store, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    start = str(time.time() + 1.0)
    racers = [run_python(RACER, str(store.root), KEY, str(runs), start) for _ in range(3)]
    results = [racer.communicate(timeout=30) for racer in racers]
    assert sorted(out for out, _ in results) == ["False\n", "False\n", "True\n"], results
    assert runs.read_text() == "run\n"


def test_of_commits_without_a_lock_the_first_stays(store: Store) -> None:
    def write(folder: Path) -> Mapping[str, Any]:
        Store(store.root).commit("lower", KEY, writes({"f": b"theirs"}, by="them"))
        (folder / "f").write_bytes(b"mine")
        return {"by": "me"}

    entry = store.commit("lower", KEY, write)
    assert entry.meta == {"by": "them"}
    assert (entry.folder / "f").read_bytes() == b"theirs"
    assert not leftovers(store)


def test_a_lock_keeps_threads_apart(store: Store) -> None:
    inside, most = [0], [0]

    def work() -> None:
        with store.lock("minilm-l6/model@onnx-cpu#w8"):  # any text is a name
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


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


# --- digests of files outside -----------------------------------------------------------------------------------------


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


# --- delivery ---------------------------------------------------------------------------------------------------------


def test_delivery_copies_what_differs_and_leaves_what_is_there(store: Store, tmp_path: Path) -> None:
    entry = store.commit("lower", KEY, MODEL)
    out = tmp_path / "dist"
    assert store.deliver(entry, out, ("model.bin", "model.mlpackage")) == ("model.bin", "model.mlpackage/Data/w.bin")
    inode = (out / "model.bin").stat().st_ino
    assert store.deliver(entry, out) == ()
    assert (out / "model.bin").stat().st_ino == inode
    flip(out / "model.bin", keep_stamp=True)
    (out / "model.mlpackage" / "stray").write_text("from an older build")
    (out / "notes.txt").write_text("the user's")
    assert store.deliver(entry, out, ("model.bin", "model.mlpackage")) == ("model.bin",)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "model.bin",
        "model.mlpackage/Data/w.bin",
        "notes.txt",
    ]
    assert store.find("lower", KEY) is not None


def test_a_delivered_file_shares_nothing_that_could_damage_the_store(store: Store, tmp_path: Path) -> None:
    entry = store.commit("lower", KEY, MODEL)
    store.deliver(entry, tmp_path / "dist")
    with (tmp_path / "dist" / "model.bin").open("rb+") as file:
        file.write(b"overwritten")
    assert Store(store.root).find("lower", KEY) is not None


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "", "a\\..\\b", "none"])
def test_delivery_refuses_names_that_lead_out_or_nowhere(store: Store, tmp_path: Path, name: str) -> None:
    entry = store.commit("lower", KEY, MODEL)
    with pytest.raises(StoreError):
        store.deliver(entry, tmp_path / "dist", (name,))


def test_what_a_killed_delivery_left_is_removed_when_it_is_old(store: Store, tmp_path: Path) -> None:
    for name in (".model.bin.0123.part", ".other.4567.part"):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / ".model.bin.0123.part", (1, 1))
    store.deliver(store.commit("lower", KEY, writes({"model.bin": b"x"})), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [".other.4567.part", "model.bin"]


# --- cleaning ---------------------------------------------------------------------------------------------------------


def fill(store: Store, count: int) -> list[str]:
    """``count`` entries of 1000 bytes and more, each used an hour after the one before, the last an hour ago."""
    keys = [digest_of(i) for i in range(count)]
    for i, key in enumerate(keys):
        entry = store.commit("lower", key, writes({"f": bytes(1000)}))
        used = time.time() - 3600 * (count - i)
        os.utime(entry.folder, (used, used))
    return keys


def kept(store: Store) -> set[str]:
    return {row.key for row in store.entries()}


def test_cleaning_removes_the_oldest_beyond_the_cap_and_keeps_pins(store: Store) -> None:
    keys = fill(store, 4)
    store.pin(keys[0])
    one = store.entries()[0].bytes
    cleaned = store.clean(max_bytes=2 * one)
    assert kept(store) == {keys[0], keys[3]}
    assert (cleaned.entries, cleaned.bytes) == (2, 2 * one)
    assert str(cleaned) == "2 entries removed, 0.0 MiB freed"
    store.unpin(keys[0])
    store.clean(max_bytes=0)
    assert kept(store) == set()


def test_cleaning_by_age_counts_from_the_last_use(store: Store) -> None:
    keys = fill(store, 4)
    later = Store(store.root)
    assert later.find("lower", keys[0]) is not None  # used just now
    later.close()
    store.clean(older_than_s=2.5 * 3600)
    assert kept(store) == {keys[0], keys[2], keys[3]}


def test_cleaning_leaves_what_another_process_has_used_since_it_began(store: Store) -> None:
    keys = fill(store, 3)
    other = Store(store.root)
    assert other.find("lower", keys[0]) is not None
    assert store.clean(max_bytes=0).in_use == 1
    assert kept(store) == {keys[0]}
    other.close()
    store.clean(max_bytes=0)
    assert kept(store) == set()


def test_cleaning_removes_damaged_entries(store: Store) -> None:
    entry = store.commit("lower", KEY, MODEL)
    flip(entry.folder / "model.bin", keep_stamp=False)
    assert store.find("lower", KEY) is None
    assert store.clean().bytes > 7000
    assert not store.damaged[0].moved_to.exists()


@POSIX
def test_a_killed_process_holds_no_lock(store: Store) -> None:
    code = "import sys,time\nfrom pathlib import Path\nfrom edgebake.store import Store\n"
    code += "with Store(Path(sys.argv[1])).lock('unit'):\n    print('held', flush=True)\n    time.sleep(60)"
    process = run_python(code, str(store.root))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    threading.Timer(0.2, process.send_signal, (signal.SIGKILL,)).start()
    begun = time.monotonic()
    with store.lock("unit"):
        assert 0.1 < time.monotonic() - begun < 10
    process.communicate()
