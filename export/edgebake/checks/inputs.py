"""Do inputs, methods, states and named dimensions fit together?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

from edgebake.checks.case import Case
from edgebake.errors import Problem
from edgebake.recipe import Component, Input
from edgebake.wording import nearest, said

_TENSOR = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
MAX_BYTES = 2**40  # no shape with a typing mistake may bring the machine down
WIDTH = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


def problems(case: Case) -> Iterator[Problem]:
    """Contradictions between the declared inputs, dimensions and states of a component."""
    spec = case.unit.spec
    if spec.inputs and spec.methods:
        what = "inputs: is short for the method forward and cannot stand beside methods:"
        yield Problem(what=what, where=case.where("inputs"), fix="move the inputs into methods: {forward: ...}")
        return
    for method, inputs in spec.all_methods.items():
        base = ("methods", method) if spec.methods else ("inputs",)
        if not _WORD.fullmatch(method):
            yield Problem(what=f"{said(method)} cannot name a method", where=case.where(*base), fix=_WORDS)
        for name, given in inputs.items():
            yield from _input(case, (*base, name), name, given)
        if spec.methods and not inputs:
            yield Problem(what=f"the method {said(method)} has no inputs", where=case.where(*base), fix="declare them")
    yield from _dims(case, spec)


_WORDS = "use letters, digits and '_', beginning with a letter"


def _input(case: Case, key: tuple[str, ...], name: str, given: Input) -> Iterator[Problem]:
    where = case.where(*key)
    if not _TENSOR.fullmatch(name):
        fix = "use letters, digits, '_', '.' and '-', beginning with a letter"
        yield Problem(what=f"{said(name)} cannot name an input", where=where, fix=fix)
    if given.role == "state" and given.state_from is None:
        fix = "add state_from: <the output that feeds it in the next call>"
        yield Problem(what=f"the state {said(name)} says no state_from", where=where, fix=fix)
    if given.role != "state" and given.state_from is not None:
        fix = "add role: state, or remove state_from"
        yield Problem(
            what=f"{said(name)} has state_from but is no state", where=case.where(*key, "state_from"), fix=fix
        )
    if given.role == "state" and any(isinstance(size, str) for size in given.shape):
        what = f"the state {said(name)} starts at zeros, so its shape needs fixed sizes"
        yield Problem(what=what, where=case.where(*key, "shape"), fix="replace the named dimension by its largest size")
    if given.role == "image":
        yield from _image(case, key, name, given)
    yield from _size(case, key, name, given)


def _image(case: Case, key: tuple[str, ...], name: str, given: Input) -> Iterator[Problem]:
    if len(given.shape) != 4 or given.shape[1] not in (1, 3) or given.dtype not in ("float32", "uint8"):
        shape = ", ".join(str(size) for size in given.shape)
        yield Problem(
            what=f"the image {said(name)} cannot be {given.dtype}[{shape[:60]}]",
            where=case.where(*key, "shape"),
            fix="images are float32 or uint8 of [batch, 1 or 3, height, width]",
        )


def _size(case: Case, key: tuple[str, ...], name: str, given: Input) -> Iterator[Problem]:
    largest = [_largest(case.unit.spec, size) for size in given.shape]
    if prod(largest) * WIDTH[given.dtype] > MAX_BYTES:
        what = f"{said(name)} would take {prod(largest) * WIDTH[given.dtype] / 2**30:.3g} GiB at its largest"
        yield Problem(what=what, where=case.where(*key, "shape"), fix="check the sizes and the bounds under dims:")


def _largest(spec: Component, size: int | str) -> int:
    if isinstance(size, int):
        return size
    return spec.dims[size].max if size in spec.dims else 1


def _dims(case: Case, spec: Component) -> Iterator[Problem]:
    used: set[str] = set()
    for key, given in _all_inputs(spec):
        for position, size in enumerate(given.shape):
            if isinstance(size, int):
                continue
            used.add(size)
            if size not in spec.dims:
                near = nearest(size, spec.dims)
                fix = f"did you mean {near!r}?" if near else f"add dims: {{{_example(size)}: {{min: 1, max: 128}}}}"
                what = f"the dimension {said(size)} has no bounds"
                yield Problem(what=what, where=case.where(*key, "shape", position), fix=fix)
    for name in spec.dims:
        if not _WORD.fullmatch(name):
            yield Problem(what=f"{said(name)} cannot name a dimension", where=case.where("dims", name), fix=_WORDS)
        if name not in used:
            what = f"the dimension {said(name)} is in no input's shape"
            near = nearest(name, used)
            fix = f"did you mean {near!r}?" if near else "use it in a shape, or remove it"
            yield Problem(what=what, where=case.where("dims", name), fix=fix)


def _example(size: str) -> str:
    return size if _WORD.fullmatch(size) else "seq"


def _all_inputs(spec: Component) -> Iterator[tuple[tuple[str, ...], Input]]:
    methods: Mapping[str, Mapping[str, Input]] = spec.all_methods
    for method, inputs in methods.items():
        base = ("methods", method) if spec.methods else ("inputs",)
        for name, given in inputs.items():
            yield (*base, name), given
