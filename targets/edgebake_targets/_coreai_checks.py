"""Structural checks of a Core AI asset: at build against the float weights, later against what was recorded of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, Problem, StageFailed
from edgebake.scheme import parse
from edgebake.types import Signature, TensorSpec, Verdict
from edgebake_targets import _weight_record
from edgebake_targets._coreai_compress import Assigned
from edgebake_targets._coreai_constants import Weight, decode, weights_of
from edgebake_targets._coreai_program import (
    Program,
    array_of,
    digest_of,
    function_of,
    inputs_of,
    open_program,
    outputs_of,
)
from edgebake_targets._coreml_compress import quantise
from edgebake_targets._coreml_schemes import blocks, counts_of, format_of, is_compressed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
CHECKS_FILE = "weights.check.json"  # beside the asset
_LIMITS = ("structure.inputs", "structure.outputs", "structure.weights")


def record(program: Program, weights: Iterable[Assigned]) -> dict[str, Any]:
    """Hold each weight of the written ``program`` against its float values, and return what to keep of them.

    StageFailed names each module whose weight is not stored in its scheme or is farther off than the scheme allows. A
    weight that stays float may have become part of another constant: nothing is kept of it.
    """
    stored = {weight.name: weight for weight in weights_of(program)}
    kept, problems, compressed = {}, [], []
    for held in weights:
        weight = stored.get(held.name)
        decoded = None if weight is None else decode(weight)
        if (weight is None or decoded is None) and not is_compressed(held.scheme):
            continue
        if wrong := _wrong(weight, decoded, held):
            problems.append(Problem(what=f"{', '.join(held.modules)}: {wrong}", where=program.asset.path.name))
            continue
        assert weight is not None and decoded is not None
        kept[held.name] = _kept(held, weight, decoded)
        compressed += [(weight, held)] if is_compressed(held.scheme) else []
    if problems:
        raise StageFailed(problems)
    _refuse_growth(program, compressed)
    return {"version": VERSION, "weights": kept}


def _kept(held: Assigned, weight: Weight, decoded: NDArray[np.float32]) -> dict[str, Any]:
    import numpy as np

    exact = held.values.astype(np.float64)
    off = np.linalg.norm(decoded.ravel() - exact.ravel()) if decoded.shape == exact.shape else 0.0
    return {
        "modules": list(held.modules),
        "scheme": held.scheme,
        "format": weight.format,
        "digest": digest_of(decoded),
        "relative_l2": float(f"{off / (np.linalg.norm(exact) or 1.0):.7g}"),
    }


def _wrong(weight: Weight | None, decoded: NDArray[np.float32] | None, held: Assigned) -> str:
    """Why the stored weight is not ``held`` in its scheme; empty when it is."""
    if weight is None or decoded is None:
        return f"no constant of the program holds the weight as {held.scheme}"
    if not is_compressed(held.scheme):
        return ""  # found by its values
    if weight.format != format_of(held.scheme):
        return f"the weight is stored as {weight.format}, not {held.scheme}"
    if decoded.shape != held.values.shape:
        return f"the weight has the shape {decoded.shape}, not {held.values.shape}"
    worst = float((abs(decoded - held.values.astype("float64")) - _allowed(weight, held)).max())
    return "" if worst <= 0 else f"a value is {worst:.3g} farther off than {held.scheme} allows"


def _allowed(weight: Weight, held: Assigned) -> NDArray[np.float64]:
    """Largest error of each value: half a step of its scale, or the distance to the nearest entry of its table."""
    import numpy as np

    exact, scheme = held.values.astype(np.float64), parse(held.scheme)
    counts = counts_of(held.scheme, exact.shape, held.axis)
    if scheme.family == "integer":
        scale = quantise(held.values.astype(np.float32), counts, scheme.weight_bits, np.float32)[1]
        for axis, (size, count) in enumerate(zip(exact.shape, counts, strict=True)):
            scale = np.repeat(scale, size // count, axis)
        return scale.astype(np.float64) / 2 + abs(exact) * 2.0**-22  # integer times scale is rounded to float32
    tables, allowed = array_of(weight.others[0]), np.empty(exact.shape)
    assert tables is not None
    for at, part in blocks(exact.shape, counts):
        table = np.sort(tables[at].astype(np.float64).ravel())
        right = np.clip(np.searchsorted(table, exact[part]), 1, len(table) - 1)
        nearest = np.minimum(abs(exact[part] - table[right - 1]), abs(exact[part] - table[right]))
        allowed[part] = nearest * (1 + 1e-6)
    return allowed


def _refuse_growth(program: Program, compressed: Sequence[tuple[Weight, Assigned]]) -> None:
    """StageFailed when scales, tables and narrow values together are not smaller than the floats in their place."""
    size = sum(part.bytes for weight, _ in compressed for part in (weight.main, *weight.others))
    floats = sum(held.values.nbytes for _, held in compressed)
    if compressed and size >= floats:
        schemes = ", ".join(sorted({held.scheme for _, held in compressed}))
        raise StageFailed(
            f"{schemes} compresses nothing: weights, scales and tables take {size} bytes, as floats {floats}",
            where=program.asset.path.name,
            fix="choose fp16, or a scheme with fewer tables or larger groups",
        )


def write_checks(folder: Path, checks: Mapping[str, Any]) -> None:
    """Write the record beside the asset."""
    _weight_record.write(folder / CHECKS_FILE, checks)


def read_checks(folder: Path) -> Mapping[str, Any]:
    """The record in ``folder``; ArtifactDamaged when it is missing or of another version."""
    return _weight_record.read(folder / CHECKS_FILE, VERSION)


def structure(entry: Path, signature: Signature, checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """See ``coreai.structure``."""
    try:
        program = open_program(entry)
    except ArtifactDamaged as error:
        reason = str(error.problems[0].what)
        lost = (Verdict(limit=name, state="not measured", reason="the asset does not load") for name in _LIMITS)
        return (Verdict(limit="structure.loads", state="fail", subject=entry.name, reason=reason), *lost)
    there, back = [], []
    for name, method in signature.methods.items():
        function = function_of(name, signature.methods)
        graph = program.graphs.get(function)
        if graph is None:
            there.append(f"the function {function} is not there")
            continue
        there += _differences(method.inputs, inputs_of(graph))
        back += _differences(method.outputs, outputs_of(graph))
    return (
        Verdict(limit="structure.loads", state="pass", subject=entry.name),
        _verdict("structure.inputs", entry, there),
        _verdict("structure.outputs", entry, back),
        _weights(program, checks.get("weights", {})),
    )


def _verdict(limit: str, entry: Path, wrong: list[str]) -> Verdict:
    return Verdict(limit=limit, state="fail" if wrong else "pass", subject=entry.name, reason="; ".join(sorted(wrong)))


def _differences(promised: Iterable[TensorSpec], found: Iterable[TensorSpec]) -> list[str]:
    """What is missing, too much, or of another type; an open dimension (``?``) fits any."""
    there, wanted = {spec.name: spec for spec in found}, {spec.name: spec for spec in promised}
    wrong = [f"{name} is not there" for name in wanted.keys() - there.keys()]
    wrong += [f"{name} is there but was not promised" for name in there.keys() - wanted.keys()]
    for name in wanted.keys() & there.keys():
        spec, dtype = there[name], wanted[name].lowered_dtype or wanted[name].dtype
        sizes = [size if isinstance(size, int) else "?" for size in wanted[name].shape]
        fits = len(sizes) == len(spec.shape) and all(f in (s, "?") for f, s in zip(spec.shape, sizes, strict=True))
        if not fits or spec.dtype != dtype:
            wrong.append(f"{name} is {spec.dtype} {_text(spec.shape)}, not {dtype} {_text(sizes)}")
    return wrong


def _text(shape: Iterable[int | str]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _weights(program: Program, kept: Mapping[str, Any]) -> Verdict:
    """Whether each recorded weight decodes to what it did when it was held against its float values."""
    limit, subject = "structure.weights", program.asset.path.name
    if not kept:
        return Verdict(limit=limit, state="not measured", subject=subject, reason="no weight of it was recorded")
    try:
        stored = {weight.name: weight for weight in weights_of(program)}
        for name, entry in sorted(kept.items()):
            label = f"{', '.join(entry['modules'])} ({entry['scheme']})"
            if name not in stored:
                return _failed(limit, subject, f"the weight of {label} is not there")
            decoded = decode(stored[name])
            if decoded is None or digest_of(decoded) != entry["digest"]:
                return _failed(limit, subject, f"{label} decodes to other values than those it was built from")
    except ArtifactDamaged as error:
        return _failed(limit, subject, str(error.problems[0].what))
    worst = max(kept.values(), key=lambda entry: float(entry["relative_l2"]))
    reason = f"worst of {len(kept)}: {', '.join(worst['modules'])} ({worst['scheme']})"
    return Verdict(limit=limit, state="pass", value=float(worst["relative_l2"]), subject=subject, reason=reason)


def _failed(limit: str, subject: str, reason: str) -> Verdict:
    return Verdict(limit=limit, state="fail", subject=subject, reason=reason)
