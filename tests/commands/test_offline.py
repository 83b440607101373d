"""Recipes whose model comes from the hub, where the hub cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path

from baking import finish, start
from edgebake.errors import EXIT_STAGE
from verbs import Baked

ONLY = ("--only", "*@onnx-cpu#fp32", "--json")


def offline(folder: Path) -> dict[str, str]:
    return {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


def test_a_hub_out_of_reach_is_told_with_its_place_and_what_builds_without(tmp_path: Path) -> None:
    done = finish(start("build", "mobilevit-xxs", *ONLY, "--store", tmp_path / "store", **offline(tmp_path)))
    assert done.code == EXIT_STAGE
    assert "mobilevit-xxs.yaml:6:model.path: 'apple/mobilevit-xx-small' is neither a folder" in done.err
    assert "the recipe mobilevit-xxs-random has the same architecture and needs no hub" in done.err


def test_other_recipes_are_built_all_the_same(baked: Baked, tmp_path: Path) -> None:
    where = ("--store", baked.store, "--out", tmp_path / "dist")
    done = finish(start("build", "mobilenet-v2", baked.recipe, *ONLY, *where, **offline(tmp_path)))
    assert done.code == EXIT_STAGE, done.err
    unreachable, built = done.results
    assert (unreachable["state"], unreachable["failure"]["stage"]) == ("failed", "load")
    assert "the hub cannot be reached" in unreachable["failure"]["problems"][0]["what"]
    assert built["state"] == "pass"


def test_explain_says_what_it_can_of_the_others(baked: Baked, tmp_path: Path) -> None:
    where = ("--store", baked.store, "--out", baked.out)
    done = finish(start("explain", "mobilevit-s", baked.recipe, *ONLY, *where, **offline(tmp_path)))
    assert done.code == EXIT_STAGE
    assert done.err.count("mobilevit-s.yaml:6:model.path") == 1
    assert list(json.loads(done.out)) == ["tiny/model@onnx-cpu#fp32"]
