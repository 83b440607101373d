"""Store keys: everything that could change a stage's bytes, and nothing else, known without running the stage.

A key is the SHA-256 of canonical JSON of its parts; the parts are kept with the entry, so that ``edgebake explain`` can
say which of them differs.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edgebake import devices, samples
from edgebake.errors import EdgebakeError, HubUnreachable, Problem
from edgebake.jsonfile import digest_of
from edgebake.llm.streaming import streams
from edgebake.models import _paths
from edgebake.recipe import Samples
from edgebake.recipe_files import RecipeFile, list_shipped
from edgebake.scheme import parse
from edgebake.target import (
    INSPECTORS,
    METHODS,
    MODELS,
    RUNNERS,
    TARGETS,
    Support,
    calibrating,
    find_target,
    runners_of,
    support_of,
)
from edgebake.types import About
from edgebake.units import Pair, Unit

STAGES = ("reference", "trace", "compress", "lower", "validate", "locate")
FileDigest = Callable[[Path], str]

# Source files of each stage's own code, as globs below the package.
_SOURCES = {
    "model": (
        "types.py",
        "buffers.py",
        "trace.py",
        "callables.py",
        "models/_*.py",
        "compress/_hadamard.py",
        "models/transformers.py",
        "mapped.py",
    ),
    "samples": ("samples*.py",),
    "language": ("llm/decoder.py", "llm/operators.py", "llm/companions.py", "llm/random_weights.py", "llm/shards.py"),
    "reference": (
        "llm/judge.py",
        "llm/digest.py",
        "llm/generation.py",
        "reference*.py",
        "buffers.py",
        "tensor_file.py",
        "types.py",
        "stages.py",
        "workbench.py",
    ),
    "describe": ("streamed.py", "llm/streaming.py", "trace.py", "assignment.py", "types.py", "workbench.py"),
    "trace": ("trace.py", "buffers.py", "rowwise.py", "types.py", "assignment.py", "stages.py", "workbench.py"),
    "compress": ("types.py", "stages.py", "workbench.py", "lattice.py"),
    "lower": ("types.py", "stages.py", "streamed.py", "workbench.py", "scheme.py", "lattice.py", "reference_run.py"),
    "validate": (
        "llm/judge.py",
        "llm/digest.py",
        "llm/generation.py",
        "llm/meter.py",
        "metrics.py",
        "agreement.py",
        "bootstrap.py",
        "validate.py",
        "run*.py",
        "weighing.py",
        "size.py",
        "reference.py",
        "modes.py",
        "compute_units.py",
    ),
    "locate": ("locate.py", "metrics.py"),
    "speculate": (
        "llm/speculative.py",
        "llm/vocabularies.py",
        "llm/judge.py",
        "llm/generation.py",
        "llm/fit*.py",
        "run*.py",
        "speculating.py",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StageKey:
    """A stage's key and the parts it was made of."""

    key: str
    parts: Mapping[str, Any]


@lru_cache
def version(distribution: str) -> str:
    """Installed version of ``distribution``, or ``absent``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Installed versions by name."""
    return {name: version(name) for name in sorted(set(distributions))}


@lru_cache
def cpu() -> str:
    """What of this machine can change float bytes: architecture, CPU features, threads."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        flags = next((ln.split(":", 1)[1] for ln in lines if ln.startswith(("flags", "Features"))), "")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return digest_of([platform.machine(), sorted(flags.split()), threads])[:16]


@lru_cache
def _origin(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec and spec.origin else None


def sources(modules: Iterable[str], file_digest: FileDigest) -> dict[str, str]:
    """Digest of each module's source file; modules that do not exist are left out."""
    found = {name: _origin(name) for name in sorted(set(modules))}
    return {name: file_digest(path) for name, path in found.items() if path is not None}


def own_sources(stage: str, file_digest: FileDigest) -> dict[str, str]:
    """Digest of the package's own files that do ``stage``."""
    return {name: file_digest(path) for name, path in _own_files(stage).items()}


@lru_cache
def _own_files(stage: str) -> dict[str, Path]:
    root = Path(__file__).parent
    files = {path for pattern in _SOURCES[stage] for path in root.glob(pattern)}
    return {path.relative_to(root).as_posix(): path for path in sorted(files)}


def rules_by_method(unit: Unit) -> dict[str, dict[str, Any]]:
    """``{method: rules}``: which compression method applies which schemes; method "" is the target's own lowering."""
    target = find_target(unit.target)
    named = [("*", unit.scheme), *unit.spec.compress.modules.items()]
    methods: dict[str, dict[str, Any]] = {}
    for scheme in {s for _, s in named}:
        row = support_of(target, scheme)
        name = row.method if row is not None else ""
        methods.setdefault(name, {"rules": [list(pair) for pair in named], "schemes": []})["schemes"].append(scheme)
    for rule in methods.values():
        rule["schemes"].sort()
    return methods


def _methods_acting_on(unit: Unit, where: str) -> dict[str, Any]:
    acting = {n: r for n, r in rules_by_method(unit).items() if n and METHODS.find(n).ACTS_ON == where}
    rows = [_row_facts(row) for row in find_target(unit.target).SUPPORTS]
    steps = [s.model_dump(mode="json") for s in unit.spec.compress.steps if METHODS.find(s.method).ACTS_ON == where]
    if not acting and not steps:
        return {}
    rules = {"rules": rules_by_method(unit)} if steps else {}  # a step may look at any module's scheme
    return {"schemes": acting, "steps": steps, "supports": rows, **rules}


def _row_facts(row: Support) -> list[Any]:
    return [row.scheme, list(row.kinds), row.method, row.override_only]


def _method_sources(what: Mapping[str, Any]) -> list[str]:
    names = [*what.get("schemes", {}), *(s["method"] for s in what.get("steps", ()))]
    helpers = (source for n in names for source in getattr(METHODS.find(n), "SOURCES", ()))
    return [*(METHODS.module_name(n) for n in names), *helpers]


def _method_versions(what: Mapping[str, Any]) -> dict[str, str]:
    names = [*what.get("schemes", {}), *(s["method"] for s in what.get("steps", ()))]
    return versions(d for n in names for d in METHODS.find(n).DISTRIBUTIONS)


def _samples_part(unit: Unit, purpose: str, file_digest: FileDigest) -> dict[str, Any] | None:
    spec = getattr(unit.spec.samples, purpose)
    if spec is None:
        return None
    kept = spec.model_dump(mode="json", exclude={"file", "images", "text"})
    files = dict(samples.fingerprint(spec, unit.base, file_digest))
    return {"spec": kept, "files": files, "code": own_sources("samples", file_digest)}


def needs_calibration(unit: Unit) -> bool:
    """Does any scheme, step or option of the unit look at calibration samples?"""
    named = (unit.scheme, *unit.spec.compress.modules.values())
    options = calibrating(find_target(unit.target), unit.options)
    return any(parse(s).needs_calibration for s in named) or bool(unit.spec.compress.steps or options)


def model_part(unit: Unit, file_digest: FileDigest) -> dict[str, Any]:
    """The float model: weights, code, interface."""
    spec = unit.spec
    decodes = spec.model.context is not None
    model = spec.model.model_dump(mode="json", exclude={"path"} if spec.model.source != "python" else set())
    return {
        "model": model,
        "files": dict(_paths.fingerprint(spec.model, unit.base, file_digest)),
        "methods": {m: {k: i.model_dump(mode="json") for k, i in ins.items()} for m, ins in spec.all_methods.items()},
        "dims": {k: d.model_dump(mode="json") for k, d in spec.dims.items()},
        "code": own_sources("model", file_digest) | (own_sources("language", file_digest) if decodes else {}),
        "source": sources((MODELS.module_name(spec.model.source),), file_digest),
        "versions": versions(("torch", "transformers", "optimum", "gguf")),
    }


def component_key(unit: Unit, file_digest: FileDigest) -> str:
    """Names the float model: builds that share it wait for each other instead of doing the same work twice."""
    return digest_of(model_part(unit, file_digest))


def about(unit: Unit, file_digest: FileDigest) -> About:
    """What an artifact of ``unit`` may say of itself. Nothing of this machine: the same recipe gives the same bytes."""
    made_from = [component_key(unit, file_digest), rules_by_method(unit), unit.target, dict(unit.options)]
    pixels = _normalised(unit)
    return About(
        description=unit.description,
        licence=unit.spec.model.licence or "",
        digest=digest_of(made_from),
        mean=pixels.mean if pixels else (),
        std=pixels.std if pixels else (),
    )


def _normalised(unit: Unit) -> Samples | None:
    """The image samples that say how pixels are normalised, evaluation's first; None without an input of images."""
    sets = (unit.spec.samples.evaluation, unit.spec.samples.calibration)
    takes = any(taken.role == "image" for inputs in unit.spec.all_methods.values() for taken in inputs.values())
    return next((found for found in sets if takes and found is not None and found.images is not None), None)


def _judging(file_format: str, runners: Iterable[tuple[str, str, Any]]) -> list[str]:
    """Modules that say what an artifact holds and what it computes."""
    own = [source for _, module, runner in runners for source in (module, *getattr(runner, "SOURCES", ()))]
    return [INSPECTORS.module_name(file_format), *own]


def _measured(unit: Unit, file_digest: FileDigest) -> dict[str, Any]:
    """What measures, what the recipe has measured besides parity, and why the artifact is not run."""
    runners = [(name, RUNNERS.module_name(name), r) for name, r in runners_of(unit.target)]
    limits = unit.spec.limits
    return {
        "runners": {name: r.missing() is None for name, _, r in runners},
        "sources": sources(_judging(find_target(unit.target).FORMAT, runners), file_digest),
        "versions": versions(d for _, _, r in runners for d in r.DISTRIBUTIONS),
        "agreement": limits.agreement.model_dump(exclude={"min"}) if limits.agreement else None,
        "task": limits.task.model_dump(exclude={"max_drop"}) if limits.task else None,
        **_unless_empty(without_run=unit.without_run),
    }


def _unless_empty(**texts: str) -> dict[str, str]:
    return {name: text for name, text in texts.items() if text}


def _code_of(methods: Mapping[str, Any], file_digest: FileDigest) -> dict[str, Any]:
    """What does the work of compression ``methods``."""
    return {
        "method_sources": sources(_method_sources(methods), file_digest),
        "versions": _method_versions(methods),
    }


def _beside(
    pair: Pair, validated: Mapping[str, Any], file_digest: FileDigest, device: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a draft proposes to, the target's artifact and prompts, and what runs the two: as in ``validated``."""
    target = stage_keys(pair.unit, file_digest, device)
    return {
        "beside": {stage: target[stage].key for stage in ("lower", "reference")},
        "tokens": pair.tokens,
        "device": device,
        **{name: validated[name] for name in ("runners", "sources", "versions")},
    }


def keys_of(
    units: Sequence[Unit], files: Iterable[RecipeFile], file_digest: FileDigest
) -> tuple[dict[str, dict[str, StageKey]], dict[str, EdgebakeError]]:
    """Keys by unit, and by unit what keeps it from having any: a hub out of reach, a file gone since the check.

    A model is asked for once, however many units it has. EdgebakeError where no unit has keys.
    """
    keys: dict[str, dict[str, StageKey]] = {}
    without: dict[str, EdgebakeError] = {}
    unreachable: dict[str, HubUnreachable] = {}
    recipes = {file.recipe.name: file for file in files}
    for unit in units:
        model = digest_of([unit.recipe, unit.component, unit.spec.model.model_dump(mode="json")])
        if model in unreachable:
            without[unit.id] = unreachable[model]
            continue
        try:
            keys[unit.id] = stage_keys(unit, file_digest, devices.row(unit.device))
        except HubUnreachable as error:
            where = recipes[unit.recipe].where("components", unit.component, "model", "path")
            without[unit.id] = unreachable[model] = HubUnreachable([_offline(p, unit, where) for p in error.problems])
        except EdgebakeError as error:
            without[unit.id] = error
    if without and not keys:
        first = next(iter(without.values()))
        raise type(first)(list(dict.fromkeys(problem for error in without.values() for problem in error.problems)))
    return keys, without


def _offline(problem: Problem, unit: Unit, where: str) -> Problem:
    """``problem`` with its place, and the shipped recipe that does without the hub where there is one."""
    offline = f"{unit.recipe}-random"
    also = f"; the recipe {offline} has the same architecture and needs no hub" if offline in list_shipped() else ""
    return replace(problem, where=where or problem.where, fix=problem.fix + also)


def stage_keys(unit: Unit, file_digest: FileDigest, device: Mapping[str, Any] | None) -> dict[str, StageKey]:
    """Keys of all stages of ``unit``, by stage name; with ``describe`` for ``trace`` and ``compress`` if it streams."""
    target = find_target(unit.target)
    parts: dict[str, dict[str, Any]] = {}
    keys: dict[str, str] = {}

    def add(stage: str, **what: Any) -> None:
        parts[stage] = {**what, "code": own_sources(stage, file_digest)}
        keys[stage] = digest_of({"stage": stage, **parts[stage]})

    model = digest_of(model_part(unit, file_digest))
    on_modules, on_graph = _methods_acting_on(unit, "module"), _methods_acting_on(unit, "graph")
    calibration = _samples_part(unit, "calibration", file_digest) if needs_calibration(unit) else None
    evaluation = _samples_part(unit, "evaluation", file_digest)
    add("reference", model=model, samples=evaluation, cpu=cpu(), **_unless_empty(without_float=unit.without_float))
    if streams(unit):
        add("describe", model=model)
    add(
        "trace",
        model=model,
        methods=on_modules,
        **_code_of(on_modules, file_digest),
        calibration=calibration if on_modules.get("steps") else None,
        target=unit.target if on_modules else None,
    )
    add(
        "compress",
        trace=keys["trace"],
        methods=on_graph,
        **_code_of(on_graph, file_digest),
        target=sources((TARGETS.module_name(unit.target), *target.SOURCES), file_digest) if on_graph else None,
        calibration=calibration if on_graph else None,
        quantizer={"options": dict(unit.options), "device": device} if on_graph else None,  # how ranges are chosen
        cpu=cpu(),
    )
    add(
        "lower",
        compress=keys.get("describe", keys["compress"]),
        rules=rules_by_method(unit),
        target=unit.target,
        sources=sources((TARGETS.module_name(unit.target), *target.SOURCES), file_digest),
        versions=versions(target.DISTRIBUTIONS) | getattr(target, "versions", dict)(),
        options=dict(unit.options),
        device=device,
        calibration=calibration,
        cpu=cpu(),
        **({"about": asdict(about(unit, file_digest))} if getattr(target, "CARRIES_ABOUT", False) else {}),
    )
    add("validate", lower=keys["lower"], reference=keys["reference"], **_measured(unit, file_digest))
    add("locate", lower=keys["lower"], reference=keys["reference"], validate=keys["validate"])
    if unit.pair is not None:
        add("speculate", lower=keys["lower"], **_beside(unit.pair, parts["validate"], file_digest, device))
    return {stage: StageKey(key=keys[stage], parts=parts[stage]) for stage in keys}
