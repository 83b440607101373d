"""Choosing among units by globs, as ``--only`` does."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from edgebake.errors import UsageError
from edgebake.llm.streaming import streams
from edgebake.units import Unit
from edgebake.wording import said


def _names(unit: Unit) -> tuple[str, ...]:
    """Ways to name a unit: in full, without component, without scheme."""
    return unit.id, unit.id.replace(f"/{unit.component}@", "@", 1), f"{unit.recipe}@{unit.target}"


def select(units: Sequence[Unit], only: Sequence[str]) -> tuple[Unit, ...]:
    """Units whose id matches one of the globs; all when there is none. UsageError when a glob matches nothing."""
    for glob in only:
        if not any(fnmatchcase(name, glob) for unit in units for name in _names(unit)):
            wider = any(fnmatchcase(name.lower(), f"*{glob.lower()}*") for unit in units for name in _names(unit))
            hint = f"did you mean '*{glob.lower()}*'? " if glob and wider else ""
            raise UsageError(
                f"--only {said(glob)} matches none of the {len(units)} artifacts",
                fix=f"{hint}they are: " + ", ".join(unit.id for unit in units),
            )
    return tuple(u for u in units if not only or any(fnmatchcase(n, g) for n in _names(u) for g in only))


def within_memory(units: Sequence[Unit], memory_mib: float | None) -> list[Unit]:
    """``units``, saying what is not run of those that are lowered from files: it would take more than the memory.

    ``memory_mib``: what a worker may use, None for this machine's memory.
    """
    if not any(map(streams, units)):
        return list(units)
    from edgebake.llm import fit

    return [fit.within_memory(unit, memory_mib) for unit in units]
