"""What to try after a limit was missed: steps that a recipe can take, nearest to the cause first."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from edgebake.result import Result
from edgebake.scheme import Scheme, parse
from edgebake.types import Verdict, rule_for

QUALITY = ("parity.", "agreement.", "task.")


def advice(result: Result) -> tuple[str, ...]:
    """Up to three steps for the limits that ``result`` missed."""
    missed = [verdict for verdict in result.verdicts if verdict.state == "fail"]
    steps: list[str] = []
    if any(verdict.limit.startswith(QUALITY) for verdict in missed):
        steps += _quality(result)
    steps += [step for verdict in missed for step in _resources(verdict)]
    return tuple(dict.fromkeys(steps))[:3]


def _quality(result: Result) -> Iterator[str]:
    outputs = (result.measurements.get("outputs") or {}).values()
    if any(output.get("reference_nonfinite") for output in outputs):
        yield "mend the float model first: it returns NaN or infinity on the evaluation samples"
        return
    if any(output.get("nonfinite") for output in outputs):
        yield "look for values beyond the range of the artifact's number format, such as masks of -1e9 in fp16"
    modules = (result.measurements.get("located") or {}).get("modules") or ()
    if modules:
        yield f"keep that part wide: {rule_for(str(modules[0].get('module')), 'fp32')}"
    yield from _wider(parse(result.scheme))


def _wider(scheme: Scheme) -> Iterator[str]:
    if scheme.activation_bits is not None and scheme.activation_bits < 16 and not scheme.dynamic:
        yield (
            "more, and more varied, calibration samples; or wider or dynamic activations where the target has them: "
            f"w{scheme.weight_bits}a16, w{scheme.weight_bits}a8d"
        )
    elif scheme.family == "palette":
        yield f"a larger palette: palette{min(8, scheme.weight_bits + 2)}" if scheme.weight_bits < 8 else "scheme fp16"
    elif scheme.family == "integer" and scheme.weight_bits < 8:
        yield "smaller groups, or 8 bits for the most sensitive modules (compress: modules:)"
    elif scheme.family == "float":
        yield "hold the lowered graph against the float model: a float scheme should lose next to nothing"


def _resources(verdict: Verdict) -> Iterator[str]:
    steps = {
        "size.*": "a scheme with fewer bits, or compress what the lines below `size` name",
        "memory.*": "smaller fixed shapes (inputs:, dims:), or fp16 activations where the target has them",
        "delegated": "replace the operators named above in the model, or choose a target that has them "
        "(`edgebake targets`)",
    }
    for pattern, step in steps.items():
        if fnmatchcase(verdict.limit, pattern):
            yield step
