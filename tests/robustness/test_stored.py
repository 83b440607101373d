"""A store that is damaged, deleted, too small, or shared by builds that run at once."""

from __future__ import annotations

import shutil
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from baking import Kitchen, digests, finish, flip, kitchen, litter, on_small_disk, recipe, start
from edgebake.errors import EXIT_STAGE

STORED = ("reference", "trace", "compress", "lower", "validate")


def entries(made: Kitchen) -> list[Path]:
    return sorted(path for path in (made.store / "v1" / "entries").glob("*/*"))


def rounds(made: Kitchen) -> list[list[Path]]:
    """Every stored file, one of each entry at a time."""
    files = [[path for path in sorted(entry.rglob("*")) if path.is_file()] for entry in entries(made)]
    return [[path for path in some if path is not None] for some in zip_longest(*files)]


@pytest.mark.slow
def test_one_changed_byte_in_any_stored_file_is_named_and_its_stage_runs_again(baked: Any) -> None:
    made: Kitchen = baked.kitchen
    for damaged in rounds(made):
        for path in damaged:
            flip(path)
        done = made.build("--check")
        assert done.code == 0, done.err
        for path in damaged:
            stage, name = path.parts[-3], path.name
            assert f"stored files of stage {stage} are damaged ({name};" in done.err
        ran = {stage for stages in done.stages for stage, state in stages.items() if state == "ran"}
        assert ran >= {path.parts[-3] for path in damaged}
        assert digests(made.out) == baked.digests
    quiet = made.build("--check")
    assert quiet.stages == [{"deliver": "unchanged"}] * 2
    assert "damaged" not in quiet.err


@pytest.mark.slow
def test_programs_of_every_method_are_read_again_by_a_later_build(tmp_path: Path) -> None:
    schemes = ("fp16", "w8a8", "w8a8d", "w4g32a8d")
    made = kitchen(tmp_path, [{"target": "executorch-xnnpack", "scheme": scheme} for scheme in schemes])
    assert made.build().code == 0
    before = digests(made.out)
    shutil.rmtree(made.store / "v1" / "entries" / "lower")
    done = made.build()
    assert done.code == 0, done.err
    assert all({stages["trace"], stages.get("compress", "stored")} == {"stored"} for stages in done.stages)
    assert {stages["lower"] for stages in done.stages} == {"ran"}
    assert digests(made.out) == before


@pytest.mark.slow
def test_a_deleted_store_is_filled_again_with_the_same_bytes(baked: Any) -> None:
    shutil.rmtree(baked.kitchen.store)
    done = baked.kitchen.build()
    assert done.code == 0, done.err
    assert {state for stages in done.stages for state in stages.values()} >= {"ran"}
    assert digests(baked.kitchen.out) == baked.digests


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_stage_is_said_and_with_more_room_the_same_command_goes_on(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, ["onnx-cpu"], model={"source": "python", "path": "tiny_net:build", "options": {"width": 1200}}
    )  # 5.9 MB of weights
    made = Kitchen(path, tmp_path / "disk" / "store", tmp_path / "dist")
    small, medium, large = on_small_disk(made, tmp_path / "disk", ["4m", "10m", "64m"])
    for tried, stage in ((small, "trace"), (medium, "lower")):
        assert tried.done.code == EXIT_STAGE
        (result,) = tried.done.results
        assert result["failure"]["stage"] == stage
        assert "disk is full" in result["failure"]["problems"][0]["what"]
        assert "Traceback" not in tried.done.err
        assert not tried.litter
        assert not tried.digests
    assert large.done.code == 0, large.done.err
    assert large.done.stages[0]["reference"] == large.done.stages[0]["trace"] == "stored"
    assert large.done.stages[0]["lower"] == "ran"


def ran(*builds: list[dict[str, str]]) -> dict[str, int]:
    """How often each stored stage ran in all of the builds together."""
    states = [stages for build in builds for stages in build]
    return {stage: sum(stages.get(stage) == "ran" for stages in states) for stage in STORED}


@pytest.mark.slow
def test_two_builds_of_the_same_recipe_at_once_do_the_work_once(baked: Any, tmp_path: Path) -> None:
    made = kitchen(tmp_path)
    processes = [start(*made.arguments("--timeout", 60)) for _ in range(2)]
    first, second = map(finish, processes)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert ran(first.stages, second.stages) == {
        "reference": 1,
        "trace": 1,
        "compress": 1,
        "lower": 2,
        "validate": 2,
    }
    assert digests(made.out) == baked.digests
    assert not litter(made)


@pytest.mark.slow
def test_two_recipes_of_one_network_at_once_share_its_reference_and_its_trace(tmp_path: Path) -> None:
    targets = {"first": ["onnx-cpu"], "second": ["executorch-xnnpack"]}
    recipes = {name: recipe(tmp_path, given, name) for name, given in targets.items()}
    both = [Kitchen(path, tmp_path / "store", tmp_path / "dist") for path in recipes.values()]
    processes = [start(*made.arguments()) for made in both]
    first, second = map(finish, processes)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert ran(first.stages, second.stages) == {"reference": 1, "trace": 1, "compress": 0, "lower": 2, "validate": 2}
    assert not litter(both[0])
