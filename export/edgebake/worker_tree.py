"""A process with its descendants: how much memory they take, how they all end, and that none outlives this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress

import psutil

_MIB = float(1 << 20)
_END_S = 2.0
# Standard input ends when this process does, however it does; then the worker's process group is killed. A thread of
# the worker watches for that as well, but cannot run while native code holds the interpreter's lock.
_GUARD = 'read -r _; kill -s KILL -- "-$1"'

Pipe = subprocess.Popen[bytes]


def start_guard(process: Pipe) -> Pipe | None:
    """A shell that kills the group of ``process`` when this process dies; None where there are no process groups."""
    if os.name != "posix":
        return None
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "edgebake-guard", str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def end_guard(guard: Pipe) -> None:
    """Dismiss the guard."""
    guard.kill()
    guard.wait()
    close(guard)


def close(process: Pipe) -> None:
    """Close the pipe to the standard input of a process that has ended."""
    try:
        if process.stdin is not None:
            process.stdin.close()
    except OSError:  # what it did not read is of no use to anyone
        return


def family(pid: int) -> list[psutil.Process]:
    """The process and all its descendants, as far as they are alive."""
    try:
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.Error:
        return []


def resident_mib(members: Iterable[psutil.Process]) -> float:
    """Sum of their resident memory."""
    return sum(map(_resident_bytes, members)) / _MIB


def end_tree(process: Pipe, seen: Sequence[psutil.Process]) -> None:
    """Kill ``process``, its group, its descendants and those ``seen`` before; returns when they are gone."""
    members = {member.pid: member for member in (*seen, *family(process.pid)) if member.pid != process.pid}
    if process.poll() is None:
        process.kill()
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):  # nobody left; macOS says so differently of zombies
            os.killpg(process.pid, signal.SIGKILL)  # also those whose parent has died before
    for member in members.values():
        try:
            member.kill()  # those that have left the group; psutil makes sure that the number is still theirs
        except psutil.Error:
            continue
    process.wait()
    close(process)
    psutil.wait_procs(list(members.values()), timeout=_END_S)


def _resident_bytes(member: psutil.Process) -> int:
    try:
        return int(member.memory_info().rss)
    except psutil.Error:
        return 0
