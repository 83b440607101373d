"""What a sweep builds of a recipe, and the limits that each scheme is held against."""

from __future__ import annotations

import pytest

from edgebake.check import check
from edgebake.commands import _sweeping
from edgebake.recipe_yaml import list_shipped, read
from edgebake.units import units_of
from verbs import Baked, Edgebake


@pytest.mark.parametrize("name", ["minilm-l6", "efficientnet-lite0", "smollm2-135m"])
def test_a_shipped_recipe_can_be_swept_as_it_is(name: str) -> None:
    swept, not_built = _sweeping.swept(read(list_shipped()[name]), (), (), trust=False)
    assert swept is not None
    units, _ = check([swept], trust=False)
    assert len({unit.id for unit in units}) == len(units) > 5
    assert not {unit.id for unit in units} & {result.unit for result in not_built}
    refused = [result for result in not_built if result.failure]
    # groups of 128 do not divide the rows of one: that ends no sweep of the other schemes
    wide = {f"w4g128{form}" for form in ("", "a8d", "z", "za8d")}
    assert {result.scheme for result in refused} == (wide if name == "smollm2-135m" else set())
    if refused:
        assert refused[0].failure is not None
        assert str(refused[0].failure.problems[0]).startswith("w4g128 needs an input width that is a multiple of 128")


def test_a_scheme_keeps_its_own_rule_and_others_get_the_loosest_limits_of_their_target() -> None:
    file = read(list_shipped()["minilm-l6"])
    swept, _ = _sweeping.swept(file, ("fp32", "w8a8d", "w8"), ("onnx-cpu",), trust=False)
    assert swept is not None
    check([swept], trust=False)
    fp32, dynamic, w8 = units_of(swept.recipe, swept.base)
    assert dict(dynamic.spec.compress.modules) == {"embeddings.*_embeddings": "w8"}
    for own in (fp32, dynamic):
        assert own.spec in [unit.spec for unit in units_of(file.recipe, file.base) if unit.id == own.id]
    limits = w8.spec.limits
    assert (limits.parity.cosine, limits.parity.sqnr_db, limits.size.of_float) == (0.992, 18, 1.02)
    assert limits.agreement is not None
    assert (limits.agreement.metric, limits.agreement.min) == ("spearman", 0.988)


def test_the_loosest_limits_ask_only_what_all_ask() -> None:
    tight = {"parity": {"cosine": 0.99, "max_abs": 0.1}, "size": {"mib": 3}, "memory": {"peak_mib": 40}}
    loose = {"parity": {"cosine": 0.9, "max_abs": 0.5}, "size": {"mib": 9}}
    assert _sweeping.loosest([tight, loose]) == {
        "parity": {"cosine": 0.9, "max_abs": 0.5},
        "size": {"mib": 9},
        "memory": None,
    }


def test_a_scheme_whose_weights_alone_are_too_large_is_a_row_and_not_the_end(edgebake: Edgebake, baked: Baked) -> None:
    settings = ("--set", "limits.size.of_float=0.5", "--store", baked.store, "--out", baked.out.parent / "swept")
    said = edgebake("sweep", baked.recipe, *settings, "--scheme", "fp32", "--scheme", "w8", "--json")
    rows = {row["scheme"]: row for row in said.json}
    assert said.code == 0, said.err
    assert (rows["w8"]["state"], rows["fp32"]["state"], rows["fp32"]["bytes"]) == ("pass", "fail", None)
    assert rows["fp32"]["why"] == "missed: size.of_float: 1, limit at most 0.5 (its weights alone; not built)"
    alone = edgebake("sweep", baked.recipe, *settings, "--scheme", "fp32")
    assert alone.code == 5, alone.err
    assert "not built" in alone.out
    assert "else the loosest of its target" in alone.out
