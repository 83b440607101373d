"""`edgebake devices`: the device profiles."""

from __future__ import annotations

from edgebake.commands import _shared


def run(*, name: str | None, as_json: bool) -> int:
    """All devices on a line each, or one in full."""
    from edgebake import devices

    found = {n: dict(devices.find(n)) for n in ([name] if name else devices.names())}
    if as_json:
        _shared.print_json(found)
        return 0
    out = _shared.console()
    for device, facts in found.items():
        if name is None:
            out.print(f"{device:12} {facts.get('title', facts.get('name', ''))}")
            continue
        out.print(device)
        for key, value in facts.items():
            out.print(f"  {key}: {value}")
    return 0
