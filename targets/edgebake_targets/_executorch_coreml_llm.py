"""Decoders in ExecuTorch programs with Core ML parts: a token a call, keys and values in the part's states.

Every part has states of its own, which no other method sees, and shapes of Core ML's states cannot vary with a call: so
there is one method, which reads prompts token by token as well. ExecuTorch's own runner does so where a model tells it
that its shapes are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgebake.target import Asked, Refusal
from edgebake.types import Traced
from edgebake_targets import _coreml_decoder
from edgebake_targets._coreml_options import system_of
from edgebake_targets._decoders import decodes, exported, of_single_tokens


def refusals(asked: Asked) -> Iterator[Refusal]:
    """A decoder for systems without states."""
    if decodes(asked) and system_of(asked.options) != "iOS18":
        yield _coreml_decoder.NEEDS_STATES


def stepwise(traced: Traced) -> Traced:
    """``traced`` taking one token a call, its caches as states; itself where it is no decoder. Weights are shared."""
    if traced.signature.language is None:
        return traced
    from edgebake_targets._coreml_decoder_graph import rewritten

    return of_single_tokens(traced, lambda program, method: exported(rewritten(program), method))
