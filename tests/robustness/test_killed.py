"""kill -9 and Ctrl-C in every stage: no survivors, and the same command goes on where the work was."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from baking import (
    HOLDS,
    W8A8,
    Kitchen,
    all_gone,
    await_file,
    await_stopped,
    digests,
    events,
    family,
    finish,
    freezing,
    interrupt,
    kitchen,
    litter,
    start,
    stepped,
    workers,
)
from edgebake.errors import EXIT_INTERRUPTED

Events = Iterator[Mapping[str, Any]]

# Stages by the place in the network's file that they come by and can be held at; in those without one, the worker is
# stopped as the stage begins.
PLACES = {
    "load": "load",
    "reference": "evaluation",
    "trace": "trace",
    "compress": "calibration",
    "lower": "",
    "validate": "",
}
STAGES = tuple(PLACES)


@contextmanager
def held_in(stage: str, made: Kitchen, holds: Path) -> Iterator[tuple[subprocess.Popen[str], Events]]:
    """A build that has come as far as ``stage`` and does not leave it."""
    holds.mkdir(exist_ok=True)
    place = holds / (PLACES[stage] or "nothing")
    place.touch()
    frozen = {} if PLACES[stage] else freezing(holds.with_name("freeze"), stage)
    with stepped(made, **{HOLDS: str(holds)}, **frozen) as build:
        told = events(build)
        seen = []
        for event in told:
            seen.append(event)
            if event.get("stage") == stage:
                break
        assert seen[-1].get("stage") == stage, seen
        if PLACES[stage]:
            await_file(place.with_suffix(".reached"))
        else:
            (worker,) = workers(build.pid)
            await_stopped(worker)
        yield build, told
    place.unlink()


def assert_goes_on(made: Kitchen, baked: Any, last: str) -> None:
    """The next build repeats nothing that ended before ``last``, in which the one before was killed, and is whole."""
    done = made.build()
    assert done.code == 0, done.err
    (stages,) = done.stages
    stored = set(STAGES[: STAGES.index(last)]) - {"load"}  # what a source loads is not stored
    assert not {name for name in stored if stages.get(name, "stored") != "stored"}
    assert stages[last] == "ran"
    assert digests(made.out) == {name: digest for name, digest in baked.digests.items() if "onnx-cpu" not in name}
    assert not litter(made)


@pytest.mark.slow
def test_a_build_killed_in_every_stage_leaves_no_process_and_goes_on_from_there(baked: Any, tmp_path: Path) -> None:
    made = kitchen(tmp_path, [W8A8])
    for stage in STAGES:
        with held_in(stage, made, tmp_path / "holds") as (build, _):
            processes = family(build.pid)
            assert workers(build.pid)
            build.kill()
            assert all_gone(processes), f"something outlived a build killed in {stage}"
        assert not digests(made.out)
    assert_goes_on(made, baked, STAGES[-1])


@pytest.mark.slow
def test_a_worker_killed_in_every_stage_is_one_failure_and_the_next_build_goes_on(baked: Any, tmp_path: Path) -> None:
    made = kitchen(tmp_path, [W8A8])
    for stage in STAGES:
        with held_in(stage, made, tmp_path / "holds") as (build, told):
            (worker,) = workers(build.pid)
            processes = [worker, *worker.children(recursive=True)]
            worker.kill()
            (failure,) = [event["end"][0] for event in told if "end" in event]
        assert all_gone(processes)
        assert failure[0] == stage
        assert f"killed by signal 9 (killed from outside) in stage {stage}" in failure[1]
        assert len(failure) == 2, "one problem says it"
    assert_goes_on(made, baked, STAGES[-1])


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_is_said_once_and_the_next_build_goes_on(baked: Any, tmp_path: Path) -> None:
    made = kitchen(tmp_path, [W8A8])
    holds = tmp_path / "holds"
    holds.mkdir()
    (holds / "calibration").touch()
    arguments = [argument for argument in made.arguments("--quiet") if argument != "--json"]
    build = start(*arguments, **{HOLDS: str(holds)})
    await_file(holds / "calibration.reached")
    processes = family(build.pid)
    interrupt(build)
    done = finish(build)
    assert done.code == EXIT_INTERRUPTED
    kept = f"kept in {made.store}: reference, trace; the same command goes on from there"
    assert done.err == f"interrupted; {kept}\n", "no failure, no log, no traceback"
    assert not done.out
    assert all_gone(processes)
    (holds / "calibration").unlink()
    assert_goes_on(made, baked, "compress")
