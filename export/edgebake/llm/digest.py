"""Logits kept small: of a row over 100,000 words what perplexity, agreement and divergence need, and few rows whole.

Whole logits of 8,192 tokens over 128,256 words are 4.2 GB; this is under 100 MB. Of each row of the float model: its
KEPT most likely words with their logits, the logarithm of the sum of all exponentials, the mean, and the logit of the
word that the text has next. Of the artifact: its logits of the same words, its own first FIRST, and the same sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
KEPT = 32
FIRST = 5
EVERY = 64  # one row in so many is kept whole, for SQNR
NO_WORD = -1  # where the text ends, no word is next
LOGITS = "logits"
WORDS, TOP, SUMS, OWN = (f"{LOGITS}.{name}" for name in ("words", "top", "sums", "own"))
OF_ARTIFACT = (LOGITS, TOP, OWN, SUMS)
SUM, MEAN, NEXT = range(3)  # columns of SUMS


def of_float(logits: Array, following: Array) -> dict[str, Array]:
    """What is kept of the float model's ``logits``, (1, rows, words), before the words ``following``, (rows,)."""
    rows = logits.reshape(-1, logits.shape[-1])
    words = _largest(rows, min(KEPT, rows.shape[1]))
    return {
        LOGITS: rows[::EVERY],
        WORDS: words.astype(np.int32),
        TOP: np.take_along_axis(rows, words, axis=1).astype(np.float32),
        SUMS: _sums(rows, following),
    }


def of_artifact(logits: Array, following: Array, words: Array) -> dict[str, Array]:
    """What is kept of the artifact's ``logits``; ``words`` are the float model's first, (rows, KEPT)."""
    rows = logits.reshape(-1, logits.shape[-1])
    return {
        LOGITS: rows[::EVERY],
        TOP: np.take_along_axis(rows, words.astype(np.intp), axis=1).astype(np.float32),
        OWN: _largest(rows, min(FIRST, rows.shape[1])).astype(np.int32),
        SUMS: _sums(rows, following),
    }


def following(calls: Sequence[Mapping[str, Array]], tokens: str) -> list[Array]:
    """Per call the word after each of its tokens, NO_WORD after the last of all."""
    counts = [call[tokens].shape[-1] for call in calls]
    text = np.concatenate([call[tokens].reshape(-1) for call in calls])
    after = np.append(text[1:], NO_WORD)
    return np.split(after, np.cumsum(counts)[:-1])


def _largest(rows: Array, count: int) -> NDArray[np.intp]:
    """(rows, count) places of the largest values, the largest first; the first of equal ones, as argmax has it."""
    near = np.sort(np.argpartition(-rows, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(rows, near, axis=1), axis=1, kind="stable")
    return np.asarray(np.take_along_axis(near, order, axis=1))


def _sums(rows: Array, following: Array) -> NDArray[np.float64]:
    """(rows, 3): SUM, MEAN, NEXT; NEXT is NaN where no word follows."""
    top = rows.max(axis=1, keepdims=True)
    summed = top[:, 0] + np.log(np.exp(rows - top).sum(axis=1, dtype=np.float64))
    there = np.maximum(following, 0).astype(np.intp)[:, None]
    after = np.where(following == NO_WORD, np.nan, np.take_along_axis(rows, there, axis=1)[:, 0])
    return np.stack([summed, rows.mean(axis=1, dtype=np.float64), after], axis=1)
