"""What a target is asked for where a test lowers without a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgebake.target import LowerRequest
from edgebake.types import Assignment, SampleSet


def defaults(target: Any) -> dict[str, Any]:
    """The target's options as a recipe that says nothing gives them."""
    return {option.name: option.default for option in target.OPTIONS}


def lower_request(
    folder: Path,
    options: Mapping[str, Any],
    *,
    scheme: str = "fp32",
    assignment: Assignment | None = None,
    calibration: SampleSet | None = None,
) -> LowerRequest:
    """A request for no device; without an assignment, no module is compressed."""
    return LowerRequest(
        unit="test",
        scheme=scheme,
        assignment=assignment or Assignment(schemes={}, kinds={}),
        options=options,
        device=None,
        calibration=calibration,
        folder=folder,
    )
