"""Limits on a decoder's text, and what reports say of it."""

from __future__ import annotations

from typing import Any

import pytest

from edgebake.limits import judge, parity_failed
from edgebake.recipe import Limits
from edgebake.reports import _language

MEASURED: dict[str, Any] = {
    "words": 8415,
    "texts": 33,
    "perplexity": {"float": 30.0, "artifact": 30.6, "ratio": 1.02, "low": 1.01, "high": 1.03},
    "kl": 0.012,
    "top1": {"value": 0.97, "raw": 0.95, "near_ties": 170, "count": 8448, "low": 0.96, "high": 0.98},
    "top5": 0.999,
    "nonfinite": 0,
    "generated": {"value": 0.5, "prompts": 24, "new_words": 32, "mean_length": 16.0, "whole": 9},
    "stepwise": {"tokens": 48, "sqnr_db": 62.5, "same": 1.0},
    "speed": {"first_token_ms": 41.2, "decode_tokens_per_s": 33.3},
}
RUNNER = {"name": "executorch-runtime", "kind": "executed"}
# just met, just missed
BOUNDS = {
    "perplexity": (1.02, 1.019),
    "kl": (0.012, 0.0119),
    "top1": (0.97, 0.971),
    "top5": (0.999, 0.9991),
    "generated": (0.5, 0.51),
    "stepwise_db": (62.5, 62.6),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_limit_holds_to_the_last_digit(name: str) -> None:
    for bound, state in zip(BOUNDS[name], ("pass", "fail"), strict=True):
        limits = Limits.model_validate({"language": {name: bound}})
        found = {"runner": RUNNER, "language": MEASURED}
        (verdict,) = judge(limits, found)
        assert (verdict.limit, verdict.state, verdict.bound) == (f"language.{name}", state, bound)
        assert parity_failed(limits, found) == (state == "fail")


def test_what_is_no_number_fails() -> None:
    broken = {**MEASURED, "perplexity": {**MEASURED["perplexity"], "ratio": None}}
    (verdict,) = judge(Limits.model_validate({"language": {"perplexity": 2.0}}), {"runner": RUNNER, "language": broken})
    assert (verdict.state, verdict.reason) == ("fail", "the result is not a number")


def test_without_a_runner_nothing_is_measured() -> None:
    limits = Limits.model_validate({"language": {"top1": 0.9}})
    (verdict,) = judge(limits, {"runner": None, "not_measured": "no runner executes it"})
    assert (verdict.state, verdict.reason) == ("not measured", "no runner executes it")


def test_reports_say_what_the_text_is_like() -> None:
    found = {"language": MEASURED}
    assert _language.cell(found) == ("top1 97.0 %", "ppl ×1.0200")
    assert dict(_language.lines(found)) == {
        "text": "perplexity 30.6, float 30 (ratio 1.01 to 1.03) on 8415 tokens; KL 0.012 nats; top-5 99.9 %; "
        "170 near-ties left out of top-1",
        "generates": "as the float model does for 16.0 of 32 tokens (9 of 24 prompts to the end); "
        "token by token against at once: 62.5 dB",
        "pace": "33.3 tokens/s, 41 ms to the first after a short prompt, here",
    }
    assert _language.cell({}) == ()
    assert not list(_language.lines({}))
