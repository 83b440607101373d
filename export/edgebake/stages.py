"""The stages of one unit, in order; each reads what earlier ones stored and is not run again when its key is known."""

from __future__ import annotations

import copy
import gc
import importlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake import locate as locating
from edgebake import mapped, signatures, streamed, validate
from edgebake.assignment import assign
from edgebake.buffers import Snapshot, untouched
from edgebake.keys import StageKey, about, component_key, needs_calibration, stage_keys
from edgebake.limits import parity_failed
from edgebake.llm import companions, decoder
from edgebake.llm import judge as language
from edgebake.llm.streaming import streams
from edgebake.reference import Reference
from edgebake.store import Entry
from edgebake.target import METHODS, GraphRequest, LowerRequest, ModuleRequest, find_target, support_of
from edgebake.types import Assignment, Loaded, Module, ReferenceCall, Sample, Traced, canonical_module_name
from edgebake.units import Unit
from edgebake.workbench import Bench, keeping, load, read_samples, stored

if TYPE_CHECKING:
    import torch

_LARGE = 1 << 30  # bytes of stored programs


def reference(bench: Bench, unit: Unit, keys: Mapping[str, StageKey]) -> Reference:
    """The float model's outputs on the evaluation samples."""
    from edgebake import reference as recorded

    def write(folder: Path) -> Mapping[str, Any]:
        if unit.without_float:
            return streamed.without_float(bench, unit, keys, folder)
        from edgebake.reference_run import run_float

        loaded = load(bench, unit)
        with bench.stage("reference", unit):
            evaluation = read_samples(bench, unit, "evaluation")
            facts = {"model": dict(loaded.facts), "signature": signatures.to_json(loaded.signature)}
            calls = run_float(loaded, evaluation)
            if loaded.signature.language is not None:
                calls, facts = language.kept(calls), {**facts, **language.continued(loaded, evaluation)}
            recorded.write(folder, evaluation, calls, facts)
        bench.samples.clear()
        return {"noise": evaluation.noise, "weights": loaded.facts.get("weights", "trained")}

    entry = stored(bench, unit, "reference", keys, write)
    return Reference(entry.folder)


def _acting(unit: Unit, assignment: Assignment, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Methods that act on ``where``, the recipe's steps first, then those the assigned schemes need."""
    target = find_target(unit.target)
    named = [(step.method, step.options) for step in unit.spec.compress.steps]
    rows = [support_of(target, s) for s in sorted({unit.scheme, *assignment.schemes.values()})]
    named += [(row.method, {}) for row in rows if row is not None and row.method]
    seen: dict[str, Mapping[str, Any]] = {}
    for name, options in named:
        if METHODS.find(name).ACTS_ON == where:
            seen.setdefault(name, options)
    return list(seen.items())


def _private_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares parameters and buffers: a method replaces what it changes and copies nothing else."""
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _inventory_to_json(modules: tuple[Module, ...]) -> list[dict[str, Any]]:
    return [asdict(m) for m in modules]


def trace(bench: Bench, unit: Unit, keys: Mapping[str, StageKey]) -> tuple[Traced, Assignment, Entry]:
    """One exported program per method, with the methods that act on modules applied first."""

    def write(folder: Path) -> Mapping[str, Any]:
        from edgebake import trace as tracing

        loaded = load(bench, unit)
        with bench.stage("trace", unit):
            modules = tracing.live_modules(loaded)
            assignment = _assignment(unit, modules)
            said: list[str] = []
            changed = _compress_modules(bench, unit, loaded, assignment, keys["trace"].key, said.append)
            traced = tracing.trace(changed)
            _save(traced, folder)
            companions.store(loaded.companions, folder, decoder.shortened(loaded.methods, changed.methods))
            bench.keep(keys["trace"].key, traced)
        states = {name for method in traced.signature.methods.values() for name in method.buffers}
        states |= _names(loaded, "buffers") - _names(changed, "buffers")
        live, there = {m.name for m in modules}, _names(changed, "modules")
        return {
            "signature": signatures.to_json(traced.signature),
            "ops": sorted({*_ops(m for m, _ in _acting(unit, assignment, "module")), *loaded.operators}),
            "modules": _inventory_to_json(tuple(m for m in modules if m.name in there)),  # a step may drop layers
            "notes": list(dict.fromkeys(said)),
            "float_bytes": tracing.float_bytes(loaded.methods.values(), live, states),
            "facts": dict(loaded.facts),
        }

    entry = stored(bench, unit, "trace", keys, write)
    assignment = _assignment(unit, tuple(Module(**m) for m in entry.meta["modules"]))
    return _programs(bench, keys["trace"].key, entry), assignment, entry


def _assignment(unit: Unit, modules: tuple[Module, ...]) -> Assignment:
    return assign(unit.scheme, unit.spec.compress.modules, modules, find_target(unit.target), unit.target)


def _compress_modules(
    bench: Bench, unit: Unit, loaded: Loaded, assignment: Assignment, key: str, tell: Callable[[str], None]
) -> Loaded:
    """``loaded`` after the methods that act on modules; ``key`` names all that they depend on."""
    acting = _acting(unit, assignment, "module")
    if not acting:
        return loaded
    methods = {}
    for name, module in loaded.methods.items():
        changed = _private_copy(module)
        for method, options in acting:
            request = ModuleRequest(
                module=changed,
                assignment=assignment,
                options=options,
                run_calibration=lambda m, name=name: _feed(m, bench, unit, loaded, name),  # type: ignore[misc]
                tell=tell,
                keep=keeping(bench, "part", key, name, method),
            )
            changed = METHODS.find(method).apply(request)
        methods[name] = changed
    mapped.give_back()
    return Loaded(methods=methods, signature=loaded.signature, facts=loaded.facts)


def _names(loaded: Loaded, of: str) -> set[str]:
    """Names of the ``buffers`` or ``modules`` of all methods."""
    return {canonical_module_name(name) for m in loaded.methods.values() for name, _ in getattr(m, f"named_{of}")()}


def _feed(module: torch.nn.Module, bench: Bench, unit: Unit, loaded: Loaded, method: str) -> None:
    """Run ``module`` on the calibration samples; states are those of the float model."""
    import torch

    from edgebake.reference_run import run_float

    order = [t.name for t in loaded.signature.methods[method].inputs]
    start = Snapshot.of(loaded.methods.values())  # ``module`` shares the buffers
    for calls in run_float(loaded, read_samples(bench, unit, "calibration")):
        start.restore()
        for call in (c for c in calls if c.method == method):
            module(*(torch.from_numpy(call.inputs[name]) for name in order))


def _calibration_args(bench: Bench, unit: Unit, traced: Traced, method: str) -> list[list[tuple[Any, ...]]]:
    """Per sample the positional inputs of its calls of ``method``; the float program carries the states on."""
    import torch

    samples = read_samples(bench, unit, "calibration")
    order = {name: [t.name for t in spec.inputs] for name, spec in traced.signature.methods.items()}
    stateless = all(t.role != "state" for spec in traced.signature.methods.values() for t in spec.inputs)
    if stateless:
        given = ([(c.method, c.tensors()) for c in sample.calls] for sample in samples)
    else:
        given = ([(c.method, dict(c.inputs)) for c in calls] for calls in _run_programs(traced, samples))
    return [
        [tuple(torch.from_numpy(inputs[n]) for n in order[m]) for m, inputs in calls if m == method] for calls in given
    ]


def _save(traced: Traced, folder: Path) -> None:
    for name, program in traced.programs.items():
        mapped.save(program, folder / f"{name}.pt2")


def _programs(bench: Bench, key: str, entry: Entry) -> Traced:
    """The programs of ``entry``: those in memory when this worker made them, else read from the store."""
    if key not in bench.traced:
        import torch

        for name in entry.meta["ops"]:
            module, _, function = name.partition(":")
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
        names = entry.meta["signature"]["methods"]
        programs = {name: torch.export.load(entry.folder / f"{name}.pt2") for name in names}
        bench.keep(key, Traced(programs=programs, signature=signatures.from_json(entry.meta["signature"])))
    return bench.traced[key]


def _ops(methods: Iterable[str]) -> list[str]:
    """Modules that register the operators a stored program may hold."""
    return sorted({op for name in methods for op in getattr(METHODS.find(name), "OPS", ())})


def compress(
    bench: Bench, unit: Unit, keys: Mapping[str, StageKey], traced: Traced, assignment: Assignment, trace_ops: list[str]
) -> Traced:
    """The programs with the methods that act on graphs applied; ``traced`` itself when there are none."""
    acting = _acting(unit, assignment, "graph")
    if not acting:
        return traced

    def write(folder: Path) -> Mapping[str, Any]:
        from edgebake.trace import without_provenance

        with bench.stage("compress", unit):
            programs = {}
            for name, program in traced.programs.items():
                programs[name] = program
                for method, options in acting:
                    request = _graph_request(bench, unit, traced, name, programs[name], assignment, options)
                    programs[name] = without_provenance(METHODS.find(method).apply(request))
            compressed = Traced(programs=programs, signature=traced.signature)
            _save(compressed, folder)
            bench.keep(keys["compress"].key, compressed)
        ops = sorted({*trace_ops, *_ops(method for method, _ in acting)})
        return {"signature": signatures.to_json(traced.signature), "ops": ops}

    entry = stored(bench, unit, "compress", keys, write)
    return _programs(bench, keys["compress"].key, entry)


def _graph_request(
    bench: Bench,
    unit: Unit,
    traced: Traced,
    method: str,
    program: torch.export.ExportedProgram,
    assignment: Assignment,
    options: Mapping[str, Any],
) -> GraphRequest:
    from edgebake.trace import dynamic_shapes

    target: Any = find_target(unit.target)
    signature = traced.signature
    calibration = _calibration_args(bench, unit, traced, method) if needs_calibration(unit) else []
    return GraphRequest(
        program=program,
        dynamic_shapes=dynamic_shapes(signature.methods[method], signature.dims),
        quantizer=target.quantizer(_lower_request(bench, unit, assignment, Path(), traced)),
        calibration=calibration,
        options=options,
    )


def _lower_request(
    bench: Bench, unit: Unit, assignment: Assignment, folder: Path, traced: Traced, beside: Path | None = None
) -> LowerRequest:
    calibration = read_samples(bench, unit, "calibration") if needs_calibration(unit) else None
    return LowerRequest(
        unit=unit.id,
        scheme=unit.scheme,
        assignment=assignment,
        options=unit.options,
        device=bench.device(unit.device),
        calibration=calibration,
        folder=folder,
        about=about(unit, bench.store.file_digest),
        float_calls=lambda samples: _run_programs(traced, samples),
        beside=beside,
    )


def _run_programs(traced: Traced, samples: Iterable[Sample]) -> Iterator[tuple[ReferenceCall, ...]]:
    """The recorded calls of ``traced`` on ``samples``, states carried on."""
    from edgebake.reference_run import run_float

    modules = {name: program.module() for name, program in traced.programs.items()}
    return run_float(Loaded(methods=modules, signature=traced.signature, facts={}), samples)


def lower(bench: Bench, unit: Unit, keys: Mapping[str, StageKey]) -> tuple[Entry, Entry]:
    """The artifact, with the entries of the trace and of the artifact itself."""
    key = keys["lower"]
    known = bench.store.find("lower", key.key)
    before = bench.store.find("trace", keys["trace"].key)
    if known is not None and before is not None:  # programs that nobody needs are not read
        with bench.stage("lower", unit) as how:
            how.append("stored")
        return before, known
    traced, assignment, before = trace(bench, unit, keys)
    compressed = compress(bench, unit, keys, traced, assignment, before.meta["ops"])

    def write(folder: Path) -> Mapping[str, Any]:
        with bench.stage("lower", unit):
            request = _lower_request(bench, unit, assignment, folder, traced, companions.kept(before.folder))
            lowered = find_target(unit.target).lower(compressed, request)
            lowered = streamed.finished(unit, lowered, folder, before)
        return {"lowered": signatures.lowered_to_json(lowered), "assignment": dict(assignment.schemes)}

    return before, stored(bench, unit, "lower", keys, write)


def float_timer(bench: Bench, unit: Unit, recorded: Reference) -> validate.FloatTimer | None:
    """Times the float eager model on a recorded call; None when this worker did not need to load it."""
    loaded = bench.loaded.get(component_key(unit, bench.store.file_digest))
    if loaded is None:
        return None
    import torch

    def run(index: int, repetitions: int) -> list[float]:
        call = recorded.sample(index).calls[0]
        order = [t.name for t in loaded.signature.methods[call.method].inputs]
        args = tuple(torch.from_numpy(call.inputs[n]) for n in order)
        took = []
        with torch.inference_mode(), untouched(loaded.methods[call.method]) as buffers:
            for _ in range(repetitions):
                start = time.perf_counter()
                loaded.methods[call.method](*args)
                took.append((time.perf_counter() - start) * 1e3)
                buffers.restore()
        return took

    return run


def judge(bench: Bench, unit: Unit, keys: Mapping[str, StageKey]) -> None:
    """All stages of ``unit``; what they found lies in the store under ``keys``."""
    if streams(unit):  # lowered before the float network takes memory
        traced_entry, lowered_entry = streamed.lower(bench, unit, keys)
        recorded = reference(bench, unit, keys)
    else:
        recorded = reference(bench, unit, keys)
        traced_entry, lowered_entry = lower(bench, unit, keys)

    def write(_folder: Path) -> Mapping[str, Any]:
        _let_go(bench, traced_entry)
        gc.collect()
        with bench.stage("validate", unit):
            subject = _subject(unit, recorded, traced_entry, lowered_entry)
            measured = validate.measure(subject, float_timer(bench, unit, recorded), inside=True)
        return {"measurements": measured}

    entry = stored(bench, unit, "validate", keys, write)
    if not streams(unit) and parity_failed(unit.spec.limits, entry.meta["measurements"]):
        _locate(bench, unit, keys, recorded, lowered_entry)


def _let_go(bench: Bench, traced: Entry) -> None:
    """Forget programs of large networks, which take as much memory as running the artifact: the store has them."""
    if sum(file.stat().st_size for file in traced.folder.glob("*.pt2")) >= _LARGE:
        bench.traced.clear()


def _subject(unit: Unit, recorded: Reference, traced: Entry, lowered_entry: Entry) -> validate.Subject:
    return validate.Subject(
        unit=unit.id,
        target=unit.target,
        scheme=unit.scheme,
        folder=lowered_entry.folder,
        lowered=lowered_entry.meta["lowered"],
        assignment=lowered_entry.meta["assignment"],
        reference=recorded.folder,
        limits=unit.spec.limits,
        model=traced.meta,
        not_run=unit.without_run,
    )


def _locate(bench: Bench, unit: Unit, keys: Mapping[str, StageKey], recorded: Reference, lowered_entry: Entry) -> None:
    def write(_folder: Path) -> Mapping[str, Any]:
        loaded = load(bench, unit)
        traced, assignment, before = trace(bench, unit, keys)
        compressed = compress(bench, unit, keys, traced, assignment, before.meta["ops"])
        with bench.stage("locate", unit):
            subject = _subject(unit, recorded, before, lowered_entry)
            located = validate.with_inside(
                subject, lambda inside: locating.locate(loaded, compressed, recorded.sample(0).calls[0], inside)
            )
        return {"located": located}

    stored(bench, unit, "locate", keys, write)


def run_unit(bench: Bench, unit: Unit) -> None:
    """Do everything that ``unit`` needs and that is not in the store yet."""
    judge(bench, unit, stage_keys(unit, bench.store.file_digest, bench.device(unit.device)))
