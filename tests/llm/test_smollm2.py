"""The shipped recipe on its trained model: text that makes sense, from both runners, and numbers as published here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import genai_cases
from edgebake import signatures
from edgebake.pipeline import BuildOptions, build
from edgebake.recipe_files import recipes_folder
from edgebake.recipe_yaml import read
from edgebake_targets.runners import executorch_runtime

PROMPT = "The capital of France is"


@pytest.mark.slow
def test_smollm2_generates_in_stock_onnxruntime_genai_what_it_does_in_ours(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    recipe = read(str(recipes_folder() / "llm" / "smollm2-135m.yaml"))
    options = BuildOptions(out=tmp_path / "dist", store=tmp_path / "store", only=("*@onnx-genai*",), timeout_s=3600)
    (result,) = build([recipe], options, lambda _event: None)
    assert result.failure is None, result.failure
    assert [verdict for verdict in result.verdicts if verdict.state != "pass"] == []
    folder = tmp_path / "dist" / "smollm2-135m" / "model" / "onnx-genai" / "any" / "w4g32z"
    for prompt in (PROMPT, "Once upon a time", "def fibonacci(n):"):
        assert genai_cases.stock(genai, folder, prompt, 16) == genai_cases.ours(folder, prompt, 16)


@pytest.mark.slow
def test_smollm2_says_paris_in_both_runners(tmp_path: Path) -> None:
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  its kernels, which the runner looks for
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
    from tokenizers import Tokenizer

    recipe = read(str(recipes_folder() / "llm" / "smollm2-135m.yaml"))
    options = BuildOptions(out=tmp_path / "dist", store=tmp_path / "store", only=("*#fp32",), timeout_s=3600)
    (result,) = build([recipe], options, lambda _event: None)
    assert result.failure is None, result.failure
    language = result.measurements["language"]
    assert language["perplexity"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert language["top1"]["value"] > 0.998
    folder = tmp_path / "dist" / "smollm2-135m" / "model" / "executorch-xnnpack" / "any" / "fp32"

    said: list[str] = []
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    runner.generate(PROMPT, GenerationConfig(max_new_tokens=4, temperature=0.0, echo=False), said.append)
    assert "".join(said).strip().startswith("Paris")

    manifest = json.loads((folder / "manifest.json").read_text())
    session: Any = executorch_runtime.open(folder / "model.pte", signatures.from_json(manifest["signature"]))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    new: list[int] = []
    while len(new) < 4:
        start = len(ids) + len(new) - 1 if new else 0
        given = {"tokens": np.array([new[-1:] or ids]), "input_pos": np.array([start])}
        new.append(int(session.call("forward", given)["logits"][0, -1].argmax()))
    assert tokenizer.decode(new) == "".join(said)
