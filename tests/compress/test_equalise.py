"""Cross-layer equalisation: the same function, channels of like size between layers, and which layers make a pair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from edgebake.compress import equalise
from edgebake.errors import RecipeError
from edgebake.target import ModuleRequest
from edgebake.types import Assignment


class Block(torch.nn.Module):
    """An inverted residual with channels of very different size."""

    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.expand = torch.nn.Conv2d(4, 8, 1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.depth = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = torch.nn.Conv2d(8, 4, 1)
        self.activation = activation
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-2, 1, 8))
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.norm(self.expand(x)))
        result: torch.Tensor = x + self.project(self.activation(self.depth(inner)))
        return result


def block(activation: torch.nn.Module) -> Block:
    torch.manual_seed(0)
    return Block(activation).eval()


def images() -> torch.Tensor:
    return torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def equalised(module: torch.nn.Module, inputs: torch.Tensor | None = None) -> tuple[torch.nn.Module, list[str]]:
    """``module`` after the step, and what it told."""
    given, said = images() if inputs is None else inputs, []

    def run(network: torch.nn.Module) -> None:
        network(given)

    none = Assignment(schemes={}, kinds={})
    request = ModuleRequest(module=module, assignment=none, options={}, run_calibration=run, tell=said.append)
    return equalise.apply(request), said


def spread(module: torch.nn.Module, layer: str) -> float:
    """How many times larger the largest input channel of ``layer`` is than the smallest."""
    given: list[torch.Tensor] = []
    hook = module.get_submodule(layer).register_forward_hook(lambda _m, args, _out: given.append(args[0]))
    with torch.no_grad():
        module(images())
    hook.remove()
    peaks = given[0].abs().amax((0, 2, 3))
    return float(peaks.max() / peaks.min())


def decibels(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.double().square().sum() / (wanted.double() - got).square().sum()))


@pytest.mark.parametrize(("activation", "told"), [(torch.nn.ReLU(), False), (torch.nn.ReLU6(), True)])
def test_the_function_stays_and_channels_come_together(activation: Any, told: bool) -> None:
    plain, (made, said) = block(activation), equalised(block(activation))
    with torch.no_grad():
        assert decibels(plain(images()), made(images())) > 100
    assert spread(made, "depth") < 0.3 * spread(plain, "depth")
    assert bool(said) == told
    assert not told or said == [
        "equalise: of 2 pairs of layers 2 have a ReLU6 between them, through which scaling is exact up to 2 times "
        "what the calibration samples show"
    ]


def test_through_relu_it_is_exact_beyond_the_samples_through_relu6_it_is_not() -> None:
    for activation, exact in ((torch.nn.ReLU(), True), (torch.nn.ReLU6(), False)):
        plain, (made, _) = block(activation), equalised(block(activation))
        with torch.no_grad():
            assert (decibels(plain(30 * images()), made(30 * images())) > 100) == exact


def test_the_tensors_that_the_float_reference_shares_stay() -> None:
    plain = block(torch.nn.ReLU())
    shared = copy.deepcopy(plain, {id(t): t for t in (*plain.parameters(), *plain.buffers())})
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    equalised(shared)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert not torch.equal(shared.get_parameter("norm.weight"), before["norm.weight"])


def test_linear_layers_make_pairs_too() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3)).eval()
    x = torch.randn(20, 6)
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 1, 12)[:, None])  # type: ignore[operator]
        wanted = net(x)
        made, said = equalised(net, x)
        assert decibels(wanted, made(x)) > 100
    assert said == []


class Apart(torch.nn.Module):
    """Layers that must not be scaled: one read twice, one behind an activation that bends, one whose weight is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.bent, self.tied, self.last = (torch.nn.Linear(6, 6) for _ in range(4))
        self.last.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(x)
        x = x + torch.nn.functional.gelu(self.bent(x))
        result: torch.Tensor = self.last(torch.relu(self.tied(x)))
        return result


def test_a_network_without_pairs_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(RecipeError, match="no layer of this network feeds another one") as caught:
        equalised(Apart().eval(), torch.randn(4, 6))
    assert "take the step out" in str(caught.value)
