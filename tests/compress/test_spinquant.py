"""Learned rotations: orthogonal, better than random ones, the same each time, and merged like them."""

from __future__ import annotations

import re

import pytest
import torch

import outlier_decoders
from edgebake.compress import _cayley, _rounding, rotate, spinquant
from edgebake.errors import RecipeError, StageFailed
from edgebake.scheme import parse


def kept(module: torch.nn.Module, scheme: str) -> torch.nn.Module:
    """A copy whose linear layers are rounded plainly."""
    import copy

    made = copy.deepcopy(module)
    for name in outlier_decoders.linears(made, scheme):
        layer = made.get_submodule(f"wrapped.{name}")
        layer.weight = torch.nn.Parameter(_rounding.rounded(layer.weight.detach(), parse(scheme)))  # type: ignore[arg-type]
    return made


def test_steps_stay_orthogonal_and_find_a_known_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    start, _ = torch.linalg.qr(wanted + 0.1 * torch.randn(12, 12, generator=generator, dtype=torch.float64))
    learned = _cayley.Cayley.of(start)
    before = float((learned.x - wanted).norm())
    for step in range(60):
        learned.step((learned.x - wanted).float(), 0.2 * (1 - step / 60))
    assert float((learned.x - wanted).norm()) < 0.1 * before
    assert torch.allclose(learned.x @ learned.x.T, torch.eye(12, dtype=torch.float64), atol=1e-12)


def test_a_gradient_of_zero_moves_nothing() -> None:
    learned = _cayley.Cayley.of(torch.eye(4))
    learned.step(torch.zeros(4, 4), 1.0)
    assert torch.equal(learned.x, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("scheme", ["w4", "w4g32a8d"])
def test_the_function_stays_and_the_rounded_network_comes_nearer_on_calibration(scheme: str) -> None:
    plain = outlier_decoders.network()
    made, said = outlier_decoders.after(spinquant, plain, scheme, outlier_decoders.ids(1), steps=24)
    assert outlier_decoders.decibels(plain, made) > 100
    told = re.fullmatch(
        r"spinquant: 24 steps; divergence of the rounded network from the float one on the first calibration call "
        r"(\S+) before, (\S+) after \(nats per position\)",
        said[1],
    )
    assert told and float(told[2]) < 0.9 * float(told[1])
    start, _ = outlier_decoders.after(rotate, plain, scheme)
    given = outlier_decoders.ids(1)[0]
    with torch.no_grad():
        wanted = plain(given)[0].softmax(-1)
        losses = [
            float((wanted * (wanted.log() - kept(m, "w4")(given)[0].log_softmax(-1))).sum(-1).mean())
            for m in (start, made)
        ]
    if scheme == "w4":  # what is told is what plain rounding of the merged weights gives
        assert losses == pytest.approx([float(told[1]), float(told[2])], rel=0.1)


def test_the_result_is_the_same_each_time_and_the_float_network_keeps_its_tensors() -> None:
    plain = outlier_decoders.network(tied=True)
    before = outlier_decoders.logits(plain)
    first, second = (outlier_decoders.after(spinquant, plain, steps=2) for _ in range(2))
    assert torch.equal(outlier_decoders.logits(first[0]), outlier_decoders.logits(second[0])) and first[1] == second[1]
    assert torch.equal(outlier_decoders.logits(plain), before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in first[0].modules())
    assert first[1][1].startswith("spinquant: the embedding and the head shared one weight and are two now")


def test_a_decoder_that_nothing_rounds_and_other_networks_are_refused() -> None:
    with pytest.raises(RecipeError, match="spinquant: no linear layer of the decoder gets integer weights") as caught:
        outlier_decoders.after(spinquant, outlier_decoders.network(), "w8a8d")
    assert "or the step rotate, which learns nothing" in str(caught.value)
    with pytest.raises(RecipeError, match="spinquant works on decoders built like Llama"):
        spinquant.apply(outlier_decoders.request(torch.nn.Linear(4, 4), {"": "w4"}))


def test_a_loss_that_is_not_finite_ends_it_with_the_step() -> None:
    plain = outlier_decoders.network()
    plain.wrapped.lm_head.weight.data[3] = float("inf")
    with pytest.raises(StageFailed, match="spinquant: the loss of step 1 is not finite") as caught:
        outlier_decoders.after(spinquant, plain, steps=1)
    assert "lower its rate, or check the calibration samples" in str(caught.value)


def test_matrices_that_learning_made_worse_are_not_taken() -> None:
    plain = outlier_decoders.network()
    made, said = outlier_decoders.after(spinquant, plain, "w8", outlier_decoders.ids(2), steps=2, rate=5.0)
    assert any("the random matrices stay, since learning came no nearer" in line for line in said), said
    start, _ = outlier_decoders.after(rotate, plain, "w8")
    assert torch.equal(outlier_decoders.logits(made), outlier_decoders.logits(start))
