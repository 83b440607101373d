"""Is there such a target, and can it do what the recipe asks: schemes, options, device, methods."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from edgebake import devices, fitting
from edgebake.checks.case import Case, moved
from edgebake.compress import _options as step_options
from edgebake.devices import Device
from edgebake.errors import EdgebakeError, Problem, RecipeError
from edgebake.llm.companions import CONFIG
from edgebake.llm.tasks import is_decoder
from edgebake.scheme import shown
from edgebake.target import (
    METHODS,
    TARGETS,
    Asked,
    Option,
    Support,
    Target,
    calibrating,
    find_target,
    support_of,
    unmet,
)
from edgebake.types import TensorSpec
from edgebake.wording import did_you_mean, said

_TOLD = 8  # more schemes than that are named without what there is to know of each


def problems(case: Case) -> Iterator[Problem]:
    """Everything about the target rule of ``case`` that can be refused by reading ``SUPPORTS`` and ``OPTIONS``."""
    yield from _methods(case)
    if case.unit.target not in TARGETS.names():
        fix = did_you_mean(case.unit.target, TARGETS.names())
        yield Problem(what=f"there is no target {said(case.unit.target)}", where=case.where_rule("target"), fix=fix)
        yield from _device(case)
        return
    try:
        target = find_target(case.unit.target)
    except RecipeError as error:
        yield from moved(error, case.where_rule("target"))
        return
    yield from _default_scheme(case, target)
    yield from _module_schemes(case, target)
    wrong_options = list(_options(case, target))
    yield from wrong_options
    if not wrong_options:
        yield from _needs(case, target)
        yield from _uncalibrated(case, target)
    wrong_device = list(_device(case))
    yield from wrong_device
    if not wrong_options and not wrong_device:
        yield from _refusals(case, target)


def options_of(target: Target, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the target's defaults filled in; numbers in the type of the default."""
    filled: dict[str, Any] = {}
    for option in target.OPTIONS:
        value = given.get(option.name, option.default)
        filled[option.name] = float(value) if isinstance(option.default, float) else value
    return filled


def _default_scheme(case: Case, target: Target) -> Iterator[Problem]:
    scheme, where = case.unit.scheme, case.where("compress", "scheme")
    inner = case.rule.compress.get("scheme")
    if case.rule.scheme is not None and inner is not None:
        what = "the scheme stands twice, as scheme: and under compress:"
        yield Problem(what=what, where=case.where_rule("compress", "scheme"), fix="keep one")
    row = support_of(target, scheme)
    if row is None:
        yield Problem(what=f"{case.unit.target} cannot do {shown(scheme)}", where=where, fix=_instead(case, target))
    elif row.override_only:
        kinds = " and ".join(row.kinds)
        yield Problem(
            what=f"{case.unit.target} does {shown(scheme)} for {kinds} modules only, not for a whole network"
            + (f": {row.note}" if row.note else ""),
            where=where,
            fix=f"name modules in compress.modules, such as {{'*embed*': {scheme}}}; as the scheme: {_able(target)}",
        )


def _module_schemes(case: Case, target: Target) -> Iterator[Problem]:
    for glob, scheme in case.unit.spec.compress.modules.items():
        if scheme != "fp32" and support_of(target, scheme) is None:
            yield Problem(
                what=f"{case.unit.target} cannot do {shown(scheme)}",
                where=case.where("compress", "modules", glob),
                fix=_instead(case, target, scheme),
            )


def _instead(case: Case, target: Target, scheme: str = "") -> str:
    wanted = scheme or case.unit.scheme
    others = [name for name in targets_with(wanted) if name != case.unit.target]
    text = f"it can do {_able(target)}"
    return text + (f"; {wanted} works on {', '.join(others)}" if others else f"; no target does {wanted}")


def _able(target: Target) -> str:
    rows = [row for row in target.SUPPORTS if not row.override_only]
    if len(rows) <= _TOLD:
        return "; ".join(_row(row) for row in rows)
    return ", ".join(shown(row.scheme) for row in rows) + " (`edgebake targets` says more of each)"


def _row(row: Support) -> str:
    return shown(row.scheme) + (f": {row.note}" if row.note else "")


@lru_cache
def targets_with(scheme: str) -> tuple[str, ...]:
    """The targets that take ``scheme`` for a whole recipe."""
    able = []
    for name in TARGETS.names():
        try:
            row = support_of(find_target(name), scheme)
        except RecipeError:  # a plug-in for another contract version: reported where a recipe names it
            continue
        if row is not None and not row.override_only:
            able.append(name)
    return tuple(able)


def _options(case: Case, target: Target) -> Iterator[Problem]:
    known = {option.name: option for option in target.OPTIONS}
    for name, value in case.rule.options.items():
        where = case.where_rule("options", name)
        if name not in known:
            what = f"{case.unit.target} has no option {said(name)}"
            yield Problem(what=what, where=where, fix=did_you_mean(name, known))
        elif wrong := _misfit(known[name], value):
            yield Problem(what=wrong, where=where, fix=f"{name}: {known[name].help}")


def _needs(case: Case, target: Target) -> Iterator[Problem]:
    """Schemes that the options do not allow; where the option is not written, its default does not."""
    options = options_of(target, case.rule.options)
    for scheme, place in _schemes(case).items():
        row = support_of(target, scheme)
        for what, fix in unmet(case.unit.target, row, options) if row else ():
            yield Problem(what=what, where=case.where("compress", *place), fix=fix)


def _uncalibrated(case: Case, target: Target) -> Iterator[Problem]:
    """Options that look at calibration samples where the recipe has none."""
    if case.unit.spec.samples.calibration is not None:
        return
    for option in calibrating(target, case.rule.options):
        yield Problem(
            what=f"{option.name}: {case.rule.options[option.name]} looks at calibration samples, and there are none",
            where=case.where_rule("options", option.name),
            fix=f"add samples: {{calibration: ...}}, or options: {{{option.name}: {option.default}}}",
        )


def _refusals(case: Case, target: Target) -> Iterator[Problem]:
    """What the target itself finds that cannot be, where the recipe says it."""
    for refusal in getattr(target, "refusals", lambda _: ())(_asked(case, target)):
        yield Problem(what=refusal.what, where=_place(case, *refusal.key.split(".", 2)), fix=refusal.fix)


def _place(case: Case, section: str, *names: str) -> str:
    """Where the recipe says what ``Refusal.key`` names."""
    if section == "options":
        return case.where_rule("options", *names)
    if section == "inputs":
        method, name = names
        return case.where(*(("methods", method) if case.unit.spec.methods else ("inputs",)), name)
    places = {
        "device": case.where_rule("device"),
        "dims": case.where("dims"),
        "model": case.where("model", "path"),
        "scheme": case.where("compress", "scheme"),
        "modules": case.where("compress", "modules"),
    }
    return places.get(section, case.where_rule("target"))


def _asked(case: Case, target: Target) -> Asked:
    spec = case.unit.spec
    sets = (spec.samples.evaluation, spec.samples.calibration)
    pixels = next((found for found in sets if found is not None and found.images is not None), None)
    return Asked(
        scheme=case.unit.scheme,
        module_schemes=tuple(dict.fromkeys(spec.compress.modules.values())),
        options=options_of(target, case.rule.options),
        device=devices.row(case.unit.device),
        inputs={
            method: tuple(
                TensorSpec(name=name, shape=given.shape, dtype=given.dtype, role=given.role)
                for name, given in inputs.items()
            )
            for method, inputs in spec.all_methods.items()
        },
        varying=tuple(name for name, dim in spec.dims.items() if dim.min < dim.max),
        channels=len(pixels.mean) if pixels is not None else None,
        sizes={name: dim.sizes for name, dim in spec.dims.items() if dim.sizes},
        widths=_widths(case) if getattr(target, "STREAMS", False) else {},
        config=_config(case) if getattr(target, "STREAMS", False) else {},
    )


def _widths(case: Case) -> Mapping[str, tuple[str, int]]:
    """Of a decoder; empty where its configuration is not here or says too little, which other checks report."""
    if not is_decoder(case.unit.spec.model):
        return {}
    from edgebake.llm import fit

    try:
        return fit.widths(case.unit)
    except EdgebakeError:
        return {}


def _config(case: Case) -> Mapping[str, Any]:
    """As :func:`_widths`, of config.json itself."""
    if not is_decoder(case.unit.spec.model):
        return {}
    from edgebake.llm import fit

    try:
        found = json.loads((fit.configuration(case.unit) / CONFIG).read_text("utf-8"))
    except (EdgebakeError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _misfit(option: Option, value: Any) -> str:
    fits = type(value) is type(option.default) or (isinstance(option.default, float) and type(value) is int)
    if not fits:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type(option.default)]
        return f"must be {kind}, not {said(value)}"
    if option.choices and value not in option.choices:
        return f"must be one of {', '.join(str(choice) for choice in option.choices)}, not {said(value)}"
    return ""


def _device(case: Case) -> Iterator[Problem]:
    """A device that there is not or that does not fit, in the words of ``edgebake devices``."""
    where = case.where_rule("device")
    try:
        device = devices.find(case.unit.device) if case.unit.device else None
    except RecipeError as error:
        yield from moved(error, where)
        return
    try:
        target = find_target(case.unit.target)
    except RecipeError:  # reported where the target is named
        return
    if device is None:
        what = f"{case.unit.target} lowers for one chip, and no device is named" if fitting.needs_one(target) else ""
    else:
        what = fitting.target_misfit(case.unit.target, target, device)
    if what:  # only now: reading all devices takes as long as the rest of a check
        yield Problem(what=what, where=where, fix=fitting.fitting_text(fitting.of_target(target)))
    elif device is not None:
        yield from _schemes_on_device(case, target, device)


def _schemes_on_device(case: Case, target: Target, device: Device) -> Iterator[Problem]:
    """Schemes that the target takes, but not on this device."""
    for scheme, place in _schemes(case).items():
        row = support_of(target, scheme)
        what = fitting.scheme_misfit(case.unit.target, row, device) if row else ""
        if row and what:
            able = [r.scheme for r in target.SUPPORTS if not fitting.scheme_misfit(case.unit.target, r, device)]
            others = fitting.fitting_text(fitting.of_target(target), row.needs_device)
            fix = f"schemes on {device.name}: {', '.join(able) or 'none'}; {others}"
            note = f" ({row.note})" if row.note else ""
            yield Problem(what=what + note, where=case.where("compress", *place), fix=fix)


def _schemes(case: Case) -> dict[str, tuple[str, ...]]:
    """The schemes of ``case`` and where under compress: each is written."""
    modules = case.unit.spec.compress.modules
    return {case.unit.scheme: ("scheme",), **{scheme: ("modules", glob) for glob, scheme in modules.items()}}


def warnings(case: Case) -> Iterator[Problem]:
    """What a checked ``case`` may still stumble over: a device that came with an older system than is asked for."""
    if case.unit.device is None:
        return
    options = options_of(find_target(case.unit.target), case.rule.options)
    if what := fitting.newer_system(options, devices.find(case.unit.device)):
        fix = f"a lower {fitting.MINIMUM_OS} under options, if devices that were not updated must load it"
        yield Problem(what=what, where=case.where_rule("device"), fix=fix)


def _methods(case: Case) -> Iterator[Problem]:
    for position, step in enumerate(case.unit.spec.compress.steps):
        if step.method not in METHODS.names():
            yield Problem(
                what=f"there is no compression method {said(step.method)}",
                where=case.where("compress", "steps", position, "method"),
                fix=did_you_mean(step.method, METHODS.names()),
            )
            continue
        key = ("compress", "steps", position)
        for wrong in step_options.problems(step.method, _of_method(step.method, "OPTIONS", ()), step.options):
            yield replace(wrong, where=case.where(*key, "options", wrong.where))
        before = (s.method for s in case.unit.spec.compress.steps[:position] if s.method in METHODS.names())
        last = next((method for method in before if _of_method(method, "LAST", False)), "")
        if last and _of_method(step.method, "ACTS_ON", "") == "module":
            yield Problem(
                what=f"the step {step.method} behind {last} would take its weights off the integers that it chose",
                where=case.where(*key, "method"),
                fix=f"put {last} last",
            )


def _of_method(method: str, name: str, default: Any) -> Any:
    return getattr(METHODS.find(method), name, default)
