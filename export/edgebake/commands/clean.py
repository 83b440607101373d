"""`edgebake clean`: free space in the store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from edgebake.commands import _shared
from edgebake.errors import UsageError


def run(
    *, max_gib: float | None, older_than_days: float | None, everything: bool, store: Path | None, as_json: bool
) -> int:
    """Remove leftovers of dead processes and, as asked, entries by size or age."""
    from edgebake.store import Store

    if everything and (max_gib is not None or older_than_days is not None):
        raise UsageError(
            "--all empties the store; it goes with no other limit", fix="drop --max-gib / --older-than-days"
        )
    opened = Store(store)
    opened.sweep()
    limit = 0 if everything else None if max_gib is None else int(max_gib * 2**30)
    age = None if older_than_days is None else older_than_days * 86400
    cleaned = opened.clean(max_bytes=limit, older_than_s=age)
    if as_json:
        _shared.print_json({**asdict(cleaned), "store": str(opened.root), "bytes_left": opened.size_bytes()})
        return 0
    left = opened.size_bytes() / 2**20
    _shared.console().print(f"{cleaned}; {left:.1f} MiB left in {opened.root}")
    return 0
