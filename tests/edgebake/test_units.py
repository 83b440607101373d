"""Units: ids, folders, and overrides of a target merged into what the component says."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from edgebake.errors import RecipeError
from edgebake.recipe import Recipe
from edgebake.units import Unit, units_of


def units(*targets: object, **component: object) -> tuple[Unit, ...]:
    """Units of a recipe with one component ``model``."""
    spec = {"model": {"source": "python", "path": "m:f"}, "targets": list(targets), **component}
    return units_of(Recipe.model_validate({"name": "r", "components": {"model": spec}}), Path("/base"))


def test_id_and_folder_say_everything_that_tells_units_apart() -> None:
    plain, full = units("onnx-cpu", {"target": "onnx-qnn", "device": "sm8650", "scheme": "16a8w", "name": "fast"})
    assert plain.id == "r/model@onnx-cpu#fp32"
    assert plain.folder == PurePosixPath("r/model/onnx-cpu/any/fp32")
    assert full.id == "r/model@onnx-qnn+sm8650#w8a16.fast"
    assert full.folder == PurePosixPath("r/model/onnx-qnn/sm8650/fast")
    assert full.base == Path("/base")


def test_overrides_change_key_by_key() -> None:
    limits = {"parity": {"cosine": 0.9, "sqnr_db": 20}, "size": {"mib": 3}}
    rule = {"target": "coreml", "limits": {"parity": {"cosine": 0.5}, "delegated": "50%"}}
    plain, changed = units("coreml", rule, limits=limits)
    assert plain.spec.limits.parity.cosine == 0.9
    assert (changed.spec.limits.parity.cosine, changed.spec.limits.parity.sqnr_db) == (0.5, 20)
    assert changed.spec.limits.size.mib == 3 and changed.spec.limits.delegated == 0.5


def test_null_in_an_override_takes_away() -> None:
    limits = {"agreement": {"metric": "top1", "min": 0.9}}
    (unit,) = units({"target": "coreml", "limits": {"agreement": None}}, limits=limits)
    assert unit.spec.limits.agreement is None


def test_scheme_is_short_for_compress_scheme() -> None:
    compress = {"scheme": "w8", "modules": {"head": "fp32"}}
    (unit,) = units({"target": "coreml", "scheme": "pal6"}, compress=compress)
    assert unit.scheme == unit.spec.compress.scheme == "palette6"
    assert unit.spec.compress.modules == {"head": "fp32"}
    (unit,) = units({"target": "coreml", "compress": {"scheme": "half"}}, compress=compress)
    assert unit.scheme == "fp16"


def test_the_spec_of_a_unit_names_no_targets_and_options_stay_raw() -> None:
    (unit,) = units({"target": "coreml", "options": {"minimum_os": "iOS18"}, "optional": True})
    assert unit.spec.targets == () and unit.optional
    assert unit.options == {"minimum_os": "iOS18"}


def test_units_come_in_the_order_of_the_file() -> None:
    one = {"model": {"source": "python", "path": "m:f"}, "targets": ["b", "a"]}
    recipe = Recipe.model_validate({"name": "r", "components": {"z": one, "y": one}})
    assert [(u.component, u.target) for u in units_of(recipe, Path())] == [
        ("z", "b"),
        ("z", "a"),
        ("y", "b"),
        ("y", "a"),
    ]


def test_an_override_that_does_not_fit_is_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match=r"components\.model\.targets\.0\.limits\.parity\.cosine: must be 1 or less"):
        units({"target": "coreml", "limits": {"parity": {"cosine": 7}}})


def test_lists_and_tuples_are_taken_from_python_too() -> None:
    (unit,) = units("coreml", inputs={"x": {"shape": (1, "n")}}, dims={"n": {"max": 3}})
    assert unit.spec.inputs["x"].shape == (1, "n")
