"""Checkpoints whose folder is whole and whose weights are odd: no numbers, a head beside a tied table, padded words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import baking
import decoders
from edgebake.errors import Problem, RecipeError
from edgebake.llm import generation
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.reports import _language
from edgebake.types import Language

TARGETS = ("executorch-xnnpack", "onnx-genai")
WEIGHTS, TABLE, HEAD, PROJECTION = "model.safetensors", "embed_tokens", "lm_head", "model.layers.0.mlp.up_proj.weight"
TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
FIX = "copy the model again; a training that diverged leaves such values, too"
PADDED = decoders.WORDS + 32


def reweigh(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(model / WEIGHTS)
    change(weights)
    save_file(weights, model / WEIGHTS, {"format": "pt"})


def request(model: Path) -> LoadRequest:
    asked = Component.model_validate(decoders.component(model))
    return LoadRequest(model=asked.model, component=asked, base=model)


def build(model: Path) -> baking.Done:
    (model.parent / "text.txt").write_text(TEXT)
    samples = {"evaluation": {"text": "text.txt", "length": 40, "count": 8}}
    limits = {"language": {"perplexity": 1.001, "kl": 0.001, "top1": 0.99, "generated": 0.99}}
    given = {**decoders.component(Path("model")), "samples": samples, "targets": list(TARGETS), "limits": limits}
    path = model.parent / "decoder.yaml"
    path.write_text(yaml.safe_dump({"name": "decoder", **given}, sort_keys=False))
    return baking.finish(
        baking.start("build", path, "--out", model.parent / "dist", "--report", model.parent / "report.md", "--json")
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return decoders.save(tmp_path / "model", num_hidden_layers=1)


def refused(read: Callable[[], Any]) -> Problem:
    with pytest.raises(RecipeError) as caught:
        read()
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 2
    return problem


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_no_number_is_named_however_it_is_read(model: Path, value: float, kind: torch.dtype) -> None:
    def harm(weights: dict[str, torch.Tensor]) -> None:
        weights |= {name: weight.to(kind) for name, weight in weights.items()}
        weights[PROJECTION][5, 7] = value

    reweigh(model, harm)
    problem = refused(lambda: hugging_face.load(request(model)))
    assert (problem.where, problem.fix) == ("model.path", FIX)
    assert problem.what == f"'{PROJECTION}' of the checkpoint holds values that are NaN or infinite"
    tensors = hugging_face.tensors(request(model))
    problem = refused(lambda: list(tensors.rows(PROJECTION)))
    assert (problem.where, problem.fix) == (str(model / WEIGHTS), FIX)
    assert problem.what == f"'{PROJECTION}' of {WEIGHTS} holds values that are NaN or infinite"
    assert len(list(tensors.rows("model.norm.weight"))) == 1


def test_large_weights_are_numbers(model: Path) -> None:
    """Of which the sum is none in float32."""
    reweigh(model, lambda weights: weights[PROJECTION].fill_(3e38))
    assert hugging_face.load(request(model)).facts["parameters"] > 0


def own_head(weights: dict[str, torch.Tensor]) -> None:
    (table,) = (weight for name, weight in weights.items() if TABLE in name)
    weights[f"{HEAD}.weight"] = table.flip(0).contiguous()


def test_a_head_of_its_own_beside_a_tied_table_is_the_one_that_speaks(model: Path) -> None:
    reweigh(model, own_head)
    network: Any = hugging_face.load(request(model)).methods["forward"].get_submodule("wrapped")
    assert torch.equal(network.lm_head.weight, network.model.embed_tokens.weight.flip(0))


def test_tokens_without_a_word_are_counted_and_told() -> None:
    known, silent = (
        Language(context=decoders.CONTEXT, vocabulary=PADDED, bos=1, stop=(2,), tokens=tokens) for tokens in (96, None)
    )
    assert generation.unknown([[3, 95, 96], [127, 2]], known) == 2
    assert generation.unknown([[3, 127]], silent) is None
    found = {"stepwise": {"sqnr_db": 60.0}, "speed": {"decode_tokens_per_s": None}, "unknown": 2}
    told = dict(_language.lines({"language": found}))["padding"]
    assert told == "generates 2 tokens that the tokenizer has no word for: whoever decodes its text must skip them"
    assert "padding" not in dict(_language.lines({"language": {**found, "unknown": 0}}))


@pytest.mark.slow
def test_a_build_of_weights_that_are_no_numbers_ends_with_two(model: Path) -> None:
    reweigh(model, lambda weights: weights[PROJECTION][5].fill_(math.nan))
    done = build(model)
    assert done.code == 2
    for target in TARGETS:
        assert done.err.count(f"failed: decoder/model@{target}#fp32 at") == 1
    assert done.err.count("holds values that are NaN or infinite") == done.err.count(FIX) == len(TARGETS)
    assert done.err.count(f"'{PROJECTION}' of ") == len(TARGETS)


@pytest.mark.slow
def test_both_ways_to_lower_speak_with_the_head_of_its_own(model: Path) -> None:
    reweigh(model, own_head)
    done = build(model)
    assert done.code == 0, done.err + done.out
    assert [result["measurements"]["language"]["generated"]["value"] for result in done.results] == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [False, True])
def test_a_padded_vocabulary_is_built_and_what_it_says_of_padding_is_told(tmp_path: Path, chosen: bool) -> None:
    """As configurations have it whose table is rounded up: rows of zeros, and rows that were left as they began."""
    model = decoders.save(tmp_path / "model", num_hidden_layers=1, vocab_size=PADDED)
    if not chosen:
        (name,) = (name for name in load_file(model / WEIGHTS) if TABLE in name)
        reweigh(model, lambda weights: weights[name][decoders.WORDS :].zero_())
    done = build(model)
    assert done.code == 0, done.err + done.out
    for result in done.results:
        manifest = json.loads((Path(result["folder"]) / "manifest.json").read_text())
        told = manifest["signature"]["language"]
        assert (told["vocabulary"], told["tokens"]) == (PADDED, decoders.WORDS)
        assert (result["measurements"]["language"]["unknown"] > 0) is chosen
    assert ("that the tokenizer has no word for" in (tmp_path / "report.md").read_text()) is chosen
