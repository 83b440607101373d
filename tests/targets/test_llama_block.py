"""A decoder layer in the size of Llama 3.2 1B: what it computes, and that the NPU takes all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baking import finish, start
from edgebake.models.zoo import llama_block
from edgebake_targets import onnx_qnn
from executorch_qnn_cases import toolchain

SMALL = {"hidden": 64, "intermediate": 128, "heads": 4, "key_value_heads": 2, "length": 8}


def test_a_position_sees_those_before_it_and_the_weights_are_those_of_the_seed() -> None:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(llama_block.model(**SMALL))
    hidden = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, same = (block(hidden)["hidden_out"] for block in made)
        later = hidden.clone()
        later[:, 5:] += 1
        changed = made[0](later)["hidden_out"]
    assert torch.equal(wanted, same)
    assert torch.equal(wanted[:, :5], changed[:, :5]) and not torch.equal(wanted[:, 5:], changed[:, 5:])
    assert float((wanted - hidden).std()) > 0.3, "the branches weigh as much as what they add to"


@pytest.fixture(scope="module")
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toolchain(tmp_path_factory.mktemp("toolchain")):
        yield


@pytest.mark.slow
@pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed")
@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("target", ["onnx-qnn", "executorch-qnn"])
def test_a_layer_of_that_size_meets_its_limits_on_the_simulator(tmp_path: Path, target: str) -> None:
    chosen = ("--only", f"*@{target}+sm8650#w8a16", "--out", tmp_path / "dist", "--store", tmp_path / "store")
    done = finish(start("build", "llama-block-random-qnn", *chosen, "--json"), 1200)
    assert done.code == 0, done.out + done.err
    (result,) = done.results
    assert {verdict["limit"]: verdict["state"] for verdict in result["verdicts"]}["delegated"] == "pass"
