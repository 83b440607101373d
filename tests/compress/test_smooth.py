"""SmoothQuant: the same function in float, and less lost where activations are rounded to 8 bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import outlier_decoders
from edgebake.compress import smooth
from edgebake.errors import RecipeError


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Llama", {"tied": True}), ("Qwen2", {}), ("Qwen3", {"head_dim": 32})],
)
def test_the_function_stays(kind: str, more: dict[str, Any]) -> None:
    plain = outlier_decoders.network(kind, **more)
    made, said = outlier_decoders.after(smooth, plain, "w8a8d")
    assert outlier_decoders.decibels(plain, made) > 100
    assert said[-1] == "smooth: channels of 8 groups of linear layers scaled"


class _Rounded(torch.nn.Module):
    """A linear layer as w8a8d computes it: a scale per row of the weight, a scale and zero point per token."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.weight, self.bias = (weight / scale).round() * scale, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp(min=1e-12)
        zero = (-128 - low / scale).round()
        rounded = (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale
        return torch.nn.functional.linear(rounded, self.weight, self.bias)


def rounded(module: torch.nn.Module) -> torch.nn.Module:
    for path, part in list(module.named_modules()):
        if isinstance(part, torch.nn.Linear) and "lm_head" not in path:
            module.set_submodule(path, _Rounded(part))
    return module


def test_rounded_activations_lose_less() -> None:
    plain = outlier_decoders.network()
    smoothed, _ = outlier_decoders.after(smooth, plain, "w8a8d")
    before, after = (outlier_decoders.decibels(plain, rounded(net)) for net in (outlier_decoders.network(), smoothed))
    assert after > before + 2


def test_largest_activations_of_all_channels_are_alike_at_full_strength() -> None:
    made, _ = outlier_decoders.after(smooth, outlier_decoders.network(), "w8a8d", strength=1.0)
    given: list[torch.Tensor] = []
    made.wrapped.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    with torch.no_grad():
        for call in outlier_decoders.ids():
            made(call)
    peaks = torch.cat(given, 1).abs().amax((0, 1))
    torch.testing.assert_close(peaks, torch.ones_like(peaks), rtol=1e-3, atol=1e-3)


def test_the_float_network_keeps_its_tensors() -> None:
    plain = outlier_decoders.network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    made, _ = outlier_decoders.after(smooth, plain, "w8a8d")
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in made.modules())


def test_a_smoothed_head_parts_from_the_embedding_and_says_so() -> None:
    plain = outlier_decoders.network(tied=True)
    for option, parted in ((True, True), (False, False)):
        said: list[str] = []
        schemes = {**outlier_decoders.linears(plain, "w8a8d"), "lm_head": "w8a8d"}
        shared = copy.deepcopy(plain, {id(t): t for t in (*plain.parameters(), *plain.buffers())})
        made: Any = smooth.apply(outlier_decoders.request(shared, schemes, said, head=option))
        assert (made.wrapped.lm_head.weight is made.wrapped.model.embed_tokens.weight) is not parted
        assert any("12,288 more values to store" in text for text in said) is parted
        assert outlier_decoders.decibels(plain, made) > 100


def test_a_strength_beyond_one_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"smooth: a strength of 1\.5 is none") as caught:
        outlier_decoders.after(smooth, outlier_decoders.network(), "w8a8d", strength=1.5)
    assert "between 0 and 1" in str(caught.value)


def test_float_activations_and_other_architectures_are_refused() -> None:
    with pytest.raises(RecipeError, match="smooth: no linear layer of the decoder gets rounded activations") as caught:
        outlier_decoders.after(smooth, outlier_decoders.network(), "w4")
    assert "take the step out, or choose such a scheme" in str(caught.value)
    with pytest.raises(RecipeError, match="smooth works on decoders built like Llama, and"):
        outlier_decoders.after(smooth, outlier_decoders.any_network("Gemma", head_dim=16), "w8a8d")
