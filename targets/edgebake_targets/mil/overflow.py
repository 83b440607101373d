"""Finds values inside a program that left the range of their type."""

from __future__ import annotations

from typing import Any

import torch

from edgebake_targets.mil.evaluate import Watch
from edgebake_targets.mil.program import Operation


def not_finite(found: dict[str, str]) -> Watch:
    """A watch for ``MilModel.predict`` that notes in ``found``: name of a value that is not finite -> its operator.

    An infinity is not always a fault: masks of attention are made of it. Compare with what mode ``fp32`` finds.
    """

    def watch(operation: Operation, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            found.setdefault(name, operation.operator)

    return watch
