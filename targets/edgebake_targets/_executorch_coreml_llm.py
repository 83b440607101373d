"""Decoders in ExecuTorch programs with Core ML parts: a token a call, keys and values in the part's states.

Every part has states of its own, which no other method sees, and shapes of Core ML's states cannot vary with a call: so
there is one method, which reads prompts token by token as well. ExecuTorch's own runner does so where a model tells it
that its shapes are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgebake.target import Asked, Refusal, Session
from edgebake.types import Signature, Traced
from edgebake_targets import _coreml_decoder
from edgebake_targets._coreml_options import system_of
from edgebake_targets._decoders import INPUTS, without_caches


def refusals(asked: Asked) -> Iterator[Refusal]:
    """A decoder for systems without states."""
    decodes = any(tuple(spec.name for spec in inputs) == INPUTS for inputs in asked.inputs.values())
    if decodes and system_of(asked.options) != "iOS18":
        yield _coreml_decoder.NEEDS_STATES


def stepwise(traced: Traced) -> Traced:
    """``traced`` taking one token a call, its caches as states; itself where it is no decoder. Weights are shared."""
    if traced.signature.language is None:
        return traced
    from edgebake_targets._coreml_decoder_graph import rewritten

    ((name, program),) = traced.programs.items()
    method = _coreml_decoder.fixed(traced.signature.methods[name], 1)
    exported = _coreml_decoder.exported(rewritten(program), method)
    signature = replace(traced.signature, methods={name: method}, dims={})
    return Traced(programs={name: exported}, signature=without_caches(signature))


def session(inner: Session, signature: Signature) -> Session:
    """The open session ``inner`` of a program; of a decoder's that takes a token a call one that takes whole texts."""
    if signature.language is None or _coreml_decoder.longest(signature) > 1:
        return inner
    (name,) = signature.methods
    return _coreml_decoder.DecoderSession(inner, signature, decode=name)
