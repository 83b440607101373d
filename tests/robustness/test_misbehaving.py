"""Workers that crash, hang and eat memory: one clear failure each, and the other artifacts are built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from baking import W8A8, Done, Kitchen, digests, kitchen, litter
from edgebake.errors import EXIT_STAGE

TIMEOUT_S, MEMORY_MIB = 40, 2500


def misbehaving(name: str) -> dict[str, Any]:
    """A target whose calibration samples come from the callable ``name``."""
    return {**W8A8, "name": name, "samples": {"calibration": {"python": f"tiny_net:{name}"}}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Kitchen, Done]:
    bad = [misbehaving(name) for name in ("crashing", "hoarding", "hanging", "leaving")]
    made = kitchen(tmp_path_factory.mktemp("misbehaving"), [*bad, "onnx-cpu"])
    return made, made.build("--timeout", TIMEOUT_S, "--memory", MEMORY_MIB)


SAID = {
    "crashing": r"killed by signal 11 \(segmentation fault\) in stage compress",
    "hoarding": r"stage compress used 2\.\d+ GiB, the limit is 2\.\d+ GiB \(--memory\)",
    "leaving": r"ended with code 0 in stage compress without saying why",
    "hanging": r"stage compress ran longer than 40 s \(--timeout\)",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_a_worker_that_ends_badly_is_one_failure_that_names_the_stage(built: tuple[Kitchen, Done], name: str) -> None:
    (result,) = [r for r in built[1].results if r["name"] == name]
    assert result["state"] == "failed"
    assert result["failure"]["stage"] == "compress"
    (problem,) = result["failure"]["problems"]
    assert re.search(SAID[name], problem["what"]), problem["what"]
    assert problem["fix"]
    assert Path(result["failure"]["log"]).is_file()
    assert len(re.findall(SAID[name], built[1].err)) == 1


@pytest.mark.slow
def test_the_other_artifacts_of_the_same_network_are_built_and_the_exit_code_is_4(
    built: tuple[Kitchen, Done], baked: Any
) -> None:
    made, done = built
    assert done.code == EXIT_STAGE
    assert "Traceback" not in done.err.replace("Traceback (most recent call first)", "")
    states = {r["name"] or r["target"]: r["state"] for r in done.results}
    assert states.pop("onnx-cpu") == "pass"
    assert set(states.values()) == {"failed"}
    assert digests(made.out) == {n: d for n, d in baked.digests.items() if "xnnpack" not in n}
    assert not litter(made)


@pytest.mark.slow
def test_fail_fast_says_of_the_rest_that_it_was_not_begun(tmp_path: Path) -> None:
    made = kitchen(tmp_path, [misbehaving("crashing"), "onnx-cpu"])
    done = made.build("--fail-fast")
    assert done.code == EXIT_STAGE
    crashed, rest = done.results
    assert crashed["failure"]["stage"] == "compress"
    assert "--fail-fast" in rest["failure"]["problems"][0]["what"]
    assert rest["stages"] == {}
