"""The store against real damage: flipped bytes, killed processes, races."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebake.errors import StageFailed, StoreError
from edgebake.jsonfile import digest_of
from edgebake.store import Store
from storing import KEY, MODEL, OTHER, POSIX, flip, leftovers, run_python, writes

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


BEGUN = """
import os, signal, sys
from pathlib import Path
from edgebake.store import Store
def write(folder):
    (folder / "half.bin").write_bytes(b"x" * 100000)
    os.kill(os.getpid(), signal.SIGKILL)
Store(Path(sys.argv[1])).get_or_run("lower", sys.argv[2], write, begun=True)
"""


@POSIX
def test_what_a_killed_process_began_is_gone_on_with_and_cleaned_when_nobody_does(store: Store) -> None:
    for key in (KEY, OTHER):
        run_python(BEGUN, str(store.root), key).communicate()
    assert store.sweep() == 2
    assert store.find("lower", KEY) is None

    def write(folder: Path) -> dict[str, object]:
        assert (folder / "half.bin").read_bytes() == b"x" * 100000
        (folder / "half.bin").rename(folder / "whole.bin")
        assert store.clean().bytes == 100000  # the other's: this one is being worked on
        return {}

    entry, ran = store.get_or_run("lower", KEY, write, begun=True)
    assert ran
    assert list(entry.files) == ["whole.bin"]
    assert not list((store.root / "v1" / "begun").iterdir())


@POSIX
def test_a_sweep_keeps_what_was_begun_this_week(store: Store) -> None:
    run_python(BEGUN, str(store.root), KEY).communicate()
    (folder,) = (store.root / "v1" / "begun").iterdir()
    store.sweep()
    assert folder.exists()
    for path in (folder / "half.bin", folder):
        os.utime(path, (time.time() - 8 * 86400,) * 2)
    store.sweep()
    assert not folder.exists()


def test_what_fails_leaves_nothing_begun(store: Store) -> None:
    def write(folder: Path) -> dict[str, object]:
        (folder / "half.bin").write_bytes(b"x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        store.get_or_run("lower", KEY, write, begun=True)
    assert not list((store.root / "v1" / "begun").iterdir())


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
