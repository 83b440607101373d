"""Drafts that learn from their targets: nearer than untrained layers, the same each time, resumed after a kill."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import outlier_decoders as decoders
from edgebake.compress import distill
from edgebake.errors import RecipeError, StageFailed
from step_parts import Killed, keeper

OPTIONS = {"layers": 2, "steps": 30, "calls": 2, "rate": 0.003}


def network() -> decoders.Network:
    return decoders.network(tied=True, num_hidden_layers=4)


def ids(count: int = 16, seed: int = 1) -> list[torch.Tensor]:
    """Of few words, so that there is something to learn."""
    return [call % 8 for call in decoders.ids(count, seed)]


def logits(module: torch.nn.Module) -> torch.Tensor:
    """On text that is not among the calibration samples."""
    with torch.no_grad():
        return torch.cat([module(call)[0] for call in ids(4, seed=2)])


def divergence(teacher: torch.nn.Module, student: torch.nn.Module) -> float:
    """Over all words, nats per position."""
    wanted, got = (logits(m).log_softmax(-1) for m in (teacher, student))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def after(plain: torch.nn.Module, keep: Any = None, **more: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    shared = copy.deepcopy(plain, {id(t): t for t in (*plain.parameters(), *plain.buffers())})
    request = decoders.request(shared, {}, said, ids())
    return distill.apply(replace(request, keep=keep, options={**OPTIONS, **more})), said


def test_the_first_layers_come_nearer_to_the_whole_and_say_by_how_much() -> None:
    plain = network()
    before = logits(plain)
    untrained, _ = after(plain, steps=0)
    made, said = after(plain)
    assert len(made.wrapped.model.layers) == made.wrapped.config.num_hidden_layers == 2
    assert len(plain.wrapped.model.layers) == 4 and torch.equal(logits(plain), before)
    assert made.wrapped.lm_head.weight is plain.wrapped.lm_head.weight  # the table stays the target's
    assert not any(p.requires_grad for p in made.parameters())
    assert divergence(plain, made) < 0.6 * divergence(plain, untrained)
    told = re.search(r"2 of 4 layers, 30 steps of 2 calls out of 14; on 2 .* is (\S+) before, (\S+) after", said[0])
    assert told and float(told[2]) < 0.6 * float(told[1])
    curve = [float(number) for number in said[1].partition("steps: ")[2].split(", ")]
    assert len(curve) == 15 and curve[-1] < curve[0]


def test_words_that_are_not_kept_count_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, got = torch.randn(2, 5, 128, generator=generator).log_softmax(-1)
    exact = (wanted.exp() * (wanted - got)).sum(-1)
    for kept, near in ((128, True), (16, False)):
        top = wanted.topk(kept)
        found = distill._of(got, distill._Lesson(((), {}), top.indices, top.values))
        assert torch.allclose(found, exact, atol=1e-3) is near
        assert bool((found <= exact + 1e-3).all()) and bool((found > 0).all())


def test_layers_that_learning_made_worse_are_not_taken() -> None:
    plain = network()
    for layer in plain.wrapped.model.layers[2:]:  # which hardly do anything: the first ones are near already
        layer.self_attn.o_proj.weight.mul_(0.05)
        layer.mlp.down_proj.weight.mul_(0.05)
    untrained, _ = after(plain, steps=0)
    made, said = after(plain, steps=10)
    assert torch.equal(logits(made), logits(untrained))
    assert said[-1] == "distill: the untrained layers stay: try a lower rate, or more calibration text"


def test_only_the_last_layers_learn_where_that_is_asked_for() -> None:
    plain = network()
    made, _ = after(plain, trained=1, steps=2)
    first, second = made.wrapped.model.layers
    assert first.mlp.up_proj.weight is plain.wrapped.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(second.mlp.up_proj.weight, plain.wrapped.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(made.wrapped.model.norm.weight, plain.wrapped.model.norm.weight)


def test_a_killed_build_goes_on_and_gives_the_same_bits(tmp_path: Path) -> None:
    plain = network()
    wanted, said = after(plain)
    keep, first = keeper(tmp_path, most=2)  # what the whole model says, and 25 steps
    with pytest.raises(Killed):
        after(plain, keep)
    keep, second = keeper(tmp_path)
    made, again = after(plain, keep)
    assert (len(first), len(second)) == (2, 1) and not set(first) & set(second)
    assert torch.equal(logits(made), logits(wanted)) and again == said


def test_bad_options_are_refused() -> None:
    for given, what in (
        ({"layers": 4}, "the model has 4 layers: its first 4 cannot be taken"),
        ({"calls": 0}, "distill: calls is 0, and the draft has 2 layers"),
        ({"trained": 3}, "distill: trained is 3, and the draft has 2 layers"),
        ({"layer": 2}, "the step distill has no option 'layer'"),
    ):
        with pytest.raises(RecipeError, match=what):
            after(network(), **given)
    with pytest.raises(
        RecipeError, match="distill works on decoders of transformers, and Linear has no configuration of one"
    ):
        distill.apply(decoders.request(torch.nn.Linear(4, 4), {}))
    few = decoders.request(network(), {}, calls=decoders.ids(1))
    with pytest.raises(RecipeError, match="one call of calibration samples is held back"):
        distill.apply(few)


def test_a_loss_that_is_not_finite_ends_it_with_the_step() -> None:
    plain = network()
    plain.wrapped.lm_head.weight.data[3] = float("inf")
    with pytest.raises(StageFailed, match="distill: the loss of step 1, or its gradient, is not finite") as caught:
        after(plain)
    assert "lower its rate, or check the calibration samples" in str(caught.value)
