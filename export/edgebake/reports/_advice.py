"""What to try after a limit was missed: steps that a recipe can take, nearest to the cause first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgebake.errors import EdgebakeError
from edgebake.result import AS_IT_IS, Result
from edgebake.scheme import Scheme, parse
from edgebake.target import find_target
from edgebake.types import Verdict, rule_for

_FLOAT32 = "keep_float32"  # the option of targets that compute in float16
QUALITY = ("parity.", "agreement.", "task.", "language.")


def advice(result: Result) -> tuple[str, ...]:
    """Up to four steps for the limits that ``result`` missed; only schemes that its target has are named."""
    if result.scheme == AS_IT_IS:
        return ()
    missed = [verdict for verdict in result.verdicts if verdict.state == "fail"]
    scheme, there = parse(result.scheme), _schemes(result.target)
    steps: list[str] = []
    if any(verdict.limit.startswith(QUALITY) for verdict in missed):
        steps += _quality(result, scheme, there)
    steps += [step for verdict in missed for step in _resources(verdict, scheme, there)]
    return tuple(dict.fromkeys(steps))[:4]


def _schemes(target: str) -> list[Scheme]:
    """What ``target`` takes as a recipe's scheme; nothing of a target that this machine does not know."""
    try:
        rows = find_target(target).SUPPORTS
    except EdgebakeError:  # the report was made where a plug-in is installed
        return []
    return [parse(row.scheme) for row in rows if not row.override_only]


def _options(target: str) -> set[str]:
    try:
        return {option.name for option in find_target(target).OPTIONS}
    except EdgebakeError:
        return set()


def _quality(result: Result, scheme: Scheme, there: Sequence[Scheme]) -> Iterator[str]:
    outputs = (result.measurements.get("outputs") or {}).values()
    if any(output.get("reference_nonfinite") for output in outputs):
        yield "mend the float model first: it returns NaN or infinity on the evaluation samples"
        return
    modes = result.measurements.get("modes") or {}
    overflows = any(found.get("overflow") for mode, found in modes.items() if mode != "fp16-worst")
    if overflows and _FLOAT32 in _options(result.target):
        yield f"keep what leaves the range of float16 in float32: options: {{{_FLOAT32}: auto}}"
    elif any(output.get("nonfinite") for output in outputs):
        yield "look for values beyond the range of the artifact's number format, such as masks of -1e9 in fp16"
    modules = (result.measurements.get("located") or {}).get("modules") or ()
    if modules:
        yield f"keep that part wide: {rule_for(str(modules[0].get('module')), 'fp32')}"
    yield from _wider(scheme, there)


def _wider(scheme: Scheme, there: Sequence[Scheme]) -> Iterator[str]:
    if scheme.needs_calibration:
        yield "more, and more varied, calibration samples"
    if scheme.family == "float":
        yield "hold the lowered graph against the float model: a float scheme should lose next to nothing"
    elif scheme.family == "palette":
        larger = [s for s in there if s.family == "palette" and s.weight_bits > scheme.weight_bits]
        larger.sort(key=lambda s: s.weight_bits)
        if wider := larger[:1] or [s for s in there if s.name == "fp16"]:
            yield f"a wider scheme: {wider[0].name}"
    elif finer := [s for s in there if _is_finer(s, scheme)]:
        yield f"a finer scheme, if only for the most sensitive modules (compress: modules:): {_names(finer)}"


def _is_finer(other: Scheme, scheme: Scheme) -> bool:
    """Are both of integers, and neither weights nor activations of ``other`` rounded more?"""
    if other.family != "integer" or other.name == scheme.name:
        return False
    return _weights(other) >= _weights(scheme) and _activations(other) >= _activations(scheme)


def _weights(scheme: Scheme) -> tuple[int, float]:
    return scheme.weight_bits, -(scheme.group or float("inf"))  # small groups are finer, whole channels coarsest


def _activations(scheme: Scheme) -> int:
    """Finest first: float, 16 bits, 8 bits scaled at run time, 8 bits in fixed ranges."""
    if scheme.activation_bits is None:
        return 3
    return 2 if scheme.activation_bits >= 16 else int(scheme.dynamic)


def _names(schemes: Sequence[Scheme]) -> str:
    return ", ".join(scheme.name for scheme in schemes)


def _resources(verdict: Verdict, scheme: Scheme, there: Sequence[Scheme]) -> Iterator[str]:
    if verdict.limit.startswith("size."):
        fewer = [s for s in there if s.weight_bits < scheme.weight_bits]
        head = f"a scheme with fewer bits ({_names(fewer)}), or " if fewer else ""
        yield f"{head}compress what the lines below `size` name"
    elif verdict.limit.startswith("memory."):
        half = scheme.name == "fp32" and any(s.name == "fp16" for s in there)
        yield "smaller fixed shapes (inputs:, dims:)" + (
            ", or half the bytes an activation: scheme fp16" if half else ""
        )
    elif verdict.limit == "delegated":
        yield "replace the operators named above in the model, or choose a target that has them (`edgebake targets`)"
