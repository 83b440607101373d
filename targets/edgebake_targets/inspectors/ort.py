"""Reads any ONNX Runtime file (.ort): interface, the operators that a reduced build needs, and every weight."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from edgebake.errors import ArtifactDamaged
from edgebake.target import Missing
from edgebake.types import Inspection
from edgebake_targets._units import ONNX_RUNTIME_KERNELS, Tally
from edgebake_targets.inspectors import _ort_model, onnx
from edgebake_targets.inspectors._flatbuffers import Malformed
from edgebake_targets.inspectors._pte_file import mapped

SUFFIXES = (".ort",)


def missing() -> Missing | None:
    """Whether onnx is installed, whose types the file has."""
    return onnx.missing()


def inspect(path: Path) -> Inspection:
    """What ``path`` holds. ArtifactDamaged when it is no .ort file, is cut short, or contradicts itself."""
    try:
        read = _ort_model.read(mapped(path))
    except OSError as error:
        raise ArtifactDamaged(f"cannot be read: {error.strerror or error}", where=str(path), fix=onnx.FIX) from error
    except (Malformed, RecursionError, ValueError) as error:
        what = f"this is no whole ONNX Runtime file: {error}"
        raise ArtifactDamaged(what, where=str(path), fix=onnx.FIX) from error
    found = onnx.described(read.model, path)
    tally = Tally(operators=Counter(found.operators), uncounted=set(found.operators), subgraphs=1)
    return replace(
        found,
        format="ort",
        units=(tally.work(ONNX_RUNTIME_KERNELS),),
        facts={
            **found.facts,
            "format_version": read.version,
            **({"weights_in_another_file": read.outside} if read.outside else {}),
        },
    )
