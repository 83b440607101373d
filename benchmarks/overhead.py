"""What edgebake costs beyond the libraries it calls: `edgebake build` of MiniLM against bare_minilm.py.

Both sides run in turns on this machine, each in a fresh folder and store, with the same environment variables. Wall
time is that of the whole command; peak memory is the highest sum over the process and all its descendants, sampled
alike for both, of proportional set sizes (proc_pid_smaps): a page that two of them share counts once, and the moment
between fork and exec does not count a process twice. Ratios are those of the medians; pairs are printed as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from edgebake.unit import ENVIRONMENT

WALL_LIMIT, MEMORY_LIMIT = 1.10, 1.15
_SAMPLE_S = 0.1
_MAIN = "from edgebake.cli import main; main()"
_BARE = Path(__file__).with_name("bare_minilm.py")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command: wall seconds, CPU seconds of its tree, highest MiB of its tree."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Run:
    """Run ``command`` to its end, sampled; RuntimeError with the end of its output when it fails."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(environment))
    peak, status = 0, 0
    while not (found := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, proportional(process.pid))
        time.sleep(_SAMPLE_S)
    wall = time.perf_counter() - start
    _, status, used = found
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[1:3]} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return Run(wall_s=wall, cpu_s=used.ru_utime + used.ru_stime, peak_mib=peak / 2**20)


def proportional(pid: int) -> int:
    """Bytes of the process and its descendants, shared pages parted among those that share them."""
    try:
        leader = psutil.Process(pid)
        members = [leader, *leader.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for member in members:
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def product(scheme: str, work: Path, environment: Mapping[str, str]) -> Run:
    """One build into a fresh store."""
    only = f"*@executorch-xnnpack#{scheme}"
    folders = ("--store", str(work / "store"), "--out", str(work / "dist"))
    command = [sys.executable, "-c", _MAIN, "build", "minilm-l6", "--only", only, *folders]
    return run(command, environment, work / "product.log")


def bare(scheme: str, work: Path, environment: Mapping[str, str]) -> Run:
    """The script."""
    command = [sys.executable, str(_BARE), "--scheme", scheme, "--out", str(work / "bare")]
    return run(command, environment, work / "bare.log")


def ratios(products: Sequence[Run], bares: Sequence[Run]) -> dict[str, float]:
    """Medians of the product over medians of the script."""
    names = ("wall_s", "cpu_s", "peak_mib")
    return {
        name: statistics.median(getattr(r, name) for r in products) / statistics.median(getattr(r, name) for r in bares)
        for name in names
    }


def main() -> int:
    """Print pairs and ratios; 1 when a limit is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", choices=("fp32", "w8a8d"), default="w8a8d")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    environment = {**os.environ, **ENVIRONMENT}
    products: list[Run] = []
    bares: list[Run] = []
    for _ in range(options.pairs):
        for side, runs in ((bare, bares), (product, products)):
            with tempfile.TemporaryDirectory(prefix="edgebake-overhead-") as folder:
                runs.append(side(options.scheme, Path(folder), environment))
        print(json.dumps({"bare": asdict(bares[-1]), "edgebake": asdict(products[-1])}), flush=True)
    found = ratios(products, bares)
    limits = {"wall_s": WALL_LIMIT, "peak_mib": MEMORY_LIMIT}
    print(json.dumps({"scheme": options.scheme, "ratios": found, "limits": limits, "load": os.getloadavg()}, indent=2))
    return 0 if all(found[name] <= limit for name, limit in limits.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
