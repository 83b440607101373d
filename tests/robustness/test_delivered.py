"""Delivered files that are damaged, deleted, or half in place: named, refused, and put right from the store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from baking import Kitchen, digests, environment, finish, flip, litter, on_small_disk, rebuild, start
from edgebake.errors import EXIT_STAGE
from edgebake.result import exit_code
from edgebake.verify import verify

STATE = ".edgebake.json"  # only builds look at it
HEAVY = ("torch", "torchao", "transformers", "onnx", "onnxruntime", "coremltools", "executorch", "sklearn", "scipy")
LIGHT_BUILD = f"""
import sys
from edgebake.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("HEAVY", sorted(set(sys.modules) & {set(HEAVY)!r}), file=sys.stderr)
"""
# Forks a build for each number that it reads; a hook of the interpreter kills it at its nth change to dist.
CRASHES = """
import itertools, os, signal, sys
from pathlib import Path
from edgebake.pipeline import BuildOptions, build
from edgebake.recipe_yaml import read

recipe, store, out = sys.argv[1:]
files = [read(recipe)]
options = BuildOptions(out=Path(out), store=Path(store), only=("*@onnx-cpu*",))
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree"}

def kill_at(die_at):
    numbers = itertools.count(1)

    def hook(event, arguments):
        writing = event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wax"
        if (writing or event in CHANGES) and any(str(a).startswith(out) for a in arguments):
            if next(numbers) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

for line in sys.stdin:
    child = os.fork()
    if not child:
        kill_at(int(line))
        failed = any(result.failure for result in build(files, options, lambda event: None))
        os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def delivered(kitchen: Kitchen) -> list[Path]:
    return sorted(path for path in kitchen.out.rglob("*") if path.is_file())


def artifacts_beside(path: Path, kitchen: Kitchen) -> list[Path]:
    """Artifact folders that the delivered file is part of: all of them for a file of the reference."""
    folders = {p.parent for p in kitchen.out.rglob("manifest.json") if "reference" not in p.parts}
    return sorted(folders) if "reference" in path.parts else [path.parent]


def stages(results: list[Any]) -> list[dict[str, str]]:
    return [dict(result.stages) for result in results]


UNCHANGED = [{"deliver": "unchanged"}] * 2


def test_a_build_without_changes_delivers_nothing_and_imports_nothing_heavy(baked: Any) -> None:
    arguments = [str(a) for a in baked.kitchen.arguments()]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LIGHT_BUILD, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "HEAVY []"
    before = {p: p.stat() for p in delivered(baked.kitchen)}
    results, warnings = rebuild(baked.kitchen, check=True)
    assert stages(results) == UNCHANGED
    assert not warnings
    assert {p: p.stat() for p in delivered(baked.kitchen)} == before


@pytest.mark.parametrize("at", [0, None, -2], ids=["first", "middle", "last but one"])
def test_one_changed_byte_in_any_delivered_file_is_named_refused_and_put_right(baked: Any, at: int | None) -> None:
    for path in delivered(baked.kitchen):
        flip(path, at)
        if path.name != STATE:
            for folder in artifacts_beside(path, baked.kitchen):
                refused = verify(folder)
                assert exit_code([refused]) == EXIT_STAGE, path
                assert refused.failure is not None
                assert any(str(path.resolve()) == str(Path(p.where).resolve()) for p in refused.failure.problems)
        results, warnings = rebuild(baked.kitchen, check=True)
        assert any(str(path) in warning for warning in warnings), path
        assert {"deliver": "ran"} in stages(results), path
        assert digests(baked.kitchen.out) == baked.digests
    assert stages(rebuild(baked.kitchen, check=True)[0]) == UNCHANGED


def test_the_command_line_names_the_damaged_file_and_exits_with_4(baked: Any) -> None:
    model = next(baked.kitchen.out.rglob("model.onnx"))
    flip(model)
    refused = finish(start("verify", model.parent))
    again = baked.kitchen.build("--check")
    assert refused.code == EXIT_STAGE
    assert "model.onnx" in "".join((refused.out + refused.err).split())  # long paths are wrapped
    assert "Traceback" not in refused.out + refused.err
    assert again.code == 0
    assert str(model) in again.err
    assert digests(baked.kitchen.out) == baked.digests


def test_any_deleted_file_is_delivered_again_without_running_a_stage(baked: Any) -> None:
    for path in delivered(baked.kitchen):
        path.unlink()
        results, _ = rebuild(baked.kitchen)
        assert {"deliver": "ran"} in stages(results), path
        assert all(r.state == "pass" for r in results)
        assert digests(baked.kitchen.out) == baked.digests
    shutil.rmtree(baked.kitchen.out)
    assert stages(rebuild(baked.kitchen)[0]) == [{"deliver": "ran"}] * 2
    assert digests(baked.kitchen.out) == baked.digests
    assert stages(rebuild(baked.kitchen)[0]) == UNCHANGED


def test_a_delivery_killed_at_any_step_leaves_no_half_artifact_and_the_next_build_mends_it(baked: Any) -> None:
    kitchen: Kitchen = baked.kitchen
    with crashes(kitchen) as build_killed_at:
        at, code = 0, -9
        while code == -9:
            at += 1
            os.utime(next(kitchen.out.rglob("model.onnx")))  # so that both are replaced
            os.utime(next(kitchen.out.rglob("samples.json")))
            code = build_killed_at(at)
            assert_whole_or_absent(kitchen, baked.digests)
            assert all(r.state == "pass" for r in rebuild(kitchen)[0])
            assert digests(kitchen.out) == baked.digests
            assert not litter(kitchen)
    assert code == 0
    assert at > 10


@contextmanager
def crashes(kitchen: Kitchen) -> Iterator[Callable[[int], int]]:
    """Builds and kills at the nth change to the output folder; returns the exit code."""
    arguments = [str(a) for a in (kitchen.recipe, kitchen.store, kitchen.out)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", CRASHES, *arguments], env=environment(), stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        giving, told = process.stdin, process.stdout

        def build_killed_at(at: int) -> int:
            giving.write(f"{at}\n")
            giving.flush()
            return int(told.readline())

        yield build_killed_at
        giving.close()


def assert_whole_or_absent(kitchen: Kitchen, undisturbed: dict[str, str]) -> None:
    there = digests(kitchen.out)
    for folder in {Path(name).parent for name in undisturbed}:
        whole = {name: digest for name, digest in undisturbed.items() if Path(name).parent == folder}
        assert {name: digest for name, digest in there.items() if Path(name).parent == folder} in (whole, {})


def test_a_full_disk_under_the_output_folder_is_said_and_leaves_nothing(baked: Any, tmp_path: Path) -> None:
    kitchen = Kitchen(baked.kitchen.recipe, baked.kitchen.store, tmp_path / "disk" / "dist")
    full, roomy = on_small_disk(kitchen, tmp_path / "disk", ["16k", "8m"])
    assert full.done.code == EXIT_STAGE
    assert [r["failure"]["stage"] for r in full.done.results] == ["deliver", "deliver"]
    assert "disk is full" in full.done.err
    assert "write to another disk" in full.done.err and "EDGEBAKE_STORE" not in full.done.err  # not the store's disk
    assert "Traceback" not in full.done.err
    assert not full.litter
    assert not full.digests
    assert roomy.done.code == 0
    assert roomy.done.stages == [{"deliver": "ran"}] * 2
    assert roomy.digests == baked.digests
