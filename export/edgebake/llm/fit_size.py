"""How many bytes of a file each part of a decoder takes, by file format and scheme: arithmetic, nothing is built.

A weight of ``o`` output and ``i`` input channels at ``b`` bits takes o·ceil(i·b/8) bytes; its scales take one number
per output channel, or per output channel and group of ``g`` input channels: o·ceil(i/g) (Jacob et al. 2018, equation 1,
per channel and per group). What the formats add to that was read off files that edgebake wrote (tests/llm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from edgebake.llm.fit_shape import PARTS, Decoder, Part, Weight
from edgebake.scheme import Scheme, parse


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a file format holds weights, in bytes.

    ``floats``: one value that stays float; ``channel_scale`` and ``group_scale``: one scale. ``shares_tied``: the head
    reads the embedding's copy where both have one scheme, groups excepted unless ``shares_groups``; with
    ``shares_packed`` also where the head's differs by its activations alone. ``program`` and ``per_layer``: graph,
    names and metadata.
    """

    floats: int
    channel_scale: int
    group_scale: int
    shares_tied: bool
    program: int
    per_layer: int
    shares_packed: bool = False
    shares_groups: bool = False


# By format, or by the target that departs from it.
# ExecuTorch 1.4: XNNPACK keeps a bfloat16 scale per group and a float32 scale per channel; what a delegate took and the
# embedding outside it are two copies. ONNX: MatMulNBits has float32 scales, symmetric weights have no zero points.
# Core ML: everything that is not an integer is float16. MLX: float32 scales, constants of equal bytes stored once.
_COREML = Format(
    floats=2,
    channel_scale=2,
    group_scale=2,
    shares_tied=True,
    program=10_000,
    per_layer=30_000,
    shares_groups=True,
)
FORMATS: Mapping[str, Format] = {
    "pte": Format(floats=4, channel_scale=4, group_scale=2, shares_tied=False, program=10_000, per_layer=30_000),
    "onnx": Format(floats=4, channel_scale=4, group_scale=4, shares_tied=True, program=8_000, per_layer=8_000),
    "onnx-genai": Format(
        floats=4,
        channel_scale=4,
        group_scale=4,
        shares_tied=True,
        program=8_000,
        per_layer=8_000,
        shares_packed=True,
    ),
    "mlpackage": _COREML,
    "executorch-coreml": _COREML,
    "executorch-mlx": Format(
        floats=4,
        channel_scale=4,
        group_scale=4,
        shares_tied=True,
        program=10_000,
        per_layer=20_000,
        shares_packed=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Bytes of one part: ``values`` of its weights, ``scales`` and tables, ``floats`` (biases)."""

    values: int
    scales: int
    floats: int
    schemes: tuple[str, ...]

    @property
    def total(self) -> int:
        """All of it."""
        return self.values + self.scales + self.floats


@dataclass(frozen=True, kw_only=True)
class FileSize:
    """Bytes of a file by part, and of its ``program``: graph, names, metadata."""

    parts: Mapping[Part, PartSize]
    program: int

    @property
    def total(self) -> int:
        """The whole file."""
        return self.program + sum(part.total for part in self.parts.values())


def file_size(decoder: Decoder, schemes: Mapping[str, str], format_: str) -> FileSize:
    """The file of ``decoder`` in ``format_`` (a key of FORMATS), each module in its scheme; others are float32."""
    holds = FORMATS[format_]
    stored = [(w, schemes.get(w.name, "fp32")) for w in decoder.weights]
    if holds.shares_tied:
        embedding = schemes.get(decoder.weights[0].name, "fp32")
        stored = [(w, s) for w, s in stored if not (w.tied and _one_copy(s, embedding, holds))]
    parts = {part: _part([(w, s) for w, s in stored if w.part == part], holds) for part in PARTS}
    return FileSize(parts=parts, program=holds.program + holds.per_layer * decoder.layers)


def _one_copy(head: str, embedding: str, holds: Format) -> bool:
    """Whether a tied head in the scheme ``head`` reads what the embedding is stored as."""
    left, right = parse(head), parse(embedding)
    packed = holds.shares_packed and left.family == right.family and left.weight_bits == right.weight_bits
    grouped = left.group is not None or right.group is not None
    return (packed or head == embedding) and (holds.shares_groups or not grouped)


def _part(stored: Sequence[tuple[Weight, str]], holds: Format) -> PartSize:
    sizes = [weight_bytes(weight, scheme, holds) for weight, scheme in stored]
    return PartSize(
        values=sum(size[0] for size in sizes),
        scales=sum(size[1] for size in sizes),
        floats=sum(weight.bias * holds.floats for weight, _ in stored),
        schemes=tuple(dict.fromkeys(scheme for weight, scheme in stored if weight.kind != "norm")),
    )


def weight_bytes(weight: Weight, scheme: str, holds: Format) -> tuple[int, int]:
    """(values, scales) of one weight in ``scheme``."""
    known = parse(scheme)
    if known.family == "float" or weight.kind == "norm":
        half = known.family == "float" and known.weight_bits == 16 and weight.kind != "norm"
        return weight.values * (2 if half else holds.floats), 0
    rows, columns = weight.shape
    if known.family != "integer":
        values = known.payload_bytes(weight.values)
        return values, known.floor_bytes(weight.values, rows) - values
    values = rows * ceil(columns * known.weight_bits / 8)
    return values, _scales(known, rows, columns, holds)


def _scales(scheme: Scheme, rows: int, columns: int, holds: Format) -> int:
    if scheme.group:
        groups = rows * ceil(columns / scheme.group)
        return groups * (holds.group_scale + (holds.floats if scheme.zero_points else 0))
    return (1 if scheme.whole else rows) * holds.channel_scale
