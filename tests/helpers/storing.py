"""What tests of the store share: writers, damage, and processes that are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import edgebake
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
