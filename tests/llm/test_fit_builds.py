"""Predictions held against what builds then write and take: 5 % for the file, 15 % for the memory of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import baking
from decoder_cases import TINY, Written
from edgebake.llm import fit
from edgebake.llm.companions import companions, language
from edgebake.recipe_yaml import read
from edgebake.units import units_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS, SAMPLES = RECIPES / "llm/configs", RECIPES / "samples/sentences.txt"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
SMALL = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
RULES = {"modules": {"*embed_tokens": "w8", "lm_head": "w8a8d"}}


CACHED = {
    "model": {"source": "transformers", "path": "decoder", "weights": "random", "context": 128},
    "inputs": {"tokens": {"shape": [1, "seq"], "dtype": "int64"}, "input_pos": {"shape": [1], "dtype": "int64"}},
    "samples": {"evaluation": {"text": str(SAMPLES), "count": 2, "length": 32}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ({"target": "onnx-cpu"}, {}),
        ({"target": "onnx-cpu", "scheme": "w4g32"}, {}),
        ({"target": "onnx-cpu", "scheme": "w8"}, {}),
        ({"target": "executorch-xnnpack"}, {}),
        ({"target": "executorch-xnnpack", "scheme": "w4g32a8d", "compress": RULES}, CACHED),
    ],
    ids=("onnx-fp32", "onnx-w4g32", "onnx-w8", "pte-fp32", "pte-w4g32a8d-with-a-cache"),
)
def test_builds_are_as_predicted(
    decoder_recipe: Written, tmp_path: Path, rule: dict[str, Any], more: dict[str, Any]
) -> None:
    path = decoder_recipe([rule], SMALL, **more)
    for name in TOKENIZER:
        shutil.copy(CONFIGS / "qwen3-0.6b" / name, path.parent / "decoder")
    file = read(str(path), ())
    (unit,) = units_of(file.recipe, file.base)
    predicted = fit.predict(unit)
    done = baking.finish(baking.start("build", path, "--store", tmp_path / "store", "--out", tmp_path / "dist"))
    assert done.code == 0, done.err
    (measured,) = (tmp_path / "dist").rglob("measurements.json")
    found = json.loads(measured.read_text("utf-8"))
    assert predicted.size.total == pytest.approx(found["size"]["bytes"], rel=0.05)
    peak = max(stage["peak_mib"] for stage in found["stages"].values()) * 2**20
    assert predicted.export_peak_bytes == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "qwen3-0.6b", "qwq-32b"])
def test_what_travels_with_the_random_recipes_is_whole(name: str) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(CONFIGS / name)
    assert set(companions(CONFIGS / name)) == set(TOKENIZER)
    found = language(CONFIGS / name, config, 8192)
    assert (found.vocabulary, found.bos) == (config.vocab_size, config.bos_token_id)
    tokenizer = transformers.AutoTokenizer.from_pretrained(CONFIGS / name)
    assert tokenizer.decode(tokenizer("Größe, 漢字.")["input_ids"]) == "Größe, 漢字."
