"""`edgebake devices`: the device profiles, and what fits them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared
from edgebake.wording import written

if TYPE_CHECKING:
    from edgebake.devices import Device
    from edgebake.fitting import Fit, SchemeFit


def run(*, name: str | None, as_json: bool) -> int:
    """All devices on a line each, or one in full with the targets and schemes that fit it."""
    from edgebake import devices

    found = [devices.find(n) for n in ((name,) if name else devices.names())]
    if as_json:
        _shared.print_json({device.name: _plain(device) for device in found})
        return 0
    for line in _in_full(found[0]) if name else _table(found):
        _shared.say(line)
    return 0


def _plain(device: Device) -> dict[str, Any]:
    from edgebake import fitting

    targets = {
        fit.target: {
            "fits": not fit.why_not,
            "why_not": fit.why_not,
            "schemes": {
                s.scheme: {"fits": not s.why_not, "why_not": s.why_not, "options": s.settings, "aside": s.aside}
                for s in fit.schemes
            },
        }
        for fit in fitting.fits(device)
    }
    return {**device.row, "sources": device.sources, "unknown": device.unknown, "targets": targets}


def _table(found: list[Device]) -> Iterator[str]:
    heads = ("device", "", "vendor", "NPU", "GiB", "GB/s")
    rows = [heads, *((d.name, d.title, d.vendor, *map(_fact(d), ("npu", "ram_gib", "bandwidth_gb_s"))) for d in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        yield "  ".join((*left, *right)).rstrip()


def _fact(device: Device) -> Any:
    return lambda key: written(device.facts[key]) if key in device.facts else "-"


def _in_full(device: Device) -> Iterator[str]:
    from edgebake import fitting
    from edgebake.devices import FACTS

    yield f"{device.name}: {device.title}, {device.vendor}, {device.platform}"
    for key, value in device.facts.items():
        yield f"  {key} {written(value)}: {FACTS[key].help}"
        yield f"    {device.sources[key]}"
    for key, why in device.unknown.items():
        yield f"  {key} not known: {why}"
    yield "targets"
    for fit in fitting.fits(device):
        yield from _of_target(fit)


def _of_target(fit: Fit) -> Iterator[str]:
    if fit.why_not:
        yield f"  -  {fit.why_not}"
        return
    able = [scheme for scheme in fit.schemes if not scheme.why_not]
    yield f"  ok {fit.target}: {', '.join(s.scheme for s in able if not s.settings) or 'only with the options below'}"
    groups: dict[str, list[str]] = {}
    for scheme in able:
        if words := _asks(scheme):
            groups.setdefault(words, []).append(scheme.scheme)
    for words, schemes in groups.items():
        yield f"       {', '.join(schemes)}: {words}"
    for scheme in fit.schemes:
        if scheme.why_not:
            yield f"     - {scheme.why_not}"


def _asks(scheme: SchemeFit) -> str:
    words = [f"with {name} {' or '.join(map(written, values))}" for name, values in scheme.settings.items()]
    return "; ".join([*words, scheme.aside] if scheme.aside else words)
