"""How an artifact's text differs from the float model's on the same text: perplexity, divergence, agreement.

* Perplexity: ``exp(mean of -log p(next word))`` (Jelinek et al., "Perplexity - a measure of the difficulty of speech
  recognition tasks", 1977); its ratio to the float model's with a paired interval over the texts.
* KL divergence of the float model's distribution from the artifact's, in nats, over its KEPT first words and one word
  for all others: never more than the divergence over all words (data processing inequality; Cover & Thomas, "Elements
  of Information Theory", 2006, section 2.8).
* Top-1 agreement with near-ties apart, as in :class:`edgebake.agreement.Top1Meter`.
* The same by ranges of positions that double in length (0 to 127, 128 to 255, 256 to 511 ...), and how much the
  divergence of any range is above the first's: a cache or position embeddings that go wrong far into a text drift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgebake.bootstrap import difference_interval, share_interval
from edgebake.llm.digest import MEAN, NEXT, OWN, SUM, SUMS, TOP, WORDS
from edgebake.metrics import to_json

Array = NDArray[Any]
Floats = NDArray[np.float64]
TIE_MARGIN = 0.01  # of the distance between a row's largest logit and its mean: edgebake.recipe.Agreement's default

FIRST_RANGE = 128  # positions
LEAST_ROWS = 64  # of a range that drift is judged by: fewer say little

# columns of a text's tally
_COLUMNS = ("words", "float", "artifact", "rows", "kl", "same", "ties", "top5")


@dataclass(kw_only=True)
class TextMeter:
    """``add`` once per call, then ``measurements``."""

    _texts: dict[str, Floats] = field(default_factory=dict, init=False)
    _ranges: dict[int, Floats] = field(default_factory=dict, init=False)
    _nonfinite: int = field(default=0, init=False)

    def add(self, source: str, reference: Mapping[str, Array], artifact: Mapping[str, Array], start: int = 0) -> None:
        """Take in what ``edgebake.llm.digest`` kept of one call of the text ``source``, which begins at ``start``."""
        r, a = reference[SUMS], artifact[SUMS]
        told = ~np.isnan(r[:, NEXT])
        sound = np.asarray(np.isfinite(a[:, [SUM, MEAN]]).all(axis=1))
        self._nonfinite += int((~sound).sum())
        counts = self._texts.setdefault(source, np.zeros(len(_COLUMNS)))
        same, ties, top5 = _decisions(reference, artifact, sound)
        losses = (np.where(told, side[:, SUM] - np.where(told, side[:, NEXT], 0), 0) for side in (r, a))
        rows = np.stack([told, *losses, np.ones(len(r)), _divergence(reference, artifact), same, ties, top5], axis=1)
        counts += rows.sum(axis=0)
        for number, part in _by_range(rows, start):
            self._ranges.setdefault(number, np.zeros(len(_COLUMNS)))[:] += part.sum(axis=0)

    def measurements(self, seed: int = 0) -> dict[str, Any]:
        """Perplexities, their ratio, divergence in nats, shares of rows that agree; null where a number is NaN."""
        table = np.array(list(self._texts.values())).reshape(-1, len(_COLUMNS))
        total = dict(zip(_COLUMNS, table.sum(axis=0).tolist(), strict=True))
        words, rows = total["words"], total["rows"]
        compared = table[:, 3] - table[:, 6]
        low, high = difference_interval(table[:, 2] - table[:, 1], table[:, 0], seed)
        top_low, top_high = share_interval(table[:, 5], compared, seed)
        decided = rows - total["ties"]
        return {
            "words": int(words),
            "texts": len(table),
            "perplexity": {
                "float": _exp(total["float"], words),
                "artifact": _exp(total["artifact"], words),
                "ratio": _exp(total["artifact"] - total["float"], words),
                "low": _exp(low, 1),
                "high": _exp(high, 1),
            },
            "kl": to_json(total["kl"] / rows) if rows else None,
            "top1": {
                "value": to_json(total["same"] / decided) if decided else None,
                "raw": to_json(total["same"] / rows) if rows else None,
                "near_ties": int(total["ties"]),
                "count": int(rows),
                "low": to_json(top_low),
                "high": to_json(top_high),
            },
            "top5": to_json(total["top5"] / rows) if rows else None,
            "positions": (ranges := [self._range(number) for number in sorted(self._ranges)]),
            "drift": _drift(ranges),
            "nonfinite": self._nonfinite,
        }

    def _range(self, number: int) -> dict[str, Any]:
        """The ``number``-th range of positions, ``from`` and ``to`` included."""
        found = dict(zip(_COLUMNS, self._ranges[number].tolist(), strict=True))
        decided = found["rows"] - found["ties"]
        return {
            "from": FIRST_RANGE << (number - 1) if number else 0,
            "to": (FIRST_RANGE << number) - 1,
            "rows": int(found["rows"]),
            "kl": to_json(found["kl"] / found["rows"]),
            "top1": to_json(found["same"] / decided) if decided else None,
            "perplexity": _exp(found["artifact"] - found["float"], found["words"]),
        }


def _by_range(rows: Floats, start: int) -> Iterator[tuple[int, Floats]]:
    """``rows``, of which the first stands at ``start``, by the number of their range of positions."""
    numbers = np.array([(place // FIRST_RANGE).bit_length() for place in range(start, start + len(rows))])
    for number in np.unique(numbers).tolist():
        yield number, rows[numbers == number]


def _drift(ranges: Sequence[Mapping[str, Any]]) -> float | None:
    """Nats that the divergence of any later range is above the first's, never below 0; None without two to compare."""
    enough = [each["kl"] for each in ranges if each["rows"] >= LEAST_ROWS]
    if len(enough) < 2 or ranges[0]["from"] or None in enough:
        return None
    return float(max(0.0, max(enough[1:]) - enough[0]))


def _exp(total: float, count: float) -> float | None:
    """``exp(total / count)``; None where that is no number."""
    if not count or not math.isfinite(total):
        return None
    return math.exp(min(total / count, 700.0))


def _decisions(reference: Mapping[str, Array], artifact: Mapping[str, Array], sound: Array) -> tuple[Array, ...]:
    """Per row: same first word, near-tie, the float model's first among the artifact's first five."""
    words, top, own = reference[WORDS], reference[TOP].astype(np.float64), artifact[OWN]
    same = sound & (words[:, 0] == own[:, 0])
    found = words == own[:, :1]  # where the artifact's first word stands among the float model's
    margin = top[:, 0] - np.where(found, top, -np.inf).max(axis=1)
    ties = sound & ~same & (margin < TIE_MARGIN * (top[:, 0] - reference[SUMS][:, MEAN]))
    return same, ties, sound & (words[:, :1] == own).any(axis=1)


def _divergence(reference: Mapping[str, Array], artifact: Mapping[str, Array]) -> Floats:
    """(rows,) nats; NaN where the artifact's logits are not finite."""
    logs = [side[TOP].astype(np.float64) - side[SUMS][:, [SUM]] for side in (reference, artifact)]
    p, q = (np.exp(log) for log in logs)
    tails = [np.maximum(1 - share.sum(axis=1), 1e-12) for share in (p, q)]
    spread: Floats = (p * (logs[0] - logs[1])).sum(axis=1) + tails[0] * np.log(tails[0] / tails[1])
    return np.where(spread < 0, 0.0, spread)  # rounding alone makes it negative
