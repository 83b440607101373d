"""Structural checks of a Core ML package: at build against the float weights, later against what was recorded of them.

The record holds a sketch of each float weight (feature hashing: Weinberger et al., ICML 2009): 64 sums under seeded
signs, from which the distance to the decoded weight can be estimated without keeping the float weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, Problem, StageFailed
from edgebake.scheme import Scheme, parse
from edgebake.types import MethodSignature, Signature, TensorSpec, Verdict, VerdictState
from edgebake_targets import _coreml_activations, _coreml_modules, _coreml_schemes, _coreml_states, _weight_record
from edgebake_targets._coreml_allowed import allowed, table_of
from edgebake_targets._coreml_constants import (
    Constant,
    constants,
    decode,
    format_of,
    operations,
    payload_name,
    stored_parts,
)
from edgebake_targets._coreml_functions import function_of
from edgebake_targets._coreml_interface import inputs_of, outputs_of
from edgebake_targets._coreml_package import Package, Place, open_package, payload_of, places_of
from edgebake_targets._coreml_schemes import is_compressed, numbers_of
from edgebake_targets._coreml_weights import Held

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
CHECKS_FILE = "weights.check.json"  # beside the packages
_BUCKETS = 64
_TOLERANCE = 1e-3  # of the distance; what is stored is rounded to 7 digits


def record(package: Package, named: Mapping[str, Held]) -> dict[str, Any]:
    """Hold each weight of the package that was written against its float values, and return what to keep of them.

    StageFailed names each module whose weight is not stored in its scheme or is farther off than the scheme allows.
    """
    stored = constants(package)
    kept, problems = {}, []
    for name, held in sorted(named.items()):
        constant = stored.get(name)
        wrong = _wrong(package, constant, held)
        if wrong or constant is None:
            problems.append(Problem(what=f"{', '.join(held.modules)}: {wrong}", where=package.path.name))
            continue
        decoded = decode(package, constant)
        kept[name] = {
            "modules": list(held.modules),
            "scheme": held.scheme,
            "shape": list(held.values.shape),
            "norm": _short(_norm(held.values)),
            "sketch": [_short(v) for v in sketch(held.values)],
            "distance": _short(_norm(sketch(held.values) - sketch(decoded))),
            "relative_l2": _short(_norm(held.values - decoded) / (_norm(held.values) or 1.0)),
        }
    if problems:
        raise StageFailed(problems)
    _refuse_growth(package, [(stored[name], held) for name, held in named.items() if is_compressed(held.scheme)])
    return kept


def _refuse_growth(package: Package, compressed: Sequence[tuple[Constant, Held]]) -> None:
    """StageFailed when scales, tables and narrow values together are not smaller than the floats in their place."""
    held_as = sum(
        len(payload_of(package, part).data)
        for constant, _ in compressed
        for name, part in stored_parts(constant).items()
        if name not in ("axis", "shape", "vector_axis")
    )
    floats = sum(held.values.size * table_of(package, constant).bits // 8 for constant, held in compressed)
    if compressed and held_as >= floats:
        schemes = ", ".join(sorted({held.scheme for _, held in compressed}))
        raise StageFailed(
            f"{schemes} compresses nothing: weights, scales and tables take {held_as} bytes, as floats {floats}",
            where=package.path.name,
            fix="choose fp16, or a scheme with fewer tables or larger groups",
        )


def record_modules(package: Package, modules: Mapping[str, list[str]]) -> dict[str, str]:
    """The value of ``package`` that each module hands on, by module name."""
    values = [output.name for operation in operations(package) for output in operation.outputs]
    return _coreml_modules.found_among(values, modules)


def record_inside(package: Package, inside: Mapping[str, str]) -> dict[str, str]:
    """The module that computes each value of ``package``, by the value's name."""
    values = {output.name for operation in operations(package) for output in operation.outputs}
    return {value: module for value, module in inside.items() if value in values}


def record_states(package: Package, states: Mapping[str, str]) -> dict[str, str]:
    """``states`` (name -> buffer) once ``package`` is seen to write to each; else StageFailed names it."""
    _coreml_states.refuse_dropped(package, declared_states(package), states)
    return dict(states)


def declared_states(package: Package) -> tuple[str, ...]:
    """Names of the states of ``package``."""
    return tuple(spec.name for spec in inputs_of(package) if spec.role == "state")


def _wrong(package: Package, constant: Constant | None, held: Held) -> str:
    """Why the stored weight is not ``held`` in its scheme; empty when it is."""
    if constant is None:
        return f"no constant of the package holds the weight as {held.scheme}"
    if other := _other_format(package, constant, held.scheme):
        return f"the weight is stored as {other}, not {held.scheme}"
    decoded = decode(package, constant)
    if decoded.shape != held.values.shape:
        return f"the weight has the shape {decoded.shape}, not {held.values.shape}"
    promised = numbers_of(held.scheme, held.values.shape, held.axis)
    if is_compressed(held.scheme) and (found := _numbers(package, constant, parse(held.scheme))) != promised:
        return f"the weight has {_said(found)}, where {held.scheme} has {_said(promised)}"
    excess = abs(decoded - held.values) - allowed(package, constant, held)  # nan, which is not <= 0, fails too
    worst = float(excess.max())
    return "" if worst <= 0 else f"a value is {worst:.3g} farther off than {held.scheme} allows"


def _other_format(package: Package, constant: Constant, scheme: str) -> str:
    """How a weight of the compressed ``scheme`` is stored when that is not in this scheme; empty when it is."""
    stored = format_of(package, constant)
    same = (stored.replace("sparse-float32", "sparse-float16")) == _coreml_schemes.format_of(scheme)
    return stored if is_compressed(scheme) and not same else ""


def _numbers(package: Package, constant: Constant, scheme: Scheme) -> dict[str, int]:
    """How many tables, scales and values that are not zero the constant has."""
    stored, numbers = stored_parts(constant), {}
    sizes = {name: math.prod(payload_of(package, part).shape) for name, part in stored.items() if name != "shape"}
    if "lut" in sizes:
        numbers["tables"] = sizes["lut"] // (2**scheme.weight_bits * scheme.vector)
    if "scale" in sizes:
        numbers["scales"] = sizes["scale"]
    if "mask" in sizes or "data_mask" in sizes or "indices_mask" in sizes:
        numbers["values"] = sizes[payload_name(constant)]
    return numbers


def _said(numbers: Mapping[str, int]) -> str:
    return " and ".join(f"{number} {what}" for what, number in sorted(numbers.items()))


def sketch(values: NDArray[Any]) -> NDArray[np.float64]:
    """``_BUCKETS`` sums of the flattened ``values`` under seeded signs, value ``i`` in bucket ``i % _BUCKETS``.

    The squared length of a difference of sketches estimates that of the difference, without bias.
    """
    import numpy as np

    flat = np.zeros(-(-values.size // _BUCKETS) * _BUCKETS)
    flat[: values.size] = values.ravel()
    random = np.random.Generator(np.random.Philox(key=20180501))
    flips = np.unpackbits(np.frombuffer(random.bytes((flat.size + 7) // 8), np.uint8), count=flat.size)
    np.negative(flat, out=flat, where=flips.view(np.bool_))
    return np.asarray(flat.reshape(-1, _BUCKETS).sum(axis=0))


def _norm(values: NDArray[Any]) -> float:
    import numpy as np

    return float(np.sqrt(np.square(values.astype(np.float64)).sum()))


def _short(value: float) -> float:
    return float(f"{value:.7g}")


def write_checks(path: Path, checks: Mapping[str, Any]) -> None:
    """Write the record beside the packages."""
    _weight_record.write(path, checks)


def read_checks(path: Path) -> Mapping[str, Any]:
    """The record at ``path``; ArtifactDamaged when it is missing or of another version."""
    return _weight_record.read(path, VERSION)


def recorded(place: Place, what: str) -> Mapping[str, Any]:
    """The part ``what`` of the record beside the package that is about ``place``; empty where there is none."""
    try:
        checks = read_checks(place.path.parent / CHECKS_FILE)
    except ArtifactDamaged:
        return {}
    found: Mapping[str, Any] = checks.get(what, {}).get(place.key, {})
    return found


def recorded_parts(entry: Path) -> Sequence[Mapping[str, Any]]:
    """Of a decoder in several packages, ``entry`` the first, what the record says of each; empty without a record."""
    try:
        checks = read_checks((entry.parent if entry.suffix == ".mlpackage" else entry) / CHECKS_FILE)
    except ArtifactDamaged:
        return ()
    found: Sequence[Mapping[str, Any]] = checks.get("parts", ())
    return found


def structure(entry: Path, signature: Signature, checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """See ``coreml.structure``."""
    places = places_of(entry, signature.methods)
    found: list[Verdict] = []
    loaded: dict[Path, Package | None] = {}
    for name, place in places.items():
        if place.path not in loaded:
            loaded[place.path], verdicts = _load_verdicts(place.path)
            found += verdicts
        package = loaded[place.path]
        if package is not None:
            found += _of_method(package, place, signature.methods[name], signature, checks)
    return tuple(found)


def _load_verdicts(path: Path) -> tuple[Package | None, list[Verdict]]:
    """The package at ``path`` when it is whole, and what that says of the limits."""
    try:
        return _loaded(path), [Verdict(limit="structure.loads", state="pass", subject=path.name)]
    except ArtifactDamaged as error:
        reason = str(error.problems[0].what)
    limits = ("structure.inputs", "structure.outputs", "structure.weights")
    lost = [Verdict(limit=limit, state="not measured", reason="the package does not load") for limit in limits]
    return None, [Verdict(limit="structure.loads", state="fail", subject=path.name, reason=reason), *lost]


def _of_method(
    whole: Package, place: Place, method: MethodSignature, signature: Signature, checks: Mapping[str, Any]
) -> list[Verdict]:
    """One method's inputs, outputs, weights and states."""
    try:
        package = function_of(whole, place.function) if place.function else whole
    except ArtifactDamaged as error:
        return [Verdict(limit="structure.inputs", state="fail", subject=place.key, reason=error.problems[0].what)]
    plain = tuple(spec for spec in inputs_of(package) if spec.role != "state")
    found = (
        _interface("structure.inputs", place.path, _promised(method.inputs, signature), plain),
        _interface("structure.outputs", place.path, _promised(method.outputs, signature), outputs_of(package)),
        held_against(package, checks.get("packages", {}).get(place.key, {})),
        *_coreml_activations.verdicts(package, checks.get("activations", {}).get(place.key, {})),
        *_coreml_states.verdict(package, declared_states(package), checks.get("states", {}).get(place.key, {})),
    )
    return [replace(verdict, subject=place.key) for verdict in found]


def _loaded(entry: Path) -> Package:
    """Load the program as coremltools does, which infers every type again; ArtifactDamaged when that fails."""
    from edgebake_targets._coremltools import quiet

    with quiet():
        # Imported before the package is opened, since the loader insists on its own protobuf classes.
        from coremltools.converters.mil.frontend.milproto.load import load

        package = open_package(entry)
        if package.spec.WhichOneof("Type") != "mlProgram":
            raise ArtifactDamaged("it holds no ML program", where=str(entry))
        weights = entry / "Data" / "com.apple.CoreML" / "weights"
        try:
            load(package.spec, specification_version=package.spec.specificationVersion, file_weights_dir=str(weights))
        except Exception as error:  # a damaged program makes the loader raise whatever Python raises
            raise ArtifactDamaged(
                f"coremltools cannot load it: {type(error).__name__}: {error}", where=str(entry)
            ) from error
    return package


def _promised(specs: Iterable[TensorSpec], signature: Signature) -> list[tuple[str, tuple[int | str, ...], str]]:
    """Name, shape and dtype in the package; a dimension reads as its range or sizes, a scalar has the shape (1,)."""
    return [(s.name, tuple(_extent(d, signature) for d in s.shape) or (1,), s.lowered_dtype or s.dtype) for s in specs]


def _extent(size: int | str, signature: Signature) -> int | str:
    if isinstance(size, int):
        return size
    bounds = signature.dims[size]
    if len(bounds.sizes) > 1:
        return "|".join(map(str, sorted(bounds.sizes)))
    return f"{bounds.min}..{bounds.max}" if bounds.min != bounds.max else bounds.min


def _interface(
    limit: str, entry: Path, promised: list[tuple[str, tuple[int | str, ...], str]], found: tuple[TensorSpec, ...]
) -> Verdict:
    there = {spec.name: spec for spec in found}
    wrong = [f"{name} is not there" for name in there.keys() ^ {name for name, _, _ in promised} if name not in there]
    wrong += [f"{name} is there but was not promised" for name in there if name not in {n for n, _, _ in promised}]
    for name, shape, dtype in promised:
        spec = there.get(name)
        if spec is not None and not (spec.dtype == dtype and _fits(spec.shape, shape)):
            wrong.append(f"{name} is {spec.dtype} {_text(spec.shape)}, not {dtype} {_text(shape)}")
    return Verdict(limit=limit, state="fail" if wrong else "pass", subject=entry.name, reason="; ".join(sorted(wrong)))


def _fits(found: tuple[int | str, ...], promised: tuple[int | str, ...]) -> bool:
    """Equal, where ``?`` (a size that the converter left to run time) fits any."""
    return len(found) == len(promised) and all(f in (p, "?") for f, p in zip(found, promised, strict=True))


def _text(shape: tuple[int | str, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def held_against(package: Package, kept: Mapping[str, Any]) -> Verdict:
    """``structure.weights``: the weights of ``package`` against what ``record`` kept of them."""
    try:
        return _weights(package, kept)
    except (ArtifactDamaged, ValueError) as error:
        return Verdict(limit="structure.weights", state="fail", subject=package.path.name, reason=str(error))


def _weights(package: Package, kept: Mapping[str, Any]) -> Verdict:
    """The worst weight: its distance to the float one, as projected, against what it was when it was built."""
    limit, subject = "structure.weights", package.path.name
    if not kept:
        return Verdict(
            limit=limit, state="not measured", subject=subject, reason="no weight of this package was recorded"
        )
    stored = constants(package)
    worst: tuple[float, float, float, str] = (-1.0, 0.0, 0.0, "")
    for name, entry in sorted(kept.items()):
        label = f"{', '.join(entry['modules'])} ({entry['scheme']})"
        constant = stored.get(name)
        if constant is None or list(constant.shape) != entry["shape"]:
            return Verdict(limit=limit, state="fail", subject=subject, reason=f"the weight of {label} is not there")
        if other := _other_format(package, constant, entry["scheme"]):
            return Verdict(limit=limit, state="fail", subject=subject, reason=f"{label} is stored as {other}")
        distance = _norm(sketch(decode(package, constant)) - entry["sketch"])
        size = entry["norm"] or 1.0
        change = abs(distance - entry["distance"]) / (_TOLERANCE * entry["distance"] + 1e-6 * size)
        if not change <= worst[0]:
            worst = (change, distance / size, (1 + _TOLERANCE) * entry["distance"] / size + 1e-6, label)
    change, value, bound, label = worst
    state: VerdictState = "pass" if change <= 1 else "fail"
    reason = (
        f"worst of {len(kept)}: {label}"
        if state == "pass"
        else f"{label} decodes to other values than those it was built from"
    )
    return Verdict(limit=limit, state=state, value=value, bound=bound, subject=subject, reason=reason)
