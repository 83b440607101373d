"""Greedy text of any runner of a decoder, how fast it comes, and whether one token at a time gives what many do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgebake.metrics import sqnr_db, to_json
from edgebake.recipe import DECODER_INPUTS
from edgebake.types import Language, Sample

Array = NDArray[Any]
# (tokens (1, n) int64, input_pos (1) int64) -> logits (1, n, words)
Step = Callable[[Array, Array], Array]

TOKENS, POSITION = DECODER_INPUTS
PROMPTS = 24  # texts whose beginnings are gone on with
PROMPT_WORDS = 16
NEW_WORDS = 32
STEPS = 48  # tokens read one by one


def prompts(samples: Iterable[Sample]) -> list[list[int]]:
    """The beginnings of up to PROMPTS texts, each at most half of a text."""
    chosen = list(texts(samples))[:PROMPTS]
    return [text[: min(PROMPT_WORDS, len(text) // 2)] for text in chosen if len(text) > 1]


def texts(samples: Iterable[Sample]) -> Iterator[list[int]]:
    """The tokens of each sample, whatever calls they are read in."""
    for sample in samples:
        text: list[int] = np.concatenate([call.tensors()[TOKENS].reshape(-1) for call in sample.calls]).tolist()
        yield text


def read(step: Step, tokens: Sequence[int], once: int, start: int = 0) -> Array:
    """Logits of all ``tokens``, (1, n, words), of which at most ``once`` are read in a call."""
    parts = [
        step(np.array([tokens[at : at + once]], np.int64), np.array([start + at], np.int64))
        for at in range(0, len(tokens), once)
    ]
    return np.concatenate(parts, axis=1)


def greedy(step: Step, prompt: Sequence[int], once: int, context: int) -> tuple[list[int], list[float]]:
    """Up to NEW_WORDS tokens, the likeliest each time, and the seconds that each took; the first with the prompt.

    Nothing ends the text but the context: what is compared is every decision.
    """
    new: list[int] = []
    took: list[float] = []
    while len(new) < NEW_WORDS and len(prompt) + len(new) < context:
        begun = time.perf_counter()
        logits = read(step, new[-1:] or prompt, once, len(prompt) + len(new) - 1 if new else 0)
        new.append(int(logits[0, -1].argmax()))
        took.append(time.perf_counter() - begun)
    return new, took


def stepwise(step: Step, tokens: Sequence[int], once: int) -> dict[str, Any]:
    """The first STEPS of ``tokens`` read one by one against the same read at once: SQNR of logits, first words."""
    chosen = list(tokens[:STEPS])
    whole, single = read(step, chosen, once), read(step, chosen, 1)
    same = (whole.argmax(axis=-1) == single.argmax(axis=-1)).mean()
    return {"tokens": len(chosen), "sqnr_db": to_json(sqnr_db(whole, single), 200.0), "same": float(same)}


def agreement(float_texts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Tokens until artifact and float model first differ: ``value`` is their share of all, ``whole`` texts alike."""
    alike = [_alike(r, a) for r, a in zip(float_texts, texts, strict=True)]
    longest = sum(map(len, float_texts))
    return {
        "value": sum(alike) / longest if longest else None,
        "prompts": len(alike),
        "new_words": max(map(len, float_texts), default=0),
        "mean_length": sum(alike) / len(alike) if alike else None,
        "whole": sum(n == len(r) for n, r in zip(alike, float_texts, strict=True)),
    }


def _alike(left: Sequence[int], right: Sequence[int]) -> int:
    differing = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differing, min(len(left), len(right)))


def unknown(texts: Sequence[Sequence[int]], language: Language | None) -> int | None:
    """Tokens of ``texts`` that the tokenizer has no word for: rows that pad a vocabulary were chosen.

    None where nothing says how many words there are.
    """
    known = None if language is None else language.tokens
    return None if known is None else sum(token >= known for text in texts for token in text)


def speed(took: Sequence[Sequence[float]]) -> Mapping[str, float | None]:
    """Milliseconds to the first token, the prompt read, and tokens a second after it: medians."""
    first = [seconds[0] for seconds in took if seconds]
    later = [second for seconds in took for second in seconds[1:]]
    return {
        "first_token_ms": float(np.median(first)) * 1e3 if first else None,
        "decode_tokens_per_s": 1 / float(np.median(later)) if later else None,
    }
