"""Plans units, hands components to workers, and turns what they stored into delivered artifacts and results."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgebake import delivery, last, worker
from edgebake.check import check
from edgebake.errors import EXIT_INTERRUPTED, EXIT_STAGE, EXIT_TOOLCHAIN, ArtifactDamaged, EdgebakeError, Problem
from edgebake.jsonfile import digest_of
from edgebake.keys import StageKey, component_key, keys_of
from edgebake.limits import judge, parity_failed
from edgebake.llm.tasks import is_decoder
from edgebake.recipe_yaml import RecipeFile
from edgebake.result import Failure, Result
from edgebake.selecting import select, within_memory
from edgebake.store import Store
from edgebake.store_files import storage_errors
from edgebake.target import MODELS, find_target
from edgebake.unit import ENVIRONMENT, unit_to_json
from edgebake.units import Unit

Observer = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build; ``timeout_s`` counts per stage, ``memory_mib`` bounds a worker's process tree."""

    out: Path = Path("dist")
    store: Path | None = None
    jobs: int = 1
    only: tuple[str, ...] = ()
    fail_fast: bool = False
    timeout_s: float | None = None
    memory_mib: float | None = None
    check: bool = False  # hash everything instead of trusting size, mtime and inode
    trust: bool = False


@dataclass(kw_only=True)
class _Progress:
    """What one unit's stages took in this build."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Units of one component that share a worker."""

    component: str
    units: tuple[Unit, ...]


@dataclass(kw_only=True)
class Build:
    """One run of :func:`build`: what is known of each unit so far."""

    options: BuildOptions
    store: Store
    observe: Observer
    stop: threading.Event = field(default_factory=threading.Event)
    progress: dict[str, _Progress] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


def build(files: Sequence[RecipeFile], options: BuildOptions, observe: Observer) -> list[Result]:
    """Build every selected unit of ``files``; one result each, in the recipes' order.

    KeyboardInterrupt says which stages are kept.
    """
    units, warnings = check(files, trust=options.trust)
    for problem in warnings:
        observe({"event": "warning", "text": str(problem)})
    chosen = within_memory(select(units, options.only), options.memory_mib)
    run = Build(options=options, store=Store(options.store), observe=observe)
    run.store.sweep()
    digest = lru_cache(maxsize=None)(run.store.file_digest)  # units share files: one look at each
    keys, without = keys_of(chosen, files, digest)
    for name, error in without.items():
        run.failures[name] = Failure(stage="load", problems=tuple(error.problems), exit_code=error.exit_code)
        observe({"event": "failed", "unit": name, "stage": "load", "text": str(error)})
    for unit in chosen:
        if missing := find_target(unit.target).missing():
            problem = Problem(what=missing.reason, where=unit.id, fix=missing.remedy)
            run.failures[unit.id] = Failure(stage="toolchain", problems=(problem,), exit_code=EXIT_TOOLCHAIN)
    if options.check:
        _check_conversions(run, chosen)
    todo = [u for u in chosen if u.id not in run.failures and _stored(run, u, keys[u.id]) is None]
    _refuse_too_large(run, todo)
    try:
        _work(run, [unit for unit in todo if unit.id not in run.failures])
        results = [_result(run, unit, keys.get(unit.id, {})) for unit in chosen]
        built = {result.unit for result in results if result.folder is not None}
        delivery.prune_references(run.store, options.out, [unit for unit in chosen if unit.id in built])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(run.store, keys.values())) from None
    return results


def _refuse_too_large(run: Build, units: Sequence[Unit]) -> None:
    """A language model that cannot be built in this machine's memory fails before anything of it is read."""
    decoders = [unit for unit in units if is_decoder(unit.spec.model)]
    if not decoders:
        return
    from edgebake.llm import fit

    for unit in decoders:
        if problem := fit.refusal(unit, run.options.memory_mib):
            run.failures[unit.id] = Failure(stage="start", problems=(problem,), exit_code=EXIT_STAGE)
            run.observe({"event": "failed", "unit": unit.id, "stage": "start", "text": str(problem)})


def _kept(store: Store, keys: Iterable[Mapping[str, StageKey]]) -> str:
    """What an interrupted build leaves to the next one."""
    wanted = dict.fromkeys((stage, key.key) for of_unit in keys for stage, key in of_unit.items())
    held = Counter(stage for stage, key in wanted if store.find(stage, key, verify=False) is not None)
    if not held:
        return "no stage has finished: the same command begins anew"
    stages = ", ".join(stage if count == 1 else f"{count} {stage}" for stage, count in held.items())
    return f"kept in {store.root}: {stages}; the same command goes on from there"


def _stored(run: Build, unit: Unit, keys: Mapping[str, StageKey]) -> delivery.Delivered | None:
    """What the store holds of ``unit``, or None when a stage has to run; what is about to be delivered is hashed."""
    full = run.options.check or not delivery.current(run.options.out, unit, keys)
    before = "describe" if "describe" in keys else "trace"
    stages = ("reference", before, *(("compress",) if full else ()), "lower", "validate", "locate", "speculate")
    entries = {s: run.store.find(s, keys[s].key, verify=full) for s in stages if s in keys}
    _tell_damages(run)
    found = {stage: entry for stage, entry in entries.items() if entry is not None}
    if not found.keys() >= {"reference", before, "lower", "validate", *({"speculate"} & keys.keys())}:
        return None
    measured = dict(found["validate"].meta["measurements"])
    if "speculate" in found:
        measured["speculative"] = found["speculate"].meta["speculative"]
    if before == "trace" and parity_failed(unit.spec.limits, measured):
        if "locate" not in found:
            return None
        measured["located"] = found["locate"].meta["located"]
    return delivery.Delivered(
        unit=unit,
        keys=keys,
        trace=found[before],
        lower=found["lower"],
        reference=found["reference"],
        measurements=measured,
    )


def _check_conversions(run: Build, units: Sequence[Unit]) -> None:
    """Hash what model sources have converted; a stored trace would never ask for it."""
    models = {(u.spec.model.source, u.spec.model.path, u.base): u.spec.model for u in units}
    for (source, _, base), model in models.items():
        for key in getattr(MODELS.find(source), "conversions", lambda *_: ())(model, base):
            run.store.find("convert", key)
    _tell_damages(run)


def _tell_damages(run: Build) -> None:
    for damage in run.store.damaged:
        run.observe({"event": "warning", "text": f"{damage}: the stage runs again when its result is needed"})
    run.store.damaged.clear()


def _jobs(run: Build, units: Sequence[Unit]) -> list[_Job]:
    by_component: dict[str, list[Unit]] = {}
    for unit in units:
        by_component.setdefault(component_key(unit, run.store.file_digest), []).append(unit)
    return [_Job(component=key, units=tuple(group)) for key, group in by_component.items()]


def _work(run: Build, units: Sequence[Unit]) -> None:
    with ThreadPoolExecutor(max_workers=max(1, run.options.jobs)) as pool:
        futures = [pool.submit(_work_component, run, job) for job in _jobs(run, units)]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            run.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _work_component(run: Build, job: _Job) -> None:
    """Run the units of ``job`` in a worker; a worker that dies costs the unit it was at, the rest get a new one."""
    left = list(job.units)
    while left and not run.stop.is_set() and not (run.options.fail_fast and run.failures):
        at, done = _one_worker(run, job.component, left)
        left = [u for u in left if u.id not in done and u.id != at]


def _one_worker(run: Build, component: str, units: Sequence[Unit]) -> tuple[str | None, set[str]]:
    """(unit at which the worker died or None, units that ended)."""
    payload = {
        "store": str(run.store.root),
        "trust": run.options.trust,
        "fail_fast": run.options.fail_fast,
        "component": component,
        "units": [unit_to_json(u) for u in units],
    }
    log = run.store.root / "log" / f"{digest_of(units[0].id)[:16]}-{os.getpid()}.log"
    watch = _Watch(run=run, log=log)
    limits = worker.Limits(timeout_s=run.options.timeout_s, memory_mib=run.options.memory_mib)
    ended = worker.supervise(
        worker.command("edgebake.unit"),
        payload=payload,
        log=log,
        limits=limits,
        env={**os.environ, **ENVIRONMENT},
        stop=run.stop,
        on_event=watch.event,
        on_sample=watch.sample,
    )
    if ended.reason == "finished" and watch.unit is not None:  # code of a recipe can end a process with code 0
        ended = replace(ended, reason="crashed")
    if ended.reason == "finished" or watch.unit is None:
        if watch.unit is None and not watch.ended and ended.reason != "finished":
            _fail_all(run, units, ended, log)
            watch.ended |= {u.id for u in units}
        return None, watch.ended | ({u.id for u in units} if ended.reason == "finished" else set())
    code = EXIT_INTERRUPTED if ended.reason == "interrupted" else EXIT_STAGE
    problem = worker.describe(ended)
    stage = watch.last or "start"
    run.failures[watch.unit] = Failure(stage=stage, problems=(problem,), exit_code=code, log=log)
    if ended.reason != "interrupted":
        run.observe({"event": "failed", "unit": watch.unit, "stage": stage, "text": str(problem)})
    return watch.unit, watch.ended


def _fail_all(run: Build, units: Sequence[Unit], ended: worker.Exit, log: Path) -> None:
    for unit in units:
        problems = (worker.describe(ended),)
        run.failures[unit.id] = Failure(stage="start", problems=problems, exit_code=EXIT_STAGE, log=log)


@dataclass(kw_only=True)
class _Watch:
    """Follows one worker's events."""

    run: Build
    log: Path
    unit: str | None = None
    stage: str = ""
    last: str = ""  # the stage begun last, which a failure belongs to
    waiting: bool = False  # has it been told that another build is at the same model?
    ended: set[str] = field(default_factory=set)
    opened: list[tuple[str, float]] = field(default_factory=list)

    def event(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "unit":
            self.unit = event["unit"]
            self.run.progress[event["unit"]] = _Progress()
        elif kind == "stage":
            self._stage(event)
        elif kind == "failed":
            problems = tuple(Problem(**p) for p in event["problems"])
            code = EXIT_STAGE if event["exit_code"] is None else event["exit_code"]
            stage = self.last or "start"
            failure = Failure(stage=stage, problems=problems, exit_code=code, log=self.log)
            self.run.failures[event["unit"]] = failure
            self._end(event["unit"])
            event = {**event, "stage": stage, "text": "\n".join(str(p) for p in problems)}
        elif kind == "done":
            self._end(event["unit"])
        elif kind == "waiting":
            if self.waiting:
                return
            self.waiting = True
            event = {"event": "warning", "text": f"{event['unit']} waits for another edgebake that builds this model"}
        elif kind == "damaged":
            event = {"event": "warning", "text": f"{event['what']}: the stage ran again"}
        self.run.observe(event)

    def _end(self, unit: str) -> None:
        progress = self.run.progress[unit]
        progress.seconds = time.monotonic() - progress.started
        self.ended.add(unit)
        self.unit = None
        self.opened.clear()
        self.stage = self.last = ""

    def _stage(self, event: Mapping[str, Any]) -> None:
        name = event["stage"]
        stages = self.run.progress[event["unit"]].stages
        if event["state"] == "start":
            self.opened.append((name, time.monotonic()))
            self.stage = name
            stages.setdefault(name, {"seconds": 0.0, "peak_mib": 0.0, "state": "stored"})
            self.last = name
            return
        _, started = self.opened.pop()
        took = stages[name]
        took["seconds"] += time.monotonic() - started
        if event["how"] == "ran":
            took["state"] = "ran"
        self.stage = self.opened[-1][0] if self.opened else ""

    def sample(self, rss_mib: float, elapsed_s: float) -> None:
        if self.unit and self.stage:
            took = self.run.progress[self.unit].stages[self.stage]
            took["peak_mib"] = max(took["peak_mib"], rss_mib)
        self.run.observe(
            {"event": "sample", "unit": self.unit, "stage": self.stage, "rss_mib": rss_mib, "elapsed_s": elapsed_s}
        )


def host_facts() -> dict[str, Any]:
    """The machine that the numbers were taken on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [ln.split(":", 1)[1].strip() for ln in info.read_text().splitlines() if ln.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "os": platform.platform(), "python": platform.python_version()}


def _result(run: Build, unit: Unit, keys: Mapping[str, StageKey]) -> Result:
    progress = run.progress.get(unit.id)
    result = Result(
        unit=unit.id,
        recipe=unit.recipe,
        component=unit.component,
        target=unit.target,
        device=unit.device,
        scheme=unit.scheme,
        name=unit.name,
        optional=unit.optional,
        failure=run.failures.get(unit.id),
        stages={k: v["state"] for k, v in progress.stages.items()} if progress else {},
        seconds=progress.seconds if progress else 0.0,
    )
    if result.failure is not None:
        return result
    if run.options.fail_fast and run.failures and progress is None and _stored(run, unit, keys) is None:
        problem = Problem(what="not begun: another artifact failed (--fail-fast)", where=unit.id)
        return replace(result, failure=Failure(stage="start", problems=(problem,), exit_code=EXIT_STAGE))
    try:
        with run.store.lock(delivery.lock_name(run.options.out, unit)):
            done = _stored(run, unit, keys)
            if done is not None:
                return _delivered(run, done, result)
        problems = [
            Problem(
                what="its results are no longer in the store",
                where=unit.id,
                fix="another process cleaned it, or a file it is made from changed meanwhile: build again",
            )
        ]
    except EdgebakeError as error:  # a full disk, say: the other artifacts' results must not be lost
        problems = error.problems
    failure = Failure(stage="deliver", problems=tuple(problems), exit_code=EXIT_STAGE)
    run.observe({"event": "failed", "unit": unit.id, "stage": "deliver", "text": "\n".join(map(str, problems))})
    return replace(result, failure=failure)


def _delivered(run: Build, done: delivery.Delivered, result: Result) -> Result:
    folder = run.options.out / done.unit.folder
    current = delivery.current(run.options.out, done.unit, done.keys)
    renew = False
    if run.options.check:
        bad_reference = delivery.reference_damages(run.options.out, done.unit, done.keys)
        renew = bool(bad_reference)
        wrong = [*(delivery.damages(folder) if folder.exists() else ()), *bad_reference]
        for path in wrong:
            run.observe({"event": "warning", "text": f"{path} is not what was delivered: delivered again"})
        current = current and not wrong
    if current and "ran" not in result.stages.values():
        try:
            measured = delivery.read_measurements(folder)
        except ArtifactDamaged as error:
            run.observe({"event": "warning", "text": f"{error}: delivered again"})
        else:
            return _judged(replace(result, stages=result.stages or {"deliver": "unchanged"}), folder, done, measured)
    progress = run.progress.get(done.unit.id, _Progress())
    measured = {**done.measurements, "stages": progress.stages, "host": host_facts()}
    delivery.deliver(run.store, done, run.options.out, measured, renew_reference=renew)
    with storage_errors("note what was built", run.store.root):
        last.remember(run.store, done.unit, run.options.out, done.keys)
    return _judged(replace(result, stages=result.stages or {"deliver": "ran"}), folder, done, measured)


def _judged(result: Result, folder: Path, done: delivery.Delivered, measured: Mapping[str, Any]) -> Result:
    return replace(result, folder=folder, verdicts=judge(done.unit.spec.limits, measured), measurements=measured)
