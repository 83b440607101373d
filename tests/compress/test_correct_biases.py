"""Bias correction: what rounding shifts on average is gone, and nothing else has changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch

from edgebake.compress import correct_biases
from edgebake.errors import RecipeError
from edgebake.target import ModuleRequest
from edgebake.types import Assignment


class Network(torch.nn.Module):
    """A convolution of each kind behind a ReLU, so that inputs have a mean; one without a bias, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.depth = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = torch.nn.Linear(8, 5)
        self.idle = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.depth(x))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


LAYERS = ("first", "depth", "head", "idle")


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def images() -> torch.Tensor:
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def corrected(schemes: Mapping[str, str], module: Network) -> torch.nn.Module:
    def run(network: torch.nn.Module) -> None:
        for image in images():
            network(image[None])

    assignment = Assignment(schemes=schemes, kinds={})
    return correct_biases.apply(ModuleRequest(module=module, assignment=assignment, options={}, run_calibration=run))


def in_integers(module: torch.nn.Module, bits: int) -> torch.nn.Module:
    """A copy with the weights that integers of ``bits`` give."""
    made = copy.deepcopy(module)
    for name in LAYERS:
        layer = made.get_submodule(name)
        layer.weight = torch.nn.Parameter(correct_biases.rounded(layer.get_parameter("weight").detach(), bits))
    return made


def shift(module: torch.nn.Module, wanted: torch.nn.Module, layer: str) -> torch.Tensor:
    """By how much the mean output of ``layer`` is off in each channel, on the float network's inputs to it."""
    given: list[torch.Tensor] = []
    hook = wanted.get_submodule(layer).register_forward_hook(lambda _m, args, _out: given.append(args[0]))
    with torch.no_grad():
        wanted(images())
        off = module.get_submodule(layer)(given[0]) - wanted.get_submodule(layer)(given[0])
    hook.remove()
    return off.mean((0, 2, 3)) if off.ndim == 4 else off.mean(0)


@pytest.mark.parametrize("layer", ["first", "depth", "head"])
def test_the_mean_of_each_channel_is_what_it_was(layer: str) -> None:
    plain = network()
    off = shift(in_integers(plain, 4), plain, layer)
    left = shift(in_integers(corrected(dict.fromkeys(LAYERS, "w4a16"), network()), 4), plain, layer)
    assert off.abs().max() > 0.001
    assert left.abs().max() < 1e-3 * off.abs().max()


def test_the_network_comes_closer_in_four_bits() -> None:
    plain = network()
    better = in_integers(corrected(dict.fromkeys(LAYERS, "w4a16"), network()), 4)
    with torch.no_grad():
        wanted, before, after = (m(images()) for m in (plain, in_integers(plain, 4), better))
    assert (after - wanted).square().sum() < 0.5 * (before - wanted).square().sum()


def test_only_assigned_layers_change_and_never_the_tensors_that_others_share() -> None:
    plain = network()
    shared = copy.deepcopy(plain, {id(t): t for t in (*plain.parameters(), *plain.buffers())})
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    found = dict(corrected({"depth": "w8a8", "head": "palette4"}, shared).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    changed = [name for name, value in found.items() if name not in before or not torch.equal(value, before[name])]
    assert changed == ["depth.bias"]


def test_a_layer_that_no_sample_reaches_keeps_its_bias_and_hooks_are_gone() -> None:
    plain, made = network(), corrected(dict.fromkeys(LAYERS, "w8a8"), network())
    assert torch.equal(made.get_parameter("idle.bias"), plain.idle.bias)
    assert not any(module._forward_hooks for module in made.modules())


def test_a_step_that_corrects_nothing_says_so() -> None:
    with pytest.raises(RecipeError, match=r"no linear layer or convolution gets integer weights") as caught:
        corrected({"head": "w4g32"}, network())
    assert "take the step out" in str(caught.value)
