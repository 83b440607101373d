"""What can be refused by reading the recipe alone: names, options that cannot stand together, images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from edgebake.errors import Problem, RecipeError
from edgebake.target import Asked, Refusal
from edgebake.types import MethodSignature
from edgebake_targets import _coreml_decoder, _coreml_images, _coreml_metadata, _coreml_options, _coreml_shapes

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# Words of the MIL language; the converter appends "_workaround" to them.
_RESERVED = frozenset(
    (
        *("any", "bool", "program", "func", "tensor", "list", "dict", "tuple", "true", "false", "string", "state"),
        *("bf16", "fp16", "fp32", "fp64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
)


def refusals(asked: Asked) -> Iterator[Refusal]:
    """See ``edgebake.target.Target``; methods whose inputs only the model knows are left to ``lower``."""
    yield from _coreml_options.contradictions(asked)
    yield from _coreml_shapes.of_recipe(asked)
    yield from _coreml_decoder.refusals(asked)
    if wrong := _coreml_metadata.empty_label(asked.options):
        yield Refusal(key="options.labels", what=wrong.what, fix=wrong.fix)
    if not 0 < asked.options["percentile"] <= 100:
        yield Refusal(key="options.percentile", what="percentile is a share in percent", fix="99.99, say")
    for method, inputs in asked.inputs.items():
        for spec in inputs:
            if problem := misnamed(spec.name):
                yield Refusal(key=f"inputs.{method}.{spec.name}", what=problem.what, fix=problem.fix)
        if inputs:
            yield from _coreml_images.refusals(asked.options, method, inputs, asked.channels)


def misnamed(name: str) -> Problem | None:
    """Why the converter would change ``name`` in silence, or None."""
    if not _IDENTIFIER.fullmatch(name):
        return Problem(what=f"Core ML cannot name an input or output {name!r}", fix="use letters, digits and _")
    if name in _RESERVED:
        return Problem(what=f"{name!r} is a word of Core ML's language", fix=f"call it {name}_in, say")
    return None


def check_names(method: MethodSignature) -> None:
    """RecipeError for names that the converter would change in silence."""
    names = [spec.name for spec in (*method.inputs, *method.outputs)]
    problems = [problem for name in sorted(set(names)) if (problem := misnamed(name))]
    problems += _twice(names)
    if problems:
        raise RecipeError(problems)


def _twice(names: Iterable[str]) -> Iterator[Problem]:
    given = list(names)
    for name in sorted(set(given)):
        if given.count(name) > 1:
            yield Problem(what=f"{name!r} names two inputs or outputs; Core ML needs them to differ", fix="rename one")
