"""Can the limits be measured and met at all, and what must be said about them beforehand?"""

from __future__ import annotations

from collections.abc import Iterator

from edgebake.checks.case import Case
from edgebake.errors import Problem
from edgebake.limits import ENOUGH_DECISIONS
from edgebake.recipe import Component, Limits
from edgebake.scheme import parse, shown


def problems(case: Case) -> Iterator[Problem]:
    """Limits that contradict the samples, each other, or arithmetic."""
    spec = case.unit.spec
    evaluation = spec.samples.evaluation
    for key in quality_limits(spec.limits):
        if evaluation is None:
            what = f"{'.'.join(key)} is limited, but there are no evaluation samples"
            yield Problem(what=what, where=case.where("limits", *key), fix="add samples: {evaluation: ...}")
    yield from _task(case)
    agreement = spec.limits.agreement
    if agreement is not None and agreement.metric != "spearman" and agreement.min < 0:
        what = f"the share of {agreement.metric} decisions that agree cannot be negative"
        yield Problem(what=what, where=case.where("limits", "agreement", "min"), fix="give 0 to 1")
    if agreement is not None and agreement.metric != "binary" and "threshold" in agreement.model_fields_set:
        what = f"threshold: is for binary, the metric is {agreement.metric}"
        yield Problem(what=what, where=case.where("limits", "agreement", "threshold"), fix="remove it")
    yield from _language(case)
    yield from _size(case)


def _language(case: Case) -> Iterator[Problem]:
    """A network with a cache is judged by its text, every other one by its outputs."""
    spec = case.unit.spec
    decodes = spec.model.context is not None
    strange = ("agreement", "task") if decodes else ("language",)
    for key in (key for key in quality_limits(spec.limits) if key[0] in strange):
        name = ".".join(key)
        yield Problem(
            what=f"{name} is no limit for a network {'with' if decodes else 'without'} a key/value cache",
            where=case.where("limits", *key),
            fix="use limits: {language: {top1: 0.98}}" if decodes else "remove it, or give model: {context: ...}",
        )


def quality_limits(limits: Limits) -> tuple[tuple[str, ...], ...]:
    """Keys of the limits that say something about closeness to the float model or about the task."""
    parity = [("parity", key) for key, value in limits.parity if value is not None]
    single = [(key,) for key in ("agreement", "task") if getattr(limits, key) is not None]
    language = [("language", key) for key, value in limits.language if value is not None]
    return (*parity, *single, *language)


def _task(case: Case) -> Iterator[Problem]:
    evaluation = case.unit.spec.samples.evaluation
    if case.unit.spec.limits.task is None or evaluation is None or evaluation.kind in ("file", "python"):
        return
    if evaluation.kind == "images" and evaluation.labels != "none":
        return
    fix = "set labels: filename" if evaluation.kind == "images" else "use images, file or python"
    what = f"a task metric needs labelled samples; {evaluation.kind} has no labels here"
    yield Problem(what=what, where=case.where("limits", "task"), fix=fix)


def smallest_of_float(spec: Component) -> float | None:
    """Share of the float size that the weights alone take at least; None where steps may make them smaller."""
    return None if spec.compress.steps else parse(_narrowest(spec)).weight_bits / 32


def _narrowest(spec: Component) -> str:
    schemes = (spec.compress.scheme, *spec.compress.modules.values())
    return min(schemes, key=lambda name: parse(name).weight_bits)


def _size(case: Case) -> Iterator[Problem]:
    spec = case.unit.spec
    bound, floor = spec.limits.size.of_float, smallest_of_float(spec)
    if bound is not None and floor is not None and bound < floor:
        scheme = shown(_narrowest(spec))
        yield Problem(
            what=f"{bound:g} of the float size cannot be met: {scheme} weights alone are {floor:g} of it",
            where=case.where("limits", "size", "of_float"),
            fix=f"give more than {floor:g}, or choose a scheme with fewer bits",
        )


def warnings(case: Case) -> Iterator[Problem]:
    """What does not stop a build, but what a reader of its numbers must know."""
    spec, name = case.unit.spec, f"{case.unit.recipe}/{case.unit.component}"
    limited = [".".join(key) for key in quality_limits(spec.limits)]
    evaluation, agreement = spec.samples.evaluation, spec.limits.agreement
    if spec.model.weights == "random":
        what = f"{name} has random weights: its numbers say nothing about quality"
        yield Problem(what=what, where=case.where("model", "weights"))
    if evaluation is None:
        return
    if evaluation.noise and limited:
        what = f"{', '.join(limited)} of {name} rest on noise samples, which say nothing about quality"
        yield Problem(what=what, where=case.where("samples", "evaluation"), fix="give real samples")
    elif agreement is None or agreement.metric == "spearman" or _makes_sequences(spec):
        return
    elif evaluation.count < ENOUGH_DECISIONS:
        yield Problem(
            what=f"agreement of {name} rests on {evaluation.count} samples: its confidence interval will be wide",
            where=case.where("samples", "evaluation"),
            fix=f"give {ENOUGH_DECISIONS} or more",
        )


def _makes_sequences(spec: Component) -> bool:
    """May a sample be many calls, each of which decides? Only the samples themselves say how many; reports do, too."""
    inputs = [given for method in spec.all_methods.values() for given in method.values()]
    return len(spec.all_methods) > 1 or any(given.role == "state" for given in inputs)
