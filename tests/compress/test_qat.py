"""Training with rounded weights: nearer than plain rounding, on integers that quantisers keep, and resumed exactly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import outlier_decoders
from edgebake import lattice
from edgebake.compress import _adapters, _rounding, qat, quantize_weights
from edgebake.errors import RecipeError, StageFailed
from edgebake.scheme import parse

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TOLD = re.compile(
    r"qat: (\d+) steps, rank (\d+), adapters (merge|keep); (divergence from the float network|cross-entropy) on the "
    r"first calibration calls (\S+) before, (\S+) after \(nats per position\); each (\d+ steps|step): (.*)"
)


def trained(scheme: str = "w4", **options: Any) -> tuple[Any, list[str]]:
    given = {"steps": 12, "rate": 5e-4, **options}
    return outlier_decoders.after(qat, outlier_decoders.network(), scheme, outlier_decoders.ids(2), **given)


def layers(module: torch.nn.Module) -> dict[str, Any]:
    return {name: module.get_submodule(f"wrapped.{name}") for name in outlier_decoders.linears(module, "w4")}


@pytest.mark.parametrize("scheme", ["w4", "w4g32a8d"])
def test_the_rounded_network_comes_nearer_and_its_integers_are_kept(scheme: str) -> None:
    made, said = trained(scheme)
    told = TOLD.fullmatch(said[0])
    assert told and told[1] == "12" and told[2] == "16"
    assert float(told[6]) < 0.8 * float(told[5])
    curve = [float(value) for value in told[8].split(", ")]
    assert len(curve) == 6 and curve[-1] < curve[0]
    form = parse(scheme)
    for layer in layers(made).values():
        groups = _rounding.grouped(layer.weight.detach(), form)
        assert lattice.integers(groups.reshape(-1, groups.shape[-1]).numpy(), 4)[2].all()
    wanted = outlier_decoders.linears(made, scheme)
    stored = quantize_weights.apply(outlier_decoders.request(trained(scheme)[0], wanted))
    for name, layer in layers(made).items():
        assert torch.equal(layers(stored)[name].weight.dequantize(), layer.weight)


def test_what_is_told_is_what_the_rounded_network_gives() -> None:
    made, said = trained()
    told = TOLD.fullmatch(said[0])
    assert told is not None
    losses = []
    for ids in outlier_decoders.ids(2):
        with torch.no_grad():
            wanted = outlier_decoders.network()(ids)[0].log_softmax(-1)
            got = made(ids)[0].log_softmax(-1)
        losses.append(float((wanted.exp() * (wanted - got)).sum(-1).mean()))
    assert sum(losses) / 2 == pytest.approx(float(told[6]), abs=1e-4)


def test_adapters_that_are_kept_stand_beside_plainly_rounded_weights() -> None:
    made, said = trained(adapters="keep")
    told = TOLD.fullmatch(said[0])
    assert told and told[3] == "keep" and float(told[6]) < 0.8 * float(told[5])
    plain = layers(outlier_decoders.network())
    assert all(layer.adapter.a.weight.shape == (16, layer.in_features) for layer in layers(made).values())
    for name, layer in layers(made).items():
        groups = plain[name].weight.detach()
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
        off = layer.weight != torch.clamp(torch.round(groups / scale), -8, 7) * scale
        assert off.float().mean() < 0.01  # torchao multiplies by 1 / scale: halves between integers go to either
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        wanted = x @ layer.weight.T + layer.adapter(x)
        assert torch.allclose(layer(x), wanted, atol=1e-4) and layer.adapter.b.weight.abs().max() > 0


def test_the_next_token_of_the_text_is_learned_where_that_is_the_teacher() -> None:
    _, said = trained(teacher="text")
    told = TOLD.fullmatch(said[0])
    assert told and told[4] == "cross-entropy" and float(told[6]) < float(told[5])


def test_training_that_was_killed_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    ran: list[str] = []

    def keep(allowed: int) -> Callable[[str, Callable[[Path], object]], Path]:
        def kept(part: str, fill: Callable[[Path], object]) -> Path:
            folder = tmp_path / part.replace(" ", "-")
            if not folder.exists():
                if len(ran) == allowed:
                    raise KeyboardInterrupt
                folder.mkdir()
                fill(folder)
                ran.append(part)
            return folder

        return kept

    def build(allowed: int) -> Any:
        module = outlier_decoders.network()
        request = outlier_decoders.request(
            module, outlier_decoders.linears(module, "w4"), None, outlier_decoders.ids(2), steps=8, part=3
        )
        return qat.apply(replace(request, keep=keep(allowed)))

    whole, _ = trained(steps=8, part=3, rate=3e-4)
    with pytest.raises(KeyboardInterrupt):
        build(1)
    made = build(9)
    assert ran == ["steps 0 to 3 of 8", "steps 3 to 6 of 8", "steps 6 to 8 of 8"]
    for name, layer in layers(made).items():
        assert torch.equal(layer.weight, layers(whole)[name].weight)
    broken = next(tmp_path.glob("*0-to-3*")) / "learned.safetensors"
    _adapters.save(broken, [torch.zeros(2, requires_grad=True)], torch.optim.AdamW([torch.zeros(2)]), [1.0])
    with pytest.raises(StageFailed, match=r"learned\.safetensors of a part of training belongs to another network"):
        build(9)


def test_learning_that_made_it_worse_is_not_taken() -> None:
    made, said = trained(rate=30.0, steps=2)
    assert said[1].startswith("qat: rounding stays plain, since learning came no nearer")
    kept, _ = trained(rate=30.0, steps=2, adapters="keep")
    for name, layer in layers(made).items():
        assert torch.equal(layer.weight, layers(kept)[name].weight) and type(layers(kept)[name]) is torch.nn.Linear


def test_what_cannot_be_trained_is_refused() -> None:
    plain = outlier_decoders.network()
    with pytest.raises(RecipeError, match="qat: no linear layer gets integer weights with float or grouped dynamic"):
        outlier_decoders.after(qat, plain, "w8a8d")
    with pytest.raises(RecipeError, match=r"qat: w4g40 needs input features divisible by 40, but .*q_proj has 96"):
        outlier_decoders.after(qat, plain, "w4g40")
    with pytest.raises(RecipeError, match="qat: rank is 0"):
        outlier_decoders.after(qat, plain, rank=0)
    request = outlier_decoders.request(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), {"0": "w4"}, None, [torch.randn(2, 8)], teacher="text"
    )
    with pytest.raises(RecipeError, match="learns the next token, and the network's first input is no text"):
        qat.apply(request)


def test_a_loss_that_is_not_finite_ends_it_with_the_step() -> None:
    plain = outlier_decoders.network()
    plain.wrapped.lm_head.weight.data[3] = float("inf")
    with pytest.raises(StageFailed, match="qat: the loss of step 1 is not finite"):
        outlier_decoders.after(qat, plain, steps=1)
