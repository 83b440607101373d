"""The constants of a function: made when first used, kept while they fit a budget, made again where they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from edgebake_targets.mil import values
from edgebake_targets.mil.program import Constant, Operation

BUDGET = 2**29  # bytes of widened and decompressed weights that are kept
_SMALL = 2**16  # always kept: they cost more to make than to hold


@dataclass(frozen=True, kw_only=True, eq=False)
class Lazy:
    """A constant that is not made yet: stored, or an output of an operation on constants (``constexpr_*``)."""

    stored: Constant | None = None
    operation: Operation | None = None
    output: int = 0
    parts: Mapping[str, tuple[Lazy, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Gives the values of lazy constants. ``decompress`` evaluates an operation on the values of its parts."""

    decompress: Callable[[Operation, Mapping[str, Any]], tuple[Any, ...]]
    budget: int = BUDGET
    kept: dict[Lazy, Any] = field(default_factory=dict)
    spent: list[int] = field(default_factory=lambda: [0])

    def value(self, lazy: Lazy) -> Any:
        """The constant's value; it must not be changed."""
        if lazy in self.kept:
            return self.kept[lazy]
        value = self._made(lazy, {})
        cost = _cost(lazy, value)
        if cost <= _SMALL or self.spent[0] + cost <= self.budget:
            self.spent[0] += cost
            self.kept[lazy] = value
        return value

    def _made(self, lazy: Lazy, done: dict[int, tuple[Any, ...]]) -> Any:
        """``done``: results of operations that several parts read, such as a mask and the values it places."""
        if lazy.stored is not None:
            return values.value_of(lazy.stored)
        assert lazy.operation is not None
        if id(lazy.operation) not in done:
            parts = {name: [self._made(part, done) for part in bound] for name, bound in lazy.parts.items()}
            single = {name: part[0] if len(part) == 1 else part for name, part in parts.items()}
            done[id(lazy.operation)] = self.decompress(lazy.operation, single)
        return done[id(lazy.operation)][lazy.output]


def _cost(lazy: Lazy, value: Any) -> int:
    """Bytes of memory beyond those of the mapped file."""
    if lazy.stored is not None:
        return values.bytes_of(lazy.stored)
    return int(value.nbytes) if isinstance(value, torch.Tensor) else 0
