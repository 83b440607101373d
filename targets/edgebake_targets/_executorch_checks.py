"""Structural checks of any ExecuTorch program: it loads, and takes and returns what was promised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edgebake.errors import ArtifactDamaged
from edgebake.types import Inspection, Signature, TensorSpec, Verdict
from edgebake_targets.inspectors import pte


def structure(entry: Path, signature: Signature) -> tuple[Verdict, ...]:
    """``structure.loads``, ``structure.inputs`` and ``structure.outputs``."""
    try:
        found = pte.inspect(entry)
    except ArtifactDamaged as error:
        return unreadable(entry, error)
    return (Verdict(limit="structure.loads", state="pass", subject=entry.name), *_interface(signature, found))


def unreadable(entry: Path, error: ArtifactDamaged, more: Iterable[str] = ()) -> tuple[Verdict, ...]:
    """What is said of a program that does not load; ``more``: limits beyond those of ``structure``."""
    limits = ("structure.inputs", "structure.outputs", *more)
    reason = "the program does not load"
    return (
        Verdict(limit="structure.loads", state="fail", subject=entry.name, reason=str(error.problems[0].what)),
        *(Verdict(limit=limit, state="not measured", reason=reason) for limit in limits),
    )


def _interface(signature: Signature, found: Inspection) -> Iterator[Verdict]:
    """Types and shapes by position, methods in the order of the file: .pte files keep no names of inputs."""
    methods = [signature.methods[name] for name in found.facts["methods"] if name in signature.methods]
    sides = (
        ("inputs", [spec for method in methods for spec in method.inputs], found.inputs),
        ("outputs", [spec for method in methods for spec in method.outputs], found.outputs),
    )
    for side, promised, there in sides:
        wrong = _differences(promised, there, signature)
        yield Verdict(limit=f"structure.{side}", state="fail" if wrong else "pass", reason="; ".join(wrong))


def _differences(promised: Sequence[TensorSpec], found: Sequence[TensorSpec], signature: Signature) -> list[str]:
    if len(promised) != len(found):
        return [f"there are {len(found)}, promised were {len(promised)}"]
    wrong = []
    for spec, there in zip(promised, found, strict=True):
        shape = tuple(signature.dims[size].max if isinstance(size, str) else size for size in spec.shape)
        if (there.dtype, there.shape) != (spec.dtype, shape):
            wrong.append(f"{spec.name} is {there.dtype} {list(there.shape)}, not {spec.dtype} {list(shape)}")
    return wrong
