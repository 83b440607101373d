"""Shipped recipes whose weights come from the hub: what their limits rest on, and that they say so."""

from __future__ import annotations

import pytest

from edgebake.commands._sweeping import loosest
from edgebake.recipe_files import list_shipped
from edgebake.recipe_yaml import read
from edgebake.units import units_of


@pytest.mark.parametrize("name", ["mobilevit-xxs", "mobilevit-s", "mobilenet-v2"])
def test_a_recipe_that_was_never_built_with_its_weights_asks_no_more_than_its_random_variant_reaches(name: str) -> None:
    text = list_shipped()[name].read_text()
    assert "have not been held against a build with the trained weights" in " ".join(text.split())
    assert f"{name}-random" in text
    trained, variant = (read(list_shipped()[n]) for n in (name, f"{name}-random"))
    held = {(u.target, u.scheme): u.spec.limits for u in units_of(variant.recipe, variant.base)}
    units = units_of(trained.recipe, trained.base)
    assert {(u.target, u.scheme) for u in units} == set(held)
    for unit in units:
        asked = unit.spec.limits.model_dump()
        assert loosest([asked, held[unit.target, unit.scheme].model_dump()]) == asked, unit.id
