"""On a Mac: every artifact for Apple's runtimes under EDGEBAKE_DIST meets the limits of its recipe on the real one."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from edgebake.commands._shared import artifact_folders
from edgebake.delivery import read_manifest
from edgebake.verify import verify

DIST = Path(os.environ.get("EDGEBAKE_DIST", "dist"))


@pytest.mark.skipif(platform.system() != "Darwin", reason="Core ML and MLX execute on macOS only")
@pytest.mark.parametrize("target", ["coreml", "executorch-coreml", "executorch-mlx"])
def test_every_artifact_meets_its_limits_on_this_mac(target: str) -> None:
    folders = [f for f in artifact_folders([DIST]) if read_manifest(f)["target"] == target]
    assert folders, f"build a recipe with the target {target} first: none under {DIST}"
    results = {f: verify(f) for f in folders}
    assert {f.as_posix(): r.state for f, r in results.items()} == {f.as_posix(): "pass" for f in folders}
    assert all(r.measurements["runner"]["kind"] == "device" for r in results.values())
    assert all(r.measurements["latency"]["median_ms"] > 0 for r in results.values())
    for found in (r.measurements for r in results.values() if target == "coreml"):
        assert {"cpu_only", "cpu_and_gpu", "cpu_and_ne"} == set(found["compute_units"])
        assert sum(sum(row["operators"].values()) for row in found["placement"].values())
