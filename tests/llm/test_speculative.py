"""Speculative decoding: whatever the draft proposes, the text is the target's own; what is counted on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoders
from edgebake.errors import RecipeError
from edgebake.llm import generation, speculative
from edgebake.llm.speculative import Decoder
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.types import Loaded

PROMPTS = [[int(t) for t in np.random.default_rng(n).integers(3, decoders.WORDS, 3 + n % 9)] for n in range(6)]


def load(folder: Path, **model: Any) -> Loaded:
    given = decoders.component(folder)
    component = Component.model_validate({**given, "model": {**given["model"], **model}})
    return hugging_face.load(LoadRequest(model=component.model, component=component, base=folder))


def running(loaded: Loaded) -> Decoder:
    module = loaded.methods["forward"]

    def step(tokens: Any, position: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(tokens), torch.from_numpy(position))[0].numpy()

    return speculative.decoder(loaded.signature, step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoders.save(tmp_path_factory.mktemp("whole"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Loaded:
    return load(folder)


def test_a_draft_that_is_the_target_is_believed_in_everything(folder: Path, whole: Loaded) -> None:
    found = speculative.run(running(whole), running(load(folder)), PROMPTS, 4)
    assert found["acceptance"] == 1.0
    assert found["accepted"] == found["proposed"] > 0
    assert found["tokens_per_step"] == pytest.approx(found["proposed"] / found["steps"] + 1)
    assert found["identical"] == {"value": 1.0, "same": 6, "near_ties": 0, "texts": 6}
    assert found["here"]["tokens_per_s"] > 0 and found["here"]["alone_tokens_per_s"] > 0


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_the_first_layers_propose_and_the_text_stays_the_targets(folder: Path, whole: Loaded, tokens: int) -> None:
    found = speculative.run(running(whole), running(load(folder, layers=2)), PROMPTS, tokens)
    assert 0 < found["acceptance"] < 1
    assert 1 < found["tokens_per_step"] < tokens + 1
    assert found["identical"]["same"] + found["identical"]["near_ties"] == len(PROMPTS)
    assert found["identical"]["value"] == 1.0


def test_a_draft_of_another_network_changes_no_word(tmp_path: Path, whole: Loaded) -> None:
    other = load(decoders.save(tmp_path, "qwen2", hidden_size=32, vocab_size=decoders.WORDS + 32))
    assert other.signature.language is not None and other.signature.language.vocabulary > decoders.WORDS
    found = speculative.run(running(whole), running(other), PROMPTS, 4)
    assert found["acceptance"] < 0.5
    assert found["identical"]["value"] == 1.0


def test_text_goes_on_to_the_end_of_the_cache_and_not_past_it(whole: Loaded) -> None:
    target = running(whole)
    prompt = PROMPTS[0] * 20  # within 8 tokens of the end of the cache
    prompt = prompt[: decoders.CONTEXT - 8]
    spoken = speculative.speak(target, target, prompt, 4)
    own, _ = generation.greedy(target.step, prompt, target.once, target.context)
    assert len(own) == 8
    assert spoken.new[:8] == own
    assert sum(1 + most for most, _ in spoken.calls) <= 9


# --- what is counted, on a model that says the next number ---


def saying(wrong: Any = lambda place: False, words: int = 50) -> Decoder:
    """Says the token after the one it reads, and a wrong one after places for which ``wrong``."""

    def step(tokens: Any, position: Any) -> Any:
        found = np.zeros((1, tokens.shape[1], words), np.float32)
        for at, token in enumerate(tokens[0]):
            found[0, at, (int(token) + 1 + int(wrong(int(position[0]) + at))) % 50] = 1
        return found

    return Decoder(step=step, once=16, context=1000, words=words)


def test_tested_proposals_are_those_up_to_the_first_rejected() -> None:
    found = speculative.run(saying(), saying(lambda place: place % 4 == 3), [[7, 8]], 4)
    # Of a call four are proposed; the one after a place of 3, 7, ... is wrong, and nothing after it is tested.
    calls = speculative.speak(saying(), saying(lambda place: place % 4 == 3), [7, 8], 4).calls
    assert calls[0] == (4, 1)
    assert set(calls[1:]) == {(4, 3)}
    accepted = sum(n for _, n in calls)
    assert found["acceptance"] == pytest.approx(accepted / (accepted + len(calls)))
    assert found["tokens_per_step"] == pytest.approx((accepted + len(calls)) / len(calls))


def test_a_difference_is_a_near_tie_only_where_the_target_hardly_decides() -> None:
    def target(margin: float) -> Decoder:
        def step(tokens: Any, position: Any) -> Any:
            found = np.zeros((1, tokens.shape[1], 50), np.float32)
            alone = tokens.shape[1] == 1
            for at, token in enumerate(tokens[0]):
                found[0, at, (int(token) + 1) % 50] = 1.0
                found[0, at, (int(token) + 2) % 50] = 1.0 - margin if alone else 1.0 + margin  # rounds otherwise
            return found

        return Decoder(step=step, once=16, context=1000, words=50)

    for margin, ties, value in ((0.001, 1, None), (0.3, 0, 0.0)):
        found = speculative.run(target(margin), saying(), [[7]], 4)["identical"]
        assert (found["near_ties"], found["value"]) == (ties, value)


# --- a draft made of the target ---


def test_the_first_layers_are_the_targets_own(folder: Path, whole: Loaded) -> None:
    cut = load(folder, layers=1)
    weights, all_of_them = (dict(x.methods["forward"].named_parameters()) for x in (cut, whole))
    assert not [name for name in weights if ".layers.1." in name or ".layers.2." in name]
    assert all(torch.equal(weight, all_of_them[name]) for name, weight in weights.items())
    assert cut.facts["first_layers"] == 1
    assert cut.facts["parameters"] < whole.facts["parameters"]


def test_more_layers_than_there_are_cannot_be_taken(folder: Path) -> None:
    with pytest.raises(RecipeError, match="the model has 3 layers: its first 3 cannot be taken") as caught:
        load(folder, layers=3)
    assert caught.value.problems[0].where == "model.layers"
    assert caught.value.problems[0].fix == "give layers: 2 or fewer"
