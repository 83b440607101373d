"""A first recipe from a model's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from edgebake.drafting import draft, write_out
from edgebake.errors import EdgebakeError, UsageError
from edgebake.recipe import Recipe
from edgebake.recipe_yaml import read

BERT = {"vocab_size": 99, "model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512}
VIT = {"image_size": 224, "model_type": "vit", "num_channels": 1, "architectures": ["ViTForImageClassification"]}


def folder(base: Path, name: str, content: Any, **others: Any) -> Path:
    made = base / name
    made.mkdir(parents=True)
    for file, value in {"config.json": content, **others}.items():
        (made / file).write_text(json.dumps(value))
    return made


def recipe(base: Path, path: str, scheme: str = "fp32") -> Recipe:
    """The drafted recipe, written and read."""
    written = base / "drafted.yaml"
    written.write_text(write_out(draft(path, base), ["onnx-cpu"], scheme, base))
    return read(written).recipe


def test_a_text_model_with_a_tokenizer_gets_sentences(tmp_path: Path) -> None:
    folder(tmp_path, "bert", BERT, **{"tokenizer.json": {}, "modules.json": []})
    component = recipe(tmp_path, "bert").components["model"]
    assert component.model.task == "sentence-embedding"
    assert list(component.inputs) == ["input_ids", "attention_mask"]
    assert component.dims["seq"].max == 128
    assert component.samples.evaluation is not None
    assert component.samples.evaluation.count >= 500
    assert component.limits.agreement is not None


def test_a_text_model_without_one_gets_noise_within_its_vocabulary(tmp_path: Path) -> None:
    folder(tmp_path, "bert", {**BERT, "max_position_embeddings": 4})
    component = recipe(tmp_path, "bert").components["model"]
    assert component.samples.evaluation is not None
    assert component.samples.evaluation.high == 99
    assert (component.dims["seq"].min, component.dims["seq"].max) == (4, 4)
    assert component.limits.agreement is None


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForMaskedLM", "fill-mask"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_the_task_follows_the_architecture(tmp_path: Path, architecture: str, task: str) -> None:
    folder(tmp_path, "net", {**BERT, "architectures": [architecture]})
    assert draft("net", tmp_path).task == task


@pytest.mark.parametrize(
    ("processor", "size", "mean"),
    [
        ({}, 224, (0.485, 0.456, 0.406)),
        ({"image_mean": [0.5], "image_std": [0.5]}, 224, [0.5]),
        ({"do_normalize": False, "image_mean": [0.5]}, 224, [0.0]),
    ],
)
def test_an_image_model_takes_its_processor_s_numbers(
    tmp_path: Path, processor: Mapping[str, Any], size: int, mean: Any
) -> None:
    folder(tmp_path, "vit", VIT, **({"preprocessor_config.json": processor} if processor else {}))
    found = draft("vit", tmp_path)
    assert (found.size, found.mean) == (size, mean)
    assert recipe(tmp_path, "vit").components["model"].inputs["pixel_values"].shape == (1, 1, 224, 224)


@pytest.mark.parametrize(
    ("config", "processor", "size"),
    [
        ({"image_size": [192, 192]}, {}, 192),
        ({"image_size": {}}, {"crop_size": {"height": 160, "width": 160}}, 160),
        ({}, {"size": {"shortest_edge": 288}}, 288),
        ({"image_size": "large"}, {}, 224),
        ({"image_size": 10**9}, {}, 4096),
    ],
)
def test_sizes_are_written_in_many_ways(tmp_path: Path, config: Any, processor: Any, size: int) -> None:
    folder(tmp_path, "net", config, **{"preprocessor_config.json": processor})
    assert draft("net", tmp_path).size == size


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"is_encoder_decoder": True, "vocab_size": 9, "model_type": "t5"}, "'t5' has an encoder and a decoder"),
        ({"vocab_size": 32, "conv_dim": [512], "model_type": "wav2vec2"}, "takes sound"),
        ({"text_config": {"vocab_size": 9}, "vision_config": {}, "model_type": "clip"}, "takes text and images"),
        ({"model_type": "pointnet"}, "cannot be told"),
        ({"model_type": 7}, "model without model_type"),
    ],
)
def test_models_whose_inputs_would_be_guessed_are_refused(tmp_path: Path, config: Any, why: str) -> None:
    folder(tmp_path, "net", config)
    with pytest.raises(UsageError, match=why):
        draft("net", tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff", "[" * 100_000])
def test_a_configuration_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/config.json").write_text(content, "latin-1")
    with pytest.raises(UsageError) as refusal:
        draft("net", tmp_path)
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 1e40, True])
@pytest.mark.parametrize("key", ["vocab_size", "architectures", "max_position_embeddings", "text_config"])
def test_values_of_any_kind_make_a_recipe_that_can_be_read(tmp_path: Path, key: str, value: object) -> None:
    folder(tmp_path, "net", {**BERT, key: value})
    assert recipe(tmp_path, "net").name == "net"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Org Name/my-Model", "my-model"),
        ("minilm/model", "minilm"),
        ("cache/models--org--Tiny-BERT/snapshots/0123abc", "tiny-bert"),
        ("--", "model"),
        ("x" * 150, "x" * 100),
    ],
)
def test_names_come_from_what_people_call_the_model(tmp_path: Path, path: str, name: str) -> None:
    folder(tmp_path, path, BERT)
    assert draft(path, tmp_path).name == name


def test_weights_that_are_pickles_or_missing_are_said(tmp_path: Path) -> None:
    made = folder(tmp_path, "bert", BERT)
    assert recipe(tmp_path, "bert").components["model"].model.weights == "random"
    (made / "pytorch_model.bin").write_bytes(b"")
    assert recipe(tmp_path, "bert").components["model"].model.pickles
    (made / "model.safetensors").write_bytes(b"")
    plain = recipe(tmp_path, "bert").components["model"].model
    assert (plain.weights, plain.pickles) == ("trained", False)


def test_no_code_and_no_weight_of_the_model_is_looked_at(tmp_path: Path) -> None:
    made = folder(tmp_path, "bert", {**BERT, "auto_map": {"AutoModel": "modeling.Net"}})
    (made / "modeling.py").write_text("raise SystemExit('ran')")
    (made / "model.safetensors").mkdir()
    assert draft("bert", tmp_path).name == "bert"


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(EdgebakeError, match="there is no"):
        draft("./nowhere", tmp_path)


class Two(torch.nn.Module):
    """Two inputs, the first as long as one likes."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x.sum() + ids


def test_a_program_says_its_inputs_itself(tmp_path: Path) -> None:
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=77)}, "ids": None}
    given = (torch.zeros(1, 9, 4), torch.zeros(3, dtype=torch.int64))
    torch.export.save(torch.export.export(Two(), given, dynamic_shapes=shapes), tmp_path / "two.pt2")
    component = recipe(tmp_path, "two.pt2").components["model"]
    assert {n: (s.shape, s.dtype) for n, s in component.inputs.items()} == {
        "x": ((1, "dim0", 4), "float32"),
        "ids": ((3,), "int64"),
    }
    assert (component.dims["dim0"].min, component.dims["dim0"].max) == (2, 77)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_a_program_that_cannot_be_read_is_drafted_without_inputs(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pt2").write_bytes(content)
    found = draft("net.pt2", tmp_path)
    assert found.inputs == {}
    assert found.notes[-1] == "name the inputs of the program in the recipe"
