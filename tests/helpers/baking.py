"""What tests of whole builds share: a tiny network beside its recipe, the command as users run it, and digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import edgebake
import edgebake_targets
from edgebake.pipeline import BuildOptions, build
from edgebake.recipe_yaml import read
from edgebake.result import Result

SOURCES = [str(Path(package.__file__ or "").parents[1]) for package in (edgebake, edgebake_targets)]
# A folder of files named like a place in the code below: who gets there notes it, and stays as long as the file does.
HOLDS = "EDGEBAKE_TEST_HOLDS"
NETWORK = f"""
import ctypes, os, time
from pathlib import Path
import numpy as np
import torch
from torch import nn
from edgebake.types import Call, Sample

def hold(place):
    file = Path(os.environ.get("{HOLDS}", "/nowhere"), place)
    if file.exists():
        file.with_suffix(".reached").touch()
    while file.exists():
        time.sleep(0.02)

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.wide, self.deep, self.head = nn.Linear(32, width), nn.Linear(width, width), nn.Linear(width, 8)

    def forward(self, x):
        if torch.compiler.is_exporting():
            hold("trace")
        return self.head(torch.relu(self.deep(torch.relu(self.wide(x)))))

def build(width=64):
    hold("load")
    return Net(width)

def evaluation(request):
    hold("evaluation")
    return samples(request)

def calibration(request):
    hold("calibration")
    return samples(request)

def samples(request):
    values = np.random.default_rng(request.count).standard_normal((request.count, 1, 32), dtype=np.float32)
    return [Sample(calls=(Call(inputs={{"x": value}}),), source=str(i)) for i, value in enumerate(values)]

def crashing(request):
    ctypes.string_at(0)

def leaving(request):
    os._exit(0)

def hanging(request):
    time.sleep(600)

def hoarding(request):
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1 << 20) * 64))
        time.sleep(0.06)
"""
W8A8 = {"target": "executorch-xnnpack", "scheme": "w8a8"}
BOTH: tuple[Any, ...] = ("onnx-cpu", W8A8)


def recipe(folder: Path, targets: Sequence[Any] = BOTH, name: str = "tiny", **more: Any) -> Path:
    """A recipe for the network above in ``folder``, with the network and its samples beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_net.py").write_text(NETWORK)
    content = {
        "name": name,
        "model": {"source": "python", "path": "tiny_net:build"},
        "inputs": {"x": {"shape": [1, 32]}},
        "samples": {
            "calibration": {"python": "tiny_net:calibration", "count": 8},
            "evaluation": {"python": "tiny_net:evaluation", "count": 16},
        },
        "limits": {"parity": {"cosine": 0.9}},
        "targets": list(targets),
        **more,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def results(self) -> list[dict[str, Any]]:
        """The units of the JSON report."""
        found: list[dict[str, Any]] = json.loads(self.out)["results"]
        return found

    @property
    def stages(self) -> list[dict[str, str]]:
        """What each unit says of its stages."""
        return [result["stages"] for result in self.results]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the tree under test first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), **more}


def start(*arguments: object, **more: str) -> subprocess.Popen[str]:
    """`edgebake ARGUMENTS` in a process of its own; ``more`` is added to its environment."""
    code = "from edgebake.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], within_s: float = 300) -> Done:
    """Wait for the end of what ``start`` started."""
    try:
        out, err = process.communicate(timeout=within_s)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


@dataclass(frozen=True)
class Kitchen:
    """A recipe with a store and an output folder of its own."""

    recipe: Path
    store: Path
    out: Path

    def arguments(self, *more: object) -> tuple[object, ...]:
        """The command line of a build with a JSON report."""
        return ("build", self.recipe, "--store", self.store, "--out", self.out, "--json", *more)

    def build(self, *more: object) -> Done:
        """Build with the command line."""
        return finish(start(*self.arguments(*more)))


def kitchen(folder: Path, *arguments: Any, **more: Any) -> Kitchen:
    """A fresh one in ``folder``; the rest goes to ``recipe``."""
    return Kitchen(recipe(folder / "recipe", *arguments, **more), folder / "store", folder / "dist")


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every delivered file that must not depend on the run, by path; leftovers count as well."""
    varying = ("measurements.json", ".edgebake.json")
    files = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in varying)
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def litter(kitchen: Kitchen) -> list[str]:
    """What half a delivery or half a stage would leave: hidden folders in dist, files in the store's temporary one."""
    hidden = [str(p) for p in kitchen.out.rglob(".*") if p.name != ".edgebake.json"]
    return hidden + [str(p) for p in (kitchen.store / "v1" / "tmp").rglob("*") if p.is_file() and p.suffix != ".alive"]


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of the byte in the middle, or ``at``; times and inode stay as they were."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 0x10
    with path.open("rb+") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# A build that tells each stage's start and waits for a line before it goes on, so that a kill hits that very stage.
_STEPPED = """
import json, sys
from pathlib import Path
from edgebake.pipeline import BuildOptions, build
from edgebake.recipe_yaml import read

def observe(event):
    if event["event"] == "stage" and event["state"] == "start":
        print(json.dumps(event), flush=True)
        sys.stdin.readline()

recipe, store, out = sys.argv[1:]
options = BuildOptions(out=Path(out), store=Path(store))
results = build([read(recipe)], options, observe)
print(json.dumps({"end": [r.failure and [r.failure.stage, *map(str, r.failure.problems)] for r in results]}))
"""


# Found by Python as it starts: a worker stops itself once it has told that it begins the stage, however busy the
# machine is; the parent would come too late for a stage of milliseconds.
_FREEZE = """
import os, signal, sys

if "edgebake.unit" in sys.orig_argv:
    from edgebake.worker_channel import Channel

    send = Channel.send

    def send_and_stop(self, event):
        send(self, event)
        if (event.get("stage"), event.get("state")) == (os.environ["EDGEBAKE_TEST_FREEZE"], "start"):
            os.kill(os.getpid(), signal.SIGSTOP)

    Channel.send = send_and_stop
"""


def freezing(folder: Path, stage: str) -> dict[str, str]:
    """What to add to an environment whose workers are to stop (SIGSTOP) in ``stage``."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_FREEZE)
    return {"EDGEBAKE_TEST_FREEZE": stage, "PYTHONPATH": os.pathsep.join([str(folder), *SOURCES])}


@contextmanager
def stepped(kitchen: Kitchen, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A build that prints the event of each stage that starts, then goes on when it is given a line."""
    arguments = [str(kitchen.recipe), str(kitchen.store), str(kitchen.out)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _STEPPED, *arguments],
        env=environment(**more),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    with process:
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def events(process: subprocess.Popen[str]) -> Iterator[Mapping[str, Any]]:
    """What a stepped build prints; asking for the next one lets it go on."""
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)
        process.stdin.write("\n")
        process.stdin.flush()


def family(pid: int) -> list[psutil.Process]:
    """All descendants of a process."""
    return psutil.Process(pid).children(recursive=True)


def workers(pid: int) -> list[psutil.Process]:
    """The descendants of a build that do its stages."""
    return [p for p in family(pid) if "edgebake.unit" in p.cmdline()]


def await_stopped(process: psutil.Process, within_s: float = 30.0) -> None:
    """Wait until the process has been stopped."""
    until = time.monotonic() + within_s
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < until, f"process {process.pid} was not stopped"
        time.sleep(0.02)


def all_gone(processes: Sequence[psutil.Process], within_s: float = 5.0) -> bool:
    """Do all of them end within so many seconds?"""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if all(map(_ended, processes)):
            return True
        time.sleep(0.02)
    return False


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def await_file(path: Path, within_s: float = 120.0) -> None:
    """Wait until the file is there."""
    until = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} did not appear"
        time.sleep(0.02)


def interrupt(process: subprocess.Popen[str]) -> None:
    """What Ctrl-C does."""
    process.send_signal(signal.SIGINT)


def rebuild(kitchen: Kitchen, *, check: bool = False) -> tuple[list[Result], list[str]]:
    """Build in this process (workers are others, as ever); the results and the warnings."""
    warnings: list[str] = []

    def observe(event: Mapping[str, Any]) -> None:
        if event["event"] == "warning":
            warnings.append(event["text"])

    options = BuildOptions(out=kitchen.out, store=kitchen.store, check=check)
    return build([read(str(kitchen.recipe))], options, observe), warnings


# Runs in a mount namespace of its own: the disk is gone with the process, whatever happens.
_SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path
from baking import Kitchen, digests, litter

disk, sizes, *paths = json.loads(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sizes[0]}", "tmpfs", disk], check=True)
kitchen = Kitchen(*map(Path, paths))
told = []
for size in sizes:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    done = kitchen.build()
    told.append([done.code, done.out, done.err, litter(kitchen), digests(kitchen.out)])
print(json.dumps(told))
"""
_OWN_MOUNTS = ["unshare", "--mount", "--map-root-user"]


@dataclass(frozen=True)
class OnDisk:
    """How a build on a small disk ended, and what lay there afterwards."""

    done: Done
    litter: list[str]
    digests: dict[str, str]


def on_small_disk(kitchen: Kitchen, disk: Path, sizes: Sequence[str]) -> list[OnDisk]:
    """Build once for each of ``sizes``, the size of the file system at ``disk``, which starts empty and only grows."""
    if shutil.which("unshare") is None or subprocess.run([*_OWN_MOUNTS, "true"], check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here")
    disk.mkdir(parents=True, exist_ok=True)
    arguments = json.dumps([str(disk), list(sizes), str(kitchen.recipe), str(kitchen.store), str(kitchen.out)])
    path = os.pathsep.join([*SOURCES, str(Path(__file__).parent)])
    done = subprocess.run(
        [*_OWN_MOUNTS, sys.executable, "-c", _SMALL_DISK, arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [OnDisk(Done(*told[:3]), *told[3:]) for told in json.loads(done.stdout)]
