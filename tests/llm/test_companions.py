"""Tokenizer, stop tokens and chat template that travel with a language model: taken along, and held against it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import decoders
from edgebake.errors import Problem, RecipeError
from edgebake.llm.companions import companions, deliver, kept, language, store


class Config(SimpleNamespace):
    """What of a network's configuration is looked at."""

    vocab_size: int = decoders.WORDS

    def get_text_config(self) -> Config:
        return self


CONFIG = Config(bos_token_id=decoders.BOS, eos_token_id=decoders.EOS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decoders.save_tokenizer(tmp_path)
    return tmp_path


def refused(folder: Path, config: Any = CONFIG) -> Problem:
    with pytest.raises(RecipeError) as caught:
        language(folder, config, 64)
    (problem,) = caught.value.problems
    return problem


def test_files_travel_by_their_names(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    stage, artifact = tmp_path / "stage", tmp_path / "artifact"
    stage.mkdir()
    artifact.mkdir()
    store(companions(folder), stage)
    assert deliver(stage, artifact) == ("tokenizer.json", "tokenizer_config.json")
    assert (artifact / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert deliver(artifact, tmp_path) == ()


def test_the_configuration_is_kept_for_lowering_and_stays_behind(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{}")
    stage, artifact = tmp_path / "stage", tmp_path / "artifact"
    stage.mkdir()
    artifact.mkdir()
    assert kept(stage) is None
    store(companions(folder), stage)
    beside = kept(stage)
    assert beside is not None and {"config.json", "tokenizer.json"} <= {file.name for file in beside.iterdir()}
    assert "config.json" not in deliver(stage, artifact)
    assert not (artifact / "config.json").exists()


def test_the_template_of_the_copy_renders_as_the_source_does(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    stage, artifact = tmp_path / "stage", tmp_path / "artifact"
    stage.mkdir()
    artifact.mkdir()
    store(companions(folder), stage)
    deliver(stage, artifact)
    told = [{"role": "user", "content": "Hello"}]
    rendered = [AutoTokenizer.from_pretrained(f).apply_chat_template(told, tokenize=False) for f in (folder, artifact)]
    assert rendered[0] == rendered[1] == "<user>Hello\n"


def test_without_a_tokenizer_nothing_generates(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        companions(tmp_path)
    (problem,) = caught.value.problems
    assert problem.what == f"{tmp_path.name!r} has no tokenizer.json"
    assert "save_pretrained(folder)" in problem.fix


def test_a_tokenizer_of_another_network_is_refused(folder: Path) -> None:
    problem = refused(folder, Config(vocab_size=90, bos_token_id=1, eos_token_id=2))
    assert problem.what.startswith("the tokenizer gives")
    assert problem.what.endswith("the number 95, and the network knows 90 tokens")


def test_a_network_may_know_more_words_than_its_tokenizer(folder: Path) -> None:
    padded = language(folder, Config(vocab_size=128, bos_token_id=1, eos_token_id=2), 64)
    assert (padded.vocabulary, padded.stop) == (128, (2,))


def test_every_token_that_ends_a_text_is_found(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [40, 41]}))
    assert language(folder, CONFIG, 64).stop == (40, 41, decoders.EOS)


def test_a_text_that_nothing_ends_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    problem = refused(folder, Config(bos_token_id=1, eos_token_id=None))
    assert problem.what == "nothing says which token ends a text"
    assert problem.fix == "give eos_token_id in generation_config.json"


def test_a_stop_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    problem = refused(folder, Config(bos_token_id=1, eos_token_id=500))
    assert problem.what == "the token 500 that begins or ends a text is none of the network's 96"


def test_a_broken_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    problem = refused(folder)
    assert problem.what.startswith("tokenizer.json cannot be read")
    assert problem.fix == "save the tokenizer again"


def test_a_template_that_raises_is_refused(folder: Path) -> None:
    decoders.save_tokenizer(folder, template="{{ raise_exception('no user may speak') }}")
    problem = refused(folder)
    assert problem.what == "the chat template cannot render a user's word: no user may speak"
    assert "chat_template" in problem.fix
