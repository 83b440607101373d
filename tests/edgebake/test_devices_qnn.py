"""The Qualcomm rows against QNN itself: what it writes into a context binary for each chip, float16 or not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgebake import devices

ASK = Path(__file__).resolve().parents[1] / "helpers/qnn_chips.py"
UNNAMED = 68  # what QNN 2.51 compiles as for the first chips after V68, whose own version it does not name
NAMED_ELSEWHERE = ("sm8475",)  # by ExecuTorch's table


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed")
def test_the_numbers_of_each_chip_are_those_that_qnn_compiles_for(tmp_path: Path) -> None:
    rows = [devices.find(name).row for name in devices.names() if devices.find(name).vendor == "qualcomm"]
    command = [sys.executable, str(ASK), *(str(row["soc_model"]) for row in rows)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads((tmp_path / "found.json").read_text())
    for row in rows:
        arch = UNNAMED if row["name"] in NAMED_ELSEWHERE else row.get("htp_arch", UNNAMED)
        chip = row["name"].upper() if row["name"].startswith("sxr") else row["name"].upper().removesuffix("P")
        told = {"chip": chip, "htp_arch": arch, "vtcm_mib": row["vtcm_mib"], "htp_fp16": row["htp_fp16"]}
        assert found[str(row["soc_model"])] == told
