"""`edgebake targets`: what each target supports and whether its toolchain is here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from edgebake.commands import _shared
from edgebake.scheme import aliases_of
from edgebake.target import TARGETS, find_target, runners_of
from edgebake.wording import written


def rows(names: Iterable[str]) -> list[dict[str, Any]]:
    """Plain data of the targets called ``names``."""
    found = []
    for name in names:
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


def run(*, name: str | None, as_json: bool) -> int:
    """All targets with the names of their schemes, or one in full."""
    found = rows((name,) if name else TARGETS.names())
    if as_json:
        _shared.print_json(found)
        return 0
    for line in _in_full(found[0]) if name else _in_short(found):
        _shared.say(line)
    return 0


def _in_short(found: list[dict[str, Any]]) -> Iterator[str]:
    for row in found:
        here = ", ".join(f"{n} ({r['kind']})" for n, r in row["runners"].items() if r["usable"])
        runs = f"runs here: {here}" if here else "its outputs are not measured here"
        yield f"{row['target']}  {runs if row['missing'] is None else 'toolchain missing: `edgebake doctor` says more'}"
        schemes = ", ".join(scheme["scheme"] for scheme in row["schemes"])
        yield textwrap.fill(schemes, 100, initial_indent="  ", subsequent_indent="  ")
    yield ""
    yield "edgebake targets NAME says what each scheme needs and lists the options"


def _in_full(row: dict[str, Any]) -> Iterator[str]:
    yield from _state(row)
    for scheme in row["schemes"]:
        alias = f" ({', '.join(scheme['aliases'])})" if scheme["aliases"] else ""
        only = ", only in compress.modules" if scheme["only_as_override"] else ""
        note = f": {scheme['note']}" if scheme["note"] else ""
        yield f"  {scheme['scheme']}{alias}  {' '.join(scheme['modules']) or 'whole graph'}{only}{note}"
    for name, option in row["options"].items():
        choices = f" (one of {', '.join(map(written, option['choices']))})" if option["choices"] else ""
        yield f"  option {name}={written(option['default'])}: {option['help']}{choices}"


def _state(row: dict[str, Any]) -> Iterator[str]:
    missing = row["missing"]
    yield f"{row['target']}  " + ("ready" if missing is None else f"missing: {missing['reason']}")
    if missing:
        yield f"  remedy: {missing['remedy']}"
    runners = ", ".join(f"{n} ({r['kind']})" for n, r in row["runners"].items() if r["usable"])
    yield f"  runs here: {runners or 'not at all: outputs are not measured'}"
