"""The same recipe gives the same bytes: in another folder, with another store, in other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baking import W8A8, Kitchen, digests, kitchen

FORMATS: list[Any] = [
    {"target": "onnx-cpu", "scheme": "w8a8"},
    W8A8,
    {"target": "coreml", "scheme": "w8"},
    {"target": "coreml", "scheme": "w8a8", "options": {"activation_range": "histogram"}},
]


def baked_in(folder: Path) -> Kitchen:
    made = kitchen(folder, FORMATS)
    done = made.build()
    assert done.code == 0, done.err
    return made


@pytest.mark.slow
def test_artifacts_manifests_and_references_of_all_formats_are_the_same_bytes(tmp_path: Path) -> None:
    here, there = baked_in(tmp_path / "here"), baked_in(tmp_path / "quite" / "somewhere else")
    found = digests(here.out)
    assert {Path(name).suffix for name in found} >= {".onnx", ".pte", ".json", ".safetensors", ".mlmodel", ".bin"}
    assert found == digests(there.out)
