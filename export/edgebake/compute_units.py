"""What an artifact gives on each compute unit of the device it runs on, and where its operators are placed.

A device's runtime chooses units by itself; an app may hold it to some. Each is measured on a few calls, for it computes
in arithmetic of its own. Decides nothing: limits are judged on what the runtime chooses.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edgebake import modes

if TYPE_CHECKING:
    from edgebake.reference import Reference

REPETITIONS = 30


class Units(Protocol):
    """The part of ``runclient.Client`` that is needed here."""

    def in_unit(
        self, unit: str, samples: list[int], timed: int, repetitions: int
    ) -> tuple[Mapping[str, Any], list[float]] | str:
        """Outputs by ``<sample>.0.<name>`` and milliseconds of each call on sample ``timed``, or why there are none."""


def measure(names: Sequence[str], recorded: Reference, timed: int, client: Units) -> dict[str, dict[str, Any]]:
    """``measurements["compute_units"]``: parity by output and median time of each unit, or why it has none."""
    samples = modes.chosen(recorded)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        got = client.in_unit(name, samples, timed, REPETITIONS)
        if isinstance(got, str):
            found[name] = {"reason": got}
            continue
        outputs, took = got
        found[name] = {
            "calls": len(samples),
            "outputs": modes.parity(recorded, samples, outputs),
            "median_ms": statistics.median(took),
        }
    return found
