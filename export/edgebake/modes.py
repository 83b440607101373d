"""Diagnosis of narrow floats: a few calls in each rounding mode that a runner offers. Decides nothing, warns.

An interpreter can compute as the artifact declares (``declared``), without rounding (``fp32``) and with the sums inside
operators rounded too (``fp16-worst``), which is the worst that a processor of half precision may do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgebake.reference import Reference

CALLS = 8
_APART_DB = 6.0  # a bit of precision
_ENOUGH_DB = 80.0  # beyond, a loss interests nobody

# mode, samples -> outputs by "<sample>.<name>", and values that are not finite, in order, by sample: {name: operator}
Run = Callable[[str, list[int]], tuple[Mapping[str, Any], Mapping[str, Mapping[str, str]]]]


def chosen(recorded: Reference) -> list[int]:
    """Samples spread over all of them; the first call of each is run."""
    count = min(CALLS, len(recorded))
    return [index * len(recorded) // count for index in range(count)]


def measure(modes: list[str], recorded: Reference, run: Run) -> dict[str, Any]:
    """``measurements["modes"]``: per mode parity by output and the first value that only this mode makes infinite."""
    samples = chosen(recorded)
    found: dict[str, Any] = {}
    plain: Mapping[str, Mapping[str, str]] = {}
    for mode in modes:  # the first one rounds nothing: what is not finite there is meant to be so
        outputs, strange = run(mode, samples)
        plain = plain or strange
        found[mode] = {
            "calls": len(samples),
            "outputs": _parity(recorded, samples, outputs),
            "overflow": next(_overflows(strange, plain), None),
        }
    return found


def _parity(recorded: Reference, samples: list[int], outputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    from edgebake.metrics import ParityMeter

    meter = ParityMeter()
    for index in samples:
        sample = recorded.sample(index)
        expected = sample.calls[0].outputs
        meter.add(index, sample.source, expected, {name: outputs[f"{index}.{name}"] for name in expected})
    kept = ("sqnr_db", "cosine", "max_abs", "nonfinite")
    return {name: {key: row[key] for key in kept} for name, row in meter.measurements().items()}


def _overflows(
    strange: Mapping[str, Mapping[str, str]], plain: Mapping[str, Mapping[str, str]]
) -> Iterator[dict[str, Any]]:
    for sample, values in strange.items():
        for name, operator in values.items():
            if name not in plain.get(sample, {}):
                yield {"value": name, "operator": operator, "sample": int(sample)}


def warnings(modes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the modes part, in words: overflow, then loss of precision against the mode before."""
    said = []
    before: Mapping[str, Any] = {}
    for mode, found in modes.items():
        overflow = found.get("overflow")
        if overflow:
            said.append(
                f"in mode {mode} the value {overflow['value']} ({overflow['operator']}) leaves the range of float16 on "
                f"sample {overflow['sample']}: keep its module in fp32, or scale its inputs down"
            )
        for name, row in (found.get("outputs") or {}).items():
            now, then = row.get("sqnr_db"), (before.get(name) or {}).get("sqnr_db")
            if now is not None and then is not None and now < _ENOUGH_DB and then - now > _APART_DB:
                said.append(f"{name} falls from {then:.1f} to {now:.1f} dB in mode {mode}, {_MEANS.get(mode, mode)}")
        before = found.get("outputs") or {}
    return said


_MEANS = {
    "declared": "which rounds every value to the artifact's types",
    "fp16-worst": "where a processor also sums in float16",
}
