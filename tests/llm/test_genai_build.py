"""A decoder built for onnxruntime-genai as users build it: judged by its text, and generating in the stock runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import baking
import decoders
import genai_cases

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
SMALL = {"model.embed_tokens": "w8", "lm_head": "w8a8d"}
W4 = {"target": "onnx-genai", "scheme": "w4g32", "compress": {"modules": SMALL}}
HALF = {"target": "onnx-genai", "scheme": "fp16", "limits": {"parity": {"sqnr_db": 45}, "size": {"of_float": 0.7}}}
OFFSETS = {"target": "onnx-genai", "scheme": "w4g32z", "compress": {"modules": SMALL}}
CHOSEN = {
    "target": "onnx-genai",
    "scheme": "w4g32",
    "name": "chosen",
    "compress": {"modules": SMALL, "steps": ["gptq"]},
}
ROTATED = {"target": "onnx-genai", "name": "rotated", "compress": {"steps": ["rotate"]}}
PROMPT, NEW = "A list of words, longer than one call takes:", 12


def as_q4_1(weight: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's format keeps of ``weight``: 16 levels between the ends of each group of 32."""
    groups = weight.reshape(len(weight), -1, 32)
    least = groups.amin(-1, keepdim=True).half().float()
    step = ((groups.amax(-1, keepdim=True) - least) / 15).half().float()
    return (torch.clamp(torch.round((groups - least) / step), 0, 15) * step + least).reshape(weight.shape)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> baking.Kitchen:
    folder = tmp_path_factory.mktemp("genai")
    (folder / "model").mkdir()
    decoders.save(folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.norm.weight"][::2] *= 1.5  # so that merging it into the head parts the head from the embedding
    weights |= {name: as_q4_1(weight) for name, weight in weights.items() if name.endswith("proj.weight")}
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    (folder / "recipe").mkdir()
    (folder / "recipe" / "text.txt").write_text(TEXT)
    text = {"text": "text.txt", "length": 40}
    samples = {"evaluation": {**text, "skip": 4, "count": 24}, "calibration": {**text, "count": 4}}
    limits = {"language": {"top1": 0.3, "top5": 0.5, "stepwise_db": 60}}
    given = decoders.component(Path("../model"))
    targets = ("onnx-genai", W4, ROTATED, HALF, OFFSETS, CHOSEN)
    return baking.kitchen(folder, targets, name="decoder", samples=samples, limits=limits, **given)


@pytest.fixture(scope="module")
def built(place: baking.Kitchen) -> Sequence[Any]:
    done = place.build("--strict")
    assert done.code == 0, done.err + done.out
    return done.results


@pytest.mark.slow
def test_a_decoder_is_built_and_judged_by_its_text(built: Sequence[Any]) -> None:
    exact, four, *_ = (result["measurements"] for result in built)
    language = exact["language"]
    assert exact["runner"] == {"name": "onnxruntime-decoder", "kind": "executed"}
    assert language["perplexity"]["ratio"] == pytest.approx(1, abs=1e-5)
    assert language["generated"]["value"] == language["top1"]["value"] == language["stepwise"]["same"] == 1.0
    assert exact["outputs"]["logits"]["sqnr_db"] > 100
    assert 0 < four["language"]["kl"] < 2
    assert four["size"]["bytes"] < exact["size"]["bytes"]
    assert {"int4", "int8"} <= set(four["size"]["dtypes"])
    assert all("more than once" not in reason["why"] for reason in exact["size"]["reasons"])


@pytest.mark.slow
def test_matrices_merged_into_the_weights_are_in_the_graph(built: Sequence[Any]) -> None:
    exact, _, rotated, *_ = built
    assert rotated["measurements"]["outputs"]["logits"]["sqnr_db"] > 80
    data = [(Path(result["folder"]) / "model.onnx.data").stat().st_size for result in (exact, rotated)]
    table = decoders.WORDS * 64 * 4  # the head is no longer the embedding
    assert table <= data[1] - data[0] < table + 2 * 4096


@pytest.mark.slow
def test_groups_with_an_offset_lose_nothing_of_q4_1_and_chosen_integers_less_than_plain_ones(
    built: Sequence[Any],
) -> None:
    _, plain, _, _, offsets, chosen = (result["measurements"]["language"]["kl"] for result in built)
    assert offsets < 0.02 * plain  # what is left is the 8 bits of embedding and head
    assert chosen < plain


@pytest.mark.slow
def test_the_folder_holds_all_that_a_runtime_asks_for(built: Sequence[Any]) -> None:
    for result in built:
        folder = Path(result["folder"])
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {f["path"] for f in manifest["files"]}
        assert files >= {
            "model.onnx",
            "model.onnx.data",
            "genai_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert "config.json" not in files
        config = json.loads((folder / "genai_config.json").read_text())
        assert config["model"]["eos_token_id"] == manifest["signature"]["language"]["stop"] == [decoders.EOS]
        assert config["model"]["context_length"] == decoders.CONTEXT


@pytest.mark.slow
def test_stock_onnxruntime_genai_generates_the_tokens_of_our_own_loop(built: Sequence[Any]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    for result in built:
        folder = Path(result["folder"])
        assert genai_cases.stock(genai, folder, PROMPT, NEW) == genai_cases.ours(folder, PROMPT, NEW)


@pytest.mark.slow
def test_its_chat_template_renders_as_the_models_own(built: Sequence[Any]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    tokenizer = genai.Tokenizer(genai.Model(built[0]["folder"]))
    said = json.dumps([{"role": "user", "content": "Hello"}])
    assert tokenizer.apply_chat_template(said, add_generation_prompt=True) == "<user>Hello\n"
