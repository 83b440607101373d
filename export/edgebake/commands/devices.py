"""`edgebake devices`: the device profiles."""

from __future__ import annotations

from collections.abc import Mapping

from edgebake.commands import _shared


def run(*, name: str | None, as_json: bool) -> int:
    """All devices on a line each, or one in full."""
    from edgebake import devices

    found = {n: dict(devices.find(n)) for n in ([name] if name else devices.names())}
    if as_json:
        _shared.print_json(found)
        return 0
    for device, facts in found.items():
        if name is None:
            _shared.say(f"{device:10}{facts.get('title', ''):22}{facts.get('vendor', ''):10}{facts.get('npu', '')}")
            continue
        _shared.say(device)
        for key, value in facts.items():
            if isinstance(value, Mapping):
                _shared.say(f"  {key}:")
                for inner, text in value.items():
                    _shared.say(f"    {inner}: {text}")
            elif key != "name":
                _shared.say(f"  {key}: {value}")
    return 0
