"""Reads TOSA graphs, which Arm's backends lower to, and runs them on Arm's reference model.

Field numbers: tosa.fbs of the TOSA serialization library, tosa-tools 2026.8.0. What the operators compute is the TOSA
specification 1.0, https://www.mlplatform.org/tosa/tosa_spec_1_0_0.html, of which the reference model is the measure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake_targets.inspectors._flatbuffers import Malformed, root

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MARK = b"TOSA"
_DTYPES = {1: "bool", 2: "int4", 3: "int8", 4: "int16", 5: "int32", 6: "int48", 7: "float32", 8: "float16"}


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph's interface, by the names of its tensors, and how many constants it holds of each (type, elements)."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Counter[tuple[str, int]]


def parse(data: bytes) -> Graph:
    """The graph in ``data``, its first block the one that is called; Malformed when it is none."""
    if data[4:8] != _MARK:
        raise Malformed(f"a TOSA graph is marked {_MARK!r}, not {data[4:8]!r}")
    blocks = [block for region in root(memoryview(data)).tables(1) for block in region.tables(1)]
    if not blocks:
        raise Malformed("a TOSA graph without a block of operators")
    constants = Counter(
        (_DTYPES.get(tensor.whole(2, "I"), "unknown"), prod(tensor.wholes(1, "i")))
        for block in blocks
        for tensor in block.tables(2)
        if tensor.count(3, 1)
    )
    return Graph(inputs=blocks[0].texts(3), outputs=blocks[0].texts(4), constants=constants)


def run(data: bytes, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Outputs of the graph in ``data``; ArtifactDamaged when it is none, takes others, or is undefined there."""
    import numpy as np
    import tosa_reference_model

    try:
        outputs, status = tosa_reference_model.run(data, [np.ascontiguousarray(value) for value in inputs])
    except ValueError as error:  # its word for what it cannot start with
        raise _refused(str(error)) from error
    if status != tosa_reference_model.GraphStatus.TOSA_VALID:
        raise _refused(status.name)
    return list(outputs)


def _refused(why: str) -> ArtifactDamaged:
    return ArtifactDamaged(
        f"Arm's reference model does not run a TOSA graph of this program: {why}",
        fix="build the artifact again; where that does not help, choose executorch-vulkan for this network",
    )
