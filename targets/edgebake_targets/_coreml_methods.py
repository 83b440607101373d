"""Converts every method of a component, writes the packages, and records what they hold beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgebake.target import LowerRequest
from edgebake.types import Traced
from edgebake_targets import _coreml, _coreml_activations, _coreml_checks
from edgebake_targets._coreml_functions import function_of, merge
from edgebake_targets._coreml_package import Package, Place, open_package, places_of
from edgebake_targets._coreml_search import Found, keeping
from edgebake_targets._coreml_weights import Held

_RECORDED = ("packages", "modules", "states", "inside", "images", "activations")


@dataclass(frozen=True, kw_only=True)
class Written:
    """``states``: buffers by state and by place; ``activations``: what products read, by weight and place.

    ``modules``: those whose weights are in the packages. ``kept``: those that compute in float32 on request.
    """

    packages: tuple[str, ...]
    states: Mapping[str, Mapping[str, str]]
    activations: Mapping[str, Mapping[str, Any]]
    modules: frozenset[str]
    decompositions: frozenset[str]
    kept: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class _Method:
    converted: _coreml.Converted
    named: Mapping[str, Held]
    images: Mapping[str, Any]


def write(
    parts: Mapping[str, Traced],
    request: LowerRequest,
    images: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Found],
    facts: Sequence[Mapping[str, Any]] = (),
) -> Written:
    """Write the packages of ``parts``, whose signatures are the lowered ones, into the folder of ``request``.

    ``parts``: one of the name ``model``, or those that are called one after the other, of which the record keeps the
    ``facts``.
    """
    checks: dict[str, Any] = {"version": _coreml_checks.VERSION, **{part: {} for part in _RECORDED}}
    packages: dict[str, None] = {}
    modules, decompositions, kept = set[str](), set[str](), set[str]()
    for stem, traced in parts.items():
        done, places = _packages(traced, request, images, found, stem)
        for part, rows in _record(done, places).items():
            checks[part].update(rows)
        packages |= dict.fromkeys(place.path.name for place in places.values())
        modules |= {m for each in done.values() for held in each.named.values() for m in held.modules}
        decompositions |= {each.converted.decomposition for each in done.values()}
        kept |= {module for each in done.values() for module in each.converted.kept}
    if facts:
        checks["parts"] = [dict(row) for row in facts]
    _coreml_checks.write_checks(request.folder / _coreml_checks.CHECKS_FILE, checks)
    return Written(
        packages=tuple(packages),
        states=checks["states"],
        activations=checks["activations"],
        modules=frozenset(modules),
        decompositions=frozenset(decompositions),
        kept=frozenset(kept),
    )


def _packages(
    traced: Traced,
    request: LowerRequest,
    images: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Found],
    stem: str,
) -> tuple[dict[str, _Method], dict[str, Place]]:
    names = list(traced.programs)
    together = len(names) > 1 and request.options["minimum_os"] == "iOS18"
    done: dict[str, _Method] = {}
    with tempfile.TemporaryDirectory(prefix="edgebake-") as scratch:
        folder = Path(scratch) if together else request.folder
        entry = folder / (f"{stem}.mlpackage" if len(names) == 1 else f"{names[0]}.mlpackage")
        places = places_of(entry, names)
        for name in names:
            asked = keeping(request, found[name].modules)
            method = traced.signature.methods[name]
            converted = _coreml.convert(traced, name, method, asked, images[name])
            named = _coreml.compress(converted)
            _coreml.write(converted, request, places[name].path)
            done[name] = _Method(
                converted=replace(converted, program=None, held=()),  # it holds every weight, and the next one comes
                named={key: replace(held, operation=None) for key, held in named.items()},
                images=images[name],
            )
            del converted, named
        if together:
            whole = request.folder / ("methods.mlpackage" if stem in names else f"{stem}.mlpackage")
            merge(whole, {name: place.path for name, place in places.items()})
            places = places_of(whole, names)
    return done, places


def _record(done: Mapping[str, _Method], places: Mapping[str, Place]) -> dict[str, dict[str, Any]]:
    """What is kept of every method, by part and place; StageFailed for what is not as it was converted."""
    checks: dict[str, dict[str, Any]] = {part: {} for part in _RECORDED}
    opened: dict[Path, Package] = {}
    for name, method in done.items():
        place = places[name]
        whole = opened[place.path] = opened.get(place.path) or open_package(place.path)
        package = function_of(whole, place.function) if place.function else whole
        converted = method.converted
        checks["packages"][place.key] = _coreml_checks.record(package, method.named)
        checks["activations"][place.key] = _coreml_activations.record(package, method.named, converted.activations)
        checks["states"][place.key] = _coreml_checks.record_states(package, converted.states)
        checks["modules"][place.key] = _coreml_checks.record_modules(package, converted.modules)
        checks["inside"][place.key] = _coreml_checks.record_inside(package, converted.inside)
        checks["images"][place.key] = method.images
    return checks
