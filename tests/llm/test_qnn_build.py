"""Decoders built for Qualcomm's NPU as users build them: run by the vendor's simulator, judged by their text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import baking
import decoders
from edgebake.trace import trace
from edgebake_targets import _qnn_decoder
from edgebake_targets.inspectors import pte
from executorch_qnn_cases import toolchain

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
TOKENS = torch.randint(3, decoders.WORDS, (1, 32), generator=torch.Generator().manual_seed(1))
QNN = {"target": "executorch-qnn", "device": "sm8650"}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"head_dim": 32}, "phi3": {"pad_token_id": 0}}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_token_a_call_says_what_the_float_model_says(kind: str, tmp_path: Path) -> None:
    loaded = decoders.loaded(decoders.save(tmp_path, kind, **FAMILIES[kind]))
    found = _qnn_decoder.stepwise(trace(loaded))
    program = found.programs["forward"]
    step = _qnn_decoder.keeping(program.module(check_guards=False), program.example_inputs[0][2:])
    with torch.no_grad():
        network = loaded.methods["forward"]
        want = torch.cat([network(TOKENS[:, a : a + 16], torch.tensor([a]))[0] for a in (0, 16)], 1)
        given = [step(TOKENS[:, a : a + 1], torch.tensor([a]))[0] for a in range(32)]
        # Another text afterwards: rows of the first one are behind the position, and hidden.
        again = [step(TOKENS[:, 16 + a : 17 + a], torch.tensor([a]))[0] for a in range(8)]
        other = network(TOKENS[:, 16:24], torch.tensor([0]))[0]
    assert torch.allclose(torch.cat(given, 1), want, atol=1e-4, rtol=1e-4)
    assert torch.allclose(torch.cat(again, 1), other, atol=1e-4, rtol=1e-4)
    assert (found.signature.methods["forward"].buffers, found.signature.dims) == ((), {})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("qnn")
    (folder / "model").mkdir()
    decoders.save(folder / "model", num_hidden_layers=1)
    (folder / "recipe").mkdir()
    (folder / "recipe" / "text.txt").write_text(TEXT)
    (folder / "recipe" / "held.txt").write_text(TEXT.swapcase()[::-1])
    samples = {
        "calibration": {"text": "text.txt", "length": 32, "count": 6},
        "evaluation": {"text": "held.txt", "length": 32, "count": 3},
    }
    limits = {
        "language": {"top1": 0.3, "top5": 0.5, "stepwise_db": 40},
        "delegated": 0.99,
    }  # 1 asks for no operator outside
    given = {**decoders.component(Path("../model")), "samples": samples, "limits": limits}
    targets = [{**QNN, "scheme": scheme} for scheme in ("fp16", "w8a16")]
    place = baking.kitchen(folder, targets, name="decoder", **given)
    with toolchain(place.store):
        done = place.build()
    assert done.code == 0, [result["verdicts"] for result in done.results] or done.err
    return {result["scheme"]: result for result in done.results}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "floor"), [("fp16", 42), ("w8a16", 20)])
def test_a_decoder_on_the_simulator_is_judged_by_its_text(built: Mapping[str, Any], scheme: str, floor: float) -> None:
    measured = built[scheme]["measurements"]
    assert measured["runner"] == {"name": "executorch-qnn-simulator", "kind": "simulated"}
    assert measured["outputs"]["logits"]["sqnr_db"] > floor
    assert measured["language"]["perplexity"]["ratio"] == pytest.approx(1, abs=0.02)
    assert measured["language"]["stepwise"]["same"] == 1.0


@pytest.mark.slow
def test_the_whole_network_is_on_the_npu_and_the_cpu_writes_the_caches(built: Mapping[str, Any]) -> None:
    for result in built.values():
        folder = Path(result["folder"])
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["delegation"]["share"], manifest["delegation"]["partitions"]) == (1.0, 2)
        assert manifest["signature"]["methods"]["forward"]["inputs"][0]["shape"] == [1, 1]
        constants = pte.inspect(folder / "model.pte").facts["constants"]
        assert (constants["get_max_seq_len"], constants["enable_dynamic_shape"]) == (1, False)
        assert (folder / "tokenizer.json").is_file()
