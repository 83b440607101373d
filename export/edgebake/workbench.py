"""What a worker holds of one component: the float model, samples and programs that its targets share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgebake.jsonfile import digest_of
from edgebake.keys import StageKey, component_key
from edgebake.mapped import give_back
from edgebake.models import _paths
from edgebake.models._request import LoadRequest
from edgebake.recipe import Samples
from edgebake.store import Entry, Store
from edgebake.target import MODELS
from edgebake.types import Loaded, SampleSet, Traced
from edgebake.units import Unit

Emit = Callable[..., None]
NOISE = Samples(noise=True, count=16)  # what a recipe without evaluation samples is exercised with


@dataclass(kw_only=True)
class Bench:
    """What a worker holds of one component while it does that component's targets in turn."""

    store: Store
    emit: Emit
    trust: bool
    device: Callable[[str | None], Mapping[str, Any] | None]
    loaded: dict[str, Loaded] = field(default_factory=dict)
    traced: dict[str, Traced] = field(default_factory=dict)
    samples: dict[str, SampleSet] = field(default_factory=dict)

    def keep(self, key: str, traced: Traced) -> None:
        """Hold the two programs last used: the float trace that targets share and the one made from it."""
        self.traced[key] = traced
        while len(self.traced) > 2:
            del self.traced[next(iter(self.traced))]

    @contextmanager
    def stage(self, name: str, unit: Unit) -> Iterator[list[str]]:
        """Tell the parent that ``name`` runs; the yielded list takes ``stored`` when nothing had to be done."""
        how: list[str] = []
        self.emit("stage", stage=name, state="start", unit=unit.id)
        whole = False
        try:
            yield how
            whole = True
        finally:
            give_back()
            self.emit("stage", stage=name, state="end", unit=unit.id, how=how[0] if how else "ran", ok=whole)


def load(bench: Bench, unit: Unit) -> Loaded:
    """The float model, loaded once per worker."""
    key = component_key(unit, bench.store.file_digest)
    if key not in bench.loaded:
        bench.loaded.clear()
        with bench.stage("load", unit):
            bench.loaded[key] = MODELS.find(unit.spec.model.source).load(request_of(bench, unit))
    return bench.loaded[key]


def request_of(bench: Bench, unit: Unit) -> LoadRequest:
    """What the model source of ``unit`` is given."""
    return LoadRequest(
        model=unit.spec.model,
        component=unit.spec,
        base=unit.base,
        trust=bench.trust,
        keep=lambda key, fill: _kept(bench.store, "convert", key, fill),
    )


def keeping(bench: Bench, stage: str, *names: str) -> Callable[[str, Callable[[Path], object]], Path]:
    """``keep(part, fill)``: parts of the work that ``names`` name together, kept in the store under ``stage``."""
    return lambda part, fill: _kept(bench.store, stage, digest_of([*names, part]), fill)


def _kept(store: Store, stage: str, key: str, fill: Callable[[Path], object]) -> Path:
    """What ``fill`` writes, made once."""

    def write(folder: Path) -> Mapping[str, Any]:
        fill(folder)
        return {}

    return store.get_or_run(stage, key, write)[0].folder


def read_samples(bench: Bench, unit: Unit, purpose: str) -> SampleSet:
    """Calibration or evaluation samples, read once per worker."""
    from edgebake import samples

    spec = getattr(unit.spec.samples, purpose) or NOISE
    key = f"{purpose} {spec.model_dump_json()} {unit.spec.all_methods} {unit.spec.dims}"
    if key not in bench.samples:
        words = _tokenizer(bench, unit) if spec.kind == "text" else None
        bench.samples[key] = samples.read(spec, unit.spec, unit.base, words)
    return bench.samples[key]


def _tokenizer(bench: Bench, unit: Unit) -> Path | None:
    """The folder where the model's tokenizer lies."""
    elsewhere = getattr(MODELS.find(unit.spec.model.source), "tokenizer", None)
    if elsewhere is not None and (folder := elsewhere(request_of(bench, unit))) is not None:
        return Path(folder)
    found = _paths.resolve(unit.spec.model.path, unit.base)
    if isinstance(found, _paths.HubId):
        from edgebake.models import _hub

        model = unit.spec.model
        commit = _hub.commit(found.repo, model.revision)
        return _hub.snapshot(found.repo, commit, weights=False, pickles=False, code=False)
    return found if found.is_dir() else found.parent


def stored(
    bench: Bench,
    unit: Unit,
    stage: str,
    keys: Mapping[str, StageKey],
    write: Callable[[Path], Mapping[str, Any]],
    *,
    begun: bool = False,
) -> Entry:
    """Run ``write`` (which announces its own stage) unless its result is in the store.

    ``begun``: in the folder that a killed build began to fill, where there is one.
    """
    key = keys[stage]

    def with_parts(folder: Path) -> Mapping[str, Any]:
        return {**write(folder), "parts": key.parts}

    entry, ran = bench.store.get_or_run(stage, key.key, with_parts, begun=begun)
    if not ran:
        with bench.stage(stage, unit) as how:
            how.append("stored")
    return entry
