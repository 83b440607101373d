"""Copies of a delivered artifact with a defect and a manifest signed again, and what the defect does to outputs."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgebake import delivery
from edgebake.jsonfile import read_json, sign, write_json_atomic
from edgebake.result import Result, exit_code
from edgebake.store_files import sha256_file
from edgebake.verify import verify

ROOM_DB = 3.0  # between what the unharmed artifact reaches and what is asked of it
ROOM_AGREEMENT = 0.005
EXIT_LIMIT = 5

Outputs = dict[str, np.ndarray]  # (samples, ...) by output name
Edit = Callable[[Path], None]  # changes the artifact in a folder


@dataclass(frozen=True)
class Mutation:
    """A defect: ``edit`` changes the artifact in a folder; ``network`` and ``scheme`` say which artifact."""

    name: str
    network: str
    scheme: str
    edit: Edit

    def __str__(self) -> str:
        return f"{self.network}-{self.scheme}-{self.name}"


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise of ``found``; minus infinity when it holds a value that is not finite."""
    if not np.isfinite(found).all():
        return -np.inf
    noise = np.square(reference.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise)) if noise else np.inf


@dataclass(frozen=True)
class Artifact:
    """An unharmed artifact in ``folder`` and how to run it without edgebake's runners, meters or limits."""

    folder: Path
    float_outputs: Outputs
    run: Callable[[Path], Outputs]

    @cached_property
    def measured(self) -> Mapping[str, Any]:
        """What the build measured."""
        return delivery.read_measurements(self.folder)

    @cached_property
    def limits(self) -> Mapping[str, Any]:
        """Limits that this artifact meets with little room."""
        worst = min(found["sqnr_db"] for found in self.measured["outputs"].values())
        agreed = self.measured["agreement"]["value"] - ROOM_AGREEMENT
        return {"parity": {"sqnr_db": worst - ROOM_DB}, "agreement": {"metric": "top1", "min": agreed}}

    def copy(self, name: str, edit: Edit) -> Path:
        """A copy beside the artifact, edited, signed again, held against ``limits``."""
        return tampered(self.folder, name, edit, self.limits)

    def effect_db(self, folder: Path) -> float:
        """The worst output's signal to noise when the artifact in ``folder`` runs."""
        found = self.run(folder)
        return min(sqnr_db(reference, found[name]) for name, reference in self.float_outputs.items())


def sign_again(folder: Path, limits: Mapping[str, Any]) -> None:
    """Write the manifest in ``folder`` anew: ``limits`` over its own, and digests that fit what lies there."""
    manifest = read_json(folder / delivery.MANIFEST)
    for entry in manifest["files"]:
        path = folder / entry["path"]
        entry["sha256"], entry["bytes"] = sha256_file(path), path.stat().st_size
    manifest["limits"] = {**manifest["limits"], **limits}
    write_json_atomic(folder / delivery.MANIFEST, sign(manifest))


def control(network: str, scheme: str) -> Mutation:
    """Nothing but a manifest that is signed again."""
    return Mutation("control", network, scheme, lambda folder: None)


def recipes_of(folder: Path) -> Path:
    """The recipes that the artifact in ``folder`` was built from: they lie beside the output folder."""
    return folder.parents[5] / "recipes"


def nets_in(recipes: Path) -> Any:
    """The module digit_nets of a copy of the recipes."""
    spec = importlib.util.spec_from_file_location("digit_nets", recipes / "digit_nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def judged(folder: Path) -> tuple[Result, int, set[str]]:
    """What `edgebake verify` says of ``folder``, its exit code, and the limits that failed."""
    result = verify(folder)
    return result, exit_code([result]), {v.limit for v in result.verdicts if v.state == "fail"}


def tampered(source: Path, name: str, edit: Edit, limits: Mapping[str, Any]) -> Path:
    """A copy beside ``source``, edited, with digests of its files and its manifest as if it were meant so."""
    made = source.with_name(f"{source.name}-{name}")
    shutil.copytree(source, made, ignore=shutil.ignore_patterns(".edgebake.json"))
    edit(made)
    sign_again(made, limits)
    return made


def assert_unharmed_passes(source: Path, state: str = "pass") -> None:
    """A copy of ``source`` with nothing but a manifest that is signed again passes.

    ``state``: "not measured" for artifacts without limits, of which only the structure passes.
    """
    result, code, failed = judged(tampered(source, "control", lambda folder: None, {}))
    assert (result.state, code, failed) == (state, 0, set()), result.verdicts
    assert any(verdict.state == "pass" for verdict in result.verdicts)


@dataclass(frozen=True)
class Outcome:
    """What `edgebake verify` said of a mutated artifact, and its worst output's signal to noise when run here."""

    mutation: Mutation
    target: str
    effect_db: float
    bound_db: float
    result: Result

    @property
    def failed(self) -> set[str]:
        """The limits that failed."""
        return {v.limit for v in self.result.verdicts if v.state == "fail"}

    @property
    def code(self) -> int:
        """What the command line would end with."""
        return exit_code([self.result])

    def assert_found(self) -> None:
        """The defect shows in the outputs, and ``verify`` fails for the numbers and nothing else."""
        line = f"{self.target} {self.mutation}: {self.effect_db:.1f} dB, limit {self.bound_db:.1f} dB"
        assert self.effect_db < self.bound_db, f"the mutation is too small to count: {line}"
        assert self.result.state == "fail", (line, self.result.failure, self.result.verdicts)
        assert self.code == EXIT_LIMIT
        assert "parity.sqnr_db" in self.failed
        assert self.failed <= {"parity.sqnr_db", "agreement.top1"}
        print(f"\nMUTATION {line}, {sorted(self.failed)}")

    def assert_passes(self) -> None:
        """``verify`` passes what is unharmed, or harmed less than the limit tells."""
        assert self.effect_db >= self.bound_db
        assert (self.result.state, self.code, self.failed) == ("pass", 0, set()), self.result
        print(f"\nPASSES {self.target} {self.mutation}: {self.effect_db:.1f} dB, limit {self.bound_db:.1f} dB")
