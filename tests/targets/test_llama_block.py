"""A decoder layer in the size of Llama 3.2 1B: what it computes, and that the NPU takes all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baking import finish, start
from edgebake.models.zoo import llama_block, llama_cached_block
from edgebake.target import SampleRequest
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


def test_a_word_behind_a_cache_is_what_the_whole_text_gives() -> None:
    """The layer with its cache outside against the one that sees all positions at once."""
    sizes = {name: SMALL[name] for name in ("hidden", "intermediate", "heads", "key_value_heads")}
    torch.manual_seed(0)
    cached = llama_cached_block.model(**sizes)
    torch.manual_seed(0)
    whole = llama_block.model(**sizes, length=33)
    options = {name: SMALL[name] for name in ("hidden", "heads", "key_value_heads")}
    (sample,) = llama_cached_block.calls(SampleRequest(count=1, skip=0, seed=0, options=options))
    prefill, decode = ({n: torch.from_numpy(v) for n, v in call.inputs.items()} for call in sample.calls)
    filled = int((decode["mask"][0, 0, 0] == 0).sum()) - 1
    angles = torch.outer(torch.tensor([32.0]), 10000.0 ** (-torch.arange(0, 16, 2) / 16)).repeat(1, 2)[None]
    with torch.no_grad():
        wanted = whole(torch.cat((prefill["hidden"], decode["hidden"]), 1))["hidden_out"]
        read = cached(**prefill)
        for name in ("keys", "values"):
            decode[name][:, :, :32], decode[name][:, :, 32:] = read[f"new_{name}"], 7.0  # 7: must not be seen
        decode["mask"][..., :32], decode["mask"][..., 32:63] = 0.0, -100.0
        said = cached(**(decode | {"cosine": angles.cos(), "sine": angles.sin()}))
    assert filled >= 32
    torch.testing.assert_close(read["hidden_out"], wanted[:, :32], rtol=0, atol=1e-5)
    torch.testing.assert_close(said["hidden_out"], wanted[:, 32:], rtol=0, atol=1e-5)


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


@pytest.mark.slow
@pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed")
def test_a_layer_that_reads_and_one_that_writes_lie_in_one_binary_with_their_weights_once(tmp_path: Path) -> None:
    chosen = ("--out", tmp_path / "dist", "--store", tmp_path / "store", "--json")
    done = finish(start("build", "llama-block-shared-random-qnn", *chosen), 1200)
    assert done.code == 0, done.out + done.err
    told = json.loads(next((tmp_path / "dist").rglob("manifest.json")).read_text())["encodings"]["shared"]
    assert told["methods"] == ["prefill", "decode"]
    assert told["bytes"] < 0.52 * told["separate_bytes"]
