"""Which module gets which scheme."""

from __future__ import annotations

import pytest

from edgebake.assignment import assign
from edgebake.errors import RecipeError
from edgebake.target import find_target
from edgebake.types import Module

MODULES = (
    Module(name="embeddings.word", kind="embedding", parameters=1000),
    Module(name="encoder.0.query", kind="linear", parameters=64),
    Module(name="encoder.1.query", kind="linear", parameters=64),
)
TARGET = find_target("executorch-xnnpack")


def test_the_default_goes_to_the_kinds_that_the_target_can_compress_with_it() -> None:
    found = assign("w8a8d", {}, MODULES, TARGET, "executorch-xnnpack")
    assert dict(found.schemes) == {"encoder.0.query": "w8a8d", "encoder.1.query": "w8a8d"}
    assert set(found.kinds) == {m.name for m in MODULES}


def test_the_last_matching_rule_wins_and_fp32_keeps_a_module_float() -> None:
    rules = {"encoder.*": "w4g32a8d", "encoder.0.*": "fp32", "embeddings.*": "w8"}
    found = assign("w8a8d", rules, MODULES, TARGET, "executorch-xnnpack")
    assert dict(found.schemes) == {"encoder.1.query": "w4g32a8d", "embeddings.word": "w8"}


def test_a_rule_that_matches_no_module_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(RecipeError, match=r"(?s)`encoder.0.qeury: fp32` matches no .*encoder.0.query"):
        assign("w8a8d", {"encoder.0.qeury": "fp32"}, MODULES, TARGET, "executorch-xnnpack")


def test_a_rule_beyond_the_target_says_what_the_kind_can_have() -> None:
    with pytest.raises(RecipeError, match=r"(?s)embedding module 'embeddings.word' the scheme w8a8d.*it has: .*w8"):
        assign("w8a8d", {"embeddings.*": "w8a8d"}, MODULES, TARGET, "executorch-xnnpack")


def test_a_scheme_that_compresses_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="w8a8d compresses nothing here"):
        assign("w8a8d", {}, MODULES[:1], TARGET, "executorch-xnnpack")


def test_all_wrong_rules_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        assign("w8a8d", {"a.*": "fp32", "b.*": "w8"}, MODULES, TARGET, "executorch-xnnpack")
    assert len(caught.value.problems) == 2
