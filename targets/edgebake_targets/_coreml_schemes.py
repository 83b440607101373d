"""What a scheme means for one weight of a Core ML program: its scales or tables, along which axes, and if they fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from edgebake.errors import Problem
from edgebake.scheme import Scheme, parse
from edgebake.types import rule_for


def is_compressed(scheme: str) -> bool:
    """Whether ``scheme`` stores weights as other than floats."""
    return parse(scheme).family != "float"


def quantises_activations(scheme: str) -> bool:
    """Whether products under ``scheme`` read integers whose scales calibration chose."""
    return parse(scheme).needs_calibration


def format_of(scheme: str) -> str:
    """What ``_coreml_constants.format_of`` says of a weight in ``scheme``: ``int4``, ``palette3``, ``sparse-int8``."""
    return _format(parse(scheme))


def _format(scheme: Scheme) -> str:
    if scheme.family == "sparse":
        return f"sparse-{_format(scheme.inner) if scheme.inner else 'float16'}"
    name = {"float": "float", "integer": "int", "palette": "palette"}[scheme.family]
    vector = f"-vector{scheme.vector}" if scheme.vector > 1 else ""
    return f"{name}{scheme.weight_bits}{vector}{'-scaled' if scheme.scaled else ''}"


def counts_of(scheme: str, shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """How many scales or tables a weight of ``shape`` has along each axis; ``axis`` is that of its output channels.

    Scales: one, or one per output channel and group of input channels (the kernel's positions share it, as coremltools
    has it). Tables: one, or one per group of output channels.
    """
    parsed, counts = parse(scheme), [1] * len(shape)
    parsed = parsed.inner or parsed
    if parsed.family == "integer" and not parsed.whole:
        counts[axis] = shape[axis]
    if parsed.group:
        grouped = _grouped_axis(parsed, axis)
        counts[grouped] = shape[grouped] // parsed.group
    return tuple(counts)


def channel_counts(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """How many scales per output channel a weight of ``shape`` has along each axis."""
    return tuple(size if i == axis else 1 for i, size in enumerate(shape))


def numbers_of(scheme: str, shape: Sequence[int], axis: int) -> dict[str, int]:
    """How many tables, scales and values that are not zero a weight of ``shape`` is stored with."""
    parsed, numbers = parse(scheme), {}
    rounded = parsed.inner or parsed
    if parsed.family == "sparse":
        numbers["values"] = parsed.kept(math.prod(shape))
    if rounded.family == "palette":
        numbers["tables"] = math.prod(counts_of(scheme, shape, axis))
    if rounded.family == "integer":
        numbers["scales"] = math.prod(counts_of(scheme, shape, axis))
    if rounded.scaled:
        numbers["scales"] = shape[axis]
    return numbers


def _grouped_axis(scheme: Scheme, axis: int) -> int:
    return axis if scheme.family == "palette" else 1 - axis


def blocks(shape: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The position of each scale or table, and the part of the weight that it holds for."""
    sizes = [size // count for size, count in zip(shape, counts, strict=True)]
    for flat in range(math.prod(counts)):
        position, rest = [], flat
        for count in reversed(counts):
            rest, index = divmod(rest, count)
            position.append(index)
        at = tuple(reversed(position))
        yield at, tuple(slice(i * size, (i + 1) * size) for i, size in zip(at, sizes, strict=True))


def misfits(weights: Iterable[tuple[str, str, Sequence[int], int]]) -> Iterator[Problem]:
    """A problem for each (module, scheme, shape, axis) whose groups do not divide: coremltools leaves it float."""
    for module, name, shape, axis in weights:
        scheme = parse(name)
        group = scheme.stay[1] if scheme.stay else scheme.group or scheme.vector
        size = shape[_grouped_axis(scheme, axis)]
        if size % group:
            channels = "output channels" if scheme.family == "palette" else "input channels"
            yield Problem(
                what=f"{name} needs {channels} divisible by {group}, but {module} has {size}",
                where="compress",
                fix=f"give it a scheme without groups: {rule_for(module, _ungrouped(scheme))}",
            )


def _ungrouped(scheme: Scheme) -> str:
    if scheme.stay:
        return scheme.inner.name if scheme.inner else "fp16"
    return scheme.name.replace(f"g{scheme.group}", "").replace(f"v{scheme.vector}", "")
