"""Judges a model file that edgebake did not make: against recorded outputs, or against itself without rounding.

The second needs a runner that can compute without rounding (Core ML packages in float16): what the file loses when it
computes as it declares, on seeded noise. Anything else has to be held against outputs that are known to be right.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edgebake import reference, samples_files, signatures, validate
from edgebake.delivery import MANIFEST
from edgebake.errors import EdgebakeError, RecipeError, ToolchainMissing, UsageError
from edgebake.limits import judge
from edgebake.recipe import Component, Dim, DType, Input, Limits, Samples
from edgebake.result import AS_IT_IS, Failure, Result
from edgebake.samples_headers import EXTRAS, shapes
from edgebake.samples_noise import make_noise
from edgebake.target import INSPECTORS, RUNNERS, NotMeasured
from edgebake.types import DimBounds, Inspection, MethodSignature, ReferenceCall, Sample, SampleSet, Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

TARGETS = {
    ".mlpackage": "coreml",
    ".onnx": "onnx-cpu",
    ".ort": "onnx-mobile",
    ".pte": "executorch-xnnpack",
    ".aimodel": "coreai",
}
_METHOD = "forward"
_LONGEST = 64  # an open dimension in noise
_HIGHEST = 100  # integers of noise are below: token numbers that every vocabulary has
_NOISE_SAMPLES = 8
_OPEN = 1 << 30


def judged(path: Path, against: Path | None, limits: Limits) -> Result:
    """Run the file or package at ``path`` on the samples of ``against``, or on noise; failures become part of it.

    ``against`` is an .npz or .safetensors file: one array per input and per output, the first axis counts samples.
    """
    start = time.monotonic()
    failure: Failure | None = None
    measured: Mapping[str, Any] = {}
    target = TARGETS[path.suffix.lower()]
    try:
        measured = _measured(path, target, against, limits)
    except EdgebakeError as error:
        failure = Failure(stage="verify", problems=tuple(error.problems), exit_code=error.exit_code)
    return Result(
        unit=path.name,
        recipe=path.name,
        component="file",
        target=target,
        scheme=AS_IT_IS,
        folder=path.parent,
        verdicts=() if failure else judge(limits, measured),
        measurements=measured,
        failure=failure,
        stages={"verify": "ran"},
        seconds=time.monotonic() - start,
    )


def _measured(path: Path, target: str, against: Path | None, limits: Limits) -> dict[str, Any]:
    inspection = _inspected(path)
    component = _component(inspection)
    signature = _signature(inspection, component)
    with tempfile.TemporaryDirectory(prefix="edgebake-verify-") as scratch:
        folder = Path(scratch)
        if against is None:
            samples, calls = _by_itself(path, target, component, signature)
        else:
            samples, calls = _recorded(against, component, signature)
        reference.write(folder, samples, calls, {"model": {"weights": "trained"}})
        subject = validate.Subject(
            unit=path.name,
            target=target,
            scheme="fp32",
            folder=path.parent,
            lowered={
                "entry": path.name,
                "files": [path.name],
                "signature": signatures.to_json(signature),
                "delegation": {},
                "planned_memory_bytes": None,
            },
            assignment={},
            reference=folder,
            limits=limits,
            model={"modules": [], "float_bytes": sum(4 * prod(w.shape) for w in inspection.weights)},
            ours=False,
        )
        found = validate.measure(subject, None)
    if against is None:
        found["notes"] = [*found["notes"], "held against itself without rounding: what float16 costs, nothing else"]
    return found


def _inspected(path: Path) -> Inspection:
    for name in INSPECTORS.names():
        inspector = INSPECTORS.find(name)
        if path.suffix.lower() in inspector.SUFFIXES:
            if missing := inspector.missing():
                raise ToolchainMissing(f"cannot read {path.suffix} files: {missing.reason}", fix=missing.remedy)
            found: Inspection = inspector.inspect(path)
            return found
    raise AssertionError(path.suffix)


def _component(inspection: Inspection) -> Component:
    """The file's inputs in the recipe's words; states stay inside the file."""
    inputs = {spec.name: spec for spec in inspection.inputs if spec.role != "state"}
    strange = [spec for spec in inputs.values() if spec.dtype not in get_args(DType)]
    if strange:
        raise UsageError(
            f"the input {strange[0].name} is of type {strange[0].dtype}, which cannot be fed here",
            fix=f"give a model that takes {', '.join(get_args(DType))}",
        )
    dims = {word: _bounds(word) for spec in inputs.values() for word in spec.shape if isinstance(word, str)}
    names = {word: f"dim{number}" for number, word in enumerate(dims)}
    return Component.model_validate(
        {
            "model": {"source": "exported", "path": "-"},
            "inputs": {
                name: Input.model_validate(
                    {"shape": tuple(names.get(str(d), d) for d in spec.shape), "dtype": spec.dtype}
                )
                for name, spec in inputs.items()
            },
            "dims": {names[word]: bounds for word, bounds in dims.items()},
        }
    )


def _bounds(word: str) -> Dim:
    """``8..128``, ``8..``, ``1|4|8``, or the name of a dimension of any size."""
    low, dots, high = word.partition("..")
    with suppress(ValueError):
        if dots:
            return Dim(min=max(1, int(low)), max=int(high) if high else _OPEN)
        return Dim.model_validate({"sizes": [int(size) for size in word.split("|")]})
    return Dim(min=1, max=_OPEN)


def _signature(inspection: Inspection, component: Component) -> Signature:
    kept = {spec.name: spec for spec in inspection.inputs}
    method = MethodSignature(
        inputs=tuple(kept[name] for name in component.inputs),
        outputs=tuple(inspection.outputs),
        buffers=tuple(spec.name for spec in inspection.inputs if spec.role == "state"),
    )
    dims = {name: DimBounds(min=dim.min, max=dim.max, sizes=dim.sizes) for name, dim in component.dims.items()}
    return Signature(methods={_METHOD: method}, dims=dims)


Calls = Iterable[tuple[ReferenceCall, ...]]


def _recorded(against: Path, component: Component, signature: Signature) -> tuple[SampleSet, Calls]:
    """Samples and outputs of a file; both go by the names that `edgebake inspect` shows."""
    there = shapes(against)
    outputs = [spec.name for spec in signature.methods[_METHOD].outputs if spec.name in there]
    known = {*component.inputs, *outputs, *EXTRAS}
    missing = [name for name in component.inputs if name not in there]
    unknown = [name for name in there if name not in known]
    if missing or unknown or not outputs:
        inputs = ", ".join(component.inputs)
        expected = ", ".join(spec.name for spec in signature.methods[_METHOD].outputs)
        raise UsageError(
            f"{against} has the arrays {', '.join(there) or 'none'}; the model takes {inputs} and returns {expected}",
            fix="name the arrays as the inputs and outputs, the first axis counts samples",
        )
    counts = {shape[0] if shape else 0 for shape in there.values()}
    if len(counts) != 1 or counts == {0}:
        raise UsageError(
            f"the arrays of {against} differ in their first axis: {sorted(counts)}", fix="one row a sample"
        )
    spec = Samples(file=str(against), count=counts.pop())
    try:
        samples, arrays = samples_files.read_with(spec, component, against, outputs)
    except RecipeError as error:
        raise UsageError(error.problems) from None
    return SampleSet(samples=tuple(samples), description=against.name), _paired(samples, arrays, signature)


def _paired(
    samples: Iterable[Sample], arrays: Mapping[str, Any], signature: Signature
) -> Iterator[tuple[ReferenceCall, ...]]:
    ranks = {spec.name: len(spec.shape) for spec in signature.methods[_METHOD].outputs}
    for index, sample in enumerate(samples):
        rows = {name: _steps(array[index], ranks[name], len(sample.calls)) for name, array in arrays.items()}
        yield tuple(
            ReferenceCall(
                method=call.method,
                inputs=call.tensors(),
                outputs={name: steps[number] for name, steps in rows.items()},
            )
            for number, call in enumerate(sample.calls)
        )


def _steps(row: NDArray[Any], rank: int, calls: int) -> list[NDArray[Any]]:
    """The outputs of each call that one row holds, as the file's shapes say: see ``samples_files``."""
    row = row.astype("float32") if row.dtype.kind == "f" else row
    if calls > 1 and row.ndim == rank + 1 and len(row) == calls:
        return list(row)
    if calls > 1 or row.ndim not in (rank, rank - 1):
        raise UsageError(
            f"an output array holds rows of {list(row.shape)} for {calls} calls of {rank} dimensions each",
            fix="give every sample's output as the model returns it",
        )
    return [row if row.ndim == rank else row[None]]


def _by_itself(path: Path, target: str, component: Component, signature: Signature) -> tuple[SampleSet, Calls]:
    """Noise, and what the file computes of it without rounding; UsageError where no runner can do that."""
    runner = validate.choose_runner(target)
    if isinstance(runner, str):
        raise ToolchainMissing(f"nothing here runs {path.suffix} files: {runner}")
    module = RUNNERS.find(runner[0])
    try:
        session = module.open(path.absolute(), signature)
    except NotMeasured as error:
        raise UsageError(f"{path.name} cannot be judged by itself: {error}", fix="give --against FILE.npz") from None
    if "fp32" not in getattr(session, "modes", ()):
        ours = (path.parent / MANIFEST).is_file()
        whole = (
            f"edgebake verify {shlex.quote(str(path.parent))} judges the artifact that it is of; or " if ours else ""
        )
        raise UsageError(
            f"{path.name} computes in float32 or has no runner that computes without rounding",
            fix=f"{whole}give --against FILE.npz: arrays of its inputs and of the outputs that are right",
        )
    dims = {name: dim if dim.sizes else _shortened(dim) for name, dim in component.dims.items()}
    spec = Samples(noise=True, count=_NOISE_SAMPLES, high=_HIGHEST)
    samples = make_noise(spec, component.model_copy(update={"dims": dims}))
    return SampleSet(samples=tuple(samples), noise=True), _unrounded(session, samples)


def _shortened(dim: Dim) -> Dim:
    return Dim(min=dim.min, max=min(dim.max, max(dim.min, _LONGEST)))


def _unrounded(session: Any, samples: Iterable[Sample]) -> Iterator[tuple[ReferenceCall, ...]]:
    for sample in samples:
        if hasattr(session, "begin"):
            session.begin()
        calls = []
        for call in sample.calls:
            given = call.tensors()
            outputs, _ = session.call_mode("fp32", call.method, given)
            calls.append(ReferenceCall(method=call.method, inputs=given, outputs=outputs))
        yield tuple(calls)
