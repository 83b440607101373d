"""Workers that lose their parent: they and all they started end with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from working import ENV, POSIX, argv, gone

PARENT = """
import sys
from pathlib import Path
from edgebake.worker import Limits, supervise
supervise(sys.argv[2:], payload={}, log=Path(sys.argv[1]), limits=Limits(),
          on_event=lambda event: print(event["pids"], flush=True))
"""

ORPHANS = {
    "sleeps": "time.sleep(60)",
    # native code that never gives the interpreter's lock back: no Python thread of the worker can run
    "holds the lock": "ctypes.PyDLL(None).sleep(60)",
}


def start_parent(tmp_path: Path, body: str) -> tuple[subprocess.Popen[str], list[int]]:
    case = argv(tmp_path, body)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log"), *case], env=ENV, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    return parent, [int(pid) for pid in parent.stdout.readline().strip("[]\n").split(",")]


@POSIX
@pytest.mark.parametrize("body", ORPHANS.values(), ids=ORPHANS)
def test_a_worker_and_what_it_started_die_with_a_killed_parent(tmp_path: Path, body: str) -> None:
    parent, pids = start_parent(
        tmp_path,
        f"""
        c = channel()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        c.send({{"pids": [os.getpid(), child.pid]}})
        {body}
        """,
    )
    time.sleep(0.3)  # until it is where it stays
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.communicate()
    assert all(gone(pid) for pid in pids)


@POSIX
def test_a_worker_that_outlives_its_guard_still_notices_the_end_of_its_parent(tmp_path: Path) -> None:
    parent, pids = start_parent(tmp_path, 'c = channel()\nc.send({"pids": [os.getpid()]})\ntime.sleep(60)')
    guards = [p for p in psutil.Process(parent.pid).children() if p.pid not in pids]
    assert len(guards) == 1
    for process in (*guards, parent):
        process.kill()
    parent.communicate()
    assert gone(pids[0])


@POSIX
def test_ctrl_c_in_the_parent_kills_the_worker(tmp_path: Path) -> None:
    parent, pids = start_parent(tmp_path, 'c = channel()\nc.send({"pids": [os.getpid()]})\ntime.sleep(60)')
    parent.send_signal(signal.SIGINT)
    parent.wait(10)
    assert gone(pids[0], 1.0)
    assert parent.stdout is not None
    parent.stdout.close()
