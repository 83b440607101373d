"""Which targets and schemes fit a device, and why others do not: what targets ask of devices held against its facts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgebake import devices
from edgebake.devices import Device
from edgebake.errors import RecipeError
from edgebake.target import TARGETS, Needs, Support, Target, find_target
from edgebake.wording import listed, written

MINIMUM_OS = "minimum_os"  # the option that every target calls so whose artifacts ask for a system


@dataclass(frozen=True, kw_only=True)
class SchemeFit:
    """A scheme of a target on a device: why it does not fit, or what it asks for besides.

    ``settings``: options that must have one of these values and by default do not. ``aside``: what to know, such as a
    system newer than the one that the device came with.
    """

    scheme: str
    why_not: str = ""
    settings: Needs
    aside: str = ""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A target on a device: why it does not fit, or its schemes for whole networks, one by one."""

    target: str
    why_not: str = ""
    schemes: tuple[SchemeFit, ...] = ()


def fits(device: Device) -> tuple[Fit, ...]:
    """Every installed target on ``device``."""
    found = []
    for name in TARGETS.names():
        try:
            found.append(_fit(name, find_target(name), device))
        except RecipeError as error:  # a plug-in for another contract version: it says so itself
            found.append(Fit(target=name, why_not=error.problems[0].what))
    return tuple(found)


def target_misfit(name: str, target: Target, device: Device) -> str:
    """Why nothing that ``target`` makes runs on ``device``; empty when it does."""
    why = _misfit(of_target(target), device)
    return f"{name} does not run on {_named(device)}: {why}" if why else ""


def scheme_misfit(name: str, row: Support, device: Device) -> str:
    """Why the scheme of ``row`` does not, though others of the target may; empty when it does."""
    why = _misfit(row.needs_device, device)
    return f"{name} does not take {row.scheme} on {_named(device)}: {why}" if why else ""


def needs_one(target: Target) -> bool:
    """Whether ``target`` lowers for one device only, so that a recipe must name it."""
    return () in of_target(target).values()


def fitting(*needs: Needs) -> list[str]:
    """Names of the devices that meet all of ``needs``."""
    every = (devices.find(name) for name in devices.names())
    return [device.name for device in every if not any(_misfit(each, device) for each in needs)]


def fitting_text(*needs: Needs, most: int = 24) -> str:
    """The fix of a misfit: the devices that do fit."""
    names = fitting(*needs)
    return f"devices that fit: {listed(names, most)}" if names else "no device in `edgebake devices` fits"


def newer_system(options: Mapping[str, Any], device: Device) -> str:
    """What to know when an artifact asks for a newer system than ``device`` came with; empty when it does not."""
    asked, floor = options.get(MINIMUM_OS), device.facts.get("os_floor")
    if not _is_newer(asked, floor):
        return ""
    return f"{_named(device)} came with {floor}; the artifact asks for {asked} or newer, so that some must be updated"


def of_target(target: Target) -> Needs:
    """What ``target`` needs of a device; nothing when it says nothing."""
    found: Needs = getattr(target, "DEVICES", {})
    return found


def _fit(name: str, target: Target, device: Device) -> Fit:
    if why_not := target_misfit(name, target, device):
        return Fit(target=name, why_not=why_not)
    rows = [row for row in target.SUPPORTS if not row.override_only]
    return Fit(target=name, schemes=tuple(_scheme_fit(name, target, row, device) for row in rows))


def _scheme_fit(name: str, target: Target, row: Support, device: Device) -> SchemeFit:
    defaults = {option.name: option.default for option in target.OPTIONS}
    settings = {key: values for key, values in row.needs.items() if defaults[key] not in values}
    asked = {key: min(values, key=_generation) if key == MINIMUM_OS else values[0] for key, values in settings.items()}
    return SchemeFit(
        scheme=row.scheme,
        why_not=scheme_misfit(name, row, device),
        settings=settings,
        aside=newer_system({**defaults, **asked}, device),
    )


def _misfit(needs: Needs, device: Device) -> str:
    known = device.row
    for key, values in needs.items():
        if key not in known:
            return f"its {key} is not known ({device.unknown.get(key, f'chips of {device.vendor} have none')})"
        if values and known[key] not in values:
            return f"its {key} is {written(known[key])}, not {' or '.join(map(written, values))}"
    return ""


def _is_newer(system: object, floor: object) -> bool:
    """Whether ``system`` came after ``floor``; never so for systems of two families or names that say no number."""
    (family, number), (other, oldest) = _generation(system), _generation(floor)
    return family == other != "" and number > oldest


def _generation(system: object) -> tuple[str, int]:
    """Family and number of a system: Apple brought iOS 18 and macOS 15 out together, and iOS 26 and macOS 26."""
    found = re.fullmatch(r"(Android|iOS|iPadOS|macOS)([0-9]+)", str(system))
    if found is None:
        return "", 0
    number = int(found[2])
    if found[1] == "Android":
        return "android", number
    return "apple", number + 3 if found[1] == "macOS" and number < 26 else number


def _named(device: Device) -> str:
    return f"{device.name} ({device.title})"
