"""A network with a key/value cache: do inputs, samples and target go with ``model.context``?"""

from __future__ import annotations

from collections.abc import Iterator

from edgebake.checks.case import Case
from edgebake.errors import Problem, RecipeError
from edgebake.recipe import DECODER_INPUTS
from edgebake.target import TARGETS, find_target
from edgebake.wording import said

_SHAPES = "inputs: {tokens: {shape: [1, seq], dtype: int64}, input_pos: {shape: [1], dtype: int64}}"


def problems(case: Case) -> Iterator[Problem]:
    """What contradicts ``context``; nothing where the recipe gives none."""
    spec = case.unit.spec
    context = spec.model.context
    if context is None:
        return
    if spec.model.task not in (None, "text-generation", "causal-lm"):
        what = f"a key/value cache is for text-generation, the task is {said(spec.model.task)}"
        yield Problem(what=what, where=case.where("model", "task"), fix="remove context, or the task")
    if case.unit.target in TARGETS.names() and not _decodes(case.unit.target):
        *others, last = (name for name in TARGETS.names() if _decodes(name))
        able = f"{', '.join(others)} or {last}"
        yield Problem(
            what=f"{case.unit.target} has no operators for a key/value cache",
            where=case.where("model", "context"),
            fix=f"use {able}, or remove context: the network is then built without a cache",
        )
    yield from _inputs(case, context)
    sets = spec.samples
    for purpose in ("calibration", "evaluation"):
        given = getattr(sets, purpose)
        if given is not None and given.kind == "text" and given.length > context:
            what = f"samples of {given.length} tokens do not fit a context of {context}"
            where = case.where("samples", purpose, "length" if "length" in given.model_fields_set else "text")
            yield Problem(what=what, where=where, fix=f"give length: {context} or less")


def _decodes(target: str) -> bool:
    try:
        return bool(getattr(find_target(target), "DECODES", False))
    except RecipeError:  # a plug-in for another contract version: reported where a recipe names it
        return False


def _inputs(case: Case, context: int) -> Iterator[Problem]:
    spec = case.unit.spec
    where = case.where("methods" if spec.methods else "inputs" if spec.inputs else "model")
    (name, inputs), *more = spec.all_methods.items()
    shapes = [given.shape for given in inputs.values()]
    fits = len(shapes) == 2 and len(shapes[0]) == 2 and shapes[0][0] == 1 and shapes[1] == (1,)
    kinds = {given.dtype for given in inputs.values()}
    if more or name != "forward" or tuple(inputs) != DECODER_INPUTS or not fits or kinds != {"int64"}:
        what = "a network with a key/value cache takes tokens and the position of the first, and nothing else"
        yield Problem(what=what, where=where, fix=_SHAPES)
        return
    size = shapes[0][1]
    once = size if isinstance(size, int) else spec.dims[size].max if size in spec.dims else 0
    if once >= context:
        what = f"{once} tokens at once leave no room in a context of {context}"
        place = case.where("dims", size, "max") if isinstance(size, str) else where
        yield Problem(what=what, where=place, fix=f"take at most {context - 1}; longer texts are read part by part")
