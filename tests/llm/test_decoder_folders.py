"""A decoder's folder that is not whole or not of one model: told by both ways to lower it, with file, line and key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import baking
import decoders
from edgebake.check import check
from edgebake.errors import EdgebakeError, Problem, RecipeError
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.recipe_yaml import read

TARGETS = ("executorch-xnnpack", "onnx-genai")
WEIGHTS, TABLE = "model.safetensors", "model.embed_tokens.weight"
TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
Harm = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save(tmp_path_factory.mktemp("whole"), num_hidden_layers=1)


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def recipe(model: Path, *targets: str, **more: Any) -> Path:
    (model.parent / "text.txt").write_text(TEXT)
    samples = {"evaluation": {"text": "text.txt", "length": 32, "count": 2}}
    given = {**decoders.component(Path("model")), "samples": samples, "targets": list(targets)}
    given["model"] |= more
    path = model.parent / "decoder.yaml"
    path.write_text(yaml.safe_dump({"name": "decoder", **given}, sort_keys=False))
    return path


def refused(path: Path) -> Problem:
    with pytest.raises(RecipeError) as caught:
        check([read(str(path))], trust=False)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 2
    return problem


def line(path: Path, key: str) -> int:
    return next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.strip().startswith(f"{key}:"))


def configure(model: Path, **more: Any) -> None:
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, **more}))


def reweigh(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(model / WEIGHTS)
    change(weights)
    save_file(weights, model / WEIGHTS, {"format": "pt"})


def fewer_words(model: Path) -> None:
    configure(model, vocab_size=90)


def without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")


def other_end(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 500]}')


def broken_defaults(model: Path) -> None:
    (model / "generation_config.json").write_text("{")


def broken_configuration(model: Path) -> None:
    (model / "config.json").write_text("[1]")


def in_parts(model: Path) -> list[Path]:
    weights = load_file(model / WEIGHTS)
    names = sorted(weights)
    held = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, some in held.items():
        save_file({name: weights[name] for name in some}, model / file, {"format": "pt"})
    places = {name: file for file, some in held.items() for name in some}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    (model / WEIGHTS).unlink()
    return [model / file for file in held]


def missing_part(model: Path) -> None:
    in_parts(model)[1].unlink()


def missing_index(model: Path) -> None:
    in_parts(model)
    (model / f"{WEIGHTS}.index.json").unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def cut_part(model: Path) -> None:
    cut(in_parts(model)[1])


def cut_file(model: Path) -> None:
    cut(model / WEIGHTS)


def cut_header(model: Path) -> None:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:20])


def pointer(model: Path) -> None:
    (model / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def pickled(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


HARMS: tuple[tuple[Harm, str, str], ...] = (
    (fewer_words, "the tokenizer gives '{' the number 95, and the network knows 90 tokens", "put the tokenizer there"),
    (without_tokenizer, "'model' has no tokenizer.json", "save the model's fast tokenizer there"),
    (broken_tokenizer, "tokenizer.json cannot be read: Expecting property name", "save the tokenizer again"),
    (other_end, "the token 500 that begins or ends a text is none of the network's 96", "correct bos_token_id"),
    (broken_defaults, "generation_config.json cannot be read: Expecting property name", "correct it, or copy"),
    (broken_configuration, "config.json is not a model's: ", "save it again"),
    (
        missing_part,
        f"{WEIGHTS}.index.json names 'model-00002-of-00002.safetensors', which is missing",
        "copy the model",
    ),
    (missing_index, "model-00001-of-00002.safetensors is one of 2 parts, and there is no model.saf", "copy the model"),
    (cut_part, "model-00002-of-00002.safetensors is cut off: the tensor '", "copy the model again"),
    (cut_file, "model.safetensors is cut off: the tensor '", "copy the model again"),
    (cut_header, "model.safetensors is cut off or no safetensors file", "copy the model again"),
    (pointer, "model.safetensors is a pointer of Git LFS and not the weights themselves", "git lfs pull"),
    (pickled, "'model' has its weights as pickles only", "convert them to safetensors, or set pickles: true"),
)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("harm", "what", "fix"), HARMS, ids=[harm.__name__ for harm, _, _ in HARMS])
def test_what_is_wrong_with_a_folder_is_told_before_anything_is_loaded(
    model: Path, target: str, harm: Harm, what: str, fix: str
) -> None:
    harm(model)
    path = recipe(model, target)
    problem = refused(path)
    assert problem.what.startswith(what)
    assert problem.fix.startswith(fix)
    assert problem.where == f"{path}:{line(path, 'path')}:model.path"


@pytest.mark.parametrize("target", TARGETS)
def test_a_context_that_the_model_does_not_reach_is_refused(model: Path, target: str) -> None:
    path = recipe(model, target, context=4096)
    problem = refused(path)
    assert (problem.what, problem.fix) == ("the model reaches over 64 tokens, not 4096", "give at most context: 64")
    assert problem.where == f"{path}:{line(path, 'context')}:model.context"


def test_a_folder_that_is_whole_passes_whatever_its_files_are_called(model: Path) -> None:
    units, _ = check([read(str(recipe(model, *TARGETS)))], trust=False)
    assert len(units) == 2
    in_parts(model)
    assert len(check([read(str(recipe(model, *TARGETS)))], trust=False)[0]) == 2
    configure(model, vocab_size=128)  # padded: numbers that no token has
    assert len(check([read(str(recipe(model, *TARGETS)))], trust=False)[0]) == 2


def told(model: Path, how: str) -> Problem:
    """What ``load``, or ``describe``, which streamed units begin with, says of a folder that passes the check."""
    check([read(str(recipe(model, *TARGETS)))], trust=False)
    asked = Component.model_validate(decoders.component(model))
    with pytest.raises(EdgebakeError) as caught:
        getattr(hugging_face, how)(LoadRequest(model=asked.model, component=asked, base=model))
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 2
    return problem


TEMPLATES = {
    "{{ raise_exception('no user may speak') }}": "no user may speak",
    "{% for m in messages %}": "Unexpected end of template.",
    "{{ nothing.at.all }}": "'nothing' is undefined",
}


@pytest.mark.parametrize("how", ["load", "describe"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_raises_is_told_when_the_model_is_read(model: Path, how: str, template: str) -> None:
    decoders.save_tokenizer(model, template=template)
    problem = told(model, how)
    assert problem.what.startswith(f"the chat template cannot render a user's word: {TEMPLATES[template]}")
    assert problem.fix == "correct chat_template.jinja, or chat_template in tokenizer_config.json"


def test_weights_that_the_configuration_asks_for_and_no_file_has(model: Path) -> None:
    configure(model, tie_word_embeddings=False)
    problem = told(model, "load")
    assert problem.what == "the checkpoint has no fitting weights for lm_head.weight of LlamaForCausalLM"
    assert problem.fix.endswith("or copy the model again")


@pytest.mark.slow
def test_a_build_of_a_folder_with_a_template_that_raises_ends_with_two(model: Path, tmp_path: Path) -> None:
    decoders.save_tokenizer(model, template="{{ raise_exception('no user may speak') }}")
    done = baking.finish(baking.start("build", recipe(model, *TARGETS), "--out", tmp_path / "dist"))
    assert done.code == 2
    for target, stage in zip(TARGETS, ("load", "describe"), strict=True):
        begins = f"failed: decoder/model@{target}#fp32 at {stage}: model.path: the chat template cannot render a user's"
        assert done.err.count(begins) == 1
