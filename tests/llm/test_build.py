"""A decoder built as users build it: judged by its text, with its tokenizer beside it, generating in both runners."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import baking
import decoders

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
W8A8D = {"target": "executorch-xnnpack", "scheme": "w8a8d", "compress": {"modules": {"model.embed_tokens": "w8"}}}
W4 = {"model.embed_tokens": "w8", "lm_head": "w8a8d"}
W4G32A8D = {"target": "executorch-xnnpack", "scheme": "w4g32a8d", "compress": {"modules": W4}}


def kitchen(folder: Path, *targets: Any, **more: Any) -> baking.Kitchen:
    (folder / "model").mkdir()
    decoders.save(folder / "model", num_hidden_layers=1)  # lowering takes seconds for each layer
    (folder / "recipe").mkdir()
    (folder / "recipe" / "text.txt").write_text(TEXT)
    given = decoders.component(Path("../model"))
    samples = {"evaluation": {"text": "text.txt", "length": 40, "count": 24}}
    return baking.kitchen(folder, targets, name="decoder", samples=samples, **{**given, **more})


@pytest.mark.slow
def test_a_decoder_is_built_and_judged_by_its_text(tmp_path: Path) -> None:
    limits = {"language": {"perplexity": 1.2, "kl": 1.0, "top1": 0.6, "top5": 0.7, "stepwise_db": 10}}
    place = kitchen(tmp_path, "executorch-xnnpack", W8A8D, W4G32A8D, limits=limits)
    done = place.build("--strict")
    assert done.code == 0, done.err + done.out
    exact, eight, four = (result["measurements"] for result in done.results)
    language = exact["language"]
    assert language["perplexity"]["ratio"] == pytest.approx(1, abs=1e-5)
    assert (language["words"], language["texts"]) == (24 * 39, 24)
    assert language["generated"]["value"] == language["top1"]["value"] == language["stepwise"]["same"] == 1.0
    assert exact["outputs"]["logits"]["sqnr_db"] > 100
    assert exact["size"]["bytes"] > eight["size"]["bytes"] > four["size"]["bytes"]
    for found in (eight, four):
        assert 0 < found["language"]["kl"] < 1
        assert found["outputs"]["logits"]["sqnr_db"] < 60
    folder = Path(done.results[0]["folder"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"model.pte", "tokenizer.json", "tokenizer_config.json"} <= {f["path"] for f in manifest["files"]}
    assert manifest["signature"]["language"]["stop"] == [decoders.EOS]
    assert done.results[0]["measurements"]["notes"] == []


@pytest.mark.slow
def test_a_limit_on_text_that_is_missed_fails_the_build(tmp_path: Path) -> None:
    place = kitchen(tmp_path, W4G32A8D, limits={"language": {"top1": 0.9999, "perplexity": 1.0}})
    done = place.build()
    assert done.code == 5, done.err
    failed = {v["limit"]: v for v in done.results[0]["verdicts"] if v["state"] == "fail"}
    assert "language.top1" in failed
    assert done.results[0]["measurements"]["located"]["modules"]


def pair(folder: Path) -> baking.Kitchen:
    """A decoder of two layers and its first layer as its draft, in one bundle."""
    place = kitchen(folder)
    decoders.save(folder / "model", num_hidden_layers=2)
    content = yaml.safe_load(place.recipe.read_text())
    big = {key: content[key] for key in ("model", "inputs", "dims", "samples")} | {"targets": ["executorch-xnnpack"]}
    limits = {"speculative": {"acceptance": 0.01, "tokens_per_step": 1, "identical": 1}}
    small = {**big, "model": {**big["model"], "layers": 1}, "limits": limits}
    small["targets"] = [{"target": "executorch-xnnpack", "device": "sm8650"}]
    big["targets"] = [{"target": "executorch-xnnpack", "device": "sm8650"}]
    content = {"name": "pair", "components": {"small": small, "big": big}, "bundle": ["zip"]}
    content["speculative"] = {"target": "big", "draft": "small", "tokens": 3}
    place.recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    return place


@pytest.mark.slow
def test_a_draft_is_judged_beside_its_target(tmp_path: Path) -> None:
    place = pair(tmp_path)
    done = place.build("--report", tmp_path / "report.md")
    assert done.code == 0, done.err + done.out
    small, big = done.results
    found = small["measurements"]["speculative"]
    assert (found["target"], found["prompts"], found["tokens"]) == (big["unit"], 24, 3)
    assert found["identical"]["value"] == 1.0
    assert 0 < found["acceptance"] <= 1 and 1 < found["tokens_per_step"] <= 4
    assert found["expected"]["device"] == "sm8650" and found["expected"]["empty"]["tokens_per_s"] > 0
    assert "speculative" not in big["measurements"]
    states = {verdict["limit"]: verdict["state"] for verdict in small["verdicts"]}
    assert set(states.values()) == {"pass"} and len(states) == 3
    assert "tokens a step of the target (3 proposed at a time, 24 prompts)" in (tmp_path / "report.md").read_text()
    with zipfile.ZipFile(place.out / "pair" / "pair.zip") as bundle:
        rows = {row["unit"]: row for row in json.loads(bundle.read("pair/index.json"))["artifacts"]}
    assert rows[small["unit"]]["speculative"] == {"target": big["unit"], "tokens": 3}
    again = place.build()
    assert [set(stages.values()) for stages in again.stages] == [{"unchanged"}, {"unchanged"}]

    folder = Path(small["folder"])
    told = baking.finish(baking.start("verify", folder, "--json"))
    assert told.code == 0, told.err
    assert told.results[0]["measurements"]["speculative"]["accepted"] == found["accepted"]
    shutil.rmtree(Path(big["folder"]))
    told = baking.finish(baking.start("verify", folder, "--json"))
    reasons = {v["reason"] for v in told.results[0]["verdicts"] if v["limit"].startswith("speculative")}
    assert reasons == {f"the target's artifact is not here: {Path(big['folder']).resolve()}"}


@pytest.mark.slow
def test_a_draft_that_learned_from_its_target_is_held_against_it(tmp_path: Path) -> None:
    """The whole network is the distilled one's reference: what its text agrees in is what a target would accept."""
    place = pair(tmp_path)
    content = yaml.safe_load(place.recipe.read_text())
    small = content["components"]["small"]
    small["model"] = content["components"]["big"]["model"]
    small["samples"] = {**small["samples"], "calibration": {"text": "text.txt", "length": 16, "skip": 75, "count": 40}}
    small["compress"] = {"steps": [{"method": "distill", "options": {"layers": 1, "steps": 30, "rate": 0.003}}]}
    small["targets"] = [{"target": "executorch-xnnpack"}, {"target": "onnx-genai"}]
    content["components"]["big"]["targets"] = ["executorch-xnnpack", "onnx-genai"]
    place.recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    done = place.build()
    assert done.code == 0, done.err + done.out
    for result in done.results[:2]:
        found = result["measurements"]
        assert 0.2 < found["language"]["top1"]["value"] < 1.0
        assert found["speculative"]["identical"]["value"] == 1.0
        notes = found["notes"]
        assert notes[0].startswith("distill: 1 of 2 layers, 30 steps of 4 calls out of 35")
        assert notes[1].startswith("distill: mean divergence of every 2 steps: ")
    assert (
        json.loads((Path(done.results[1]["folder"]) / "genai_config.json").read_text())["model"]["decoder"][
            "num_hidden_layers"
        ]
        == 1
    )


@pytest.mark.slow
def test_positions_up_to_8k_do_not_drift(tmp_path: Path) -> None:
    """Llama 3's shape at a small size, its rotary frequencies scaled, one text that fills the cache to its last row."""
    place = kitchen(tmp_path)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 8192, "rope_parameters": rope}
    decoders.save(tmp_path / "model", **sizes)
    (tmp_path / "recipe" / "text.txt").write_text("\n".join(TEXT.replace("times", f"x{n}") for n in range(4)))
    content = yaml.safe_load(place.recipe.read_text())
    content["model"]["context"] = 8192
    content["dims"]["seq"]["max"] = 512
    content["samples"] = {"evaluation": {"text": "text.txt", "length": 8192, "count": 1}}
    int8 = {"target": "executorch-xnnpack", "name": "int8", "options": {"cache": "int8"}}
    content["targets"] = [
        {"target": "executorch-xnnpack", "limits": {"language": {"kl": 1e-5, "drift": 1e-6}}},
        {**int8, "limits": {"language": {"kl": 0.1, "drift": 0.02}}},
    ]
    place.recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    done = place.build("--strict")
    assert done.code == 0, done.err + done.out
    for result in done.results:
        ranges = result["measurements"]["language"]["positions"]
        assert [(r["from"], r["rows"]) for r in ranges] == [(0, 128), *((128 << n, 128 << n) for n in range(6))]
    assert done.results[1]["measurements"]["language"]["kl"] > 1e-5
