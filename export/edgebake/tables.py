"""The README's table of targets and schemes, made from SUPPORTS: ``python -m edgebake.tables [--write | --check]``."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgebake.errors import EdgebakeError, UsageError
from edgebake.scheme import parse, shown
from edgebake.target import TARGETS, Support, Target, find_target

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- targets:begin (made by `make tables`) -->", "<!-- targets:end -->"
KINDS = ("linear", "conv", "embedding")
FAMILIES = ("float", "integer", "palette", "sparse")


def table() -> str:
    """Markdown: one row per scheme, one column per target, notes with their reasons below."""
    targets = {name: find_target(name) for name in _own_targets()}
    lines = [f"| scheme | {' | '.join(f'`{name}`' for name in targets)} |", f"|---{'|---' * len(targets)}|"]
    notes: list[str] = []
    for scheme in _schemes(targets):
        cells = [_cell(_row(target, scheme), notes) for target in targets.values()]
        lines.append(f"| {shown(scheme)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def _own_targets() -> list[str]:
    """Names of the targets in this repository; what plug-ins add on this machine is not the README's."""
    return [name for name in TARGETS.names() if TARGETS.module_name(name).startswith(f"{TARGETS.package}.")]


def _schemes(targets: Mapping[str, Target]) -> list[str]:
    """Every supported scheme: floats, integers, palettes, pruned ones; wide before narrow."""
    names = {row.scheme for target in targets.values() for row in target.SUPPORTS}

    def rank(name: str) -> tuple[int, int, int, str]:
        scheme = parse(name)
        return FAMILIES.index(scheme.family), -scheme.weight_bits, scheme.group or 0, name

    return sorted(names, key=rank)


def _row(target: Target, scheme: str) -> Support | None:
    return next((row for row in target.SUPPORTS if row.scheme == scheme), None)


def _cell(row: Support | None, notes: list[str]) -> str:
    """Which modules the scheme compresses; appends the row's note to ``notes`` and refers to it by number."""
    if row is None:
        return "-"
    text = "all" if set(row.kinds) == set(KINDS) else ", ".join(row.kinds)
    text += " (by rule)" if row.override_only else ""
    note = note_of(row)
    if not note:
        return text
    if note not in notes:
        notes.append(note)
    return f"{text} [{notes.index(note) + 1}]"


def note_of(row: Support) -> str:
    """The note with ``g`` and ``2^b`` for the scheme's own group and table, so that schemes of one kind share it."""
    scheme, note = parse(row.scheme), row.note
    if scheme.family == "palette":
        note = re.sub(rf"\b{2**scheme.weight_bits} values", "2^b values", note)
    return re.sub(rf"(?<!OS )\b{scheme.group}\b", "g", note) if scheme.group else note


def between_markers(text: str, fresh: str) -> str:
    """``text`` with what stands between the markers replaced by ``fresh``; UsageError when a marker is missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError("README.md lost the markers of its table", fix=f"put back {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{fresh}\n{END}{tail}"


def main(arguments: Sequence[str]) -> int:
    """Print the table, write it into the README (``--write``), or say whether the README is behind (``--check``)."""
    if not arguments:
        sys.stdout.write(table() + "\n")
        return 0
    if list(arguments) not in (["--write"], ["--check"]):
        raise UsageError(f"cannot read {' '.join(arguments)!r}", fix="python -m edgebake.tables [--write | --check]")
    old = README.read_text("utf-8")
    new = between_markers(old, table())
    if old == new:
        return 0
    if arguments[0] == "--check":
        sys.stderr.write("README.md: the table of targets is behind SUPPORTS\n    -> make tables\n")
        return 1
    README.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except EdgebakeError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
