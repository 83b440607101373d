"""The stages of a unit that is lowered from its model's files: ``describe`` in the place of ``trace``, and ``lower``.

Which units these are says :func:`edgebake.llm.streaming.streams`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgebake import signatures
from edgebake.assignment import assign
from edgebake.errors import StageFailed
from edgebake.keys import StageKey, about
from edgebake.llm import companions, generation
from edgebake.llm import judge as language
from edgebake.store import Entry
from edgebake.target import MODELS, LowerRequest, find_target
from edgebake.types import Call, Lowered, Module, ReferenceCall, SampleSet, Streamed
from edgebake.units import Unit
from edgebake.workbench import Bench, read_samples, request_of, stored


def describe(bench: Bench, unit: Unit, keys: Mapping[str, StageKey]) -> Entry:
    """Interface, modules and facts of the model from its configuration, with the files that travel."""

    def write(folder: Path) -> Mapping[str, Any]:
        with bench.stage("describe", unit):
            found = MODELS.find(unit.spec.model.source).describe(request_of(bench, unit))
            companions.store(found.companions, folder)
        return {
            "signature": signatures.to_json(found.signature),
            "modules": [asdict(module) for module in found.modules],
            "notes": [],
            "float_bytes": found.float_bytes,
            "facts": dict(found.facts),
        }

    return stored(bench, unit, "describe", keys, write)


def lower(bench: Bench, unit: Unit, keys: Mapping[str, StageKey]) -> tuple[Entry, Entry]:
    """The artifact, weights read where they lie; with the entries of the description and of the artifact itself.

    A target that streams finds in the folder it fills what a killed build wrote there.
    """
    described = describe(bench, unit, keys)

    def write(folder: Path) -> Mapping[str, Any]:
        target: Any = find_target(unit.target)
        modules = tuple(Module(**module) for module in described.meta["modules"])
        assignment = assign(unit.scheme, unit.spec.compress.modules, modules, target, unit.target)
        with bench.stage("lower", unit):
            request = LowerRequest(
                unit=unit.id,
                scheme=unit.scheme,
                assignment=assignment,
                options=unit.options,
                device=bench.device(unit.device),
                calibration=None,
                folder=folder,
                about=about(unit, bench.store.file_digest),
                beside=companions.kept(described.folder),
            )
            tensors = MODELS.find(unit.spec.model.source).tensors(request_of(bench, unit))
            signature = signatures.from_json(described.meta["signature"])
            lowered = target.stream(Streamed(tensors=tensors, signature=signature), request)
            lowered = finished(unit, lowered, folder, described)
        return {"lowered": signatures.lowered_to_json(lowered), "assignment": dict(assignment.schemes)}

    return described, stored(bench, unit, "lower", keys, write, begun=True)


def finished(unit: Unit, lowered: Lowered, folder: Path, before: Entry) -> Lowered:
    """``lowered`` with what travels beside it and the notes of ``before``; StageFailed when ``folder`` lacks a file."""
    if not lowered.files or any(not (folder / f).exists() for f in lowered.files):
        raise StageFailed(f"{unit.target} wrote no artifact for {unit.id}")
    beside = companions.deliver(before.folder, folder)
    return replace(lowered, files=(*lowered.files, *beside), notes=(*before.meta["notes"], *lowered.notes))


def without_float(bench: Bench, unit: Unit, keys: Mapping[str, StageKey], folder: Path) -> Mapping[str, Any]:
    """Write the reference of a network that is not run: the samples, and why there are no outputs."""
    from edgebake import reference

    described = describe(bench, unit, keys)
    with bench.stage("reference", unit):
        evaluation = read_samples(bench, unit, "evaluation")
        facts = {
            "model": described.meta["facts"],
            "signature": described.meta["signature"],
            language.NOT_MEASURED: unit.without_float,
            language.CONTINUED: {"prompts": generation.prompts(evaluation), "texts": None},
        }
        reference.write(folder, evaluation, _inputs(evaluation), facts)
    bench.samples.clear()
    return {"noise": evaluation.noise, "weights": described.meta["facts"]["weights"]}


def _inputs(samples: SampleSet) -> Iterator[tuple[ReferenceCall, ...]]:
    def alone(call: Call) -> ReferenceCall:
        return ReferenceCall(method=call.method, inputs=call.tensors(), outputs={})

    return (tuple(map(alone, sample.calls)) for sample in samples)
