"""`edgebake clean`: free space in the store."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from edgebake.commands import _shared
from edgebake.errors import UsageError

_MOST = 1e9  # GiB or days; beyond it stand typing errors and infinity
_LOGS_S = 30 * 86400  # logs of failed stages are kept as long, unless all goes


def run(
    *, max_gib: float | None, older_than_days: float | None, everything: bool, store: Path | None, as_json: bool
) -> int:
    """Remove leftovers of dead processes and, as asked, entries by size or age."""
    from edgebake.store import Store, holds_store
    from edgebake.store_home import default_root

    if everything and (max_gib is not None or older_than_days is not None):
        raise UsageError(
            "--all empties the store; it goes with no other limit", fix="drop --max-gib / --older-than-days"
        )
    for option, value in (("--max-gib", max_gib), ("--older-than-days", older_than_days)):
        if value is not None and value > _MOST:
            raise UsageError(f"{option} {value:g} is no limit", fix=f"give at most {_MOST:g}")
    root = store or default_root()
    if not holds_store(root) and (store is not None or (root.exists() and any(root.iterdir()))):
        raise UsageError(f"{root} is no store of edgebake", fix="give the --store of your builds; nothing was removed")
    opened = Store(store)
    opened.sweep()
    limit = 0 if everything else None if max_gib is None else int(max_gib * 2**30)
    age = None if older_than_days is None else older_than_days * 86400
    cleaned = opened.clean(max_bytes=limit, older_than_s=age)
    logs = _remove_logs(opened.root, 0 if everything else _LOGS_S)
    left = opened.size_bytes()
    if as_json:
        _shared.print_json({**asdict(cleaned), "logs": logs, "store": str(opened.root), "bytes_left": left})
        return 0
    _shared.say(f"{cleaned}; {_shared.kib_or_mib(left)} left in {opened.root}")
    if limit is None and age is None and left:
        _shared.say("only leftovers of killed builds were looked for: --max-gib, --older-than-days or --all frees more")
    return 0


def _remove_logs(root: Path, older_than_s: float) -> int:
    """Logs of failed stages, and with ``older_than_s`` 0 the notes that `explain` reads; returns how many."""
    doomed = list((root / "log").glob("*.log")) + (list((root / "last").glob("*.json")) if not older_than_s else [])
    now, count = time.time(), 0
    for path in doomed:
        try:
            if now - path.stat().st_mtime >= older_than_s:
                path.unlink()
                count += 1
        except FileNotFoundError:  # another process was quicker
            continue
    return count
