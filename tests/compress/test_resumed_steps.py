"""A build that was killed within a step takes up the parts that were finished, and ends as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import edgebake
import step_parts
from storing import POSIX

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@POSIX
@pytest.mark.parametrize(
    ("step", "all_of_it", "last", "left"),
    [
        pytest.param("gptq", 14, 10, 7, id="gptq: seven layers in each of two blocks"),
        pytest.param("awq", 8, 6, 4, id="awq: four groups of layers in each of two blocks"),
        pytest.param("spinquant", 3, 2, 1, id="spinquant: four, four and two steps"),
    ],
)
def test_no_finished_part_is_worked_on_again(tmp_path: Path, step: str, all_of_it: int, last: int, left: int) -> None:
    whole, told, worked = step_parts.apply(tmp_path / "whole", step)
    assert worked == all_of_it
    killed = [sys.executable, step_parts.__file__, str(tmp_path / "killed"), step, str(last)]
    path = {**os.environ, "PYTHONPATH": str(Path(edgebake.__file__).parents[1])}
    assert subprocess.run(killed, check=False, capture_output=True, env=path).returncode == -signal.SIGKILL
    resumed, told_again, worked = step_parts.apply(tmp_path / "killed", step)
    assert worked == left
    assert told_again == told
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert step_parts.apply(tmp_path / "killed", step)[2] == 0
