"""The grammar of scheme names: weights first, then granularity, then activations.

``fp32`` ``fp16``                      float weights and activations
``w<bits>[t|g<group>[z]][a<bits>[d]]`` integer weights per channel, per group, or with ``t`` one scale for all; with
                                       ``z`` each group has a zero point, too; activations static, or dynamic with ``d``
``palette<bits>[g<group>][s]``         weights as indices into a table of 2**bits values, one or one per group;
                                       ``s``: of weights divided by a scale per output channel
``palette<bits>v<size>``               each index stands for ``size`` neighbouring output channels: 2**bits vectors
``sparse<percent>[-<inner>]``          that share of each weight is zero (the smallest values), the others are float16,
                                       or in the scheme ``inner``: ``sparse50-w8``, ``sparse50-palette4``
``sparse<n>of<m>[-<inner>]``           of every m neighbouring input channels n stay: ``sparse2of4``

``w8a8d`` reads: 8-bit weights per channel, 8-bit activations, scales chosen at run time (dynamic). A group of integers
counts input channels that share a scale; a group of palettes counts output channels that share a table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ALIASES = {
    "8da4w": "w4g32a8d",
    "8da8w": "w8a8d",
    "qd8": "w8a8d",
    "qs8": "w8a8",
    "int8wo": "w8",
    "int4wo": "w4g32",
    "q4_1": "w4g32z",
    "8a8w": "w8a8",
    "16a8w": "w8a16",
    "16a4w": "w4a16",
    "default_a8w8": "w8a8",
    "default_a16w8": "w8a16",
    "dynamic_wi8_afp32": "w8a8d",
    "weight_only_wi8_afp32": "w8",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "pal1": "palette1",
    "pal2": "palette2",
    "pal3": "palette3",
    "pal4": "palette4",
    "pal6": "palette6",
    "pal8": "palette8",
    "2:4": "sparse2of4",
}

_FLOAT = re.compile(r"fp(32|16)")
_PALETTE = re.compile(r"palette([1-8])(?:v([2-9]|1[0-6])|(?:g([1-9]\d*))?(s)?)")
_SPARSE = re.compile(r"sparse(?:([1-9]\d?)|([1-9]\d*)of([1-9]\d*))(?:-(.+))?")
_INTEGER = re.compile(r"w(\d+)(?:g(\d+)(z)?|(t))?(?:a(\d+)(d)?)?")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A decoded scheme.

    ``group``: how many input channels share a scale (None: one scale per output channel), or, of palettes, how many
    output channels share a table (None: one table per weight).
    """

    name: str
    family: str  # "float", "integer", "palette", "sparse"
    weight_bits: int
    group: int | None = None
    whole: bool = False  # of "integer": one scale for the whole weight
    zero_points: bool = False  # of "integer": each group has one, so that its values need not lie around zero
    activation_bits: int | None = None  # None: activations stay float
    dynamic: bool = False
    zero_percent: int = 0  # of each weight's values, rounded down; the others and one bit for each value are stored
    stay: tuple[int, int] | None = None  # (n, m): of every m neighbouring input channels, n are stored
    inner: Scheme | None = None  # of "sparse": how what is stored is rounded; None: float16
    vector: int = 1  # of "palette": how many neighbouring output channels an index stands for
    scaled: bool = False  # of "palette": the table holds for weights that are divided by a scale per output channel

    @property
    def needs_calibration(self) -> bool:
        """Static activations need ranges seen on calibration samples."""
        return self.activation_bits is not None and not self.dynamic

    @property
    def palette(self) -> Scheme | None:
        """The scheme of the palette, of all values or of those that stay; None without one."""
        return self.inner.palette if self.inner else self if self.family == "palette" else None

    def kept(self, weights: int) -> int:
        """How many of ``weights`` values are stored."""
        if self.stay:
            return weights * self.stay[0] // self.stay[1]
        return weights - weights * self.zero_percent // 100

    def payload_bytes(self, weights: int) -> int:
        """Smallest size of ``weights`` values, without scales, tables and masks."""
        return (self.kept(weights) // self.vector * self.weight_bits + 7) // 8

    def floor_bytes(self, weights: int, channels: int) -> int:
        """Smallest size of ``weights`` values in ``channels`` output channels: payload plus float32 scales or table.

        Zero points count as float32, too.
        """
        payload = self.payload_bytes(weights)
        if self.family == "float":
            return payload
        if self.family == "sparse":
            beside = self.inner.floor_bytes(0, channels) if self.inner else 0
            return payload + (weights + 7) // 8 + beside
        if self.family == "palette":
            tables = max(1, channels // self.group) if self.group else 1
            table = 2 * self.vector * (1 << self.weight_bits)
            return payload + tables * table + (2 * channels if self.scaled else 0)
        groups = weights // self.group if self.group else 1 if self.whole else channels
        return payload + 4 * groups * (2 if self.zero_points else 1)


def canonical(name: str) -> str:
    """The canonical name of ``name``, which may be an alias of the ecosystem."""
    lowered = name.strip().lower()
    return ALIASES.get(lowered, lowered)


def aliases_of(name: str) -> tuple[str, ...]:
    """Other names of a canonical scheme."""
    return tuple(alias for alias, target in ALIASES.items() if target == name)


def shown(name: str) -> str:
    """The canonical name with its best-known alias beside it: ``w4g32a8d (8da4w)``."""
    known = aliases_of(name)
    return f"{name} ({known[0]})" if known else name


def parse(name: str) -> Scheme:
    """Decode ``name`` (canonical or alias); ValueError with the grammar when it is not one."""
    text = canonical(name)
    if match := _FLOAT.fullmatch(text):
        return Scheme(name=text, family="float", weight_bits=int(match[1]))
    if match := _PALETTE.fullmatch(text):
        bits, vector, channels, scaled = match.groups()
        return Scheme(
            name=text,
            family="palette",
            weight_bits=int(bits),
            group=int(channels) if channels else None,
            vector=int(vector or 1),
            scaled=bool(scaled),
        )
    if (match := _SPARSE.fullmatch(text)) and (sparse := _sparse(text, *match.groups())):
        return sparse
    if match := _INTEGER.fullmatch(text):
        bits, group, zero_points, whole, activations, dynamic = match.groups()
        if int(bits) in (2, 3, 4, 8, 16) and (group is None or int(group) > 0):
            return Scheme(
                name=text,
                family="integer",
                weight_bits=int(bits),
                group=int(group) if group else None,
                whole=bool(whole),
                zero_points=bool(zero_points),
                activation_bits=int(activations) if activations else None,
                dynamic=bool(dynamic),
            )
    raise ValueError(
        f"{name!r} is not a scheme; write fp32, fp16, palette4, or w<bits>[t|g<group>[z]][a<bits>[d]] "
        "such as w8, w8a8, w8a8d, w4g32a8d"
    )


def _sparse(name: str, percent: str | None, stay: str | None, of: str | None, inner: str | None) -> Scheme | None:
    """None where the numbers do not go together, or ``inner`` is neither integers per channel nor one palette."""
    within = parse(inner) if inner else None
    if within and (within.family not in ("integer", "palette") or within.group or within.activation_bits):
        return None
    if within and (within.scaled or within.whole or within.vector > 1 or within.name != inner):
        return None
    if stay and of and not int(stay) < int(of):
        return None
    return Scheme(
        name=name,
        family="sparse",
        weight_bits=within.weight_bits if within else 16,
        zero_percent=int(percent or 0),
        stay=(int(stay), int(of)) if stay and of else None,
        inner=within,
    )
