"""Rotations of decoders: the same function, values without outliers, and no other architecture."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import outlier_decoders
from edgebake.compress import _decoder, _hadamard, rotate
from edgebake.errors import RecipeError, StageFailed


def stream_peak(module: torch.nn.Module) -> float:
    """How far the largest value of the residual stream stands above its root mean square."""
    given: list[torch.Tensor] = []
    hook = module.get_submodule("wrapped.model.layers.1").register_forward_pre_hook(lambda _m, a: given.append(a[0]))
    outlier_decoders.logits(module)
    hook.remove()
    x = torch.cat(given)
    return float(x.abs().max() / x.square().mean().sqrt())


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 60, 64, 96, 576, 896, 960])
def test_entries_are_of_one_size_where_there_is_a_construction(size: int) -> None:
    made = _hadamard.rotation(size, torch.Generator().manual_seed(0))
    assert torch.allclose(made @ made.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(made.abs(), torch.full_like(made, size**-0.5), atol=1e-12)


@pytest.mark.parametrize("size", [3, 9, 10, 18, 72, 100, 172, 720])
def test_every_other_size_is_orthogonal_and_spread(size: int) -> None:
    made = _hadamard.rotation(size, torch.Generator().manual_seed(0))
    assert torch.allclose(made @ made.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(made.abs().max()) < 1


def test_seeds_decide() -> None:
    one, same, other = (_hadamard.rotation(96, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Mistral", {}),
    ],
)
def test_the_function_stays_and_outliers_go(kind: str, more: dict[str, Any]) -> None:
    plain = outlier_decoders.network(kind, **more)
    made, said = outlier_decoders.after(rotate, plain)
    assert outlier_decoders.decibels(plain, made) > 100
    assert stream_peak(made) < 0.6 * stream_peak(plain)
    assert said[0] == "rotate: the rotations R3 and R4, which work at run time, are left out"
    told = re.fullmatch(r"rotate: float outputs unchanged to (\d+) dB", said[-1])
    assert told and 100 < int(told[1]) < 150


def test_each_rotation_can_be_left_out() -> None:
    plain = outlier_decoders.network()
    name = "wrapped.model.layers.0.self_attn.{}_proj.weight".format
    for options, moved in (({"r2": False}, "qkvo"), ({"r1": False}, "vo")):
        made, _ = outlier_decoders.after(rotate, plain, **options)
        assert outlier_decoders.decibels(plain, made) > 100
        changed = [p for p in "qkvo" if not torch.equal(made.get_parameter(name(p)), plain.get_parameter(name(p)))]
        assert "".join(changed) == moved
    one, other = (outlier_decoders.after(rotate, plain, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.get_parameter(name("q")), other.get_parameter(name("q")))


def test_a_tied_embedding_comes_apart_and_that_is_told() -> None:
    plain = outlier_decoders.network(tied=True)
    made, said = outlier_decoders.after(rotate, plain)
    assert outlier_decoders.decibels(plain, made) > 100
    assert made.wrapped.lm_head.weight is not made.wrapped.model.embed_tokens.weight
    assert plain.wrapped.lm_head.weight is plain.wrapped.model.embed_tokens.weight
    assert said[1] == (
        "rotate: the embedding and the head shared one weight and are two now, since the final normalisation's weight "
        "went into the head: 12,288 more values to store"
    )


def test_the_float_network_keeps_its_tensors_and_hooks_are_gone() -> None:
    plain = outlier_decoders.network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    made, _ = outlier_decoders.after(rotate, plain)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in made.modules())


# --- what users are told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("Gemma", {"head_dim": 16}, "model.norm is a GemmaRMSNorm, which is no x / rms(x) * weight"),
        ("Phi3", {"pad_token_id": 0}, "model.layers.0 has no self_attn.q_proj"),
        ("GPTNeoX", {}, "the network has no embed_tokens, layers, norm and lm_head"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(kind: str, more: dict[str, Any], why: str) -> None:
    plain = outlier_decoders.any_network(kind, **more)
    with pytest.raises(RecipeError) as caught:
        outlier_decoders.after(rotate, plain)
    assert why in str(caught.value)
    assert "take the step out; gptq works on every network with linear layers" in str(caught.value)


def test_parts_that_are_not_what_their_names_say_are_refused() -> None:
    plain = outlier_decoders.network()
    plain.wrapped.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(RecipeError, match=r"model.layers.1.mlp.up_proj is a Identity, not a Linear"):
        outlier_decoders.after(rotate, plain)
    plain = outlier_decoders.network()
    del plain.wrapped.model.layers[1].self_attn.head_dim
    with pytest.raises(RecipeError, match=r"model.layers.1.self_attn has no head_dim"):
        outlier_decoders.after(rotate, plain)
    plain = outlier_decoders.network()
    plain.wrapped.lm_head = torch.nn.Sequential(plain.wrapped.lm_head)
    with pytest.raises(RecipeError, match="its embed_tokens is no Embedding, or its lm_head no Linear"):
        outlier_decoders.after(rotate, plain)


def test_a_network_whose_outputs_would_change_is_refused() -> None:
    plain = outlier_decoders.network()
    layer = plain.wrapped.model.layers[1]
    layer.register_forward_hook(lambda _m, _args, output: torch.relu(output))  # not what a rotation goes through
    with pytest.raises(StageFailed, match=r"rotate changed what the network computes: its outputs are .* dB") as caught:
        outlier_decoders.after(rotate, plain)
    assert "the network is not built as its names say: take the step out" in str(caught.value)


def test_nothing_to_rotate_and_nothing_to_compare_with_are_refused() -> None:
    with pytest.raises(RecipeError, match="rotate: r1 and r2 are both off"):
        outlier_decoders.after(rotate, outlier_decoders.network(), r1=False, r2=False)
    with pytest.raises(RecipeError, match="no calibration sample calls the network"):
        rotate.apply(outlier_decoders.request(copy.deepcopy(outlier_decoders.network()), {}, calls=[]))


def test_decibels_of_equal_and_of_empty_signals() -> None:
    one = torch.ones(3)
    assert _decoder.decibels(one, one) == float("inf")
    assert _decoder.decibels(torch.zeros(3), one) == float("-inf")
