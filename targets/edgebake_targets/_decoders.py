"""What targets and runners of decoders with a key/value cache share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgebake.errors import StageFailed
from edgebake.types import Signature

INPUTS = ("tokens", "input_pos")
CACHES = ("key_cache", "value_cache")


def without_caches(signature: Signature) -> Signature:
    """``signature`` whose caches are no buffers that a call begins with: a row is written before it is read."""
    methods = {
        name: replace(method, buffers=tuple(b for b in method.buffers if not b.endswith(CACHES)))
        for name, method in signature.methods.items()
    }
    return replace(signature, methods=methods)


def refuse_past_the_end(context: int, tokens: Any, position: Any) -> None:
    """StageFailed for ``tokens``, (1, n), that go past ``context``: runtimes give a number, the rest to their log."""
    start, count = int(position[0]), tokens.shape[-1]
    if start + count > context:
        raise StageFailed(
            f"{count} tokens from position {start} on do not fit the context of {context}",
            where="validate",
            fix="begin a new text, or build with a larger context",
        )
