"""A shipped recipe for a Snapdragon's NPU gives the same bytes in other folders, stores and processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from baking import digests, finish, start
from edgebake_targets import onnx_qnn
from executorch_qnn_cases import toolchain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toolchain(tmp_path_factory.mktemp("toolchain")):
        yield


@pytest.mark.parametrize(("target", "file"), [("onnx-qnn", "model.onnx"), ("executorch-qnn", "model.pte")])
def test_other_folders_stores_and_processes_give_the_same_bytes(tmp_path: Path, target: str, file: str) -> None:
    found = []
    for folder in (tmp_path / "here", tmp_path / "quite" / "somewhere else"):
        chosen = ("--only", f"*@{target}+sm8650#w8a16", "--set", "samples.evaluation.count=1")
        done = finish(start("build", "silero-vad-qnn", *chosen, "--out", folder, "--store", folder / "store"), 1200)
        assert done.code in (0, 5), done.err  # one clip may miss a limit that is meant for all of them
        found.append({name: digest for name, digest in digests(folder).items() if not name.startswith("store/")})
    assert found[0] == found[1]
    assert any(name.endswith(f"/{file}") for name in found[0])
