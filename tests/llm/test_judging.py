"""What is kept of logits, and the numbers that are made of it, held against plain arithmetic over whole rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgebake.limits import judge as judge_limits
from edgebake.llm import digest, generation
from edgebake.llm.meter import TextMeter
from edgebake.recipe import Limits
from edgebake.reports import _language

ROWS, WORDS = 130, 200


def logits(seed: int, spread: float = 3.0) -> Any:
    return (np.random.default_rng(seed).standard_normal((1, ROWS, WORDS)) * spread).astype(np.float32)


def text(seed: int = 5) -> Any:
    after = np.random.default_rng(seed).integers(0, WORDS, ROWS)
    after[-1] = digest.NO_WORD
    return after


def probabilities(rows: Any) -> Any:
    exact = rows[0].astype(np.float64)
    shifted = np.exp(exact - exact.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def measured(float_logits: Any, artifact_logits: Any, sources: int = 1) -> dict[str, Any]:
    meter, after = TextMeter(), text()
    for number, part in enumerate(np.array_split(np.arange(ROWS), sources)):
        kept = digest.of_float(float_logits[:, part], after[part])
        got = digest.of_artifact(artifact_logits[:, part], after[part], kept[digest.WORDS])
        meter.add(str(number), kept, got)
    return meter.measurements()


def test_perplexity_and_agreement_are_those_of_whole_rows() -> None:
    r = logits(0)
    a = r + logits(1, 0.4)
    found = measured(r, a, sources=10)
    p, q = probabilities(r), probabilities(a)
    there = np.arange(ROWS - 1), text()[:-1]
    for side, share in (("float", p), ("artifact", q)):
        assert found["perplexity"][side] == pytest.approx(math.exp(-np.log(share[there]).mean()), rel=1e-5)
    ratio = found["perplexity"]["artifact"] / found["perplexity"]["float"]
    assert found["perplexity"]["ratio"] == pytest.approx(ratio)
    assert found["perplexity"]["low"] < ratio < found["perplexity"]["high"]
    assert found["top1"]["raw"] == (p.argmax(1) == q.argmax(1)).mean()
    assert found["top1"]["value"] >= found["top1"]["raw"]
    first5 = np.argsort(-q, axis=1)[:, :5]
    assert found["top5"] == (first5 == p.argmax(1)[:, None]).any(1).mean()
    assert (found["words"], found["texts"], found["nonfinite"]) == (ROWS - 1, 10, 0)


def test_divergence_is_bounded_by_that_over_all_words() -> None:
    r = logits(0)
    a = r + logits(1, 0.4)
    p, q = probabilities(r), probabilities(a)
    whole = (p * np.log(p / q)).sum(1).mean()
    assert 0.8 * whole < measured(r, a)["kl"] <= whole


def test_the_same_logits_differ_in_nothing() -> None:
    found = measured(logits(0), logits(0))
    assert found["perplexity"]["ratio"] == 1.0
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["top1"]["value"] == found["top5"] == 1.0


def test_a_near_tie_is_neither_agreement_nor_disagreement() -> None:
    r = logits(0)
    a = r.copy()
    order = np.argsort(-r[0], axis=1)
    r[0, 0, order[0, 1]] = r[0, 0, order[0, 0]] - 1e-4  # the float model hardly prefers its first word
    for row in (0, 1):
        a[0, row, order[row, 0]] -= 50
    found = measured(r, a)["top1"]
    assert (found["near_ties"], found["count"]) == (1, ROWS)
    assert found["value"] == pytest.approx((ROWS - 2) / (ROWS - 1))


def test_logits_that_are_no_numbers_are_told() -> None:
    a = logits(0)
    a[0, 3, 7] = np.nan
    found = measured(logits(0), a)
    assert found["nonfinite"] == 1
    assert found["perplexity"]["ratio"] is None
    assert found["kl"] is None
    assert found["top1"]["value"] < 1


def test_little_is_kept() -> None:
    kept = digest.of_float(logits(0), text())
    assert kept[digest.LOGITS].shape == (math.ceil(ROWS / digest.EVERY), WORDS)
    assert kept[digest.WORDS].shape == kept[digest.TOP].shape == (ROWS, digest.KEPT)


def test_the_next_word_is_the_first_of_the_next_call() -> None:
    calls = [{"tokens": np.array([[1, 2, 3]])}, {"tokens": np.array([[4]])}, {"tokens": np.array([[5, 6]])}]
    assert [part.tolist() for part in digest.following(calls, "tokens")] == [[2, 3, 4], [5], [6, digest.NO_WORD]]


# --- text ---


def counting(tokens: Any, position: Any) -> Any:
    """A model that says the token after the one it reads, by place and value: (1, n, 50)."""
    found = np.zeros((1, tokens.shape[1], 50), np.float32)
    for at, token in enumerate(tokens[0]):
        found[0, at, (int(token) + 1) % 50] = 1 + (int(position[0]) + at) / 1000
    return found


def test_greedy_text_goes_on_to_the_end_of_the_context() -> None:
    new, took = generation.greedy(counting, [7, 8], once=1, context=10)
    assert new == [9, 10, 11, 12, 13, 14, 15, 16]
    assert len(took) == 8
    assert len(generation.greedy(counting, [7, 8], once=4, context=1000)[0]) == generation.NEW_WORDS


def test_texts_are_compared_up_to_their_first_difference() -> None:
    found = generation.agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]])
    assert found == {"value": 4 / 6, "prompts": 2, "new_words": 4, "mean_length": 2.0, "whole": 1}


def test_token_by_token_is_held_against_at_once() -> None:
    text = list(range(20))
    assert generation.stepwise(counting, text, 6) == {"tokens": 20, "sqnr_db": 200.0, "same": 1.0}

    def forgetful(tokens: Any, position: Any) -> Any:
        return counting(tokens if tokens.shape[1] > 1 else tokens * 0, position)

    found = generation.stepwise(forgetful, text, 6)
    assert found["same"] < 0.2
    assert found["sqnr_db"] < 0


def far(start: int, end: int, noise: float, meter: TextMeter) -> None:
    """Positions ``start`` to ``end`` of a text in one call; the artifact's logits are off by ``noise``."""
    right = np.random.default_rng(start).normal(size=(1, end - start, 50)).astype(np.float32) * 3
    wrong = right + noise * np.random.default_rng(start + 1).normal(size=right.shape).astype(np.float32)
    after = np.zeros(end - start, np.int64)
    reference = digest.of_float(right, after)
    meter.add("text", reference, digest.of_artifact(wrong, after, reference[digest.WORDS]), start)


def test_error_is_told_by_ranges_of_positions() -> None:
    meter = TextMeter()
    for start, end, noise in ((0, 100, 0.1), (100, 200, 0.1), (200, 600, 0.1), (600, 1030, 1.0)):
        far(start, end, noise, meter)
    found = meter.measurements()
    places = [(r["from"], r["to"], r["rows"]) for r in found["positions"]]
    assert places == [(0, 127, 128), (128, 255, 128), (256, 511, 256), (512, 1023, 512), (1024, 2047, 6)]
    assert sum(r["rows"] * r["kl"] for r in found["positions"]) == pytest.approx(1030 * found["kl"])
    near, late = found["positions"][0], found["positions"][3]
    assert late["kl"] > 10 * near["kl"] and late["top1"] < near["top1"]
    assert late["perplexity"] != pytest.approx(1, abs=1e-3)
    assert found["drift"] == pytest.approx(late["kl"] - near["kl"])  # the last range has too few rows to say anything


def test_an_error_that_stays_or_falls_is_no_drift() -> None:
    meter = TextMeter()
    far(0, 128, 0.5, meter)
    far(128, 512, 0.1, meter)
    assert meter.measurements()["drift"] == 0.0
    short = TextMeter()
    far(0, 128, 0.5, short)
    assert short.measurements()["drift"] is None


@pytest.mark.parametrize(
    ("bound", "drift", "state"), [(0.1, 0.1, "pass"), (0.1, 0.11, "fail"), (0.1, None, "not measured")]
)
def test_a_limit_on_drift_needs_a_text_that_is_long_enough(bound: float, drift: float | None, state: str) -> None:
    limits = Limits.model_validate({"language": {"drift": bound}})
    runner = {"name": "executorch-runtime", "kind": "executed"}
    (verdict,) = judge_limits(limits, {"runner": runner, "language": {"kl": 0.1, "drift": drift}})
    assert (verdict.limit, verdict.state) == ("language.drift", state)
    if drift is None:
        assert verdict.reason == "no text of 192 positions or more: raise length in samples.evaluation"


def test_reports_show_ranges_of_positions() -> None:
    ranges = [
        {"from": 0, "to": 127, "rows": 128, "kl": 0.01, "top1": 0.95, "perplexity": 1.0},
        {"from": 128, "to": 255, "rows": 128, "kl": 0.02, "top1": 0.9, "perplexity": 1.0},
    ]
    told = dict(_language._positions({"positions": ranges}))
    assert told == {"positions": "0 to 127: KL 0.01, top-1 95.0 %; 128 to 255: KL 0.02, top-1 90.0 %"}
    assert not list(_language._positions({"positions": ranges[:1]}))
