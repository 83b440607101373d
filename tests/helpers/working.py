"""What tests of workers share: a worker from a few lines of Python, and whether a process has ended."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

import edgebake
from edgebake.worker import Exit

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals")
ENV = {**os.environ, "PYTHONPATH": str(Path(edgebake.__file__).parents[1])}

Run = Callable[..., tuple[Exit, list[Mapping[str, Any]]]]


def argv(folder: Path, body: str) -> list[str]:
    """A worker whose program is ``body``; ``c`` is its channel."""
    script = folder / "case.py"
    head = "import ctypes, os, signal, subprocess, sys, time\nfrom edgebake.worker_channel import channel\n"
    script.write_text(head + textwrap.dedent(body))
    return [sys.executable, "-X", "faulthandler", str(script)]


def gone(pid: int, within: float = 5.0) -> bool:
    """Does the process end (or lie as a zombie with nobody to collect it) within so many seconds?"""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
