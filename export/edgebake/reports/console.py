"""The report on a terminal or in a log: a row per artifact, what went wrong below it, a last line that counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

from edgebake.reports._rows import COLUMNS, Line, Row, row_of, stage_counts, summary
from edgebake.reports._text import for_encoding, plain
from edgebake.result import Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

GAPS = (2, 1)  # between columns: the first that fits
INDENT = 4
WIDTH = 100  # of `render`, and of what is piped: no terminal says how wide it is
STATE_STYLES = {
    "pass": "green",
    "fail": "bold red",
    "failed": "bold red",
    "not measured": "yellow",
    "toolchain missing": "yellow",
}
LINE_STYLES = {"error": "red", "try": "cyan", "unmeasured": "yellow", "note": "yellow", "info": "dim"}


def render(results: Sequence[Result], *, title: str) -> str:
    """The report as plain text, 100 columns."""
    from rich.console import Console

    out = StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    show(results, console, title=title)
    return out.getvalue()


def show(results: Sequence[Result], console: Console, *, title: str = "") -> None:
    """Print the report on ``console``: stacked rows where the terminal is narrower than the table."""
    rows = [_narrow(row_of(result)) for result in results]
    widths = _widths(rows)
    width = console.width if console.is_terminal else max(console.width, WIDTH)
    gap = next((gap for gap in GAPS if sum(widths) + gap * (len(widths) - 1) <= width), None)
    stacked = console.is_terminal and gap is None
    gap = gap or GAPS[0]
    if title:
        _print(console, [(plain(title), "bold")])
    group, previous = None, False
    for row in rows:
        if row.group != group:
            group = row.group
            _print(console, [])
            _print(console, [(group, "bold")])
            if not stacked:
                _print(console, [(_joined(COLUMNS, widths, gap), "dim")])
        elif stacked or previous:
            _print(console, [])
        previous = bool(row.lines)
        for pieces in _stacked(row) if stacked else _table(row, widths, gap):
            _print(console, pieces)
        label = max((len(line.label) for line in row.lines), default=0)
        for line in row.lines:
            _print_line(console, line, label, width)
    _foot(results, console)


def _foot(results: Sequence[Result], console: Console) -> None:
    _print(console, [])
    stages = stage_counts(results)
    if stages:
        _print(console, [("stages  ", "dim"), ("; ".join(f"{stage} {counts}" for stage, counts in stages), "")])
    worst = [state for state in ("failed", "fail", "toolchain missing", "not measured") if _has(results, state)]
    _print(console, [(summary(results), STATE_STYLES[worst[0]] if worst else "green")])


def _has(results: Sequence[Result], state: str) -> bool:
    return any(result.state == state for result in results)


def _narrow(row: Row) -> Row:
    """States of two words take two lines, which keeps the table within 100 columns."""
    state, *others = row.cells
    return replace(row, cells=(tuple(word for line in state for word in line.split()), *others))


def _widths(rows: Sequence[Row]) -> list[int]:
    from rich.cells import cell_len

    lines = [[*(line for row in rows for line in row.cells[i]), name] for i, name in enumerate(COLUMNS)]
    return [max(cell_len(line) for line in column) for column in lines]


def _joined(cells: Sequence[str], widths: Sequence[int], gap: int) -> str:
    from rich.cells import cell_len

    padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True))
    return (" " * gap).join(padded).rstrip()


def _table(row: Row, widths: Sequence[int], gap: int) -> Iterator[list[tuple[str, str]]]:
    for_state = STATE_STYLES[row.state]
    for i in range(max(len(cell) for cell in row.cells)):
        parts = [cell[i] if i < len(cell) else "" for cell in row.cells]
        text = _joined(parts, widths, gap)
        state = for_state if i == 0 else "dim"
        yield [(text[: widths[0]], state), (text[widths[0] :], "")]


def _stacked(row: Row) -> Iterator[list[tuple[str, str]]]:
    state, artifact, *others = row.cells
    yield [(" ".join(filter(None, state)), STATE_STYLES[row.state]), ("  " + " ".join(artifact), "")]
    for name, cell in zip(COLUMNS[2:], others, strict=True):
        if cell[0] != "-":
            yield [(f"{'':{INDENT}}{name}  ", "dim"), (", ".join(filter(None, cell)), "")]


def _print_line(console: Console, line: Line, label: int, width: int) -> None:
    """``label  text``, wrapped under itself."""
    from rich.text import Text

    room = max(20, width - INDENT - label - GAPS[0])
    text = Text(for_encoding(line.text, console.encoding))
    wrapped = [part.plain.rstrip() for part in text.wrap(console, room)] or [""]
    for i, part in enumerate(wrapped):
        head = line.label if i == 0 else ""
        label_piece = (f"{'':{INDENT}}{head:<{label}}{'':{GAPS[0]}}", LINE_STYLES[line.kind])
        _print(console, [label_piece, (part, "dim" if line.kind == "info" else "")])


def _print(console: Console, pieces: Sequence[tuple[str, str]]) -> None:
    """One line as it is: no markup, no highlighting, wrapped on a terminal only."""
    text = _text(console, pieces)
    console.print(text, soft_wrap=not console.is_terminal, markup=False, highlight=False, emoji=False)


def _text(console: Console, pieces: Sequence[tuple[str, str]]) -> Text:
    from rich.text import Text

    text = Text()
    for piece, style in pieces:
        text.append(for_encoding(piece, console.encoding), style=style)
    return text
