"""What a build would run: every unit with its recipe fully resolved, its stages and its methods. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgebake import devices
from edgebake.fitting import target_misfit
from edgebake.keys import needs_calibration
from edgebake.llm.streaming import streams
from edgebake.llm.tasks import is_decoder
from edgebake.scheme import shown
from edgebake.target import METHODS, find_target, runners_of, support_of
from edgebake.units import Unit


def plan(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One plain mapping (JSON) per checked unit, in their order.

    ``stages`` in the order they run; ``methods`` say which compression method acts where and on which schemes;
    ``missing`` is None or what the toolchain lacks and how to get it; ``recipe`` is the component with every default.
    ``fit`` of a language model: its predicted sizes and on which devices it fits, with the reason where nothing can be
    predicted (``edgebake.llm.fit.document``); None for other networks.
    """
    return [_unit(unit) for unit in units]


def _unit(unit: Unit) -> dict[str, Any]:
    target = find_target(unit.target)
    row = support_of(target, unit.scheme)
    missing = target.missing()
    methods = _methods(unit)
    return {
        "unit": unit.id,
        "folder": str(unit.folder),
        "recipe_name": unit.recipe,
        "component": unit.component,
        "target": unit.target,
        "device": devices.row(unit.device),
        "scheme": unit.scheme,
        "scheme_shown": shown(unit.scheme),
        "kinds": list(row.kinds) if row else [],
        "note": row.note if row else "",
        "format": target.FORMAT,
        "optional": unit.optional,
        "missing": {"reason": missing.reason, "remedy": missing.remedy} if missing else None,
        "calibration": needs_calibration(unit),
        "stages": ["describe", "lower", "reference", "validate"] if streams(unit) else _stages(methods),
        "methods": methods,
        "runners": [{"name": name, "kind": runner.KIND} for name, runner in runners_of(unit.target)],
        "runs_code": _code(unit),
        "options": dict(unit.options),
        "fit": _fit(unit),
        "recipe": unit.spec.model_dump(mode="json", exclude={"targets"}),
    }


def _fit(unit: Unit) -> dict[str, Any] | None:
    if not is_decoder(unit.spec.model):
        return None
    from edgebake.llm import fit

    target = find_target(unit.target)
    known = [devices.find(name) for name in ([unit.device] if unit.device else devices.names())]
    return fit.document(unit, [device for device in known if not target_misfit(unit.target, target, device)])


def _methods(unit: Unit) -> list[dict[str, Any]]:
    """Recipe steps first, then what the schemes need, as the build runs them."""
    target = find_target(unit.target)
    acting: dict[str, list[str]] = {step.method: [] for step in unit.spec.compress.steps}
    in_lower: list[str] = []
    for scheme in dict.fromkeys((unit.scheme, *unit.spec.compress.modules.values())):
        row = support_of(target, scheme)
        if row is not None and row.method:
            acting.setdefault(row.method, []).append(scheme)
        elif scheme != "fp32":
            in_lower.append(scheme)
    found = [{"method": m, "acts_on": METHODS.find(m).ACTS_ON, "schemes": s} for m, s in acting.items()]
    return found + ([{"method": "lower", "acts_on": "artifact", "schemes": in_lower}] if in_lower else [])


def _stages(methods: list[dict[str, Any]]) -> list[str]:
    acts = [method["acts_on"] for method in methods]
    before, after = ["compress"] * ("module" in acts), ["compress"] * ("graph" in acts)
    return ["load", "reference", *before, "trace", *after, "lower", "validate"]


def _code(unit: Unit) -> list[str]:
    """Code that a build of this unit imports because the recipe names it."""
    model, samples = unit.spec.model, unit.spec.samples
    named = [model.path] if model.source in ("python", "exported") else []
    named += [f"{model.remote_code} (its own code)"] if model.remote_code else []
    named += [s.python for s in (samples.calibration, samples.evaluation) if s is not None and s.python]
    return list(dict.fromkeys(named))
