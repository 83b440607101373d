"""How a worker that did not finish is described."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgebake.worker import Exit, Limits, describe, log_tail


def ended(tmp_path: Path, **changes: Any) -> Exit:
    facts: dict[str, Any] = {"reason": "crashed", "stage": "lower", "code": None, "signal": None}
    facts |= {"peak_mib": {}, "seconds": {}, "log": tmp_path / "none.log", "limits": Limits(60.0, 4096.0)}
    return Exit(**{**facts, **changes})


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"reason": "memory", "peak_mib": {"lower": 4300.8}},
            "stage lower used 4.2 GiB, the limit is 4.0 GiB (--memory)",
        ),
        (
            {"reason": "memory", "peak_mib": {"lower": 4106.2}},
            "stage lower used 4.01 GiB, the limit is 4.00 GiB (--memory)",
        ),
        ({"reason": "timeout"}, "stage lower ran longer than 60 s (--timeout)"),
        ({"signal": 11}, "the worker was killed by signal 11 (segmentation fault) in stage lower"),
        ({"code": 0xC0000005}, "the worker crashed in stage lower: access violation (0xC0000005)"),
    ],
)
def test_the_texts(tmp_path: Path, changes: Mapping[str, Any], text: str) -> None:
    problem = describe(ended(tmp_path, **changes))
    assert problem.what == text
    assert problem.fix


def test_a_worker_killed_from_outside_points_to_memory(tmp_path: Path) -> None:
    assert "out of memory" in describe(ended(tmp_path, signal=9, peak_mib={"lower": 15000.0})).fix


def test_a_finished_worker_has_nothing_to_describe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finished"):
        describe(ended(tmp_path, reason="finished", code=0))


def test_the_end_of_a_log_is_safe_to_print(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 50000 + b"\n 10%\r 20%\r 30%\n\x1b[2Jwiped\n\xff\n" + b"y" * 5000 + b"\n\n")
    tail = log_tail(log)
    assert tail[-4:] == [" 30%", "?[2Jwiped", "�", "y" * 300]
    assert len(log_tail(log, 1)) == 1
