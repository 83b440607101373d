"""Checks of any ExecuTorch program: it loads, takes and returns what was promised, and holds its integer weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.scheme import parse
from edgebake.target import LowerRequest
from edgebake.types import Inspection, Signature, TensorSpec, Traced, Verdict
from edgebake_targets import _executorch
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


def refuse_lost_integers(
    request: LowerRequest, traced: Traced, *, fix: str, inside: Counter[tuple[str, int]] | None = None
) -> None:
    """StageFailed naming the modules whose integer weights are not in the file with their bits, with ``fix``.

    ``inside``: constants, as (type, elements), of parts that the inspector of .pte files cannot look into.
    """
    records = pte.inspect(request.folder / _executorch.ARTIFACT).weights
    found = Counter((record.dtype, prod(record.shape)) for record in records) + (inside or Counter())
    held = [weight for program in traced.programs.values() for weight in _executorch.integer_weights(program)]
    distinct = {(weight.digest, weight.count): weight for weight in held}
    bits = {module: parse(scheme).weight_bits for module, scheme in request.assignment.schemes.items()}
    expected = Counter((f"int{bits.get(weight.module, 0)}", weight.count) for weight in distinct.values())
    lost = expected - found
    names = {w.module for w in distinct.values() if (f"int{bits.get(w.module, 0)}", w.count) in lost}
    names |= {m for m, width in bits.items() if width < 16 and m not in {w.module for w in held}}
    if names:
        raise StageFailed(
            f"integer weights came out of lowering as floats: {', '.join(sorted(names))}", where="lower", fix=fix
        )
