"""Greedy speculative decoding: a draft proposes tokens, the target reads them at once and keeps what it would say.

Algorithm 1 of Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (and Chen et al. 2023,
"Accelerating Large Language Model Decoding with Speculative Sampling"), where every distribution is its likeliest
token: the text is the target's own greedy text, whatever the draft proposes. Rows of rejected tokens stay in both
caches and are written over by the next call, which begins at the first of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgebake.llm import generation
from edgebake.llm.judge import sizes
from edgebake.llm.meter import TIE_MARGIN
from edgebake.types import Signature


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder that runs: ``once`` tokens a call at most, ``context`` in its cache, ``words`` that it knows."""

    step: generation.Step
    once: int
    context: int
    words: int


@dataclass(kw_only=True)
class Spoken:
    """A text: ``new`` tokens after the prompt, and of each call of the target what was (proposed, accepted)."""

    new: list[int] = field(default_factory=list)
    calls: list[tuple[int, int]] = field(default_factory=list)
    seconds: float = 0.0  # of the calls after the first token


def decoder(signature: Signature, step: generation.Step) -> Decoder:
    """The decoder of ``signature`` that ``step`` runs."""
    assert signature.language is not None
    once, context = sizes(signature)
    return Decoder(step=step, once=once, context=context, words=signature.language.vocabulary)


def speak(target: Decoder, draft: Decoder, prompt: Sequence[int], tokens: int) -> Spoken:
    """At least NEW_WORDS tokens after ``prompt``, up to the end of the target's cache; a call is never cut short."""
    words = min(target.words, draft.words)  # beyond stands what pads a vocabulary
    text, seen, spoken = list(prompt), 0, Spoken()
    text.append(int(generation.read(target.step, text, target.once)[0, -1].argmax()))
    begun = time.perf_counter()
    while len(text) - len(prompt) < generation.NEW_WORDS and len(text) < target.context:
        most = min(tokens, target.context - len(text))
        proposed = _propose(draft, text, seen, most, words)
        logits = generation.read(target.step, [text[-1], *proposed], target.once, len(text) - 1)
        said = logits[0].argmax(axis=-1).tolist()
        accepted = next((n for n, (a, b) in enumerate(zip(proposed, said, strict=False)) if a != b), len(proposed))
        # The draft has read all but its last proposal; what the target rejected counts for nothing.
        seen = len(text) + min(accepted, most - 1)
        text += said[: accepted + 1]
        spoken.calls.append((most, accepted))
    spoken.seconds = time.perf_counter() - begun
    spoken.new = text[len(prompt) :]
    return spoken


def _propose(draft: Decoder, text: Sequence[int], seen: int, count: int, words: int) -> list[int]:
    """The draft's ``count`` likeliest tokens after ``text``, of which its cache holds the first ``seen``."""
    unread, start, found = list(text[seen:]), seen, []
    for _ in range(count):
        known = [token if token < draft.words else 0 for token in unread]  # any other word: it may be rejected
        logits = generation.read(draft.step, known, draft.once, start)
        start += len(unread)
        unread = [int(logits[0, -1, :words].argmax())]
        found += unread
    return found


def run(target: Decoder, draft: Decoder, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """What came of all ``prompts``: how much was accepted, whether the texts are the target's own, and the pace here.

    ``acceptance``: accepted proposals over tested ones, the first rejected one of a call included and those after it
    not: the estimate of alpha of Leviathan et al. 2023, definition 3.1. ``tokens_per_step``: tokens over calls of the
    target, its reading of the prompt and the first token after it left out.
    """
    alone = [generation.greedy(target.step, prompt, target.once, target.context) for prompt in prompts]
    texts = [speak(target, draft, prompt, tokens) for prompt in prompts]
    calls = [call for text in texts for call in text.calls]
    accepted = sum(n for _, n in calls)
    tested = sum(min(n + 1, most) for most, n in calls)
    took = sum(second for _, seconds in alone for second in seconds[1:])
    own = [new for new, _ in alone]
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "steps": len(calls),
        "proposed": sum(most for most, _ in calls),
        "accepted": accepted,
        "acceptance": accepted / tested if tested else None,
        "tokens_per_step": (accepted + len(calls)) / len(calls) if calls else None,
        "identical": _identical(target, prompts, own, [text.new for text in texts]),
        "here": {
            "tokens_per_s": _per_second(accepted + len(calls), sum(text.seconds for text in texts)),
            "alone_tokens_per_s": _per_second(sum(len(new) - 1 for new in own), took),
        },
    }


def _per_second(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def _identical(
    target: Decoder, prompts: Sequence[Sequence[int]], own: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How many ``texts`` are the target's ``own``; apart those that first differ where the target hardly decides.

    A target may round otherwise when it reads several tokens at once; after the first difference texts are of
    different contexts, and are not compared.
    """
    same = ties = 0
    for prompt, wanted, got in zip(prompts, own, texts, strict=True):
        place = next((n for n, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), None)
        if place is None:
            same += 1
        elif _near_tie(target, prompt, wanted[:place], wanted[place], got[place]):
            ties += 1
    decided = len(own) - ties
    return {"value": same / decided if decided else None, "same": same, "near_ties": ties, "texts": len(own)}


def _near_tie(target: Decoder, prompt: Sequence[int], new: Sequence[int], first: int, second: int) -> bool:
    """Is ``second`` nearly as likely as ``first`` after ``new``, read token by token? (edgebake.llm.meter's margin.)"""
    row = generation.read(target.step, prompt, target.once)[0, -1]
    for number, token in enumerate(new):
        row = generation.read(target.step, [token], target.once, len(prompt) + number)[0, -1]
    row = row.astype(np.float64)
    return bool(row[first] - row[second] < TIE_MARGIN * (row[first] - row.mean()))
