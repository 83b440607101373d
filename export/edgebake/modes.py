"""Diagnosis of narrow floats: a few calls in each rounding mode that a runner offers. Decides nothing, warns.

An interpreter can compute as the artifact declares (``declared``), without rounding (``fp32``) and with the sums inside
operators rounded too (``fp16-worst``), which is the worst that a processor of half precision may do. Where samples are
sequences, states are carried through their calls in each mode: errors that grow from call to call show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgebake.reference import Reference

CALLS = 8
IN_SEQUENCES = 32  # calls of a mode in all where samples have several: one long sample, or some of each of a few
ORDER = ("fp32", "declared", "fp16-worst")  # from no rounding to the most; what was stored has lost its order
_APART_DB = 20.0
_HALF_DB = 60.0  # what float16 gives a network at its best; what is lost above is its nature and no news

# mode, samples, most calls of each -> outputs by "<sample>.<call>.<name>", and values that are not finite, in order, by
# "<sample>.<call>": {name: operator}, the operator as ``matmul`` or, where its module is known, ``matmul of head``
Run = Callable[[str, list[int], int], tuple[Mapping[str, Any], Mapping[str, Mapping[str, str]]]]


def chosen(recorded: Reference, most: int = CALLS) -> list[int]:
    """Up to ``most`` samples spread over all of them."""
    count = min(most, len(recorded))
    return [index * len(recorded) // count for index in range(count)]


def budget(recorded: Reference) -> tuple[list[int], int]:
    """The samples to run and how many calls of each at most."""
    length = -(-recorded.manifest["calls"] // len(recorded))
    samples = chosen(recorded, max(1, min(CALLS, IN_SEQUENCES // length)))
    return samples, IN_SEQUENCES // len(samples)


def measure(modes: list[str], recorded: Reference, run: Run) -> dict[str, Any]:
    """``measurements["modes"]``: per mode parity by output and the first value that only this mode makes infinite."""
    samples, most = budget(recorded)
    found: dict[str, Any] = {}
    plain: Mapping[str, Mapping[str, str]] = {}
    for number, mode in enumerate(modes):
        outputs, strange = run(mode, samples, most)
        found_parity = parity(recorded, samples, outputs)
        # The first one rounds nothing: what is not finite there is meant to be so, unless outputs suffer from it (a
        # constant beyond float16 was stored as infinity).
        if number == 0 and not any(row["nonfinite"] for row in found_parity.values()):
            plain = strange
        found[mode] = {
            "calls": len(strange),
            "outputs": found_parity,
            "overflow": next(_overflows(strange, plain), None),
        }
    return found


def parity(recorded: Reference, samples: list[int], outputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``outputs`` by ``<sample>.<call>.<name>``, of the first calls of each of ``samples``, against the reference."""
    from edgebake.metrics import ParityMeter

    meter = ParityMeter()
    for index in samples:
        sample = recorded.sample(index)
        for number, call in enumerate(sample.calls):
            got = {name: outputs[at] for name in call.outputs if (at := f"{index}.{number}.{name}") in outputs}
            if got or not number:  # of a decoder's logits a mode gives the rows that were kept whole
                meter.add(index, sample.source, {name: call.outputs[name] for name in got} or call.outputs, got)
    kept = ("sqnr_db", "cosine", "max_abs", "nonfinite")
    return {name: {key: row[key] for key in kept} for name, row in meter.measurements().items()}


def _overflows(
    strange: Mapping[str, Mapping[str, str]], plain: Mapping[str, Mapping[str, str]]
) -> Iterator[dict[str, Any]]:
    for at, values in strange.items():
        for name, operator in values.items():
            if name not in plain.get(at, {}):
                what, _, module = operator.partition(" of ")
                sample, call = map(int, at.split("."))
                yield {"value": name, "operator": what, "module": module, "sample": sample, "call": call}


def ordered(modes: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """``modes`` from no rounding to the most; those that are not of ORDER after them."""
    return sorted(modes.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER))


def warnings(modes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the modes part for good, a line each: overflow, then the output that a mode costs more than 20 dB."""
    said = []
    before: Mapping[str, Any] = {}
    for mode, found in ordered(modes):
        overflow = found.get("overflow")
        if overflow:
            said.append(_overflow_text(mode, overflow))
        outputs = found.get("outputs") or {}
        lost = {name: loss for name, row in outputs.items() if (loss := _loss(before.get(name) or {}, row)) > _APART_DB}
        if lost:
            worst = max(lost, key=lambda name: lost[name])
            then, now = before[worst]["sqnr_db"], outputs[worst]["sqnr_db"]
            rest = len(lost) - 1
            others = f" ({rest} more output{'s' if rest > 1 else ''} likewise)" if rest else ""
            said.append(
                f"{worst} falls from {then:.1f} to {now:.1f} dB in mode {mode}, {_MEANS.get(mode, mode)}{others}"
            )
        before = outputs
    return said


def _loss(before: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    now, then = row.get("sqnr_db"), before.get("sqnr_db")
    return 0.0 if now is None or then is None else min(then, _HALF_DB) - now


def _overflow_text(mode: str, overflow: Mapping[str, Any]) -> str:
    module = overflow.get("module")
    place = f" of {module}" if module else ""
    at = f"sample {overflow['sample']}" + (f", call {call}" if (call := overflow.get("call")) else "")
    fix = f'options: {{keep_float32: "{module}"}}, or auto' if module else "options: {keep_float32: auto}"
    return (
        f"in mode {mode} the value {overflow['value']} ({overflow['operator']}{place}) leaves the range of float16 on "
        f"{at}: {fix}"
    )


_MEANS = {
    "declared": "which rounds every value to the artifact's types",
    "fp16-worst": "where a processor also sums in float16",
}
