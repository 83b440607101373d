"""Cells, lines and advice that every format shows."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebake.reports._advice import advice
from edgebake.reports._rows import row_of, stage_counts, summary, verdict_text, worst_output
from edgebake.reports._text import decibels, floored, for_encoding, mib, number, percent, plain
from edgebake.result import Result
from edgebake.target import TARGETS, find_target
from edgebake.types import Verdict


def _texts(result: Result, label: str) -> list[str]:
    return [line.text for line in row_of(result).lines if line.label == label]


def test_cells_of_a_pass(passing: Result) -> None:
    row = row_of(passing)
    assert row.group == "minilm-l6/model"
    assert row.cells == (
        ("pass", "executed"),
        ("executorch-xnnpack", "w8a8d (8da8w)"),
        ("31.2 dB", "cos 0.99963"),
        ("spearman 0.993", "0.988–0.997"),
        ("21.9", "×0.25"),
        ("97.1 %", "3 parts"),
        ("48.0 peak", "3.0 plan"),
        ("×2.44", "12.4 ms"),
    )
    assert _texts(passing, "worst") == ["sample 17 (GPL-3): 24.1 dB on last_hidden_state"]


def test_a_failed_row_says_what_where_and_what_to_try(failing: Result) -> None:
    assert _texts(failing, "missed") == [
        "parity.sqnr_db of last_hidden_state: 18.244 dB, limit at least 25 dB",
        "delegated: 91.2 %, limit at least 95 % (outside the backend: GatherND x2 (2-D mask))",
    ]
    assert _texts(failing, "where") == [
        "the error begins at encoder.layer.3.attention.output: 41.1 dB before it, 19.0 dB after"
    ]
    first, second, third, fourth = _texts(failing, "try")
    assert '{"encoder.layer.3.attention.output": fp32}' in first
    assert second == "more, and more varied, calibration samples"
    assert third.endswith("(compress: modules:): w8a16")
    assert "operators" in fourth
    assert _texts(failing, "speed") == ["simulated cycles say nothing about a phone"]


def test_a_module_that_has_a_number_for_a_name_is_called_a_module(failing: Result) -> None:
    located = {"modules": [{"module": "0.2", "sqnr_db": 24.96}]}
    numbered = replace(failing, measurements={**failing.measurements, "located": located})
    assert _texts(numbered, "where") == ["the error begins at module 0.2: 24.9 dB"]


def test_a_task_metric_stands_beside_the_float_model(failing: Result) -> None:
    assert row_of(failing).cells[3] == ("top1 94.7 %", "92.0–96.9 %", "correct 80.0 %", "float 85.0 %")


def test_an_unmeasured_row_says_why_once_per_reason(unmeasured: Result) -> None:
    assert _texts(unmeasured, "unmeasured") == [
        "parity.sqnr_db, agreement.spearman: no runner on Linux executes an ExecuTorch Core ML delegate",
        "delegated: only the Mac's compiler decides",
    ]
    assert len(_texts(unmeasured, "note")) == 2
    assert row_of(unmeasured).cells[2:4] == (("not measured",), ("not measured",))
    assert row_of(replace(unmeasured, verdicts=())).cells[2:4] == (("-",), ("-",))
    assert row_of(unmeasured).cells[1] == ("executorch-coreml", "palette6 (pal6)", "m4-max", "small")


def test_a_recipe_without_limits_says_so(passing: Result) -> None:
    assert _texts(replace(passing, verdicts=()), "unmeasured") == ["the recipe sets no limits"]


def test_a_broken_stage_shows_problem_fix_and_log(failed: Result) -> None:
    labels = [line.label for line in row_of(failed).lines]
    assert labels == ["lower", "try", "log"]
    assert _texts(failed, "lower")[0].startswith("features.0.0: MatMulNBits")


def test_the_worst_output_decides_the_parity_cell(passing: Result) -> None:
    outputs = {
        "a": {"sqnr_db": 40.0, "cosine": 0.9999},
        "b": {"sqnr_db": 12.0, "cosine": 0.99},
        "c": {"sqnr_db": 15.0, "cosine": 0.95},
    }
    assert row_of(replace(passing, measurements={"outputs": outputs})).cells[2] == ("12.0 dB", "cos 0.95000")
    outputs["c"] = {"sqnr_db": None, "cosine": None, "nonfinite": 4}  # type: ignore[dict-item]
    assert worst_output(outputs) == "c"
    spoilt = replace(passing, measurements={"outputs": outputs})
    assert row_of(spoilt).cells[2] == ("NaN", "cos NaN")
    assert _texts(spoilt, "worst") == ["output c: 4 values NaN or infinite"]


def test_free_running_is_told_apart(passing: Result) -> None:
    free = {"probability": {"sqnr_db": 14.56}}
    result = replace(passing, measurements={**passing.measurements, "free_running": free})
    assert _texts(result, "free") == ["14.5 dB on probability when the artifact feeds itself"]


def test_stage_counts_follow_the_order_of_a_build(results: list[Result]) -> None:
    assert stage_counts(results) == [
        ("load", "2 ran, 2 stored"),
        ("reference", "2 ran, 2 stored"),
        ("trace", "4 ran"),
        ("lower", "3 ran"),
        ("validate", "3 ran"),
    ]
    first, second = results[0], results[1]
    one = replace(first, stages={"reference": "stored", "trace": "stored", "lower": "ran", "validate": "ran"})
    other = replace(second, stages={"trace": "stored", "compress": "ran", "lower": "ran", "locate": "ran"})
    ordered = [stage for stage, _ in stage_counts([one, other])]
    assert ordered == ["reference", "trace", "compress", "lower", "validate", "locate"]


def test_summary_counts_states_and_unmeasured_limits(results: list[Result], passing: Result) -> None:
    assert summary(results) == (
        "1 passed, 1 failed, 1 not measured, 1 not built, 1 without toolchain; 4 limits were not measured"
    )
    assert summary([passing]) == "1 passed; every limit was measured"
    one = replace(passing, verdicts=(*passing.verdicts, Verdict(limit="delegated", state="not measured", bound=1)))
    assert summary([one]) == "1 passed; 1 limit was not measured"
    assert summary([]) == "0 passed; no limit was judged"


def test_what_verify_could_not_read_was_not_judged(failed: Result, passing: Result) -> None:
    assert failed.failure is not None
    damaged = replace(failed, failure=replace(failed.failure, stage="verify"))
    assert summary([passing, damaged]) == "1 passed, 1 not judged; every limit was measured"


def test_a_miss_by_a_hair_shows_all_digits() -> None:
    verdict = Verdict(limit="parity.sqnr_db", state="fail", value=24.9999999, bound=25.0)
    assert verdict_text(verdict) == "parity.sqnr_db: 24.9999999 dB, limit at least 25 dB"
    verdict = Verdict(limit="agreement.spearman", state="fail", value=0.97999999, bound=0.98)
    assert verdict_text(verdict) == "agreement.spearman: 0.98 (0.97999999), limit at least 0.98"


def test_a_bound_is_shown_as_the_recipe_gives_it() -> None:
    near = Verdict(limit="agreement.spearman", state="fail", value=0.5, bound=0.9999999)
    assert verdict_text(near) == "agreement.spearman: 0.5, limit at least 0.9999999"
    assert verdict_text(replace(near, limit="agreement.top1")) == "agreement.top1: 50 %, limit at least 99.99999 %"
    assert verdict_text(replace(near, bound=1.0)) == "agreement.spearman: 0.5, limit at least 1"
    assert verdict_text(replace(near, limit="agreement.top1", bound=0.57)).endswith("limit at least 57 %")
    almost = replace(near, value=0.9999999, bound=1.0)
    assert verdict_text(almost) == "agreement.spearman: 0.9999999, limit at least 1"


def test_an_agreement_on_few_decisions_says_how_many(failing: Result) -> None:
    few = {"metric": "binary", "value": 0.99, "count": 499}
    found = {**failing.measurements, "agreement": few}
    assert _texts(replace(failing, measurements=found), "note")[-1] == (
        "agreement rests on 499 decisions, too few for a narrow interval: give samples for 500 or more"
    )
    for enough in ({**few, "count": 500}, {**few, "metric": "spearman"}):
        assert not _texts(replace(failing, measurements={**found, "agreement": enough}), "note")


def test_limits_from_above_say_at_most() -> None:
    verdict = Verdict(limit="size.mib", state="fail", value=31.5, bound=30, reason="graph (5 MiB)")
    assert verdict_text(verdict) == "size.mib: 31.5 MiB, limit at most 30 MiB (graph (5 MiB))"
    verdict = Verdict(limit="task.top1", state="fail", value=0.05, bound=0.01)
    assert verdict_text(verdict) == "task.top1: 5 %, limit at most 1 %"


@pytest.mark.parametrize(
    ("target", "scheme", "step"),
    [
        ("onnx-cpu", "w8a8", "a finer scheme, if only for the most sensitive modules (compress: modules:): w8, w8a8d"),
        ("executorch-xnnpack", "w8a8", "more, and more varied, calibration samples"),
        (
            "executorch-xnnpack",
            "w4g32a8d",
            "a finer scheme, if only for the most sensitive modules (compress: modules:): w8a8d",
        ),
        ("coreml", "palette4", "a wider scheme: palette6"),
        ("coreml", "palette8", "a wider scheme: fp16"),
        (
            "coreml",
            "fp16",
            "hold the lowered graph against the float model: a float scheme should lose next to nothing",
        ),
    ],
)
def test_advice_fits_the_scheme_and_the_target(target: str, scheme: str, step: str, failing: Result) -> None:
    measured = {**failing.measurements, "located": None}
    assert step in advice(replace(failing, target=target, scheme=scheme, measurements=measured))


def test_what_costs_too_much_is_told_what_costs_less(failing: Result) -> None:
    missed = tuple(Verdict(limit=x, state="fail", value=9, bound=8) for x in ("size.mib", "memory.peak_mib"))
    assert advice(replace(failing, target="onnx-cpu", scheme="w8a8d", verdicts=missed)) == (
        "a scheme with fewer bits (w4g32a8d, w4g32), or compress what the lines below `size` name",
        "smaller fixed shapes (inputs:, dims:)",
    )
    assert (
        "half the bytes an activation: scheme fp16"
        in advice(replace(failing, target="coreml", scheme="fp32", verdicts=missed))[1]
    )


@pytest.mark.parametrize("target", [*TARGETS.names(), "a-plug-ins"])
def test_advice_names_no_scheme_that_the_target_lacks(target: str, failing: Result) -> None:
    there = {row.scheme for row in find_target(target).SUPPORTS} if target in TARGETS.names() else set()
    measured = {**failing.measurements, "located": None}
    limits = ("parity.cosine", "size.mib", "memory.peak_mib")
    for scheme in there or {"w8a8", "palette4", "w4g32"}:
        for limit in limits:
            missed = (Verdict(limit=limit, state="fail", value=1, bound=2),)
            steps = advice(replace(failing, target=target, scheme=scheme, verdicts=missed, measurements=measured))
            named = {word for step in steps for word in re.findall(r"\b(?:fp\d+|palette\d|w\d+\w*)\b", step)}
            assert named <= there - {scheme}, steps


def test_advice_for_an_overflow_names_the_option_where_there_is_one(failing: Result) -> None:
    outputs = {"y": {"nonfinite": 4}}
    overflow = {"declared": {"overflow": {"value": "scores", "operator": "matmul", "sample": 0}}}
    found = {"outputs": outputs, "modes": overflow}
    step = "keep what leaves the range of float16 in float32: options: {keep_float32: auto}"
    assert advice(replace(failing, target="coreml", scheme="fp16", measurements=found))[0] == step
    assert "beyond the range" in advice(replace(failing, target="onnx-cpu", scheme="fp16", measurements=found))[0]
    worst = {"outputs": outputs, "modes": {"fp16-worst": overflow["declared"]}}  # decides nothing
    assert step not in advice(replace(failing, target="coreml", scheme="fp16", measurements=worst))


def test_advice_names_a_broken_float_model_first(failing: Result) -> None:
    found = {"outputs": {"y": {"reference_nonfinite": 1, "nonfinite": 1}}}
    assert "float model" in advice(replace(failing, measurements=found))[0]


@given(st.text())
def test_plain_text_is_one_harmless_line(text: str) -> None:
    cleaned = plain(text)
    assert cleaned.isprintable() or all(c.isprintable() or ord(c) > 0xA0 for c in cleaned)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) <= 0x9F or 0xD800 <= ord(c) <= 0xDFFF for c in cleaned)
    assert plain(cleaned) == cleaned


def test_plain_text_loses_colours_but_no_words() -> None:
    assert plain("\x1b[1;31mfoo\x1b[0m bar\r\n\tbaz\x07") == "foo bar baz"
    assert plain("layer\x1b]0;: 18.2 dB, limit 25") == "layer0;: 18.2 dB, limit 25"
    assert plain("a\u202eb\u2066c\x9b2Jd\u2028e") == "abcd e"
    assert plain("größe 模型 [bold]") == "größe 模型 [bold]"


def test_numbers_are_never_rounded_up_to_perfection() -> None:
    assert floored(0.99999999, 5) == "0.99999"
    assert floored(0.29, 2) == "0.29"
    assert floored(-0.5, 1) == "-0.5"
    assert percent(0.99996) == "99.9 %"
    assert percent(1.0) == "100.0 %"
    assert decibels(200.0) == "exact"
    assert decibels(None) == number(None) == percent(None) == floored(float("nan"), 1) == "NaN"
    assert [mib(x) for x in (None, 20 * 2**20, 2**18, 224, 0)] == ["-", "20.0", "0.25", "<0.01", "0.00"]


def test_signs_have_stand_ins_where_the_encoding_lacks_them() -> None:
    assert for_encoding("×2 – 模", "ascii") == "x2 - ?"
    assert for_encoding("×2 – 模", "UTF-8") == "×2 – 模"
    assert for_encoding("×2", "latin-1") == "x2"
