"""`edgebake targets`: what each target supports and whether its toolchain is here."""

from __future__ import annotations

from typing import Any

from edgebake.commands import _shared
from edgebake.scheme import aliases_of
from edgebake.target import TARGETS, find_target, runners_of


def rows() -> list[dict[str, Any]]:
    """Plain data of all targets."""
    found = []
    for name in TARGETS.names():
        target = find_target(name)
        missing = target.missing()
        found.append(
            {
                "target": name,
                "schemes": [
                    {
                        "scheme": s.scheme,
                        "aliases": list(aliases_of(s.scheme)),
                        "modules": list(s.kinds),
                        "only_as_override": s.override_only,
                        "note": s.note,
                    }
                    for s in target.SUPPORTS
                ],
                "options": {
                    o.name: {"default": o.default, "choices": o.choices, "help": o.help} for o in target.OPTIONS
                },
                "runners": {n: {"kind": r.KIND, "usable": r.missing() is None} for n, r in runners_of(name)},
                "missing": None if missing is None else {"reason": missing.reason, "remedy": missing.remedy},
            }
        )
    return found


def run(*, as_json: bool) -> int:
    """Print them."""
    if as_json:
        _shared.print_json(rows())
        return 0
    for row in rows():
        missing = row["missing"]
        _shared.say(f"{row['target']}  " + ("ready" if missing is None else f"missing: {missing['reason']}"))
        if missing:
            _shared.say(f"  remedy: {missing['remedy']}")
        for scheme in row["schemes"]:
            alias = f" ({', '.join(scheme['aliases'])})" if scheme["aliases"] else ""
            only = ", only in compress.modules" if scheme["only_as_override"] else ""
            note = f": {scheme['note']}" if scheme["note"] else ""
            _shared.say(f"  {scheme['scheme']}{alias}  {' '.join(scheme['modules']) or 'whole graph'}{only}{note}")
        for name, option in row["options"].items():
            _shared.say(f"  option {name}={option['default']}: {option['help']}")
        runners = ", ".join(f"{n} ({r['kind']})" for n, r in row["runners"].items() if r["usable"])
        _shared.say(f"  runs here: {runners or 'not at all: outputs are not measured'}")
    return 0
