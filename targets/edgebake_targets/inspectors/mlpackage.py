"""Reads a Core ML package (.mlpackage) or specification (.mlmodel), whoever made it, in well under a second."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgebake.target import Missing
from edgebake.types import Inspection, WeightRecord
from edgebake_targets._coreml_activations import quantised
from edgebake_targets._coreml_constants import (
    PAYLOADS,
    Constant,
    constants,
    format_of,
    operations,
    payload_name,
    stored_parts,
)
from edgebake_targets._coreml_interface import inputs_of, outputs_of
from edgebake_targets._coreml_package import Package, Payload, open_package, payload_of, proto

SUFFIXES = (".mlpackage", ".mlmodel")

# Specification version -> oldest system that loads it (Model.proto).
_SYSTEMS = {
    1: "iOS11",
    2: "iOS11.2",
    3: "iOS12",
    4: "iOS13",
    5: "iOS14",
    6: "iOS15",
    7: "iOS16",
    8: "iOS17",
    9: "iOS18",
    10: "iOS26",
}


def missing() -> Missing | None:
    """coremltools is needed for its protobuf classes only; nothing else of it is imported."""
    if find_spec("coremltools") is None:
        return Missing(reason="coremltools is not installed", remedy="pip install coremltools==9.0")
    return None


def inspect(path: Path) -> Inspection:
    """What the package says of itself. ArtifactDamaged when it is none, or when a constant does not add up."""
    return inspect_package(open_package(path))


def inspect_package(package: Package) -> Inspection:
    """As ``inspect``, for a package that is open."""
    kind = str(package.spec.WhichOneof("Type"))
    program = kind == "mlProgram"
    operators = Counter(str(op.type) for op in operations(package)) if program else Counter[str]()
    return Inspection(
        format="mlpackage",
        inputs=inputs_of(package),
        outputs=outputs_of(package),
        operators=dict(sorted((name, count) for name, count in operators.items() if name not in PAYLOADS)),
        delegates={},
        weights=_weights(package) if program else (),
        total_bytes=package.total_bytes,
        facts=_facts(package, kind),
    )


def _weights(package: Package) -> tuple[WeightRecord, ...]:
    """Compressed constants and those of the weight file; the small rest is graph. A shared payload counts once."""
    records: list[WeightRecord] = []
    counted: set[tuple[str, int]] = set()
    found = constants(package).values()
    feeding = {source.name for constant in found for source, _ in constant.fed.values()}
    for constant in found:
        if constant.name in feeding:
            continue  # counted with the constant that it is a part of
        stored = {n: payload_of(package, value) for n, value in stored_parts(constant).items() if _is_tensor(value)}
        main = stored.pop(payload_name(constant), None)
        if main is None or (constant.operator == "const" and main.key is None) or main.key in counted:
            continue
        if main.key is not None:
            counted.add(main.key)
        records.append(_record(package, constant, main, stored))
    return tuple(sorted(records, key=lambda record: record.name))


def _record(package: Package, constant: Constant, main: Payload, others: dict[str, Payload]) -> WeightRecord:
    beside = sum(len(p.data) for name, p in others.items() if name not in ("axis", "shape", "vector_axis"))
    return WeightRecord(
        name=constant.name,
        shape=constant.shape,
        dtype=format_of(package, constant),
        bytes=len(main.data),
        scale_bytes=beside,
        digest=sha256(main.data).hexdigest(),
    )


def _is_tensor(value: Any) -> bool:
    return bool(value.type.WhichOneof("type") == "tensorType")


def _facts(package: Package, kind: str) -> dict[str, Any]:
    spec = package.spec
    metadata = spec.description.metadata
    facts: dict[str, Any] = {
        "specification_version": int(spec.specificationVersion),
        "minimum_os": _SYSTEMS.get(int(spec.specificationVersion), "unknown"),
        "model": kind,
    }
    if kind == "mlProgram":
        program = spec.mlProgram
        facts["functions"] = sorted(program.functions)
        facts["opset"] = sorted({str(function.opset) for function in program.functions.values()})
        facts["compute_precision"] = _precision(package)
        if counts := quantised(package):
            facts["quantised_activations"] = counts
    named = {"description": "shortDescription", "version": "versionString", "author": "author", "license": "license"}
    facts.update({name: str(getattr(metadata, field)) for name, field in named.items() if getattr(metadata, field)})
    if metadata.userDefined:
        facts["metadata"] = {key: str(metadata.userDefined[key]) for key in sorted(metadata.userDefined)}
    return facts


def _precision(package: Package) -> str:
    """``fp16``, ``fp32``, ``mixed`` or ``none``: the type of what float operators give, casts and constants aside."""
    names = proto("MIL_pb2").DataType
    found = set()
    for operation in operations(package):
        if operation.type == "cast" or operation.type in PAYLOADS:
            continue
        for output in operation.outputs:
            if output.type.WhichOneof("type") == "tensorType":
                found.add(str(names.Name(output.type.tensorType.dataType)))
    floats = {"fp16": "FLOAT16" in found, "fp32": "FLOAT32" in found}
    present = [name for name, there in floats.items() if there]
    return present[0] if len(present) == 1 else "mixed" if present else "none"
