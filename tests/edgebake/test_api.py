"""The Python API: what the verbs do, as functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import baking
import edgebake
from edgebake.errors import HubUnreachable, RecipeError, UsageError
from edgebake.recipe_yaml import list_shipped, read
from verbs import recipe as recipe_file


def test_importing_edgebake_imports_next_to_nothing() -> None:
    code = "import sys, edgebake; print([m for m in sys.modules if m.split('.')[0] in ('pydantic', 'torch', 'yaml')])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=baking.environment()
    )
    assert done.stdout == "[]\n"


def test_the_package_shows_what_it_offers() -> None:
    assert edgebake.build is edgebake.api.build
    assert set(edgebake.__all__) <= {*dir(edgebake), *edgebake.__all__}
    assert edgebake.Recipe.__name__ == "Recipe"
    assert edgebake.Result.__name__ == "Result"
    with pytest.raises(AttributeError, match="has no attribute 'bake'"):
        edgebake.bake  # type: ignore[attr-defined]  # noqa: B018


def test_check_takes_names_files_and_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_file(tmp_path, ["onnx-cpu"])
    monkeypatch.chdir(tmp_path)
    recipe = read(path).recipe
    for given in (path, str(path), recipe, [recipe]):
        units, warnings = edgebake.api.check(given)
        assert [u.id for u in units] == ["tiny/model@onnx-cpu#fp32"]
        assert warnings == ()
    units, _ = edgebake.api.check("minilm-l6", settings=["compress.scheme=fp16"])
    assert {u.recipe for u in units} == {"minilm-l6"}


def test_what_is_wrong_raises_with_every_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        edgebake.build(tmp_path / "none.yaml")
    path = recipe_file(tmp_path, ["onnx-cpu", "onnx-gpu", "coreml-x"])
    with pytest.raises(RecipeError) as refusal:
        edgebake.api.check(path)
    assert len(refusal.value.problems) == 2
    with pytest.raises(UsageError, match="settings override"):
        edgebake.api.check(read(path).recipe, settings=["compress.scheme=w8"])
    with pytest.raises(UsageError, match="holds no artifact"):
        edgebake.api.verify(tmp_path)


def test_one_text_is_one_setting_and_one_glob_not_its_letters(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, ["onnx-cpu"])
    with pytest.raises(UsageError, match=r"--only '\*@coreml#fp32' matches none of the 1 artifacts"):
        edgebake.build(path, only="*@coreml#fp32", out=tmp_path / "dist", store=tmp_path / "store")
    units, _ = edgebake.api.check(path, settings="compress.scheme=w8")
    assert [unit.scheme for unit in units] == ["w8"]


def test_a_recipe_object_has_no_lines_but_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    recipe = read(list_shipped()["mobilenet-v2"]).recipe
    with pytest.raises(HubUnreachable, match=r"^model.path: 'google/mobilenet_v2_1.0_224' is neither"):
        edgebake.build(recipe, only="*@onnx-cpu#fp32", out=tmp_path / "dist", store=tmp_path / "store")


def test_no_recipe_is_not_a_build_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe is given"):
        edgebake.build([], out=tmp_path / "dist", store=tmp_path / "store")


def test_a_recipe_object_is_built_verified_and_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read(recipe_file(tmp_path, ["onnx-cpu"])).recipe
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    (built,) = edgebake.build(
        recipe, out="made", store="store", observe=lambda event: seen.append(str(event.get("stage")))
    )
    assert built.state == "pass"
    assert built.folder == Path("made/tiny/model/onnx-cpu/any/fp32")
    assert {"load", "reference", "trace", "lower", "validate"} <= set(seen)
    (again,) = edgebake.build(recipe, out="made", store="store")
    assert again.stages == {"deliver": "unchanged"}
    (judged,) = edgebake.api.verify("made")
    assert (judged.unit, judged.state) == (built.unit, "pass")
    assert judged.measurements["outputs"] == built.measurements["outputs"]
    (packed,) = edgebake.api.bundle(recipe, formats=["zip"], out="made")
    assert packed == Path("made/tiny/tiny.zip")
    assert packed.is_file()
