"""The report as one HTML file that needs nothing else: no script, no font, no request; light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from edgebake.reports._computing import operators_text
from edgebake.reports._rows import COLUMNS, Row, amount, bound_text, in_order, row_of, stage_counts, summary
from edgebake.reports._text import mib, number, plain
from edgebake.result import Result

STYLE = """
:root { color-scheme: light dark; --ink: #1d2025; --soft: #626973; --line: #d9dce1; --ground: #ffffff; --panel: #f6f7f8;
  --good: #16703c; --bad: #b3261e; --open: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa1ab; --line: #353a42; --ground: #16181c;
  --panel: #1e2126; --good: #5fc98a; --bad: #ff8a80; --open: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.45rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem; }
p { margin: .2rem 0; } .soft { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding: .7rem 0 .2rem; font-weight: 600; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: .85rem; white-space: nowrap; }
th, td { padding: .4rem .9rem .4rem 0; vertical-align: top; }
.rows > tbody > tr.row > td { border-top: 1px solid var(--line); white-space: nowrap; }
.rows td span { display: block; } .rows td span + span { color: var(--soft); font-size: .87rem; }
.state span:first-child { font-weight: 600; }
.pass { color: var(--good); } .fail, .failed { color: var(--bad); }
.not-measured, .toolchain-missing { color: var(--open); }
.rows td.lines { padding: 0 0 .7rem; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem;
  margin: 0; font-size: .93rem; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
dt.error, dd.error { color: var(--bad); } dt.unmeasured, dt.note { color: var(--open); }
dt.try { color: var(--good); }
details { margin: .5rem 0 0; } summary { cursor: pointer; color: var(--soft); font-size: .93rem; }
.inner { background: var(--panel); border-radius: 6px; padding: .2rem .9rem .6rem; margin-top: .4rem;
  font-size: .9rem; }
.inner { overflow-x: auto; } .inner td, .inner th { padding: .2rem 1rem .2rem 0; overflow-wrap: break-word; }
.inner td:last-child { min-width: 9rem; }
@media (max-width: 46rem) { .rows > thead, .rows td.none { display: none !important; }
  .rows, .rows > tbody, .rows > tbody > tr, .rows > tbody > tr > td {
  display: block; padding-right: 0; } .rows > tbody > tr.row > td { border-top: 0; padding: .1rem 0; }
  .rows > tbody > tr.row { border-top: 1px solid var(--line); padding-top: .5rem; }
  .rows > tbody > tr:not(.row) > td:not(.lines) { display: none; }
  .rows > tbody > tr.row span { display: inline; margin-right: .6rem; } dl { display: block; } dt { font-weight: 500; }
  dd { padding-left: 1rem; } COLUMN_NAMES }
@media print { details > .inner { display: block; } }
"""


# On a narrow screen cells stand below each other, each after the name of its column.
_NAMED = " ".join(
    f'.row > td:nth-child({place})::before {{ content: "{name} "; color: var(--soft); font-size: .85rem; }}'
    for place, name in enumerate(COLUMNS, 1)
    if place > 2
)
STYLE = STYLE.replace("COLUMN_NAMES", _NAMED)


def render(results: Sequence[Result], *, title: str) -> str:
    """A complete document; every string that a model could have chosen is escaped."""
    return "\n".join(_document(results, title)) + "\n"


def _e(text: object) -> str:
    return escape(plain(text), quote=True)


def _document(results: Sequence[Result], title: str) -> Iterator[str]:
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{_e(title)}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{_e(title)}</h1><p>{_e(summary(results))}</p>"
    stages = stage_counts(results)
    if stages:
        yield f'<p class="soft">Stages: {_e("; ".join(f"{stage} {counts}" for stage, counts in stages))}</p>'
    rows = [row_of(result) for result in results]
    for group, members in groupby(rows, key=lambda row: row.group):
        yield f'<h2>{_e(group)}</h2><div class="scroll"><table class="rows"><thead><tr>'
        yield "".join(f'<th scope="col">{_e(name)}</th>' for name in COLUMNS) + "</tr></thead><tbody>"
        for row in members:
            yield from _row(row)
        yield "</tbody></table></div>"
    yield "</body></html>"


def _row(row: Row) -> Iterator[str]:
    state = row.state.replace(" ", "-")
    cells = ["".join(f"<span>{_e(line)}</span>" for line in cell if line) for cell in row.cells]
    yield f'<tr class="row"><td class="state {state}">{cells[0]}</td>'
    told = zip(row.cells[1:], cells[1:], strict=True)
    yield "".join(f'<td class="none">{cell}</td>' if text == ("-",) else f"<td>{cell}</td>" for text, cell in told)
    yield "</tr>"
    yield f'<tr><td></td><td class="lines" colspan="{len(COLUMNS) - 1}">'
    if row.lines:
        yield "<dl>" + "".join(
            f'<dt class="{line.kind}">{_e(line.label)}</dt><dd class="{line.kind}">{_e(line.text)}</dd>'
            for line in row.lines
        )
        yield "</dl>"
    tables = [table for table in _tables(row.result) if table[2]]
    if tables:
        yield '<details><summary>all numbers</summary><div class="inner">'
        for caption, head, body in tables:
            yield _table(caption, head, body)
        yield "</div></details>"
    yield "</td></tr>"


Table = tuple[str, tuple[str, ...], list[tuple[object, ...]]]


def _table(caption: str, head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    top = "".join(f'<th scope="col">{_e(name)}</th>' for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in line) + "</tr>" for line in body)
    return f"<table><caption>{_e(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _tables(result: Result) -> Iterator[Table]:
    found = result.measurements
    yield (
        "Limits",
        ("limit", "of", "state", "value", "bound", "reason"),
        [
            (
                v.limit,
                v.subject,
                v.state,
                amount(v.limit, v.value) if v.value is not None else "",
                bound_text(v),
                v.reason,
            )
            for v in result.verdicts
        ],
    )
    for caption, key in (("Outputs", "outputs"), ("Outputs, free running", "free_running")):
        yield caption, _OUTPUT_HEAD, _outputs(found.get(key) or {})
    yield "Where the error begins", ("module", "SQNR dB", "before it"), _located(found)
    yield "Outside the backend", ("operator", "count", "MACs", "reason"), _left_out(found)
    yield "Operators by unit", ("unit", "by", "parts", "operators", "MACs"), _units(found)
    yield "Size", ("part", "MiB"), _size(found)
    yield "Stages", ("stage", "state", "seconds", "peak MiB"), _stages(result)
    yield "Where it ran", ("fact", "value"), _facts(result)


_OUTPUT_HEAD = ("output", "SQNR dB", "cosine", "max abs", "mean abs", "relative L2", "not finite", "worst sample")


def _outputs(outputs: Mapping[str, Mapping[str, Any]]) -> list[tuple[object, ...]]:
    metrics = ("sqnr_db", "cosine", "max_abs", "mean_abs", "relative_l2")
    told = []
    for name, each in outputs.items():
        worst = each.get("worst_sample") or {}
        sample = f"{worst.get('index')} ({worst.get('source')}): {number(worst.get('sqnr_db'))} dB" if worst else ""
        told.append((name, *(number(each.get(metric)) for metric in metrics), each.get("nonfinite", 0), sample))
    return told


def _located(found: Mapping[str, Any]) -> list[tuple[object, ...]]:
    modules = (found.get("located") or {}).get("modules") or ()
    return [(m.get("module"), number(m.get("sqnr_db")), number(m.get("before_db"))) for m in modules]


def _left_out(found: Mapping[str, Any]) -> list[tuple[object, ...]]:
    left = (found.get("delegation") or {}).get("left_out") or ()
    return [(each.get("op"), each.get("count"), f"{each.get('macs') or 0:,}", each.get("reason", "")) for each in left]


def _units(found: Mapping[str, Any]) -> list[tuple[object, ...]]:
    delegation = found.get("delegation") or {}
    told: list[tuple[object, ...]] = [
        (
            row.get("unit"),
            row.get("by"),
            row.get("subgraphs") or "",
            operators_text(row.get("operators") or {}) if row.get("operators") else "not shown",
            "unknown" if row.get("macs") is None else f"{row['macs']:,}",
        )
        for row in delegation.get("units") or ()
    ]
    moved = delegation.get("border_bytes")
    return [*told, ("between parts", "", "", f"{moved:,} bytes in a call", "")] if told and moved is not None else told


def _size(found: Mapping[str, Any]) -> list[tuple[object, ...]]:
    size = found.get("size") or {}
    names = {
        "bytes": "artifact",
        "weights": "weights",
        "scales": "scales and tables",
        "graph": "graph and metadata",
        "compiled": "compiled parts, weights and programs in one",
        "compiled_from": "weights and scales that these were made from",
        "beside": "files beside the one that runs",
        "floor_bytes": "smallest possible with these schemes",
        "float_bytes": "float32 weights",
    }
    told: list[tuple[object, ...]] = [(label, mib(size[key])) for key, label in names.items() if size.get(key)]
    told += [(f"why: {reason['why']}", mib(reason["bytes"])) for reason in size.get("reasons") or ()]
    dtypes = (size.get("dtypes") or {}).items()
    return told + [(f"{each['count']} constants of {dtype}", mib(each["bytes"])) for dtype, each in dtypes]


def _stages(result: Result) -> list[tuple[object, ...]]:
    measured = result.measurements.get("stages") or {}
    names = in_order({*result.stages, *measured})
    told: list[tuple[object, ...]] = []
    for stage in names:
        each = measured.get(stage) or {}
        seconds, peak = each.get("seconds"), each.get("peak_mib")
        state = result.stages.get(stage, each.get("state", ""))
        told.append((stage, state, "" if seconds is None else f"{seconds:.1f}", "" if peak is None else f"{peak:.0f}"))
    return told


def _facts(result: Result) -> list[tuple[object, ...]]:
    found = result.measurements
    runner, samples = found.get("runner") or {}, found.get("samples") or {}
    facts: dict[str, object] = {
        "unit": result.unit,
        "folder": result.folder or "",
        "runner": " ".join(filter(None, (str(runner.get("name") or ""), str(runner.get("kind") or "")))),
        "samples": f"{samples.get('count')} from {samples.get('sources')} sources" if samples else "",
        "speed not measured": (found.get("latency") or {}).get("reason") or "",
        **{f"host {key}": value for key, value in (found.get("host") or {}).items()},
    }
    return [(name, value) for name, value in facts.items() if value != ""]
