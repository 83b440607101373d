"""Decoders as Core ML language models: the functions ``decode`` and ``prefill`` of one package, over the same states.

Both take ``tokens`` and ``input_pos``, the position of the first, as int32, and give the logits of every token.
``decode`` takes one token, ``prefill`` as many as the recipe reads at once: shorter texts are filled up behind, with
any token, and the logits of what was filled in are left out. The rows that it writes there are written again before a
token sees them. A prompt that ends closer to the context's end than ``prefill`` is long is read by ``decode``.

Two functions of fixed shapes and not one whose length varies: Core ML prepares itself for shapes that it knows, on the
Neural Engine as well, which for a range it does not (coremltools' guide, "Flexible Input Shapes"); and no size of an
attention depends on the position, which is a value. So every token attends over the whole context under a mask; for
prompts that is what a fixed length costs. The weights are stored once. An app makes the states of one function and
hands them to both (the names are the same). One state for a layer's keys and one for its values, so that a write
touches one layer's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.target import Asked, LowerRequest, Refusal
from edgebake.types import MethodSignature, Signature, TensorSpec, Traced
from edgebake_targets._coreml_options import precision_of, searches_float32, system_of
from edgebake_targets._decoder_session import DECODE, PREFILL, Arrays, DecoderSession, longest
from edgebake_targets._decoders import INPUTS, exported, fixed, without_caches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._coreml_decoder_parts import Part

HIDDEN = "hidden"  # what goes from package to package
_WHOLE = "model"
_STATIC = "w8a8"

_CUTS_DECODERS = Refusal(
    key="options.chunk_mib",
    what="chunk_mib cuts language models between their layers, and this network is none",
    fix="leave chunk_mib out",
)

NEEDS_STATES = Refusal(
    key="options.minimum_os",
    what="a language model keeps its keys and values in states, which packages have since iOS 18, macOS 15",
    fix="options: {minimum_os: iOS18}",
)


def functions(signature: Signature) -> Signature:
    """What the functions of the package take and give; ``signature``: a decoder's, with its one method."""
    (method,) = signature.methods.values()
    once = longest(signature)
    sizes = {DECODE: 1, PREFILL: once} if once > 1 else {DECODE: 1}
    return replace(signature, methods={name: fixed(method, size) for name, size in sizes.items()}, dims={})


def lowered(signature: Signature) -> Signature:
    """``signature`` of a decoder as its artifact keeps it: dtypes of the package; no call begins with the caches."""
    from edgebake_targets._coreml import lowered_specs

    methods = {name: lowered_specs(method) for name, method in signature.methods.items()}
    return without_caches(replace(signature, methods=methods))


def encodings(signature: Signature, packages: Sequence[str]) -> dict[str, Any]:
    """For the manifest: tokens that each function takes, and the packages in the order in which they are called."""
    if signature.language is None:
        return {}
    tokens = {name: method.inputs[0].shape[1] for name, method in functions(signature).methods.items()}
    return {"functions": tokens, **({"parts": list(packages)} if len(packages) > 1 else {})}


def split(traced: Traced, request: LowerRequest) -> dict[str, Traced]:
    """The programs of the functions, by package in the order in which they are called; one unless ``chunk_mib`` asks.

    ``traced`` itself where it is no decoder. RecipeError as :func:`refusals` tell; StageFailed where it cannot be cut.
    """
    if traced.signature.language is None:
        if request.options["chunk_mib"]:
            raise RecipeError([_CUTS_DECODERS.problem()])
        return {_WHOLE: traced}
    if problems := [refusal.problem() for refusal in _of_any(request)]:
        raise RecipeError(problems)
    from edgebake_targets import _coreml_decoder_parts as parts
    from edgebake_targets._coreml_decoder_graph import rewritten

    (program,) = traced.programs.values()
    module = rewritten(program)
    most = float(request.options["chunk_mib"])
    weigh = parts.weigher(request.assignment.schemes, precision_of(request))
    cut = parts.cut(module, weigh, most) if most else [parts.Part(module=module, takes=None, gives=None)]
    named = {f"part-{number}": part for number, part in enumerate(cut, 1)} if len(cut) > 1 else {_WHOLE: cut[0]}
    return {name: _part(part, functions(traced.signature), request) for name, part in named.items()}


def _part(part: Part, signature: Signature, request: LowerRequest) -> Traced:
    from edgebake_targets._coreml_decoder_parts import caches_of

    signature = of_part(signature, part.takes, part.gives, "float16" if precision_of(request) == "fp16" else "float32")
    buffers = caches_of(part.module)
    signature = replace(signature, methods={n: replace(m, buffers=buffers) for n, m in signature.methods.items()})
    programs = {name: exported(part.module, method) for name, method in signature.methods.items()}
    return Traced(programs=programs, signature=signature)


def of_part(signature: Signature, takes: int | None, gives: int | None, dtype: str) -> Signature:
    """``signature`` of the functions where a package takes or gives hidden values of so many channels and ``dtype``."""

    def changed(method: MethodSignature) -> MethodSignature:
        tokens, position = method.inputs
        size = tokens.shape[1]
        into, out = (
            TensorSpec(name=HIDDEN, shape=(1, size, width), dtype="float32", lowered_dtype=dtype) if width else None
            for width in (takes, gives)
        )
        return replace(method, inputs=(into or tokens, position), outputs=(out,) if out else method.outputs)

    return replace(signature, methods={name: changed(method) for name, method in signature.methods.items()})


def facts_of_parts(parts: Mapping[str, Signature]) -> list[dict[str, Any]]:
    """What the record beside the packages says of them, in order; empty for a decoder in one package."""
    if len(parts) == 1:
        return []
    found = []
    for name, signature in parts.items():
        method = next(iter(signature.methods.values()))
        ends = {"takes": method.inputs[0], "gives": method.outputs[0]}
        hidden = {end: spec for end, spec in ends.items() if spec.name == HIDDEN}
        (dtype, *_) = (spec.lowered_dtype for spec in hidden.values())
        found.append(
            {
                "package": f"{name}.mlpackage",
                "dtype": dtype,
                **{end: hidden[end].shape[-1] if end in hidden else None for end in ends},
            }
        )
    return found


def parts_of(entry: Path, signature: Signature, facts: Sequence[Mapping[str, Any]]) -> list[tuple[Path, Signature]]:
    """Package and signature of each part of the artifact at ``entry``; ``facts``: of :func:`facts_of_parts`."""
    whole = functions(signature)
    if not facts:
        return [(entry, whole)]
    folder = entry.parent if entry.suffix == ".mlpackage" else entry
    return [(folder / f["package"], of_part(whole, f["takes"], f["gives"], f["dtype"])) for f in facts]


def session(entry: Path, signature: Signature, opened: Callable[[Path, Signature], Any]) -> DecoderSession:
    """The decoder at ``entry``; ``opened`` opens one of its packages."""
    from edgebake_targets._coreml_checks import recorded_parts

    sessions = [opened(*part) for part in parts_of(entry, signature, recorded_parts(entry))]
    return DecoderSession(sessions[0] if len(sessions) == 1 else Chain(sessions), signature)


class Chain:
    """Sessions of parts, each fed with what the one before it gave."""

    def __init__(self, sessions: Sequence[Any]) -> None:
        self._sessions = sessions
        self.modes: tuple[str, ...] = getattr(sessions[0], "modes", ())
        if hasattr(sessions[0], "intermediates"):
            self.intermediates = self._inside

    def begin(self) -> None:
        for each in self._sessions:
            each.begin()

    def call(self, name: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return self._through(inputs, lambda each, given: each.call(name, given))

    def call_mode(self, mode: str, name: str, inputs: Arrays) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        strange: dict[str, str] = {}

        def call(each: Any, given: Arrays) -> dict[str, NDArray[Any]]:
            outputs: dict[str, NDArray[Any]]
            outputs, found = each.call_mode(mode, name, given)
            strange.update(found)
            return outputs

        return self._through(inputs, call), strange

    def _inside(self, name: str, inputs: Arrays, modules: Iterable[str]) -> dict[str, NDArray[Any]]:
        inside: dict[str, NDArray[Any]] = {}

        def call(each: Any, given: Arrays) -> dict[str, NDArray[Any]]:
            inside.update(each.intermediates(name, given, modules))
            outputs: dict[str, NDArray[Any]] = each.call(name, given)
            return outputs

        self._through(inputs, call)
        return inside

    def _through(
        self, inputs: Arrays, call: Callable[[Any, Arrays], dict[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        position = {INPUTS[1]: inputs[INPUTS[1]]}
        given: Arrays = inputs
        for each in self._sessions:
            outputs = call(each, given)
            given = {**outputs, **position}
        return outputs


def refusals(asked: Asked) -> Iterator[Refusal]:
    """Of a decoder: systems without states, one that cannot read token by token, and what calibration would ask."""
    for method, inputs in asked.inputs.items():
        if tuple(spec.name for spec in inputs) != INPUTS:
            if inputs and asked.options["chunk_mib"]:
                yield _CUTS_DECODERS
            continue
        size = inputs[0].shape[1]
        if isinstance(size, int) and size > 1:
            yield Refusal(
                key=f"inputs.{method}.{INPUTS[0]}",
                what=f"a decoder that takes {size} tokens at once and no fewer cannot generate one after the other",
                fix=f"shape: [1, seq], with dims: {{seq: {{min: 1, max: {size}}}}}",
            )
        yield from _of_any(asked)


def _of_any(asked: Asked | LowerRequest) -> Iterator[Refusal]:
    """What no decoder can have. Samples are texts of the whole; what calibrates looks at programs of functions."""
    if system_of(asked.options) != "iOS18":
        yield NEEDS_STATES
    what = "is not there for language models yet: it runs samples through each function of the package by itself"
    options = asked.options
    if searches_float32(options):
        yield Refusal(key="options.keep_float32", what=f"keep_float32: auto {what}", fix="name the modules")
    if options["palettes"] == "sensitive_kmeans":
        yield Refusal(key="options.palettes", what=f"palettes: sensitive_kmeans {what}", fix="palettes: kmeans")
    if options["correct_biases"]:
        yield Refusal(key="options.correct_biases", what=f"correct_biases {what}", fix="leave correct_biases out")
    used = asked.module_schemes if isinstance(asked, Asked) else tuple(asked.assignment.schemes.values())
    if _STATIC in (asked.scheme, *used):
        key = "scheme" if asked.scheme == _STATIC else "modules"
        yield Refusal(key=key, what=f"{_STATIC} {what}", fix="use w8, w4g32 or palette4")
