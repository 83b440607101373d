"""AWQ: factors that the operator before takes in, and less error where activations are large."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import outlier_decoders
from edgebake.compress import _rounding, awq
from edgebake.errors import RecipeError
from edgebake.scheme import parse


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Llama", {"tied": True}), ("Qwen2", {}), ("Qwen3", {"head_dim": 32})],
)
def test_the_function_stays(kind: str, more: dict[str, Any]) -> None:
    plain = outlier_decoders.network(kind, **more)
    made, said = outlier_decoders.after(awq, plain)
    assert outlier_decoders.decibels(plain, made) > 100
    told = re.fullmatch(
        r"awq: channels of 8 groups of linear layers scaled; plain rounding then leaves (\S+) of the squared error of "
        r"their outputs on calibration samples",
        said[-1],
    )
    assert told and 0 < float(told[1]) < 0.95


def test_what_it_tells_is_what_rounding_then_loses() -> None:
    """The layer that the stream's outliers reach, computed from its inputs instead of their second moment."""
    plain = outlier_decoders.network()
    made, _ = outlier_decoders.after(awq, plain)
    name = "wrapped.model.layers.0.mlp.gate_proj"
    scheme = parse("w4")
    lost = []
    for module in (plain, made):
        given: list[torch.Tensor] = []
        layer = module.get_submodule(name)
        hook = layer.register_forward_pre_hook(lambda _m, args, given=given: given.append(args[0]))
        with torch.no_grad():
            for call in outlier_decoders.ids():
                module(call)
        hook.remove()
        weight = layer.get_parameter("weight").detach()
        lost.append(float((torch.cat(given) @ (_rounding.rounded(weight, scheme) - weight).T).square().sum()))
    assert lost[1] < 0.9 * lost[0]


def test_a_grid_of_one_changes_nothing() -> None:
    plain = outlier_decoders.network()
    made, said = outlier_decoders.after(awq, plain, grid=1)
    same = (torch.equal(value, plain.state_dict()[name]) for name, value in made.state_dict().items())
    assert all(same) and "leaves 1.00 of" in said[-1]


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="awq: a grid of 0 tries nothing") as caught:
        outlier_decoders.after(awq, outlier_decoders.network(), grid=0)
    assert "how many exponents" in str(caught.value)


def test_the_float_network_keeps_its_tensors() -> None:
    plain = outlier_decoders.network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    made, _ = outlier_decoders.after(awq, plain)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in made.modules())


def test_a_decoder_that_nothing_rounds_and_other_architectures_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"awq works on decoders built like Llama, and model\.norm is a GemmaRMSNorm"):
        outlier_decoders.after(awq, outlier_decoders.any_network("Gemma", head_dim=16))
    with pytest.raises(RecipeError, match="awq: no linear layer of the decoder gets integer weights") as caught:
        outlier_decoders.after(awq, outlier_decoders.network(), "w8a8d")
    assert "take the step out, or choose such a scheme" in str(caught.value)
