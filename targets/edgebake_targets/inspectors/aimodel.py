"""Reads a Core AI model (.aimodel), whoever made it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from edgebake.target import Missing
from edgebake.types import Inspection, WeightRecord
from edgebake_targets import _coreai_packages
from edgebake_targets._coreai_constants import Weight, weights_of
from edgebake_targets._coreai_program import Program, inputs_of, open_program, operators, outputs_of

SUFFIXES = (".aimodel",)


def missing() -> Missing | None:
    """coreai-core reads the program; torch is not needed."""
    return _coreai_packages.missing(_coreai_packages.CORE)


def inspect(path: Path) -> Inspection:
    """What the asset says of itself. ArtifactDamaged when it is none, or when a constant does not add up."""
    program = open_program(path)
    graph = program.graphs.get("main") or next(iter(program.graphs.values()))
    return Inspection(
        format="aimodel",
        inputs=inputs_of(graph),
        outputs=outputs_of(graph),
        operators=operators(program),
        delegates={},
        weights=_records(program),
        total_bytes=program.asset.total_bytes,
        facts=_facts(program),
    )


def _records(program: Program) -> tuple[WeightRecord, ...]:
    """A weight each; scales and tables that several share count once, at the first."""
    counted: set[str] = set()
    found = []
    for weight in sorted(weights_of(program), key=lambda weight: weight.name):
        if weight.main.name in counted:
            continue
        beside = {other.name: other.bytes for other in weight.others if other.name not in counted}
        counted.update((weight.main.name, *beside))
        found.append(_record(weight, sum(beside.values())))
    return tuple(found)


def _record(weight: Weight, scale_bytes: int) -> WeightRecord:
    held = weight.main.blob if weight.main.blob is not None else str(weight.main.attribute).encode()
    return WeightRecord(
        name=weight.name,
        shape=weight.shape,
        dtype=weight.format,
        bytes=weight.main.bytes,
        scale_bytes=scale_bytes,
        digest=sha256(held).hexdigest(),
    )


def _facts(program: Program) -> dict[str, Any]:
    metadata = program.asset.metadata
    facts: dict[str, Any] = {"functions": sorted(program.graphs)}
    for fact, key in (
        ("asset_version", "assetVersion"),
        ("producer", "producer"),
        ("author", "author"),
        ("license", "license"),
        ("description", "description"),
    ):
        if metadata.get(key):
            facts[fact] = str(metadata[key])
    if isinstance(extra := metadata.get("creatorDefinedMetadata"), dict) and extra:
        facts["metadata"] = {str(key): str(extra[key]) for key in sorted(extra)}
    return facts
