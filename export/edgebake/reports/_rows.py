"""What every report format says of a result: one row of short cells and the lines below it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgebake import modes
from edgebake.limits import AT_MOST, ENOUGH_DECISIONS
from edgebake.reports import _language
from edgebake.reports._advice import advice
from edgebake.reports._computing import computing
from edgebake.reports._text import counted, decibels, floored, mib, number, percent, plain
from edgebake.result import AS_IT_IS, Result, State
from edgebake.scheme import shown
from edgebake.types import Verdict

COLUMNS = ("state", "artifact", "parity", "agreement", "size MiB", "backend", "memory MiB", "speedup")
# In the order they run.
STAGES = ("load", "describe", "reference", "trace", "compress", "lower", "validate", "locate", "speculate")
LOOKING = ("verify", "report")  # verbs that judge what is built: what fails there was not judged
LineKind = Literal["error", "try", "unmeasured", "note", "info"]
UNITS = {
    "language.stepwise_db": " dB",
    "parity.sqnr_db": " dB",
    "size.mib": " MiB",
    "memory.peak_mib": " MiB",
    "memory.planned_mib": " MiB",
}
SHARES = (
    "agreement.top1",
    "agreement.binary",
    "task.",
    "delegated",
    "language.top",
    "language.generated",
    "speculative.acceptance",
    "speculative.identical",
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line below a row; ``label`` is its first word."""

    kind: LineKind
    label: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """A result as text, every string already harmless on a terminal; ``cells`` follow COLUMNS, each of short lines."""

    result: Result
    group: str  # "minilm-l6/model"
    state: str
    cells: tuple[tuple[str, ...], ...]
    lines: tuple[Line, ...]


def row_of(result: Result) -> Row:
    """The row of ``result``."""
    found = result.measurements
    cells = (
        _state(result),
        _artifact(result),
        _parity(found) or _unknown(result, "parity."),
        _agreement(found) or _language.cell(found) or _unknown(result, "agreement.", "task.", "language."),
        _size(found),
        _backend(found),
        _memory(found),
        _speed(found),
    )
    return Row(
        result=result,
        group=plain(f"{result.recipe}/{result.component}"),
        state=result.state,
        cells=tuple(tuple(plain(line) for line in cell) for cell in cells),
        lines=tuple(Line(kind=x.kind, label=x.label, text=plain(x.text)) for x in _lines(result)),
    )


def worst_output(outputs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The output with the lowest SQNR; one without a number is worse than any."""
    if not outputs:
        return None
    return min(outputs, key=lambda name: -1e9 if (db := outputs[name].get("sqnr_db")) is None else db)


def amount(limit: str, value: float | None, digits: int = 6) -> str:
    """A value of ``limit`` with its unit."""
    if value is not None and limit.startswith(SHARES):
        return f"{number(round(100 * value, 12), digits)} %"  # 100 * 0.57 is 56.999...
    return number(value, digits) + UNITS.get(limit, "")


def bound_text(verdict: Verdict) -> str:
    """The bound as the recipe gives it, with its unit; empty when there is none."""
    return "" if verdict.bound is None else amount(verdict.limit, verdict.bound, 15)


def verdict_text(verdict: Verdict) -> str:
    """``parity.sqnr_db of logits: 18.2 dB, limit at least 25 dB (why)``."""
    name = f"{verdict.limit} of {verdict.subject}" if verdict.subject else verdict.limit
    bound = bound_text(verdict)
    side = "at most" if verdict.limit in AT_MOST else "at least"
    if verdict.state == "not measured":
        return f"{name}: {verdict.reason or 'not measured'}"
    value = amount(verdict.limit, verdict.value) if verdict.value is not None or not verdict.reason else ""
    if verdict.state == "fail" and verdict.bound is not None and value == amount(verdict.limit, verdict.bound):
        value = f"{value} ({verdict.value!r})"  # six digits hide by how little it was missed
    told = ", ".join(part for part in (value, bound and f"limit {side} {bound}") if part)
    return f"{name}: {told}" + (f" ({verdict.reason})" if verdict.reason else "")


def stage_counts(results: Sequence[Result]) -> list[tuple[str, str]]:
    """``[("trace", "2 ran, 1 stored")]``: how often each stage ran and how often the store had it."""
    told = []
    for stage in in_order({stage for result in results for stage in result.stages}):
        states = Counter(result.stages[stage] for result in results if stage in result.stages)
        told.append((plain(stage), ", ".join(f"{count} {plain(state)}" for state, count in sorted(states.items()))))
    return told


def in_order(stages: Iterable[str]) -> list[str]:
    """``stages`` as a build runs them, others after them by name."""
    given = set(stages)
    return [*(stage for stage in STAGES if stage in given), *sorted(given - {*STAGES})]


def summary(results: Sequence[Result]) -> str:
    """The last line: how many artifacts are in which state, and how many limits were not measured."""
    states = Counter(_outcome(result) for result in results)
    words = ("passed", "failed", "not measured", "not built", "not judged", "without toolchain")
    told = ", ".join(f"{states[word]} {word}" for word in words if states[word] or word == "passed")
    unmeasured = sum(result.unmeasured for result in results)
    was = "was" if unmeasured == 1 else "were"
    tail = f"{counted(unmeasured, 'limit')} {was} not measured" if unmeasured else "every limit was measured"
    if not any(result.limited for result in results):
        tail = "no limit was judged"
    return f"{told}; {tail}"


def _outcome(result: Result) -> str:
    if result.failure is not None and result.failure.stage in LOOKING:
        return "not judged"
    words: dict[State, str] = {
        "pass": "passed",
        "fail": "failed",
        "not measured": "not measured",
        "failed": "not built",
        "toolchain missing": "without toolchain",
    }
    return words[result.state]


def _state(result: Result) -> tuple[str, ...]:
    runner = result.measurements.get("runner") or {}
    words = {"fail": "FAIL", "failed": "FAILED"}
    return (words.get(result.state, result.state), str(runner.get("kind") or ""))


def _artifact(result: Result) -> tuple[str, ...]:
    lines = [result.target, shown(result.scheme)]
    lines += [result.device] if result.device else []
    return (*lines, result.name) if result.name else tuple(lines)


def _parity(found: Mapping[str, Any]) -> tuple[str, ...]:
    outputs = found.get("outputs") or {}
    name = worst_output(outputs)
    if name is None:
        return ()
    cosines = [output.get("cosine") for output in outputs.values()]
    lowest = None if None in cosines else min(cosines)
    return (decibels(outputs[name].get("sqnr_db")), f"cos {floored(lowest, 5)}")


def _agreement(found: Mapping[str, Any]) -> tuple[str, ...]:
    agreement, task = found.get("agreement") or {}, found.get("task") or {}
    lines: list[str] = []
    if agreement:
        metric, low, high = agreement.get("metric"), agreement.get("low"), agreement.get("high")
        rank = metric == "spearman"
        lines.append(f"{metric} {floored(agreement.get('value'), 3) if rank else percent(agreement.get('value'))}")
        if low is not None and high is not None:
            lines.append(f"{floored(low, 3)}–{floored(high, 3)}" if rank else f"{_short(low)}–{_short(high)} %")
    if task:
        right = "correct" if task.get("metric") == "top1" else f"in {task.get('metric')}"
        lines.append(f"{right} {percent(task.get('artifact'))}")
        lines.append(f"float {percent(task.get('float'))}")
    return tuple(lines)


def _unknown(result: Result, *limits: str) -> tuple[str, ...]:
    """In the place of numbers: the recipe limits them and nothing here could measure them, or it does not ask."""
    asked = any(v.state == "not measured" and v.limit.startswith(limits) for v in result.verdicts)
    return ("not measured",) if asked else ("-",)


def _short(share: float) -> str:
    return floored(100 * share, 1)


def _size(found: Mapping[str, Any]) -> tuple[str, ...]:
    size = found.get("size") or {}
    ratio = size.get("of_float")
    return (mib(size.get("bytes")), f"×{ratio:.2f}" if ratio is not None else "")


def _backend(found: Mapping[str, Any]) -> tuple[str, ...]:
    delegation = found.get("delegation") or {}
    share = delegation.get("share")
    if share is None:
        return ("-",)
    parts = delegation.get("partitions") or 0
    return (percent(share), counted(parts, "part"))


def _memory(found: Mapping[str, Any]) -> tuple[str, ...]:
    memory = found.get("memory") or {}
    peak, planned = memory.get("run_peak_bytes"), memory.get("planned_bytes")
    lines = []
    if peak is not None:
        lines.append(f"{mib(max(0, peak - (memory.get('run_base_bytes') or 0)))} peak")
    if planned is not None:
        lines.append(f"{mib(planned)} plan")
    return tuple(lines) or ("-",)


def _speed(found: Mapping[str, Any]) -> tuple[str, ...]:
    latency = found.get("latency") or {}
    ratio, median = latency.get("ratio"), latency.get("median_ms")
    if not ratio:
        return ("-",)
    return (f"×{1 / ratio:.2f}", f"{median:.3g} ms") if median is not None else (f"×{1 / ratio:.2f}",)


def _lines(result: Result) -> list[Line]:
    found = result.measurements
    lines: list[Line] = []
    if result.failure:
        for problem in result.failure.problems:
            where = f"{problem.where}: " if problem.where else ""
            lines.append(Line(kind="error", label=result.failure.stage, text=f"{where}{problem.what}"))
            lines += [Line(kind="try", label="try", text=problem.fix)] if problem.fix else []
        if result.failure.log:
            lines.append(Line(kind="info", label="log", text=str(result.failure.log)))
    lines += [Line(kind="error", label="missed", text=verdict_text(v)) for v in result.verdicts if v.state == "fail"]
    if result.state == "fail":
        lines += [Line(kind="error", label="where", text=text) for text in _located(found)]
        lines += [Line(kind="try", label="try", text=text) for text in advice(result)]
    lines += _unmeasured(result)
    lines += [Line(kind="info", label="worst", text=text) for text in _worst(found)]
    free = found.get("free_running") or {}
    if (name := worst_output(free)) is not None:
        told = f"{decibels(free[name].get('sqnr_db'))} on {name} when the artifact feeds itself"
        lines.append(Line(kind="info", label="free", text=told))
    lines += [Line(kind="info", label=label, text=text) for label, text in _language.lines(found)]
    reasons = (found.get("size") or {}).get("reasons") or ()
    lines += [Line(kind="info", label="size", text=str(reason["why"])) for reason in reasons[:3]]
    latency = found.get("latency") or {}
    if latency.get("reason") and latency.get("ratio") is None:
        lines.append(Line(kind="info", label="speed", text=str(latency["reason"])))
    lines += [Line(kind="info", label=label, text=text) for label, text in computing(found)]
    notes = [*(found.get("notes") or ()), *_few(found), *modes.warnings(found.get("modes") or {})]
    lines += [Line(kind="note", label="note", text=str(note)) for note in notes]
    return lines


def _few(found: Mapping[str, Any]) -> list[str]:
    """What to know of an agreement that was measured on a few decisions."""
    agreement = found.get("agreement") or {}
    count = agreement.get("count") or 0
    if agreement.get("metric") == "spearman" or not 0 < count < ENOUGH_DECISIONS:
        return []
    rests = f"agreement rests on {counted(count, 'decision')}, too few for a narrow interval"
    return [f"{rests}: give samples for {ENOUGH_DECISIONS} or more"]


def _unmeasured(result: Result) -> list[Line]:
    """One line per reason, however many limits share it."""
    lines: list[Line] = []
    if not result.limited and result.failure is None:
        why = result.measurements.get("not_measured")
        unlimited = "no --limit is given" if result.scheme == AS_IT_IS else "the recipe sets no limits"
        text = unlimited + (f"; {why}" if why else "")
        lines = [Line(kind="unmeasured", label="unmeasured", text=text)]
    by_reason: dict[str, list[str]] = {}
    for verdict in result.verdicts:
        if verdict.state == "not measured":
            name = f"{verdict.limit} of {verdict.subject}" if verdict.subject else verdict.limit
            by_reason.setdefault(verdict.reason or "no reason given", []).append(name)
    told = [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in by_reason.items()]
    return lines + [Line(kind="unmeasured", label="unmeasured", text=text) for text in told]


def _located(found: Mapping[str, Any]) -> list[str]:
    located = found.get("located") or {}
    modules = located.get("modules") or ()
    told = []
    for i, module in enumerate(modules[:3]):
        before = module.get("before_db")
        drop = f"{decibels(before)} before it, {decibels(module.get('sqnr_db'))} after" if before is not None else ""
        head = "the error begins at" if i == 0 else "then"
        name = str(module.get("module"))
        name = name if any(c.isalpha() for c in name) else f"module {name}"  # those of an nn.Sequential are numbers
        told.append(f"{head} {name}: {drop or decibels(module.get('sqnr_db'))}")
    return told or ([str(located["reason"])] if located.get("reason") else [])


def _worst(found: Mapping[str, Any]) -> list[str]:
    outputs = found.get("outputs") or {}
    name = worst_output(outputs)
    sample = outputs[name].get("worst_sample") if name is not None else None
    told = []
    if sample and (sample.get("sqnr_db") is None or sample["sqnr_db"] < 200):
        told.append(
            f"sample {sample.get('index')} ({sample.get('source')}): {decibels(sample.get('sqnr_db'))} on {name}"
        )
    told += [
        f"output {output}: {counted(each['nonfinite'], 'value')} NaN or infinite"
        for output, each in outputs.items()
        if each.get("nonfinite")
    ]
    return told
