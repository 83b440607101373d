"""Drafts that learn from what their targets write: greedy text, each word's distribution, resumed after a kill."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import decoders
import outlier_decoders
from edgebake.compress import _written, distill
from edgebake.errors import RecipeError
from edgebake.llm import generation
from edgebake.target import ModuleRequest
from edgebake.types import Assignment
from step_parts import Killed, keeper

LENGTH, BEGINNING = 12, 4
OPTIONS = {"layers": 1, "steps": 30, "calls": 2, "rate": 0.003, "text": "written", "beginning": BEGINNING}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return decoders.loaded(decoders.save(tmp_path_factory.mktemp("model"))).methods["forward"]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    """Tokens of few words, so that there is something to learn."""
    return torch.randint(3, 11, shape, generator=torch.Generator().manual_seed(seed))


def calls(count: int) -> list[torch.Tensor]:
    return list(random(count, 1, LENGTH))


def request(module: torch.nn.Module, said: list[str], keep: Any = None, count: int = 16, **more: Any) -> ModuleRequest:
    def run(network: torch.nn.Module) -> None:
        for call in calls(count):
            network(call, torch.tensor([0]))

    return ModuleRequest(
        module=module,
        assignment=Assignment(schemes={}, kinds={}),
        options={**OPTIONS, **more},
        run_calibration=run,
        tell=said.append,
        keep=keep,
    )


def after(plain: torch.nn.Module, keep: Any = None, **more: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    shared = copy.deepcopy(plain, {id(t): t for t in (*plain.parameters(), *plain.buffers())})
    return distill.apply(request(shared, said, keep, **more)), said


def alone(module: torch.nn.Module, begun: torch.Tensor) -> list[int]:
    """The text after ``begun``, token by token as artifacts are judged."""

    def step(tokens: Any, position: Any) -> Any:
        with torch.no_grad():
            return module(torch.from_numpy(tokens), torch.from_numpy(position))[0].numpy()

    return generation.greedy(step, begun.tolist(), decoders.ONCE, LENGTH)[0]


def test_texts_are_each_what_the_network_writes_alone(network: torch.nn.Module) -> None:
    begun = _written.beginnings([((call, torch.tensor([0])), {}) for call in calls(2)], 5)
    assert torch.equal(begun, torch.cat([call[0, :10].reshape(2, 5) for call in calls(2)]))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    found = _written.gone_on_with(network, begun, LENGTH, 7)
    assert (found.tokens.shape, found.words.shape) == ((4, LENGTH), (4, LENGTH - 5, 7))
    assert torch.equal(found.words[:, :, 0], found.tokens[:, 5:]) and bool((found.logs.diff(dim=-1) <= 0).all())
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    for text, wanted in zip(begun, found.tokens, strict=True):
        assert alone(network, text) == wanted[5:].tolist()
    with torch.no_grad():
        whole = network(found.tokens[:1], torch.tensor([0]))[0][0, 4:-1].log_softmax(-1)
    torch.testing.assert_close(whole.gather(1, found.words[0]), found.logs[0], atol=1e-4, rtol=0)


def said_alike(target: torch.nn.Module, draft: torch.nn.Module) -> float:
    """Of texts that ``target`` writes after beginnings that are not learned, the share of words that ``draft`` says."""
    texts = _written.gone_on_with(target, random(64, BEGINNING, seed=7), LENGTH, 1).tokens
    with torch.no_grad():
        said = torch.cat([draft(text[None], torch.tensor([0]))[0].argmax(-1) for text in texts])
    return float((said[:, BEGINNING - 1 : -1] == texts[:, BEGINNING:]).float().mean())


def test_what_the_whole_writes_teaches_more_of_it_than_other_text(network: torch.nn.Module) -> None:
    more = {"count": 48, "steps": 60, "calls": 8, "rate": 0.005}
    untrained, _ = after(network, **{**more, "steps": 0})
    made, said = after(network, **more)
    given, _ = after(network, **more, text="given")
    shares = [said_alike(network, draft) for draft in (untrained, given, made)]
    assert shares[0] < shares[1] < shares[2]
    told = re.search(
        r"calls out of 126 that the whole model wrote; on 18 held .* is (\S+) before, (\S+) after", said[0]
    )
    assert told and float(told[2]) < float(told[1])


def test_a_killed_build_writes_no_text_twice_and_gives_the_same_bits(network: torch.nn.Module, tmp_path: Path) -> None:
    wanted, said = after(network)
    keep, first = keeper(tmp_path, most=1)
    with pytest.raises(Killed):
        after(network, keep)
    keep, second = keeper(tmp_path)
    made, again = after(network, keep)
    assert first == ["what the whole model writes, 0"]
    assert second == ["what the whole model writes, 1", "steps from 0 on", "steps from 25 on"]
    assert again == said
    for name, weight in made.named_parameters():
        assert torch.equal(weight, dict(wanted.named_parameters())[name]), name


def test_text_that_cannot_be_written_is_refused(network: torch.nn.Module) -> None:
    for size in (0, LENGTH):
        with pytest.raises(RecipeError, match=f"beginnings of {size} tokens leave nothing to write in calls of 12"):
            after(network, beginning=size)
    with pytest.raises(RecipeError, match="distill: text must be one of given, written, not 'own'"):
        after(network, text="own")
    bare = outlier_decoders.request(outlier_decoders.network(), {}, calls=outlier_decoders.ids(4), text="written")
    with pytest.raises(RecipeError, match="text: written is for a network with a key/value cache") as caught:
        distill.apply(bare)
    assert caught.value.problems[0].fix == "give model: {context: 2048}, or text: given"
