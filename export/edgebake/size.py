"""Where an artifact's bytes go, held against the smallest size that its schemes allow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgebake.scheme import parse
from edgebake.types import COMPILED, Assignment, Inspection, Module, WeightRecord

TOLERANCE = 0.02  # an artifact this close to its floor needs no explanation, nor does a smaller cause
SHOWN_NAMES = 3
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Smallest bytes in theory: ``packed`` integers and palette indices, ``scales`` with tables, ``floats``."""

    packed: int
    scales: int
    floats: int

    @property
    def total(self) -> int:
        return self.packed + self.scales + self.floats


def measure(
    inspection: Inspection,
    *,
    disk_bytes: int,
    float_bytes: int,
    modules: Sequence[Module] = (),
    assignment: Assignment | None = None,
    scheme: str = "fp32",
    channels: Mapping[str, int] | None = None,
    compiled_from: int | None = None,
) -> dict[str, Any]:
    """``measurements["size"]``.

    ``disk_bytes``: all files of the artifact; those that ``inspection`` did not count are ``beside`` it.
    ``float_bytes``: the model's weights in float32. ``scheme``: the recipe's default. ``channels``: output channels by
    module, read off the artifact's own constants where not given. ``compiled_from``: bytes of the weights and scales
    that compiled parts were made from, where the target knows them.
    ``reasons`` say why the artifact is not smaller, largest first: what lies above the floor (when that is over 2 %)
    and what the target leaves in float.
    """
    schemes = assignment.schemes if assignment else {}
    records = [record for record in inspection.weights if record.dtype != COMPILED]
    floor = floor_of(records, modules, schemes, float_bytes=float_bytes, scheme=scheme, channels=channels or {})
    weights = sum(record.bytes for record in records)
    scales = sum(record.scale_bytes for record in records)
    compiled = sum(record.bytes for record in inspection.weights if record.dtype == COMPILED)
    beside = max(0, disk_bytes - inspection.total_bytes)
    graph = max(0, disk_bytes - weights - scales - compiled - beside)
    reasons = list(_left_float(modules, schemes, scheme))
    if disk_bytes > floor.total * (1 + TOLERANCE):
        reasons += [*_above_floor(records, floor), (f"graph, programs and metadata {_mib(graph)}", graph)]
        reasons += [*_compiled(compiled, compiled_from), (f"files beside the one that runs {_mib(beside)}", beside)]
    smallest = TOLERANCE * floor.total
    told = sorted((reason for reason in reasons if reason[1] > smallest), key=lambda reason: -reason[1])
    return {
        "bytes": disk_bytes,
        "weights": weights,
        "scales": scales,
        "graph": graph,
        "compiled": compiled,
        "compiled_from": compiled_from,
        "beside": beside,
        "float_bytes": float_bytes,
        "of_float": disk_bytes / float_bytes if float_bytes else None,
        "floor_bytes": floor.total,
        "reasons": [{"why": why, "bytes": size} for why, size in told],
        "dtypes": _dtypes(inspection.weights),
    }


def floor_of(
    records: Sequence[WeightRecord],
    modules: Sequence[Module],
    schemes: Mapping[str, str],
    *,
    float_bytes: int,
    scheme: str,
    channels: Mapping[str, int],
) -> Floor:
    """Smallest bytes of ``modules`` in their schemes, and of everything else in float."""
    packed = scales = floats = 0
    known = {**_channels(records, modules), **channels}
    inventory, rest = _once(modules, float_bytes)
    for module in inventory:
        chosen = parse(schemes.get(module.name, "fp32"))
        payload = chosen.payload_bytes(module.parameters)
        if chosen.family == "float":
            floats += payload
        else:
            packed += payload
            scales += chosen.floor_bytes(module.parameters, known.get(module.name, 0)) - payload
    return Floor(packed=packed, scales=scales, floats=floats + rest * (2 if scheme == "fp16" else 4))


def _once(modules: Sequence[Module], float_bytes: int) -> tuple[list[Module], int]:
    """Modules with tied weights listed once, and how many parameters belong to no module (norms, positions)."""
    inventory = list(modules)
    rest = float_bytes // 4 - sum(module.parameters for module in inventory)
    if rest < 0:
        # a tied weight (token embedding and output layer) counts once in float_bytes and twice in the inventory
        sizes = Counter(module.parameters for module in inventory)
        tied = [m for m in inventory if sizes[m.parameters] > 1 and m.parameters <= -rest + m.parameters // 100]
        if tied:
            largest = max(tied, key=lambda module: module.parameters)
            inventory.remove(largest)
            rest += largest.parameters
    return inventory, max(0, rest)


def _channels(records: Sequence[WeightRecord], modules: Sequence[Module]) -> dict[str, int]:
    """Output channels of each module: those of a constant with as many values, bias included or not."""
    by_count: dict[int, int] = {}
    for record in records:
        if len(record.shape) > 1:
            out = record.shape[0] if len(record.shape) > 2 else max(record.shape)
            by_count[math.prod(record.shape)] = out
            by_count.setdefault(math.prod(record.shape) + out, out)
    return {module.name: by_count[module.parameters] for module in modules if module.parameters in by_count}


def _above_floor(records: Sequence[WeightRecord], floor: Floor) -> Iterator[tuple[str, int]]:
    copies = duplicates(records)
    doubled = sum(size for _, size in copies)
    if copies:
        yield f"the same tensor more than once: {_names([name for name, _ in copies])} {_mib(doubled)}", doubled
    counted = _without_copies(records)
    floats = [record for record in counted if record.dtype in FLOATS]
    excess = sum(record.bytes for record in floats) - floor.floats
    if excess > 0:
        names = _names([r.name for r in sorted(floats, key=lambda r: -r.bytes)])
        yield f"weights kept in float beyond what the schemes say: {names} {_mib(excess)}", excess
    packed = [record for record in counted if record.dtype not in FLOATS]
    wide = sum(record.bytes for record in packed) - floor.packed
    if wide > 0 and floor.packed:
        dtypes = _names([dtype for dtype, _ in Counter(r.dtype for r in packed).most_common()])
        yield f"weights stored wider than their scheme, as {dtypes} {_mib(wide)}", wide
    scales = sum(record.scale_bytes for record in records) - floor.scales
    if scales > 0:
        yield f"scales, zero points and tables above theory {_mib(scales)}", scales


def _compiled(size: int, made_from: int | None) -> Iterator[tuple[str, int]]:
    if size and made_from is None:
        yield f"compiled parts, whose weights and programs cannot be told apart {_mib(size)}", size
    elif size:
        more = size - (made_from or 0)
        yield f"compiled parts, above the weights they were made from {_mib(more)}", more


def duplicates(records: Sequence[WeightRecord]) -> list[tuple[str, int]]:
    """(name, bytes) of every constant whose payload another one already holds, largest first."""
    seen: set[str] = set()
    copies = []
    for record in records:
        if record.digest and record.digest in seen and record.bytes:
            copies.append((record.name, record.bytes))
        seen.add(record.digest)
    return sorted(copies, key=lambda copy: -copy[1])


def _without_copies(records: Sequence[WeightRecord]) -> list[WeightRecord]:
    unique = {record.digest or f"\0{i}": record for i, record in enumerate(records)}
    return list(unique.values())


def _left_float(modules: Sequence[Module], schemes: Mapping[str, str], scheme: str) -> Iterator[tuple[str, int]]:
    """Modules that stay wider than the recipe's default scheme, because the target cannot or a rule says so."""
    default = parse(scheme)
    if default.family == "float":
        return
    for wide in ("fp32", "fp16"):
        kept = [m for m in modules if schemes.get(m.name, "fp32") == wide]
        size = sum(m.parameters for m in kept) * parse(wide).weight_bits // 8
        if kept:
            names = _names([m.name for m in sorted(kept, key=lambda m: -m.parameters)])
            yield f"stays {wide}: {names} {_mib(size)}", size


def _dtypes(records: Sequence[WeightRecord]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for record in sorted(records, key=lambda r: r.dtype):
        entry = found.setdefault(record.dtype, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += record.bytes
    return found


def _names(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = len(unique) - SHOWN_NAMES
    return ", ".join(unique[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _mib(size: int) -> str:
    return f"({size / 2**20:.1f} MiB)" if size >= 2**17 else f"({size / 2**10:.1f} KiB)"
