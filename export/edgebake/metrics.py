"""How close an artifact's outputs are to the float model's: sums that grow call by call, in float64.

SQNR is ``10 log10(sum r^2 / sum (r - a)^2)`` over every element of every sample (r: float reference, a: artifact), so
a loud sample weighs more than a quiet one, as in Widrow & Kollar, "Quantization Noise", 2008, section 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgebake.errors import StageFailed

CAP_DB = 200.0  # what JSON holds for an exact output (+inf) and, negated, for noise over silence (-inf)
CHUNK = 1 << 20  # elements per step: keeps float64 temporaries at 8 MiB whatever the output's size

KINDS = {"b": "boolean", "i": "integer", "u": "integer", "f": "float"}

Array = NDArray[Any]


def ratio_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two energies: +inf when exact, -inf for noise over silence, NaN for 0/0."""
    if math.isnan(signal) or math.isnan(noise) or (signal == 0 and noise == 0):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def to_json(value: float, cap: float | None = None) -> float | None:
    """``value`` as JSON can hold it: NaN is null, infinities are null or ``+-cap``."""
    if math.isfinite(value):
        return value if cap is None else max(-cap, min(cap, value))
    return math.copysign(cap, value) if cap is not None and math.isinf(value) else None


def sqnr_db(reference: Array, artifact: Array) -> float:
    """SQNR in dB of one pair of arrays of the same shape; NaN when either holds a value that is not finite."""
    sums = _sums_of(reference, artifact)
    return ratio_db(sums.signal, sums.noise) if sums.finite else math.nan


@dataclass(kw_only=True)
class _Sums:
    """Sums over elements; ``signal``, ``noise``, ``energy``, ``dot`` are of r^2, (r-a)^2, a^2 and r*a."""

    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    dot: float = 0.0
    absolute: float = 0.0
    max_abs: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    nonfinite: int = 0
    reference_nonfinite: int = 0

    @property
    def finite(self) -> bool:
        return not (self.nonfinite or self.reference_nonfinite)

    def add(self, other: _Sums) -> None:
        for name in ("elements", "signal", "noise", "energy", "dot", "absolute", "nonfinite", "reference_nonfinite"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_abs = max(self.max_abs, other.max_abs)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


def _sums_of(reference: Array, artifact: Array) -> _Sums:
    total = _Sums()
    left, right = np.ravel(reference), np.ravel(artifact)
    for start in range(0, left.size, CHUNK):
        r = left[start : start + CHUNK].astype(np.float64)
        a = right[start : start + CHUNK].astype(np.float64)
        part = _Sums(
            elements=r.size,
            nonfinite=r.size - int(np.isfinite(a).sum()),
            reference_nonfinite=r.size - int(np.isfinite(r).sum()),
        )
        if part.finite:
            difference = np.abs(r - a)
            part.signal, part.energy, part.dot = float(r @ r), float(a @ a), float(r @ a)
            part.noise = float(difference @ difference)
            part.absolute, part.max_abs = float(difference.sum()), float(difference.max())
            part.low, part.high = float(r.min()), float(r.max())
        total.add(part)
    return total


def require_alike(name: str, reference: Array, artifact: Array) -> None:
    """StageFailed unless both arrays have the same shape and the same kind of numbers."""
    where = f"output {name!r}"
    if reference.shape != artifact.shape:
        raise StageFailed(
            f"the artifact returned shape {list(artifact.shape)}, the float model {list(reference.shape)}",
            where=where,
            fix="a lowering changed the output's layout or order: `edgebake inspect` shows what the artifact declares",
        )
    kinds = KINDS.get(reference.dtype.kind), KINDS.get(artifact.dtype.kind)
    if None in kinds or kinds[0] != kinds[1]:
        raise StageFailed(
            f"the artifact returned {artifact.dtype}, the float model {reference.dtype}: they cannot be compared",
            where=where,
            fix="declare the output's dtype in the target, or convert it in the model's last step",
        )


@dataclass(kw_only=True)
class OutputMeter:
    """Parity of one output; ``add`` once per call, then ``measurements``."""

    name: str
    _total: _Sums = field(default_factory=_Sums, init=False)
    # sample index -> source, signal, noise
    _samples: dict[int, tuple[str, float, float]] = field(default_factory=dict, init=False)

    def add(self, index: int, source: str, reference: Array, artifact: Array) -> None:
        """Take in one call of sample ``index``; several calls of a sample add up. Any shape, bool/int/float."""
        reference, artifact = np.asarray(reference), np.asarray(artifact)
        require_alike(self.name, reference, artifact)
        sums = _sums_of(reference, artifact)
        self._total.add(sums)
        _, signal, noise = self._samples.get(index, (source, 0.0, 0.0))
        gap = 0.0 if sums.finite else math.nan
        self._samples[index] = (source, signal + sums.signal + gap, noise + sums.noise)

    def measurements(self) -> dict[str, Any]:
        """``measurements["outputs"][name]``: JSON values, null where a number is NaN.

        ``undefined`` maps a metric to why the reference cannot support it; such a metric never passes a limit.
        """
        total = self._total
        values = dict.fromkeys(("sqnr_db", "cosine", "max_abs", "mean_abs", "relative_l2"), math.nan)
        if total.finite and total.elements:
            norms = math.sqrt(total.signal) * math.sqrt(total.energy)
            values = {
                "sqnr_db": ratio_db(total.signal, total.noise),
                "cosine": min(1.0, max(-1.0, total.dot / norms)) if norms else math.nan,
                "max_abs": total.max_abs,
                "mean_abs": total.absolute / total.elements,
                "relative_l2": math.sqrt(total.noise / total.signal) if total.signal else math.nan,
            }
        return {
            **{key: to_json(value, CAP_DB if key == "sqnr_db" else None) for key, value in values.items()},
            "nonfinite": total.nonfinite,
            "reference_nonfinite": total.reference_nonfinite,
            "elements": total.elements,
            "worst_sample": self._worst(),
            "undefined": self._undefined(),
        }

    def _undefined(self) -> dict[str, str]:
        total = self._total
        if not total.elements:
            return dict.fromkeys(("sqnr_db", "cosine", "max_abs", "mean_abs", "relative_l2"), "the output is empty")
        if not total.finite:
            return {}
        if total.signal == 0 and total.noise == 0:
            reason = "the float output is zero on every sample"
            return dict.fromkeys(("sqnr_db", "cosine", "relative_l2"), reason)
        if total.low == total.high and total.signal:
            return {"cosine": "the float output is the same number everywhere, which any constant matches"}
        return {}

    def _worst(self) -> dict[str, Any] | None:
        scored = [
            (-math.inf if math.isnan(signal) else ratio_db(signal, noise), index, source, signal)
            for index, (source, signal, noise) in self._samples.items()
            if signal != 0 or noise != 0
        ]
        if not scored:
            return None
        ratio, index, source, signal = min(scored, key=lambda item: item[:2])
        return {
            "index": index,
            "source": source,
            "sqnr_db": None if math.isnan(signal) else to_json(ratio, CAP_DB),
        }


@dataclass(kw_only=True)
class ParityMeter:
    """Parity of all outputs of an artifact."""

    _outputs: dict[str, OutputMeter] = field(default_factory=dict, init=False)

    def add(self, index: int, source: str, reference: Mapping[str, Array], artifact: Mapping[str, Array]) -> None:
        """Take in one call of sample ``index``; both mappings hold arrays by output name."""
        if set(reference) != set(artifact):
            raise StageFailed(
                f"the artifact returned the outputs {sorted(artifact)}, the float model {sorted(reference)}",
                fix="a lowering dropped or renamed outputs: `edgebake inspect` shows what the artifact declares",
            )
        for name, expected in reference.items():
            meter = self._outputs.setdefault(name, OutputMeter(name=name))
            meter.add(index, source, expected, artifact[name])

    def measurements(self) -> dict[str, dict[str, Any]]:
        """``measurements["outputs"]``."""
        return {name: meter.measurements() for name, meter in self._outputs.items()}
