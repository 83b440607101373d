"""How verbs end: exit codes, defects of our own without a traceback, interrupts, readers that went away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import baking
from edgebake import checks
from edgebake.commands._ending import EXIT_BROKEN_PIPE
from edgebake.commands._shared import expand
from edgebake.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_RECIPE, EXIT_STAGE, UsageError
from edgebake.recipe_files import recipes_folder
from verbs import Edgebake, Said, refused

VERBS = sorted(p.stem for p in Path(checks.__file__).parents[1].glob("commands/[a-z]*.py"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_says_what_it_does(edgebake: Edgebake, verb: str) -> None:
    said = edgebake(verb, "--help")
    assert said.code == 0
    assert f"edgebake {verb}" in said.out
    if verb not in ("targets", "doctor"):
        assert "Examples:" in said.out


def test_help_leads_a_newcomer(edgebake: Edgebake) -> None:
    said = edgebake("--help")
    assert "edgebake build minilm-l6" in said.out
    assert "edgebake init" in said.out
    assert all(f" {verb} " in said.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_globs_in_examples_find_recipes_of_the_repository(
    edgebake: Edgebake, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipes_folder().parent)
    globs = re.findall(r"'(recipes/[^']*)'", edgebake(verb, "--help").out)
    assert bool(globs) == (verb in ("build", "check"))
    for glob in globs:
        assert len(expand([glob])) > 10
    with pytest.raises(UsageError, match=r"\*\* goes into folders"):
        expand(["recipes/*.yml"])


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["build"], ["build", "--bogus", "x"], ["targets", "x"], ["build", "x", "-j", "0"], ["plan", "--set"]],
    ids=" ".join,
)
def test_wrong_arguments_end_with_2_and_name_themselves(edgebake: Edgebake, arguments: list[str]) -> None:
    said = edgebake(*arguments)
    assert said.code == EXIT_RECIPE
    assert said.err
    as_json = edgebake(*arguments, "--json")
    assert as_json.code == as_json.json["exit_code"] == EXIT_RECIPE
    assert as_json.json["error"][0]["what"]


def test_a_defect_of_ours_is_one_line_and_a_log(
    edgebake: Edgebake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def defect(_names: object) -> None:
        raise ZeroDivisionError("a\x1b[31m b\nc")

    monkeypatch.setattr("edgebake.commands.targets.rows", defect)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = edgebake("targets")
    refused(said, EXIT_INTERNAL, "internal error in `edgebake targets`: ZeroDivisionError", "report")
    assert "\x1b" not in said.err
    (log,) = tmp_path.glob("edgebake-targets-*.log")
    assert str(log) in said.err
    assert "Traceback" in log.read_text()
    assert edgebake("targets", "--json").json["exit_code"] == EXIT_INTERNAL


def test_a_refusal_of_the_system_is_no_defect(edgebake: Edgebake, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_names: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/secret")

    monkeypatch.setattr("edgebake.commands.targets.rows", refuse)
    refused(edgebake("targets"), EXIT_STAGE, "/somewhere/secret: Permission denied")


@pytest.mark.parametrize(
    ("kept", "line"), [((), "interrupted"), (("kept in here: trace",), "interrupted; kept in here: trace")]
)
def test_an_interrupt_ends_with_130_and_one_line(
    edgebake: Edgebake, monkeypatch: pytest.MonkeyPatch, kept: tuple[str, ...], line: str
) -> None:
    def interrupt(_names: object) -> None:
        raise KeyboardInterrupt(*kept)

    monkeypatch.setattr("edgebake.commands.targets.rows", interrupt)
    assert edgebake("targets") == Said(EXIT_INTERRUPTED, "", f"{line}\n")
    said = edgebake("targets", "--json")
    assert said.err == f"{line}\n"
    assert said.json == {"error": [{"what": line, "where": "", "fix": ""}], "exit_code": EXIT_INTERRUPTED}


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_control_c_ends_an_inspection_and_its_process(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if '_isolated' in str(sys.orig_argv): pathlib.Path(__file__).with_name('began').touch(), time.sleep(60)"
    )
    (tmp_path / "model.onnx").write_bytes(b"x")
    paths = os.pathsep.join([str(tmp_path), *baking.SOURCES])
    process = baking.start("inspect", tmp_path / "model.onnx", PYTHONPATH=paths)
    baking.await_file(tmp_path / "began", 60)
    time.sleep(0.2)  # the process that started it has to get hold of it
    children = baking.family(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    done = baking.finish(process, 30)
    assert done.code == EXIT_INTERRUPTED
    assert "Traceback" not in done.err
    assert baking.all_gone(children)


@pytest.mark.skipif(os.name != "posix", reason="pipes that break")
@pytest.mark.parametrize(
    "arguments", [["targets"], ["schema"], ["--help"], ["build", "-h"], ["plan", "minilm-l6", "--json"]], ids=" ".join
)
def test_a_reader_that_goes_away_is_no_error_to_look_at(arguments: list[str], tmp_path: Path) -> None:
    code = "from edgebake.cli import main; main()"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=baking.environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == EXIT_BROKEN_PIPE


def test_signs_that_a_terminal_lacks_do_not_end_a_verb() -> None:
    done = baking.finish(baking.start("plan", "minilm-l6", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C"))
    assert done.code == 0, done.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps a folder that a process works in")
def test_a_current_folder_that_is_gone_is_said(
    edgebake: Edgebake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    refused(edgebake("plan", "minilm-l6"), EXIT_RECIPE, "the current folder is no longer there")


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_an_empty_folder_name_is_not_the_current_folder(edgebake: Edgebake, option: str) -> None:
    said = edgebake("build", "minilm-l6", f"{option}=")
    assert said.code == EXIT_RECIPE
    assert "name is empty; write . for" in " ".join(said.err.replace("│", " ").split())
