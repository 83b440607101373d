"""The report as GitHub-flavoured Markdown, for job summaries and pull requests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from edgebake.reports._rows import COLUMNS, Row, row_of, stage_counts, summary
from edgebake.reports._text import plain
from edgebake.result import Result

STATE_SIGNS = {"pass": "✅", "fail": "❌", "failed": "❌", "not measured": "⚪", "toolchain missing": "⚪"}
_SPECIAL = re.compile(r"([\\`*_\[\]|~#$])")
_LINK = re.compile(r"(?i)(?:https?|ftp|www)(?=[:.])|@")


def render(results: Sequence[Result], *, title: str) -> str:
    """A heading, a table per component, what lies below each row, the counts."""
    return "\n".join(_blocks(results, title)) + "\n"


def escaped(text: object) -> str:
    """``text`` as Markdown shows it letter by letter: no HTML, no link, no mention, no table cell of its own."""
    harmless = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    harmless = _SPECIAL.sub(r"\\\1", harmless)
    # an entity inside the word keeps GitHub from making a link or a mention of it
    return _LINK.sub(lambda match: "&#64;" if match[0] == "@" else f"{match[0][:-1]}&#{ord(match[0][-1])};", harmless)


def _blocks(results: Sequence[Result], title: str) -> Iterator[str]:
    yield f"## {escaped(title)}"
    rows = [row_of(result) for result in results]
    for group, members in groupby(rows, key=lambda row: row.group):
        yield ""
        yield f"### {escaped(group)}"
        yield ""
        yield f"| {' | '.join(COLUMNS)} |"
        yield f"|{'---|' * len(COLUMNS)}"
        kept = list(members)
        yield from (_table_row(row) for row in kept)
        yield from _details(kept)
    yield ""
    stages = stage_counts(results)
    if stages:
        yield "Stages: " + "; ".join(f"{escaped(stage)} {escaped(counts)}" for stage, counts in stages)
        yield ""
    yield f"**{escaped(summary(results))}**"


def _table_row(row: Row) -> str:
    cells = ["<br>".join(escaped(line) for line in cell if line) for cell in row.cells]
    cells[0] = f"{STATE_SIGNS[row.state]} {cells[0]}"
    return f"| {' | '.join(cells)} |"


def _details(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.lines:
            yield ""
            yield f"**{escaped(row.result.unit)}**"
            yield ""
            yield from (f"- {escaped(line.label)}: {escaped(line.text)}" for line in row.lines)
