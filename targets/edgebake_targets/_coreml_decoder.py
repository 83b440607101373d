"""Decoders as Core ML language models: the functions ``decode`` and ``prefill`` of one package, over the same states.

Both take ``tokens`` and ``input_pos``, the position of the first, as int32, and give the logits of every token.
``decode`` takes one token, ``prefill`` as many as the recipe reads at once: shorter texts are filled up behind, with
any token, and the logits of what was filled in are left out. The rows that it writes there are written again before a
token sees them. A prompt that ends closer to the context's end than ``prefill`` is long is read by ``decode``.

Two functions of fixed shapes and not one whose length varies, since the Neural Engine takes programs of fixed shapes
only, and a GPU plans them once: with a range of lengths Core ML runs such a program on the CPU or plans it anew for
each. The weights are stored once; the functions share states when an app makes them from one and hands them to both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.target import Asked, LowerRequest, Refusal
from edgebake.types import MethodSignature, Signature, TensorSpec, Traced
from edgebake_targets._coreml_options import searches_float32, system_of
from edgebake_targets._decoders import INPUTS, refuse_past_the_end, without_caches

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

DECODE, PREFILL = "decode", "prefill"
_STATIC = "w8a8"

Arrays = Mapping[str, "NDArray[Any]"]


def functions(signature: Signature) -> Signature:
    """What the functions of the package take and give; ``signature``: a decoder's, with its one method."""
    (method,) = signature.methods.values()
    once = longest(signature)
    sizes = {DECODE: 1, PREFILL: once} if once > 1 else {DECODE: 1}
    return replace(signature, methods={name: _fixed(method, size) for name, size in sizes.items()}, dims={})


def lowered(signature: Signature) -> Signature:
    """``signature`` of a decoder as its artifact keeps it: dtypes of the package; no call begins with the caches."""
    from edgebake_targets._coreml import lowered_specs

    methods = {name: lowered_specs(method) for name, method in signature.methods.items()}
    return without_caches(replace(signature, methods=methods))


def longest(signature: Signature) -> int:
    """Tokens that a call of the decoder takes at most."""
    (method,) = signature.methods.values()
    size = method.inputs[0].shape[1]
    return size if isinstance(size, int) else signature.dims[size].max


def _fixed(method: MethodSignature, size: int) -> MethodSignature:
    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(size if isinstance(given, str) else given for given in spec.shape))

    return replace(method, inputs=tuple(map(fixed, method.inputs)), outputs=tuple(map(fixed, method.outputs)))


def split(traced: Traced, request: LowerRequest) -> Traced:
    """The programs of the functions; itself where ``traced`` is no decoder. RecipeError as :func:`refusals` tell."""
    if traced.signature.language is None:
        return traced
    if problems := [refusal.problem() for refusal in _of_any(request)]:
        raise RecipeError(problems)
    from edgebake_targets._coreml_decoder_graph import rewritten

    (program,) = traced.programs.values()
    module = rewritten(program)
    signature = functions(traced.signature)
    programs = {name: _exported(module, method) for name, method in signature.methods.items()}
    return Traced(programs=programs, signature=signature)


def _exported(module: torch.fx.GraphModule, method: MethodSignature) -> torch.export.ExportedProgram:
    import torch

    tokens, position = (torch.zeros([int(size) for size in spec.shape], dtype=torch.int64) for spec in method.inputs)
    with torch.no_grad():
        return torch.export.export(module, (tokens, position), strict=False)


def refusals(asked: Asked) -> Iterator[Refusal]:
    """Of a decoder: systems without states, one that cannot read token by token, and what calibration would ask."""
    for method, inputs in asked.inputs.items():
        if tuple(spec.name for spec in inputs) != INPUTS:
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
        yield Refusal(
            key="options.minimum_os",
            what="a language model keeps its keys and values in states, which packages have since iOS 18, macOS 15",
            fix="options: {minimum_os: iOS18}",
        )
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


class DecoderSession:
    """A decoder's one method over an open session of its functions (``edgebake.target.Session``)."""

    def __init__(self, inner: Any, signature: Signature) -> None:
        assert signature.language is not None
        self._inner = inner
        self._context = signature.language.context
        self._once = longest(signature)
        self.modes: tuple[str, ...] = getattr(inner, "modes", ())

    def begin(self) -> None:
        """Forget the text that was read."""
        self._inner.begin()

    def call(self, _method: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Logits of ``tokens`` (1, n), which stand at ``input_pos`` (1,) and after it; StageFailed past the context."""
        import numpy as np

        parts = [self._inner.call(name, given)["logits"][:, :count] for name, given, count in self._calls(inputs)]
        return {"logits": np.concatenate(parts, axis=1)}

    def call_mode(self, mode: str, _method: str, inputs: Arrays) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Like :func:`call` in one of ``modes``, with what is not finite inside."""
        import numpy as np

        strange: dict[str, str] = {}
        parts = []
        for name, given, count in self._calls(inputs):
            outputs, found = self._inner.call_mode(mode, name, given)
            parts.append(outputs["logits"][:, :count])
            strange |= found
        return {"logits": np.concatenate(parts, axis=1)}, strange

    def _calls(self, inputs: Arrays) -> Iterator[tuple[str, dict[str, NDArray[Any]], int]]:
        """Function, its inputs, and how many of its tokens count."""
        import numpy as np

        tokens, position = (inputs[name] for name in INPUTS)
        refuse_past_the_end(self._context, tokens, position)
        start, count = int(position[0]), tokens.shape[1]
        if count > 1 and start + self._once <= self._context:
            filled = np.zeros((1, self._once), tokens.dtype)
            filled[:, :count] = tokens
            yield PREFILL, dict(zip(INPUTS, (filled, position), strict=True)), count
            return
        for number in range(count):
            one = tokens[:, number : number + 1]
            yield DECODE, dict(zip(INPUTS, (one, position + number), strict=True)), 1
