"""Structural checks of an ExecuTorch program with Core ML parts: its interface, and the weights of each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake.types import Signature, Verdict
from edgebake_targets import _coreml_checks, _coreml_flattened, _coreml_states, _executorch_checks
from edgebake_targets._coreml_package import Package
from edgebake_targets.inspectors import _coreml_delegate
from edgebake_targets.inspectors import _pte_file as file
from edgebake_targets.inspectors._flatbuffers import Malformed


@dataclass(frozen=True, kw_only=True)
class Part:
    """A Core ML package inside a program: ``label`` says where, ``inputs`` and ``outputs`` are in the call's order."""

    label: str
    identifier: str
    package: Package
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def part_of(blob: memoryview, named: Mapping[str, memoryview], label: str) -> Part:
    """The package that a delegate is built from; ArtifactDamaged when there is none."""
    files = _coreml_flattened.read(_coreml_delegate.packed(blob, named, label)[0], label)
    inputs, outputs = _coreml_flattened.names_of(files, label)
    return Part(
        label=label,
        identifier=_coreml_flattened.identifier_of(files, label),
        package=_coreml_flattened.package_of(files, label),
        inputs=inputs,
        outputs=outputs,
    )


def parts_of(entry: Path) -> tuple[Part, ...]:
    """All Core ML packages of the program at ``entry``; ArtifactDamaged when one of them is none."""
    try:
        program = file.opened(file.mapped(entry))
        return tuple(
            part_of(file.blob_of(program, delegate), program.named, f"{plan.text(0)}.delegate{number}")
            for plan in program.table.tables(1)
            for number, delegate in enumerate(plan.tables(7))
            if delegate.text(0) == _coreml_delegate.BACKEND
        )
    except Malformed as error:
        raise ArtifactDamaged(f"this is no whole ExecuTorch program: {error}", where=str(entry)) from error


def recorded(entry: Path) -> Mapping[str, Any]:
    """What the record beside the program at ``entry`` says of each part, by identifier; empty where there is none."""
    try:
        parts: Mapping[str, Any] = _coreml_checks.read_checks(entry.parent / _coreml_checks.CHECKS_FILE).get(
            "parts", {}
        )
    except ArtifactDamaged:
        return {}
    return parts


def structure(entry: Path, signature: Signature, checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """See ``executorch_coreml.structure``."""
    try:
        parts = parts_of(entry)
    except ArtifactDamaged as error:
        return _executorch_checks.unreadable(entry, error, ("structure.weights",))
    kept = checks.get("parts", {})
    return (
        *_executorch_checks.structure(entry, signature),
        *_absent(kept, parts),
        *_weights(kept, parts),
        *_states(kept, parts),
    )


def _absent(recorded: Mapping[str, Any], parts: Sequence[Part]) -> Iterator[Verdict]:
    lost = sorted(set(recorded) - {part.identifier for part in parts})
    if lost:
        reason = f"the program lacks the Core ML part {lost[0]} that it was built with"
        yield Verdict(limit="structure.weights", state="fail", reason=reason)


def _states(kept: Mapping[str, Any], parts: Sequence[Part]) -> Iterator[Verdict]:
    for part in parts:
        promised = kept.get(part.identifier, {}).get("states", {})
        yield from _coreml_states.verdict(part.package, _coreml_checks.declared_states(part.package), promised)


def _weights(kept: Mapping[str, Any], parts: Sequence[Part]) -> Iterator[Verdict]:
    """A verdict for each part of whose weights something was recorded, or one that there is none."""
    recorded = {part.label: kept.get(part.identifier, {}).get("packages", {}) for part in parts}
    held = [part for part in parts if recorded[part.label]]
    for part in held:
        yield _coreml_checks.held_against(part.package, recorded[part.label])
    if not held:
        reason = "no weight of this program's Core ML parts was recorded"
        yield Verdict(limit="structure.weights", state="not measured", reason=reason)
