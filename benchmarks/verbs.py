"""CPU seconds (user and system, children included) of the verbs that people type to look something up."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

VERBS = (("--help",), ("targets",), ("plan", "minilm-l6"))
LIMIT_S = 0.4
_MAIN = "from edgebake.cli import main; main()"


def cpu_seconds(arguments: Sequence[str]) -> float:
    """CPU seconds of one `edgebake` process and its children; RuntimeError when it fails."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen([sys.executable, "-c", _MAIN, *arguments], stdout=subprocess.DEVNULL, env=environ)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"edgebake {' '.join(arguments)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Print a row per verb; 1 when a median is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for verb in VERBS:
        cpu_seconds(verb)  # files into the page cache, byte code written
        took = [cpu_seconds(verb) for _ in range(options.repetitions)]
        rows.append({"verb": " ".join(verb), "cpu_s": statistics.median(took), "min_s": min(took), "max_s": max(took)})
    if options.json:
        print(json.dumps({"limit_s": LIMIT_S, "verbs": rows}, indent=2))
    else:
        for row in rows:
            state = "ok" if row["cpu_s"] < LIMIT_S else "ABOVE"
            spread = f"{row['min_s']:.3f} to {row['max_s']:.3f}"
            print(f"edgebake {row['verb']:<15} {row['cpu_s']:.3f} s of CPU ({spread}); limit {LIMIT_S} s: {state}")
    return 0 if all(row["cpu_s"] < LIMIT_S for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
