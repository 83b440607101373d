"""What a recipe with ``context`` may not say: all of it told before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import decoders
from edgebake.check import check
from edgebake.errors import Problem, RecipeError
from edgebake.recipe_yaml import read


def problems(folder: Path, config: Mapping[str, Any] | None = None, **more: Any) -> list[Problem]:
    (folder / "config.json").write_text(json.dumps(config or {}))
    (folder / "model.safetensors").write_bytes(decoders.NO_WEIGHTS)
    decoders.save_tokenizer(folder)
    (folder / "text.txt").write_text("some text\n")
    content = {"name": "decoder", **decoders.component(Path()), "targets": ["executorch-xnnpack"], **more}
    path = folder / "decoder.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    try:
        check([read(str(path))], trust=False)
    except RecipeError as error:
        return list(error.problems)
    return []


def only(found: list[Problem]) -> tuple[str, str]:
    (problem,) = found
    return problem.what, problem.fix


def test_a_decoder_is_fine(tmp_path: Path) -> None:
    evaluation = {"text": "text.txt", "length": 32, "count": 4}
    language = {"perplexity": 1.01, "top1": 0.98}
    assert not problems(tmp_path, samples={"evaluation": evaluation}, limits={"language": language})


def test_a_target_without_operators_for_a_cache_is_refused(tmp_path: Path) -> None:
    what, fix = only(problems(tmp_path, targets=["onnx-cpu"]))
    assert what == "onnx-cpu has no operators for a key/value cache"
    assert fix.startswith(
        "use coreml, executorch-coreml, executorch-mlx, executorch-qnn, executorch-xnnpack or onnx-genai"
    )
    assert ", or remove context" in fix


def test_genai_takes_a_decoder_with_a_cache_and_nothing_else(tmp_path: Path) -> None:
    assert not problems(tmp_path, targets=["onnx-genai"], samples={"evaluation": {"text": "text.txt", "length": 32}})
    model = {"source": "transformers", "path": ".", "task": "text-generation"}
    inputs = {"input_ids": {"shape": [1, 8], "dtype": "int64"}}
    given = {"model": model, "inputs": inputs, "dims": {}, "samples": {"evaluation": {"noise": True}}}
    what, fix = only(problems(tmp_path, targets=["onnx-genai"], **given))
    assert what == "onnx-genai writes decoders that generate text with a key/value cache, and nothing else"
    assert fix.startswith("give model: {task: text-generation, context: 2048}")
    what, _ = only(problems(tmp_path, targets=[{"target": "onnx-genai", "options": {"opset": 21}}]))
    assert what == "onnx-genai has no option 'opset'"


def test_a_language_model_for_core_ml_asks_for_states(tmp_path: Path) -> None:
    options = {"minimum_os": "iOS18"}
    assert not problems(tmp_path, targets=[{"target": "coreml", "options": options}])
    (problem,) = problems(tmp_path, targets=[{"target": "coreml", "options": {"minimum_os": "macOS14"}}])
    lines = (tmp_path / "decoder.yaml").read_text().splitlines()
    assert problem.what.startswith("a language model keeps its keys and values in states")
    assert problem.fix == "options: {minimum_os: iOS18}"
    line = next(number for number, text in enumerate(lines, 1) if "minimum_os" in text)
    assert problem.where.endswith(f"decoder.yaml:{line}:targets.0.options.minimum_os")
    (problem,) = problems(tmp_path, targets=["coreml"])
    assert problem.fix == "options: {minimum_os: iOS18}"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"options": {"keep_float32": "auto"}}, "keep_float32: auto is not there for language models yet"),
        ({"options": {"palettes": "sensitive_kmeans"}}, "palettes: sensitive_kmeans is not there"),
        ({"options": {"correct_biases": True}}, "correct_biases is not there for language models yet"),
        ({"scheme": "w8a8"}, "w8a8 is not there for language models yet"),
        ({"compress": {"modules": {"lm_head": "w8a8"}}}, "w8a8 is not there for language models yet"),
    ],
)
def test_what_calibrates_functions_is_refused_for_core_ml(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    rule = {
        "target": "coreml",
        "scheme": "fp16",
        **asked,
        "options": {"minimum_os": "iOS18", **asked.get("options", {})},
    }
    text = {"text": "text.txt", "length": 32}
    samples = {"calibration": {**text, "count": 8}, "evaluation": {**text, "skip": 8}}
    found = problems(tmp_path, targets=[rule], samples=samples)
    assert [problem.what[: len(said)] for problem in found] == [said]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"chunk_mib": -1.0}, "chunk_mib is a size"),
        ({"chunk_mib": 8.0, "keep_float32": "lm_head"}, "keep_float32 names modules of a whole package"),
    ],
)
def test_what_cannot_be_cut_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    rule = {"target": "coreml", "scheme": "fp16", "options": {"minimum_os": "iOS18", **options}}
    (problem,) = problems(tmp_path, targets=[rule])
    assert problem.what.startswith(said)
    assert problem.where.endswith("options.chunk_mib")


def test_a_network_that_is_no_decoder_is_not_cut(tmp_path: Path) -> None:
    model = {"source": "transformers", "path": ".", "task": "feature-extraction"}
    given = {"model": model, "inputs": {"input_ids": {"shape": [1, 8], "dtype": "int64"}}, "dims": {}}
    rule = {"target": "coreml", "options": {"chunk_mib": 8.0}}
    (problem,) = problems(tmp_path, targets=[rule], samples={"evaluation": {"noise": True}}, **given)
    assert problem.what == "chunk_mib cuts language models between their layers, and this network is none"


def test_a_decoder_for_core_ml_reads_one_token_at_a_time_too(tmp_path: Path) -> None:
    inputs = {**decoders.INPUTS, "tokens": {"shape": [1, 16], "dtype": "int64"}}
    rule = {"target": "coreml", "options": {"minimum_os": "iOS18"}}
    (problem,) = problems(tmp_path, targets=[rule], inputs=inputs, dims={})
    assert problem.what.startswith("a decoder that takes 16 tokens at once and no fewer")
    assert ":inputs.tokens" in problem.where


def test_a_width_that_no_group_divides_is_refused_where_the_scheme_is_written(tmp_path: Path) -> None:
    sizes = {"model_type": "llama", **decoders.SIZES, "hidden_size": 96, "intermediate_size": 160}
    rules = {"*.up_proj": "w4g128", "lm_head": "w8a8d"}
    found = problems(tmp_path, config=sizes, targets=["onnx-genai"], compress={"scheme": "w4g64", "modules": rules})
    first, second, third = sorted(found, key=lambda problem: problem.what)
    lines = (tmp_path / "decoder.yaml").read_text().splitlines()
    assert first.what == (
        "w4g128 needs an input width that is a multiple of 128; module 'model.layers.0.mlp.up_proj' has 96"
    )
    assert first.fix.startswith('compress: {modules: {"model.layers.0.mlp.up_proj": fp32}}, or a scheme with smaller')
    assert [p.what.split("module ")[1] for p in (second, third)] == [
        "'model.layers.0.mlp.down_proj' has 160",
        "'model.layers.0.self_attn.q_proj' has 96",
    ]
    assert second.where.endswith(f"decoder.yaml:{lines.index('  scheme: w4g64') + 1}:compress.scheme")
    assert first.where.endswith(f"decoder.yaml:{lines.index('  modules:') + 1}:compress.modules")
    compress = {"scheme": "w4g32", "modules": {"lm_head": "w8a8d"}}
    assert not problems(tmp_path, config=sizes, targets=["onnx-genai"], compress=compress)


def test_another_task_is_refused(tmp_path: Path) -> None:
    model = {**decoders.component(Path())["model"], "task": "feature-extraction"}
    what, _ = only(problems(tmp_path, model=model))
    assert what == "a key/value cache is for text-generation, the task is 'feature-extraction'"


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": {"shape": [1, "seq"], "dtype": "int64"}},
        {**decoders.INPUTS, "input_pos": {"shape": ["seq"], "dtype": "int64"}},
        {**decoders.INPUTS, "tokens": {"shape": [1, "seq"], "dtype": "int32"}},
    ],
    ids=("names", "shape", "dtype"),
)
def test_other_inputs_are_refused(tmp_path: Path, inputs: Any) -> None:
    what, fix = only(problems(tmp_path, inputs=inputs))
    assert what == "a network with a key/value cache takes tokens and the position of the first, and nothing else"
    assert fix == "inputs: {tokens: {shape: [1, seq], dtype: int64}, input_pos: {shape: [1], dtype: int64}}"


def test_a_call_as_long_as_the_context_is_refused(tmp_path: Path) -> None:
    what, fix = only(problems(tmp_path, dims={"seq": {"min": 1, "max": 64}}))
    assert what == "64 tokens at once leave no room in a context of 64"
    assert fix == "take at most 63; longer texts are read part by part"


def test_text_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    what, fix = only(problems(tmp_path, samples={"evaluation": {"text": "text.txt", "length": 100}}))
    assert (what, fix) == ("samples of 100 tokens do not fit a context of 64", "give length: 64 or less")


def test_limits_fit_what_is_judged(tmp_path: Path) -> None:
    evaluation = {"evaluation": {"text": "text.txt", "length": 32}}
    what, fix = only(problems(tmp_path, samples=evaluation, limits={"agreement": {"metric": "top1", "min": 0.9}}))
    assert what == "agreement is no limit for a network with a key/value cache"
    assert fix == "use limits: {language: {top1: 0.98}}"
    model = {"source": "transformers", "path": ".", "task": "text-generation"}
    inputs = {"input_ids": {"shape": [1, 8], "dtype": "int64"}}
    plain = {"model": model, "inputs": inputs, "dims": {}, "samples": {"evaluation": {"noise": True}}}
    what, fix = only(problems(tmp_path, **plain, limits={"language": {"perplexity": 1.01}}))
    assert what == "language.perplexity is no limit for a network without a key/value cache"
    assert "model: {context: ...}" in fix


GEMMA2 = {"model_type": "gemma2", **decoders.SIZES, "sliding_window": 32, "attn_logit_softcapping": 50.0}


def test_families_that_a_target_has_no_operators_for_are_refused_with_what_there_is(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, config={**decoders.SIZES, "model_type": "phi"}, targets=["onnx-genai"])
    assert found.what == "there is no onnxruntime-genai graph for 'phi' models"
    assert found.fix == "families that have one: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3"
    assert found.where.endswith(":model.path") and f"{tmp_path / 'decoder.yaml'}:" in found.where
    assert not problems(tmp_path, config=GEMMA2, targets=["onnx-genai"])


def test_windows_and_caps_are_for_onnx_genai_alone(tmp_path: Path) -> None:
    (window,) = problems(tmp_path, config=GEMMA2)
    assert window.what == "some layers look back over 32 tokens only, and the cache keeps all 64"
    assert window.fix.endswith("or use onnx-genai") and window.where.endswith(":model.context")
    (cap,) = problems(tmp_path, config={**GEMMA2, "sliding_window": 64})
    assert cap.what == "gemma2 caps its attention scores, which the operator of a traced network does not"
    stepped = problems(tmp_path, config=GEMMA2, targets=["onnx-genai"], compress={"steps": ["gptq"]})
    assert window.what in {problem.what for problem in stepped}  # a step works on the network, which is traced then
