"""Runs an artifact with the most faithful runner there is and measures it against the recorded float reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgebake import compute_units, modes, runclient, signatures, size
from edgebake.llm import judge
from edgebake.recipe import Limits
from edgebake.reference import Reference
from edgebake.target import INSPECTORS, find_target, runners_of
from edgebake.types import Assignment, Inspection, Module, Signature, Verdict

if TYPE_CHECKING:
    from edgebake.agreement import TaskMeter

FloatTimer = Callable[[int, int], list[float]]  # (sample, repetitions) -> milliseconds of the float eager model
Inside = Callable[[list[str]], Mapping[str, Any]]  # module names -> values inside the artifact
T = TypeVar("T")

_ROUNDS = 7  # float and artifact take turns, so that a noisy machine disturbs both alike
_ROUND_MS = 60.0
_PRETENDING = {"interpreted": "interprets", "simulated": "simulates", "stand-in": "stands in for what executes"}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An artifact and what it is held against; nothing here needs the training model."""

    unit: str
    target: str
    scheme: str
    folder: Path
    lowered: Mapping[str, Any]  # entry, signature, delegation, planned_memory_bytes, files, encodings, notes
    assignment: Mapping[str, str]
    reference: Path
    limits: Limits
    model: Mapping[str, Any]  # modules, float_bytes, facts
    not_run: str = ""  # why nothing here is to run it
    ours: bool = True  # edgebake made it: what it promised then is beside it

    @property
    def entry(self) -> Path:
        """The file or folder that a runtime opens."""
        return self.folder / str(self.lowered["entry"])


def choose_runner(target: str) -> tuple[str, str] | str:
    """(name, kind) of the most faithful usable runner, or why there is none."""
    reasons = []
    for name, runner in runners_of(target):
        missing = runner.missing()
        if missing is None:
            return name, runner.KIND
        reasons.append(f"{name}: {missing.reason} ({missing.remedy})")
    return "; ".join(reasons) or f"no runner executes {target} artifacts on this machine"


def measure(subject: Subject, float_timer: FloatTimer | None, *, inside: bool = False) -> dict[str, Any]:
    """Everything that measurements.json holds, but for stages and host; ``inside`` when this process is a worker."""
    recorded = Reference(subject.reference)
    inspection: Inspection = INSPECTORS.find(find_target(subject.target).FORMAT).inspect(subject.entry)
    measured: dict[str, Any] = {
        "version": 1,
        "unit": subject.unit,
        "notes": [*subject.lowered.get("notes", ()), *_notes(recorded)],
        "samples": {
            "count": len(recorded),
            "calls": recorded.manifest["calls"],
            "sources": recorded.manifest["sources"],
            "noise": recorded.noise,
        },
        "delegation": dict(subject.lowered["delegation"]),
        "size": _size(subject, inspection),
        "structure": _structure(subject, inspection),
        "memory": {"planned_bytes": subject.lowered["planned_memory_bytes"]},
    }
    runner = subject.not_run or choose_runner(subject.target)
    if isinstance(runner, str):
        return {**measured, **_unmeasured(runner)}
    name, kind = runner
    measured["runner"] = {"name": name, "kind": kind}
    signature = subject.lowered["signature"]
    with runclient.opened(name, subject.entry, signature, subject.reference, inside=inside) as client:
        if "not_measured" in client.opened:
            return {**measured, **_unmeasured(f"{name}: {client.opened['not_measured']}")}
        measured |= _outputs(subject, recorded, client)
        if client.opened["modes"]:
            measured["modes"] = modes.measure(client.opened["modes"], recorded, client.in_mode)
        if kind in _PRETENDING:  # neither its memory nor its time are the artifact's
            does = _PRETENDING[kind]
            measured["memory"]["reason"] = f"{name} {does} the artifact: its memory is not the artifact's"
            return {**measured, "latency": _no_latency(f"{name} {does} the artifact: its speed says nothing")}
        measured["memory"] |= {
            "run_peak_bytes": client.opened["peak_bytes"],
            "run_base_bytes": client.opened["base_bytes"],
        }
        measured["latency"] = _latency(client, recorded, float_timer)
        if client.opened["units"]:
            timed = median_sample(recorded)
            measured["compute_units"] = compute_units.measure(client.opened["units"], recorded, timed, client)
            measured["placement"] = client.placement()
    return measured


def _unmeasured(reason: str) -> dict[str, Any]:
    return {"runner": None, "not_measured": reason, "latency": _no_latency(reason)}


def _no_latency(reason: str) -> dict[str, Any]:
    return {"median_ms": None, "ratio": None, "reason": reason}


def with_inside(subject: Subject, use: Callable[[Inside | None], T]) -> T:
    """Call ``use`` with a reader of values inside the artifact, None where its runtime offers none (sample 0).

    For workers: the artifact runs in this process where its runner allows that.
    """
    runner = choose_runner(subject.target)
    if isinstance(runner, str):
        return use(None)
    signature = subject.lowered["signature"]
    with runclient.opened(runner[0], subject.entry, signature, subject.reference, inside=True) as client:
        if not client.opened.get("can_intermediates"):
            return use(None)
        return use(lambda modules: client.intermediates(0, modules))


def _notes(recorded: Reference) -> list[str]:
    notes = []
    if recorded.facts["model"].get("weights") == "random":
        seed = recorded.facts["model"].get("seed", 0)
        notes.append(f"weights are random (seed {seed}): the numbers say nothing about quality")
    if recorded.noise:
        notes.append("evaluation samples are seeded noise: the numbers say nothing about quality")
    return notes


def _size(subject: Subject, inspection: Inspection) -> dict[str, Any]:
    files = [subject.folder / f for f in subject.lowered["files"]]
    on_disk = sum(p.stat().st_size for f in files for p in ([f] if f.is_file() else f.rglob("*")) if p.is_file())
    modules = tuple(Module(**m) for m in subject.model["modules"])
    return size.measure(
        inspection,
        disk_bytes=on_disk,
        float_bytes=subject.model["float_bytes"],
        modules=modules,
        assignment=Assignment(schemes=subject.assignment, kinds={m.name: m.kind for m in modules}),
        scheme=subject.scheme,
        compiled_from=(subject.lowered.get("encodings") or {}).get("compiled_from"),
    )


def _structure(subject: Subject, inspection: Inspection) -> list[dict[str, Any]]:
    if not subject.ours:
        return []
    target: Any = find_target(subject.target)
    signature = signatures.from_json(subject.lowered["signature"])
    if not hasattr(target, "structure"):
        found = (*_other_types(signature, inspection), *_other_chip(subject.lowered, inspection))
        return [asdict(verdict) for verdict in found]
    checks = target.read_checks(subject.folder)
    return [asdict(verdict) for verdict in target.structure(subject.entry, signature, checks)]


def _other_types(signature: Signature, inspection: Inspection) -> Iterator[Verdict]:
    """A failure for inputs or outputs of another type than promised: runners convert them, apps read the bytes.

    By name, or by position where a format keeps no names. Nothing is said of components with several methods, whose
    tensors inspectors list under names of their own.
    """
    if len(signature.methods) != 1:
        return
    method = next(iter(signature.methods.values()))
    sides = (("inputs", method.inputs, inspection.inputs), ("outputs", method.outputs, inspection.outputs))
    for side, promised, found in sides:
        there = {spec.name: spec.dtype for spec in found}
        if not there.keys() & {spec.name for spec in promised}:
            there = {spec.name: got.dtype for spec, got in zip(promised, found, strict=False)}
        wanted = {spec.name: spec.lowered_dtype or spec.dtype for spec in promised}
        wrong = [f"{n} is {there[n]}, not {wanted[n]}" for n in wanted if there.get(n, wanted[n]) != wanted[n]]
        if wrong:
            yield Verdict(limit=f"structure.{side}", state="fail", reason="; ".join(wrong))


def _other_chip(lowered: Mapping[str, Any], inspection: Inspection) -> Iterator[Verdict]:
    """A failure for a binary of another chip than promised, which a simulator runs and a phone refuses."""
    promised = ((lowered.get("encodings") or {}).get("runtime") or {}).get("soc_model")
    there = inspection.facts.get("soc_model")
    if promised is not None and str(there).isdigit() and there != promised:
        reason = f"compiled for the chip that its vendor numbers {there}, not {promised}"
        yield Verdict(limit="structure.chip", state="fail", reason=reason)


def _meters(limits: Limits, signature: Signature) -> tuple[Any, TaskMeter | None]:
    from edgebake.agreement import TaskMeter, meter_of

    first = next(iter(signature.methods.values())).outputs[0].name
    agreement = limits.agreement
    task = limits.task
    return (
        meter_of(agreement, agreement.output or first) if agreement else None,
        TaskMeter(metric=task.metric, output=task.output or first) if task else None,
    )


def _outputs(subject: Subject, recorded: Reference, client: runclient.Client) -> dict[str, Any]:
    signature = signatures.from_json(subject.lowered["signature"])
    if signature.language is not None:
        if reason := recorded.facts.get(judge.NOT_MEASURED):
            return {**judge.measure(recorded, {}, client.language()), "not_measured": reason}
        return judge.measure(recorded, client.outputs(), client.language())
    agreement, task = _meters(subject.limits, signature)
    stateful = any(t.role == "state" for m in signature.methods.values() for t in m.inputs)
    found: dict[str, Any] = {
        "outputs": _parity(recorded, client.outputs(), agreement=None if stateful else agreement, task=task)
    }
    if stateful:  # what a phone does: the artifact's own states, so decisions are judged on these
        found["free_running"] = _parity(recorded, client.outputs(free=True), agreement=agreement, task=None)
    if agreement is not None:
        found["agreement"] = agreement.measurements()
    if task is not None:
        found["task"] = task.measurements()
    return found


def _parity(
    recorded: Reference, outputs: Mapping[str, Any], *, agreement: Any, task: TaskMeter | None
) -> dict[str, dict[str, Any]]:
    from edgebake.metrics import ParityMeter

    parity = ParityMeter()
    names: dict[tuple[int, int], list[str]] = {}
    for key in outputs:
        at, nth, name = key.split(".", 2)
        names.setdefault((int(at), int(nth)), []).append(name)
    for index, sample in recorded.samples():
        for number, call in enumerate(sample.calls):
            got = {name: outputs[f"{index}.{number}.{name}"] for name in names.get((index, number), ())}
            parity.add(index, sample.source, call.outputs, got)
            if agreement is not None and agreement.output in got:
                agreement.add(sample.source, call.outputs[agreement.output], got[agreement.output])
            if task is not None and sample.label is not None and task.output in got:
                task.add(sample.source, sample.label, call.outputs[task.output], got[task.output])
    return parity.measurements()


def median_sample(recorded: Reference) -> int:
    """The sample whose inputs are of median size: what is timed."""
    by_size = sorted(range(len(recorded)), key=recorded.input_bytes)
    return by_size[len(by_size) // 2]


def _latency(client: runclient.Client, recorded: Reference, float_timer: FloatTimer | None) -> dict[str, Any]:
    """Median and spread of one call on a sample of median size, in turns with the float eager model."""
    sample = median_sample(recorded)
    once = min(client.time(sample, 3))
    per_round = max(1, min(100, int(_ROUND_MS / max(once, 1e-3))))
    artifact: list[float] = []
    floats: list[float] = []
    if float_timer is not None:
        float_timer(sample, 2)
    for _ in range(_ROUNDS):
        if float_timer is not None:
            floats += float_timer(sample, max(1, min(per_round, 10)))
        artifact += client.time(sample, per_round)
    deciles = statistics.quantiles(artifact, n=10)
    median = statistics.median(artifact)
    floating = statistics.median(floats) if floats else None
    return {
        "median_ms": median,
        "p10_ms": deciles[0],
        "p90_ms": deciles[8],
        "float_median_ms": floating,
        "ratio": median / floating if floating else None,
        "repetitions": len(artifact),
        "reason": "" if floats else "the float model was not loaded in this run",
    }
