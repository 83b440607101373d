"""What is inside a Core ML delegate of an ExecuTorch program: operators, weights, precision, oldest system."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake.types import WeightRecord
from edgebake_targets import _coreml_flattened
from edgebake_targets.inspectors import mlpackage

BACKEND = "CoreMLBackend"
_REFERENCE = b"CMJR"  # in place of a package: JSON that names the shared data which holds it
_FACTS = ("compute_precision", "minimum_os", "specification_version", "opset", "functions")


@dataclass(frozen=True, kw_only=True)
class Inside:
    """``weights`` by a key of their own, ``shared`` the keys of shared data that the packages lie in."""

    operators: Mapping[str, int]
    weights: Mapping[str, WeightRecord]
    shared: frozenset[str]
    facts: Mapping[str, Any]


def packed(blob: memoryview, named: Mapping[str, memoryview], label: str) -> tuple[memoryview, str]:
    """The flattened folder of a delegate, and the name of the shared data that holds it, empty where it is its own."""
    if bytes(blob[: len(_REFERENCE)]) != _REFERENCE:
        return blob, ""
    try:
        key = str(json.loads(bytes(blob[len(_REFERENCE) :]))["key"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"its reference to a shared Core ML package is damaged ({error})", where=label) from error
    if key not in named:
        raise ArtifactDamaged(f"the program lacks the shared Core ML package {key!r}", where=label)
    return named[key], key


def read(blob: memoryview, named: Mapping[str, memoryview], label: str) -> Inside:
    """The package of a delegate. Without coremltools its weights are one opaque record of their size."""
    held, key = packed(blob, named, label)
    files = _coreml_flattened.read(held, label)
    shared = frozenset({key} if key else ())
    if mlpackage.missing() is not None:
        opaque = WeightRecord(
            name=label, shape=(len(held),), dtype="opaque", bytes=len(held), digest=sha256(held).hexdigest()
        )
        return Inside(operators={}, weights={label: opaque}, shared=shared, facts={})
    found = mlpackage.inspect_package(_coreml_flattened.package_of(files, label))
    return Inside(
        operators=found.operators,
        weights={f"{key or label}.{w.name}": replace(w, name=f"{label}.{w.name}") for w in found.weights},
        shared=shared,
        facts={name: found.facts[name] for name in _FACTS if name in found.facts},
    )
