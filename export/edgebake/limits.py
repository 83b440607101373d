"""What a recipe limits, held against what was measured: every limit given becomes a verdict.

Only a number that was measured can pass. NaN fails; a number that no fault could have changed (``undefined``) and one
from a stand-in runner are ``not measured``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.types import Verdict, VerdictState

if TYPE_CHECKING:
    from edgebake.recipe import Limits

MIB = 2**20
ENOUGH_DECISIONS = 500  # below, the 95 % interval around 98 % agreement is wider than +-1.3 points
LABELLED_MIN = 100  # below, one sample moves a task metric by over a percent: printed, never gated
PARITY = ("cosine", "sqnr_db", "max_abs", "relative_l2")
AT_MOST = frozenset(
    {
        "parity.max_abs",
        "parity.relative_l2",
        "task.top1",
        "task.top5",
        "language.perplexity",
        "language.kl",
        "language.drift",
        "size.mib",
        "size.of_float",
        "memory.peak_mib",
        "memory.planned_mib",
    }
)  # every other limit is a least value

Measurements = Mapping[str, Any]


def judge(limits: Limits, measurements: Measurements) -> tuple[Verdict, ...]:
    """A verdict per limit that the recipe gives (parity: per output), in the recipe's order; then the structure's."""
    verdicts = [
        *_parity(limits, measurements),
        *_agreement(limits, measurements),
        *_task(limits, measurements),
        *_language(limits, measurements),
        *_speculative(limits, measurements),
        *_size(limits, measurements),
        *_memory(limits, measurements),
        *_delegated(limits, measurements),
        *(Verdict(**found) for found in measurements.get("structure") or ()),
    ]
    return tuple(verdicts)


def decide(limit: str, value: float | None, bound: float, *, subject: str = "", reason: str = "") -> Verdict:
    """Pass or fail of a measured ``value``; None and NaN fail."""
    if value is None or math.isnan(value):
        reason = reason or "the result is not a number"
        return Verdict(limit=limit, state="fail", bound=bound, subject=subject, reason=reason)
    met = value <= bound if limit in AT_MOST else value >= bound
    state: VerdictState = "pass" if met else "fail"
    return Verdict(limit=limit, state=state, value=value, bound=bound, subject=subject, reason=reason)


def unmeasured(limit: str, bound: float, reason: str, *, subject: str = "", value: float | None = None) -> Verdict:
    """A limit that nothing here could measure; ``value`` is information only."""
    return Verdict(limit=limit, state="not measured", value=value, bound=bound, subject=subject, reason=reason)


def _with_evidence(verdict: Verdict, undefined: str) -> Verdict:
    """``verdict``, unless it is a pass (or no number) for which the samples hold no evidence."""
    missed = verdict.state == "fail" and verdict.value is not None
    if not undefined or missed or verdict.bound is None:
        return verdict
    return unmeasured(verdict.limit, verdict.bound, undefined, subject=verdict.subject, value=verdict.value)


def _no_runner(measurements: Measurements) -> str:
    """Why nothing that runs the artifact can count here; empty when it can."""
    runner = measurements.get("runner")
    if not runner:
        return str(measurements.get("not_measured") or "no runner here executes this artifact")
    if runner.get("kind") == "stand-in":
        return f"{runner.get('name')} stands in for a runtime that is not here: its numbers are information only"
    return ""


def _absent(measurements: Measurements, what: str) -> str:
    return str(measurements.get("not_measured") or f"{what} was not measured")


def _parity(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    given = {name: bound for name in PARITY if (bound := getattr(limits.parity, name)) is not None}
    outputs: Mapping[str, Mapping[str, Any]] = measurements.get("outputs") or {}
    blocked = _no_runner(measurements)
    for metric, bound in given.items():
        limit = f"parity.{metric}"
        if not outputs:
            yield unmeasured(limit, bound, blocked or _absent(measurements, "parity"))
        for output, found in outputs.items():
            if blocked:
                yield unmeasured(limit, bound, blocked, subject=output, value=found.get(metric))
            elif metric not in found:
                yield unmeasured(limit, bound, _absent(measurements, metric), subject=output)
            else:
                verdict = decide(limit, found[metric], bound, subject=output, reason=_nonfinite(found))
                yield _with_evidence(verdict, (found.get("undefined") or {}).get(metric, ""))


def _nonfinite(found: Mapping[str, Any]) -> str:
    sides = (("artifact", found.get("nonfinite")), ("float model", found.get("reference_nonfinite")))
    return "; ".join(f"the {side} returned {count} values that are NaN or infinite" for side, count in sides if count)


def _notes(measurements: Measurements) -> str:
    """What a reader must know of a quality number: random weights, noise for samples."""
    notes = [str(note) for note in measurements.get("notes") or ()]
    if (measurements.get("samples") or {}).get("noise") and not any("noise" in note for note in notes):
        notes.append("evaluation samples are noise")
    return "; ".join(notes)


def _agreement(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    if limits.agreement is None:
        return
    bound, limit = limits.agreement.min, f"agreement.{limits.agreement.metric}"
    found = measurements.get("agreement") or {}
    blocked = _no_runner(measurements)
    subject = str(found.get("output") or limits.agreement.output or "")
    if blocked or not found:
        reason = blocked or _absent(measurements, "agreement")
        yield unmeasured(limit, bound, reason, subject=subject, value=found.get("value"))
    elif found.get("metric") != limits.agreement.metric:
        reason = f"what was measured is {found.get('metric')}"
        yield unmeasured(limit, bound, reason, subject=subject)
    else:
        verdict = decide(limit, found.get("value"), bound, subject=subject, reason=_notes(measurements))
        yield _with_evidence(verdict, str(found.get("undefined") or ""))


def _task(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    if limits.task is None or limits.task.max_drop is None:
        return
    bound, limit = limits.task.max_drop, f"task.{limits.task.metric}"
    found = measurements.get("task") or {}
    subject = str(found.get("output") or limits.task.output or "")
    blocked = _no_runner(measurements)
    before, after, count = found.get("float"), found.get("artifact"), found.get("count") or 0
    drop = None if before is None or after is None else before - after
    if blocked or not found:
        reason = blocked or _absent(measurements, "the task metric (no labelled samples)")
    elif found.get("metric") != limits.task.metric:
        reason, drop = f"what was measured is {found.get('metric')}", None
    elif count < LABELLED_MIN:
        reason = f"{count} labelled samples; a drop is judged from {LABELLED_MIN} on"
    elif before == 0:
        reason = "the float model gets no sample right, so nothing can drop"
    else:
        yield decide(limit, drop, bound, subject=subject, reason=_notes(measurements))
        return
    yield unmeasured(limit, bound, reason, subject=subject, value=drop)


def _language(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    found = measurements.get("language") or {}
    values = {
        "perplexity": (found.get("perplexity") or {}).get("ratio"),
        "kl": found.get("kl"),
        "top1": (found.get("top1") or {}).get("value"),
        "top5": found.get("top5"),
        "generated": (found.get("generated") or {}).get("value"),
        "stepwise_db": (found.get("stepwise") or {}).get("sqnr_db"),
        "drift": found.get("drift"),
    }
    blocked = _no_runner(measurements)
    for name, bound in limits.language:
        if bound is None:
            continue
        if blocked or not found or (values[name] is None and measurements.get("not_measured")):
            reason = blocked or _absent(measurements, "the text of a network with `context`")
            yield unmeasured(f"language.{name}", bound, reason, value=values[name])
        elif name == "drift" and values[name] is None:
            reason = "no text of 192 positions or more: raise length in samples.evaluation"
            yield unmeasured(f"language.{name}", bound, reason)
        else:
            yield decide(f"language.{name}", values[name], bound, reason=_notes(measurements))


def _speculative(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    found = measurements.get("speculative") or {}
    values = {
        "acceptance": found.get("acceptance"),
        "tokens_per_step": found.get("tokens_per_step"),
        "identical": (found.get("identical") or {}).get("value"),
    }
    blocked = _no_runner(measurements) or str(found.get("not_measured") or "")
    for name, bound in limits.speculative:
        if bound is None:
            continue
        if blocked or values[name] is None:
            reason = blocked or _absent(found, "the draft beside its target")
            yield unmeasured(f"speculative.{name}", bound, reason)
        else:
            yield decide(f"speculative.{name}", values[name], bound, reason=_notes(measurements))


def _size(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    size = measurements.get("size") or {}
    why = "; ".join(f"{r['why']}" for r in (size.get("reasons") or ())[:2])
    total = size.get("bytes")
    values = {"mib": None if total is None else total / MIB, "of_float": size.get("of_float")}
    for name, value in values.items():
        bound = getattr(limits.size, name)
        if bound is None:
            continue
        if value is None:
            yield unmeasured(f"size.{name}", bound, _absent(size, "size"))
            continue
        yield decide(f"size.{name}", value, bound, reason=why)


def _memory(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    """``peak_mib`` is what running the artifact added to the process that ran it."""
    memory = measurements.get("memory") or {}
    if (bound := limits.memory.peak_mib) is not None:
        peak, blocked = memory.get("run_peak_bytes"), _no_runner(measurements)
        value = None if peak is None else (peak - (memory.get("run_base_bytes") or 0)) / MIB
        if blocked or value is None:
            reason = blocked or str(memory.get("reason") or _absent(measurements, "peak memory"))
            yield unmeasured("memory.peak_mib", bound, reason, value=value)
        else:
            yield decide("memory.peak_mib", value, bound)
    if (bound := limits.memory.planned_mib) is not None:
        planned = memory.get("planned_bytes")
        if planned is None:
            yield unmeasured("memory.planned_mib", bound, "this artifact does not plan its memory ahead of time")
        else:
            yield decide("memory.planned_mib", planned / MIB, bound)


def _delegated(limits: Limits, measurements: Measurements) -> Iterator[Verdict]:
    bound = limits.delegated
    if bound is None:
        return
    found = measurements.get("delegation") or {}
    share = found.get("share")
    if share is None:
        reason = str(found.get("reason") or "nothing here can tell what runs on the backend")
        yield unmeasured("delegated", bound, reason)
        return
    outside = [left for left in found.get("left_out") or () if left.get("count") or left.get("macs")]
    verdict = decide("delegated", share, bound, reason=_left_out(outside))
    if bound == 1 and outside:  # 100 % promises that no operator is outside, even one that multiplies nothing
        verdict = Verdict(limit="delegated", state="fail", value=share, bound=bound, reason=_left_out(outside))
    yield verdict


def _left_out(outside: list[Mapping[str, Any]]) -> str:
    if not outside:
        return ""
    heaviest = sorted(outside, key=lambda left: (-(left.get("macs") or 0), -(left.get("count") or 0), left["op"]))
    shown = ", ".join(
        f"{left['op']} x{left.get('count') or 1}" + (f" ({left['reason']})" if left.get("reason") else "")
        for left in heaviest[:3]
    )
    more = f" and {len(heaviest) - 3} more operators" if len(heaviest) > 3 else ""
    return f"outside the backend: {shown}{more}"


def parity_failed(limits: Limits, measured: Mapping[str, Any]) -> bool:
    """Did a parity or agreement limit fail?"""
    verdicts = judge(limits, measured)
    return any(v.state == "fail" and v.limit.startswith(("parity", "agreement", "language")) for v in verdicts)
