"""Weights for onnxruntime-genai of which a killed process wrote some: those are not made again, and never trusted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import edgebake
import edgebake_targets
import genai_killed
from edgebake_targets._genai_journal import JOURNAL
from edgebake_targets._genai_weights import DATA
from storing import POSIX

pytestmark = POSIX
ALL = [f"layer{number}" for number in range(genai_killed.LAYERS)]
KILLED_IN = "layer3"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    numbers = np.random.default_rng(0)
    layers = {name: numbers.standard_normal(genai_killed.SHAPE, np.float32) for name in ALL}
    norms = {f"norm{number}": numbers.standard_normal(4096, np.float32) for number in range(len(ALL))}
    save_file(layers | norms, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def begun(source: Path) -> Path:
    """A folder that a process left when it was killed in the fourth layer."""
    folder = source / "begun"
    folder.mkdir()
    roots = [str(Path(package.__file__ or "").parents[1]) for package in (edgebake, edgebake_targets)]
    killed = [sys.executable, genai_killed.__file__, str(source), str(folder), KILLED_IN]
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
    assert subprocess.run(killed, check=False, capture_output=True, env=path).returncode == -signal.SIGKILL
    assert (folder / JOURNAL).exists()
    return folder


@pytest.fixture
def whole(source: Path) -> Path:
    folder = source / "whole"
    folder.mkdir()
    read, _ = genai_killed.write(source, folder)
    assert read == ALL
    return folder


def check(source: Path, begun: Path, whole: Path, left: list[str], order: int = 1) -> None:
    """Going on in ``begun`` reads ``left`` and gives what ``whole`` has."""
    read, made = genai_killed.write(source, begun, order=order)
    assert read == left
    again = source / "again"
    again.mkdir()
    assert made == genai_killed.write(source, again, order=order)[1]
    assert (begun / DATA).read_bytes() == (whole / DATA).read_bytes()
    assert {file.name for file in begun.iterdir()} == {DATA}


def test_whole_tensors_are_not_read_again(source: Path, begun: Path, whole: Path) -> None:
    check(source, begun, whole, ALL[ALL.index(KILLED_IN) :])


def test_what_was_damaged_since_and_all_behind_it_is_made_again(source: Path, begun: Path, whole: Path) -> None:
    with (begun / DATA).open("r+b") as file:
        file.seek(4096 * 4)  # behind the norm of the first layer, which takes four pages
        file.write(bytes(8))
    check(source, begun, whole, ALL)


def test_a_line_that_is_cut_off_tells_of_nothing(source: Path, begun: Path, whole: Path) -> None:
    *_, layer, _norm = lines = (begun / JOURNAL).read_text("utf-8").splitlines(keepends=True)
    (begun / JOURNAL).write_text("".join(lines[:-2]) + layer[:-20], "utf-8")
    check(source, begun, whole, ALL[ALL.index(KILLED_IN) - 1 :])


def test_weights_that_are_missing_are_made_again(source: Path, begun: Path, whole: Path) -> None:
    (begun / DATA).unlink()
    check(source, begun, whole, ALL)


def test_tensors_in_another_order_are_made_again(source: Path, begun: Path) -> None:
    other = source / "other"
    other.mkdir()
    genai_killed.write(source, other, order=-1)
    check(source, begun, other, ALL[::-1], order=-1)
