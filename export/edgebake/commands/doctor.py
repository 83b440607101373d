"""`edgebake doctor`: what is installed, what is missing for which target, and the exact remedy."""

from __future__ import annotations

import platform
from typing import Any

from edgebake import __version__
from edgebake.commands import _shared
from edgebake.errors import EXIT_TOOLCHAIN
from edgebake.keys import version
from edgebake.store_home import default_root
from edgebake.target import TARGETS, find_target, runners_of

_BASE = ("torch", "transformers", "optimum", "numpy", "safetensors", "tokenizers")


def findings() -> dict[str, Any]:
    """Plain data of what is here."""
    targets = {}
    for name in TARGETS.names():
        target = find_target(name)
        missing = target.missing()
        targets[name] = {
            "versions": {d: version(d) for d in target.DISTRIBUTIONS} | getattr(target, "versions", dict)(),
            "missing": None if missing is None else {"reason": missing.reason, "remedy": missing.remedy},
            "runners": {
                n: None if (gap := r.missing()) is None else {"reason": gap.reason, "remedy": gap.remedy}
                for n, r in runners_of(name)
            },
            "private_toolchain": hasattr(target, "fix"),
        }
    return {
        "edgebake": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "store": str(default_root()),
        "packages": {name: version(name) for name in _BASE},
        "targets": targets,
    }


def run(*, fix: bool, as_json: bool) -> int:
    """Print it; 3 when a target misses something. ``fix`` makes the private toolchain folders that targets need."""
    done = _fix() if fix else []
    found = findings()
    gaps = sum(t["missing"] is not None for t in found["targets"].values())
    if as_json:
        _shared.print_json({**found, "fixed": done} if fix else found)
        return EXIT_TOOLCHAIN if gaps else 0
    for line in done:
        _shared.say(line)
    _shared.say(f"edgebake {found['edgebake']}, Python {found['python']}, {found['system']}")
    _shared.say(f"store: {found['store']}")
    _shared.say("packages: " + ", ".join(f"{k} {v}" for k, v in found["packages"].items()))
    _shared.say("")
    for name, target in found["targets"].items():
        missing = target["missing"]
        versions = ", ".join(f"{k} {v}" for k, v in target["versions"].items())
        _shared.say(f"{'ok     ' if missing is None else 'MISSING'} {name}: {versions}")
        if missing:
            _shared.say(f"        {missing['reason']}\n        remedy: {missing['remedy']}")
        for runner, gap in target["runners"].items():
            _shared.say(
                f"        runner {runner}: " + ("ready" if gap is None else f"{gap['reason']}; {gap['remedy']}")
            )
        if not target["runners"]:
            _shared.say("        no runner: outputs are not measured on this machine")
    if gaps:
        _shared.say(f"\n{_shared.counted(gaps, 'target')} cannot be built here; the rest can")
    return EXIT_TOOLCHAIN if gaps else 0


def _fix() -> list[str]:
    """What was made, a line each."""
    fixable = [name for name in TARGETS.names() if hasattr(find_target(name), "fix")]
    if not fixable:
        return ["no installed target needs a private toolchain folder: everything runs in this environment"]
    done = []
    for name in fixable:
        target: Any = find_target(name)
        done.append(f"{name}: {target.fix(default_root() / 'toolchains')}")
    return done
