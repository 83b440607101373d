"""Judges a delivered artifact again, for CI: needs its folder and the recorded reference, not the training model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgebake import delivery, speculating, validate
from edgebake.artifacts import limits_of, manifest_of, measurements_of, target_of
from edgebake.errors import ArtifactDamaged, EdgebakeError
from edgebake.limits import judge
from edgebake.reference import Reference
from edgebake.result import Failure, Result
from edgebake.store_files import sha256_file
from edgebake.types import Verdict


def subject_of(folder: Path) -> validate.Subject:
    """What the manifest in ``folder`` says is to be judged; ArtifactDamaged when a file or the reference changed."""
    manifest = manifest_of(folder)
    _check_files(folder, manifest)
    return validate.Subject(
        unit=manifest["unit"],
        target=manifest["target"],
        scheme=manifest["scheme"],
        folder=folder,
        lowered={
            "entry": manifest["entry"],
            "files": sorted({Path(f["path"]).parts[0] for f in manifest["files"]}),
            "signature": manifest["signature"],
            "delegation": manifest["delegation"],
            "planned_memory_bytes": manifest["planned_memory_bytes"],
            "encodings": manifest.get("encodings", {}),
            "notes": manifest.get("notes", []),  # absent before 0.2
        },
        assignment=manifest["assignment"],
        reference=_reference(folder, manifest),
        limits=limits_of(manifest, folder),
        model=manifest["model"],
    )


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name, digest in {f["path"]: f["sha256"] for f in manifest["files"]}.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactDamaged("the file is missing", where=str(path), fix="build the artifact again")
        if sha256_file(path) != digest:
            raise ArtifactDamaged(
                "the file is not what its manifest says (SHA-256 differs)",
                where=str(path),
                fix="build the artifact again, or copy it again from where it was built",
            )
    if (folder / delivery.MEASUREMENTS).exists():
        measurements_of(folder)


def _reference(folder: Path, manifest: Mapping[str, Any]) -> Path:
    wanted = manifest["reference"]
    path = (folder / str(wanted["path"])).resolve()
    if not path.is_dir():
        raise ArtifactDamaged(
            f"the recorded reference {wanted['path']} is missing",
            where=str(folder),
            fix="copy the whole component folder, with its reference/",
        )
    recorded = Reference(path)
    recorded.verify()
    if recorded.manifest["digest"] != wanted["digest"]:
        raise ArtifactDamaged(
            "the reference beside the artifact is not the one it was judged against", where=str(path), fix="build again"
        )
    return path


def _speculative(folder: Path, subject: validate.Subject, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Of a draft: what it does for its target, whose folder is looked at as closely as its own."""
    beside = target_of(folder, manifest)
    if beside is None:
        return {}
    other, tokens = beside
    name = str(manifest["speculative"].get("target", ""))
    if not other.is_dir():
        return {"speculative": {"target": name, "not_measured": f"the target's artifact is not here: {other}"}}
    target = subject_of(other)
    if target.target != subject.target:
        raise ArtifactDamaged(f"{other} is for {target.target}, not {subject.target}", where=str(folder))
    ours, theirs = (folder, subject.lowered), (other, target.lowered)
    found = speculating.measure(subject.target, ours, theirs, target.reference, tokens)
    return {"speculative": {"target": name, **found}}


def verify(folder: Path) -> Result:
    """Digests first, then the artifact itself runs against the reference; failures become part of the result."""
    start = time.monotonic()
    manifest: Mapping[str, Any] = {}
    failure: Failure | None = None
    measured: Mapping[str, Any] = {}
    verdicts: tuple[Verdict, ...] = ()
    try:
        manifest = manifest_of(folder)
        subject = subject_of(folder)
        measured = {**validate.measure(subject, None), **_speculative(folder, subject, manifest)}
        verdicts = judge(subject.limits, measured)
    except EdgebakeError as error:
        failure = Failure(stage="verify", problems=tuple(error.problems), exit_code=error.exit_code)
    return Result(
        unit=manifest.get("unit", str(folder)),
        recipe=manifest.get("recipe", ""),
        component=manifest.get("component", ""),
        target=manifest.get("target", ""),
        scheme=manifest.get("scheme", ""),
        device=manifest.get("device"),
        name=manifest.get("name"),
        folder=folder,
        verdicts=verdicts,
        measurements=measured,
        failure=failure,
        stages={"verify": "ran"},
        seconds=time.monotonic() - start,
    )
