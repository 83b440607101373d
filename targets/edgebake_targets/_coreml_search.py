"""``keep_float32: auto``: which modules have to compute in float32, found by running packages on calibration samples.

A package of float32 everywhere says what the network computes. The package of float16 is interpreted beside it in the
modes that round; where a value leaves float16's range, or where an operator loses what its inputs still had and an
output suffers from it, the operator's module is kept in float32 and the package is made again, until nothing is found.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.target import LowerRequest
from edgebake.types import SampleSet, Traced
from edgebake_targets._coreml_options import ITSELF, searches_float32

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from edgebake_targets.mil.program import Operation

NO_SAMPLES = "keep_float32: auto runs the package on calibration samples, and there are none"
GIVE_SAMPLES = "add samples: {calibration: ...}, or name the modules"
SAMPLES = 8  # spread over the calibration samples
_CALLS = 4  # of each sample, from its first
_ROUNDS = 12
_MODES = ("declared", "fp16-worst")
_POINTS = 1024  # of each value, evenly spread: enough to see a loss of many decibels
_HALF_DB = 60.0  # what float16 gives a network at its best
_LOST_DB = 20.0  # more than this in one operator, or below ``_HALF_DB`` at an output, is no rounding as usual
_LARGEST = 65504.0  # of float16

Calls = Sequence[Sequence[Mapping[str, Any]]]  # per sample the inputs of its calls, as the package takes them
Make = Callable[[LowerRequest, Mapping[str, str]], "Made"]  # request, modules to keep -> the package
Tensors = dict[str, "NDArray[Any]"]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A package that was written to be looked at; ``inside``: the module that computes each value."""

    path: Path
    inside: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Why each module is kept in float32, and what no choice of modules mended."""

    modules: Mapping[str, str] = field(default_factory=dict)
    unsolved: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Value:
    """Of one value: some of its points, whether all are finite, whether float16 could hold it."""

    points: torch.Tensor
    finite: bool
    fits: bool


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One call, watched: values by their name in the package, the operation that made and those that use each."""

    values: dict[str, _Value] = field(default_factory=dict)
    made_by: dict[str, Operation] = field(default_factory=dict)
    used_by: dict[str, list[Operation]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()

    def watch(self, operation: Operation, name: str, value: Any) -> None:
        """For ``MilModel.predict``."""
        self.made_by[name] = operation
        for source in sources(operation):
            self.used_by.setdefault(source, []).append(operation)
        if getattr(value, "is_floating_point", bool)():
            self.values[name] = _seen(value)


def found_in(traced: Traced, request: LowerRequest, images: Mapping[str, Mapping[str, Any]]) -> dict[str, Found]:
    """What each method of ``traced`` needs; nothing where ``request`` does not ask for a search.

    RecipeError when there are no calibration samples to search on.
    """
    if not searches_float32(request.options):
        return {name: Found() for name in traced.programs}
    if request.calibration is None or not len(request.calibration):
        raise RecipeError(NO_SAMPLES, fix=GIVE_SAMPLES)
    calls = calls_of(request, request.calibration, traced.programs)
    return {name: found_for(traced, name, request, images[name], calls[name]) for name in traced.programs}


def said(found: Mapping[str, Found]) -> Iterator[str]:
    """What was kept and why, and what is still wrong, a line each; the method's name where there are several."""
    for method, each in found.items():
        within = f" of {method}" if len(found) > 1 else ""
        for module, why in each.modules.items():
            name = "the network itself" if module == ITSELF else module
            yield f"{name}{within} computes in float32 (keep_float32: auto): {why}"
        for text in each.unsolved:
            yield f"keep_float32: auto{within} found no module that mends this: {text}"


def calls_of(request: LowerRequest, samples: SampleSet, methods: Iterable[str]) -> dict[str, list[list[Tensors]]]:
    """Per method and sample the inputs of its calls, states as the float network carries them."""
    count = min(SAMPLES, len(samples))
    chosen = [samples.samples[index * len(samples) // count] for index in range(count)]
    found: dict[str, list[list[Tensors]]] = {name: [] for name in methods}
    for recorded in request.float_calls(replace(sample, calls=sample.calls[:_CALLS]) for sample in chosen):
        for name, sequences in found.items():
            sequences.append([dict(call.inputs) for call in recorded if call.method == name])
    return found


def found_for(
    traced: Traced,
    name: str,
    request: LowerRequest,
    images: Mapping[str, Any],
    calls: Calls,
) -> Found:
    """What the method ``name`` needs kept in float32 besides what ``request`` names; ``calls`` as its signature says.

    ``traced`` with the inputs and outputs that the package has.
    """
    from edgebake_targets import _coreml
    from edgebake_targets._coreml_checks import record_inside
    from edgebake_targets._coreml_images import lowered_inputs
    from edgebake_targets._coreml_package import open_package

    method = traced.signature.methods[name]
    with tempfile.TemporaryDirectory(prefix="edgebake-") as scratch:
        made: list[Path] = []

        def make(asked: LowerRequest, kept: Mapping[str, str]) -> Made:
            made.append(Path(scratch) / f"{len(made)}.mlpackage")
            converted = _coreml.convert(traced, name, method, keeping(plain(asked), kept), images)
            _coreml.compress(converted)
            _coreml.write(converted, asked, made[-1])
            return Made(path=made[-1], inside=record_inside(open_package(made[-1]), converted.inside))

        given = [[lowered_inputs(images, method, inputs) for inputs in sequence] for sequence in calls]
        return search(request, make, given)


def keeping(request: LowerRequest, modules: Iterable[str]) -> LowerRequest:
    """``request`` with ``modules`` kept in float32 too."""
    words = (str(request.options["keep_float32"]), *modules)
    return replace(request, options={**request.options, "keep_float32": " ".join(words)})


def plain(request: LowerRequest) -> LowerRequest:
    """``request`` with quick palettes: how their values are found does not change what overflows."""
    return replace(request, options={**request.options, "palettes": "kmeans"})


def search(request: LowerRequest, make: Make, calls: Calls) -> Found:
    """The modules of one method to keep in float32 besides those that ``request`` names.

    ``make`` writes the package of a request with modules kept; ``calls`` are the method's own.
    """
    exact = [_Baseline.of(run) for run in _runs(make(_exact(request), {}), calls, "fp32")]
    kept: dict[str, str] = {}
    for _ in range(_ROUNDS):
        made = make(request, kept)
        faults = list(_faults(made, calls, exact))
        new: dict[str, str] = {}
        for fault in faults:
            for module, why in fault.modules(made.inside, kept).items():
                new.setdefault(module, why)
        if not new:
            return Found(modules=kept, unsolved=tuple(dict.fromkeys(fault.text for fault in faults)))
        kept |= new
    return Found(modules=kept, unsolved=(f"{faults[0].text}, after {_ROUNDS} rounds",))


def _exact(request: LowerRequest) -> LowerRequest:
    """``request`` without a value of float16, weights that are compressed anyway aside."""
    schemes = {module: "fp32" if s == "fp16" else s for module, s in request.assignment.schemes.items()}
    options = {**request.options, "compute_precision": "fp32", "keep_float32": ""}
    return replace(request, options=options, assignment=replace(request.assignment, schemes=schemes))


def _runs(made: Made, calls: Calls, mode: str) -> Iterator[_Run]:
    """Every call in ``mode``, states of the package carried within a sample."""
    from edgebake_targets.mil import MilModel

    model = MilModel(made.path)
    for sequence in calls:
        state = model.make_state()
        for inputs in sequence:
            run = _Run(outputs=tuple(model.interface.outputs))
            model.predict(inputs, state, mode=mode, watch=run.watch)
            yield run


def sources(operation: Operation) -> Iterator[str]:
    """Names of the values that ``operation`` takes, those of its nested blocks included."""
    for block in (operation, *(inner for nested in operation.blocks for inner in nested.walk())):
        yield from (name for bound in block.inputs.values() for name in bound if isinstance(name, str))


def _seen(value: torch.Tensor) -> _Value:
    flat = value.detach().reshape(-1)
    finite = bool(flat.isfinite().all())
    fits = not finite or not flat.numel() or float(flat.abs().max()) <= _LARGEST
    return _Value(points=flat[:: max(1, flat.numel() // _POINTS)].clone(), finite=finite, fits=fits)


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    """What one call computes without rounding, by the names that converter and precision leave alone."""

    values: Mapping[str, _Value]

    @classmethod
    def of(cls, run: _Run) -> _Baseline:
        return cls(values={_stem(name): value for name, value in run.values.items()})

    def get(self, name: str) -> _Value | None:
        """The converter writes a first ``linear`` as ``linear_0`` when a cast follows it."""
        stem = _stem(name)
        return self.values.get(stem) or self.values.get(stem.removesuffix("_0"))


def _stem(name: str) -> str:
    return re.sub(r"(_cast_[a-z]+\d+)+$", "", name)


@dataclass(frozen=True, kw_only=True)
class _Fault:
    """A value that goes wrong although what it is computed from is right."""

    name: str
    text: str
    run: _Run
    exact: _Baseline

    def modules(self, inside: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, str]:
        """Modules to keep, and why: its own and those it hands huge values to; else those of its neighbours."""
        operation = self.run.made_by[self.name]
        own = self._homes([operation], inside)
        if self.name not in inside and operation.operator == "cast":  # between modules, made by the converter
            own = self._homes(self.run.used_by.get(self.name, []), inside)
        behind = self._homes(self._beyond(), inside)
        before = [self.run.made_by[name] for name in sources(operation) if name in self.run.made_by]
        for choice in (own + behind, self._homes(before, inside)):
            if new := {module: self.text for module in choice if module not in kept}:
                return new
        return {}

    @staticmethod
    def _homes(operations: Sequence[Operation], inside: Mapping[str, str]) -> list[str]:
        return [inside.get(output.name, ITSELF) for op in operations for output in op.outputs]

    def _beyond(self) -> list[Operation]:
        """Operations that take, directly or through others, what float16 cannot hold of this value."""
        found: list[Operation] = []
        waiting, seen = [self.name], {self.name}
        while waiting:
            name = waiting.pop()
            value = self.exact.get(name)
            if value is None or value.fits:
                continue
            users = self.run.used_by.get(name, [])
            found += users
            names = [output.name for op in users for output in op.outputs if output.name not in seen]
            seen.update(names)
            waiting += names
        return found


def _faults(made: Made, calls: Calls, exact: Sequence[_Baseline]) -> Iterator[_Fault]:
    for mode in _MODES:
        for number, (run, baseline) in enumerate(zip(_runs(made, calls, mode), exact, strict=True)):
            yield from _of_call(run, baseline, f"in mode {mode} on calibration call {number}")


def _of_call(run: _Run, exact: _Baseline, where: str) -> Iterator[_Fault]:
    """Overflows of one call; where there are none and an output suffers, the operators that lose."""
    bad: set[str] = set()
    overflows = []
    for name, value in run.values.items():
        known = exact.get(name)
        if value.finite or (known is not None and not known.finite):
            continue
        operation = run.made_by[name]
        taken = set(sources(operation))
        if not taken & bad and (known is not None or all(run.values[t].finite for t in taken & run.values.keys())):
            overflows.append(name)
        bad.add(name)
    for name in overflows:
        text = f"{name} ({run.made_by[name].operator}) leaves the range of float16 {where}"
        yield _Fault(name=name, text=text, run=run, exact=exact)
    if not overflows:
        yield from _losses(run, exact, where)


def _losses(run: _Run, exact: _Baseline, where: str) -> Iterator[_Fault]:
    decibels: dict[str, float] = {}
    falls: dict[str, float] = {}
    for name, value in run.values.items():
        taken = [decibels[t] for t in sources(run.made_by[name]) if t in decibels]
        before = min([_HALF_DB, *taken])
        now = _decibels(exact.get(name), value)
        decibels[name] = before if now is None else min(now, _HALF_DB)
        falls[name] = before - decibels[name]
    worst = min((decibels[name] for name in run.outputs if name in decibels), default=_HALF_DB)
    if worst >= _HALF_DB - _LOST_DB:
        return
    for name, fall in falls.items():
        if fall > _LOST_DB:
            text = f"{name} ({run.made_by[name].operator}) loses {fall:.0f} dB {where}"
            yield _Fault(name=name, text=text, run=run, exact=exact)


def _decibels(exact: _Value | None, value: _Value) -> float | None:
    """SQNR of the points; None where nothing comparable or no signal is there."""
    if exact is None or exact.points.shape != value.points.shape or not (exact.finite and value.finite):
        return None
    signal = float(exact.points.double().square().sum())
    noise = float((exact.points.double() - value.points.double()).square().sum())
    if signal == 0.0:
        return None
    return math.inf if noise == 0.0 else 10.0 * math.log10(signal / noise)
