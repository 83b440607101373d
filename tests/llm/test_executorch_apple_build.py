"""Decoders built as users build them, by ExecuTorch for Apple: Core ML's parts judged by text, MLX's looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import baking
import decoders
from edgebake_targets.inspectors import pte

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
COREML = {"target": "executorch-coreml", "options": {"minimum_os": "iOS18"}}
FOUR = {**COREML, "scheme": "w4g32", "limits": {"language": {"top1": 0.999}}}
MLX = {"target": "executorch-mlx", "scheme": "w4g32", "compress": {"modules": {"lm_head": "w8"}}}


def kitchen(folder: Path, *targets: Any) -> baking.Kitchen:
    (folder / "model").mkdir()
    decoders.save(folder / "model", num_hidden_layers=1)
    (folder / "recipe").mkdir()
    (folder / "recipe" / "text.txt").write_text(TEXT)
    samples = {"evaluation": {"text": "text.txt", "length": 40, "count": 3}}
    limits = {"language": {"top1": 0.3, "top5": 0.5, "stepwise_db": 60}}
    given = {**decoders.component(Path("../model")), "samples": samples, "limits": limits}
    return baking.kitchen(folder, targets, name="decoder", **given)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    done = kitchen(tmp_path_factory.mktemp("apple"), COREML, FOUR, MLX).build()
    assert done.code == 5, done.err + done.out  # four bits miss their limit
    return {f"{result['target']} {result['scheme']}": result for result in done.results}


@pytest.mark.slow
def test_a_decoder_in_core_mls_parts_is_judged_by_its_text(built: Mapping[str, Any]) -> None:
    exact, four = (built[f"executorch-coreml {scheme}"]["measurements"] for scheme in ("fp32", "w4g32"))
    assert exact["runner"] == {"name": "executorch-coreml-interpreter", "kind": "interpreted"}
    assert exact["language"]["perplexity"]["ratio"] == pytest.approx(1, abs=2e-3)  # states are float16
    assert exact["language"]["generated"]["value"] == exact["language"]["stepwise"]["same"] == 1.0
    assert exact["outputs"]["logits"]["sqnr_db"] > 55
    assert exact["modes"]["fp32"]["outputs"]["logits"]["sqnr_db"] > 100
    assert 0 < four["language"]["kl"] < 3
    assert four["located"]["modules"]
    failed = [v["limit"] for result in built.values() for v in result["verdicts"] if v["state"] == "fail"]
    assert failed == ["language.top1"]


@pytest.mark.slow
def test_the_program_takes_a_token_a_call_and_says_so_to_executorchs_runner(built: Mapping[str, Any]) -> None:
    folder = Path(built["executorch-coreml fp32"]["folder"])
    manifest = json.loads((folder / "manifest.json").read_text())
    (tokens, position) = manifest["signature"]["methods"]["forward"]["inputs"]
    assert (tokens["shape"], position["shape"]) == ([1, 1], [1])
    constants = pte.inspect(folder / "model.pte").facts["constants"]
    assert (constants["enable_dynamic_shape"], constants["get_max_seq_len"]) == (False, 1)
    assert constants["get_max_context_len"] == decoders.CONTEXT
    assert manifest["delegation"]["share"] == 1.0


@pytest.mark.slow
def test_a_decoder_for_mlx_is_not_measured_off_a_mac_and_never_passed(built: Mapping[str, Any]) -> None:
    result = built["executorch-mlx w4g32"]
    states = {v["limit"]: v["state"] for v in result["verdicts"]}
    assert {states[f"language.{name}"] for name in ("top1", "top5", "stepwise_db")} == {"not measured"}
    assert states["structure.loads"] == "pass"
    folder = Path(result["folder"])
    assert (folder / "tokenizer.json").is_file()
    operators = pte.inspect(folder / "model.pte").facts["delegate_operators"]
    assert operators["sdpa"] == 1
    assert operators["quantized_matmul"] == 8


def test_a_decoder_for_systems_without_states_is_refused_at_its_line(tmp_path: Path) -> None:
    place = kitchen(tmp_path, {"target": "executorch-coreml"})
    done = baking.finish(baking.start("check", place.recipe))
    assert done.code == 2
    assert "keeps its keys and values in states, which packages have since iOS 18" in done.err
    assert "minimum_os: iOS18" in done.err
