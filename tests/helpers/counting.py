"""A pytest plugin: on how many different inputs each operator of the interpreter gives a result while tests run.

``python -m pytest -p counting --cases FILE ...`` writes ``{operator: {"cases": n, "shapes": n, "edges": n}}``. Cases
are inputs that differ in a value, a type or a size; modes and op sets do not count. Edges are cases with a tensor of
rank 0, or with an axis of size 0 or 1, among what comes out or the inputs of the highest rank.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from edgebake_targets.mil.call import Call, Operator, State


@dataclass
class Seen:
    """Of one operator."""

    cases: set[str] = field(default_factory=set)
    shapes: set[str] = field(default_factory=set)
    edges: set[str] = field(default_factory=set)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, State):
        yield value.value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _shown(value: Any) -> str:
    """Differs where the value does."""
    if isinstance(value, State):
        return _shown(value.value)
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(_shown, value))}]"
    if not isinstance(value, torch.Tensor):
        return repr(value)
    content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return f"{value.dtype}{tuple(value.shape)}{sha256(content).hexdigest()}"


def _sizes(values: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(values)]


def counted(operator: Operator, seen: Seen) -> Operator:
    """``operator``, which notes in ``seen`` what it was called with and did not refuse."""

    def call_it(call: Call) -> Any:
        given, sizes = _shown(sorted(call.inputs.items())), _sizes(tuple(call.inputs.values()))
        result = operator(call)
        if call.blocks:  # they read values that are no inputs
            given += _shown(result)
        seen.cases.add(given)
        seen.shapes.add(str(sizes))
        most = max(map(len, sizes), default=0)
        if any(not shape or min(shape) < 2 for shape in (*_sizes(result), *(s for s in sizes if len(s) == most))):
            seen.edges.add(given)
        return result

    return call_it


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the counts go."""
    parser.addoption("--cases", type=Path, required=True)


class Counts:
    """Wraps the table of operators for the session."""

    def __init__(self, file: Path) -> None:
        self.file, self.seen = file, defaultdict[str, Seen](Seen)

    def pytest_sessionstart(self) -> None:
        """Every test finds operators in this table."""
        from edgebake_targets.mil.operators import operators

        table: Any = operators()
        for name in table:
            table[name] = counted(table[name], self.seen[name])

    def pytest_sessionfinish(self) -> None:
        """Write them."""
        found = {
            name: {"cases": len(seen.cases), "shapes": len(seen.shapes), "edges": len(seen.edges)}
            for name, seen in sorted(self.seen.items())
        }
        self.file.write_text(json.dumps(found, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    """Count from here."""
    config.pluginmanager.register(Counts(config.getoption("--cases")))
