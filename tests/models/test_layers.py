"""Layers of an exported program as modules again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgebake.models import _layers


class Several(nn.Module):
    """Every kind of layer, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 8, 3, padding="same", groups=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, output_padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.words = nn.Embedding(9, 4, padding_idx=0)
        self.inner = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 3, dilation=2))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        image = self.norm(self.up(self.strided(self.same(x)))).mean((2, 3))
        text = self.words(ids)
        row = self.inner[1](text[:, :, None].repeat(1, 1, 5)).sum(-1)
        return image + self.inner[0](self.inner[0](text)) + row


class Tied(nn.Module):
    """A head that multiplies by the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.words(ids), self.words.weight)


class TwoWays(nn.Module):
    """One convolution's weight with two strides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).sum() + nn.functional.conv1d(x, self.conv.weight, self.conv.bias, stride=2)


def restored(network: nn.Module, *given: torch.Tensor) -> torch.fx.GraphModule:
    program = torch.export.export(network.eval(), given)
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    _layers.restore(module)
    torch.testing.assert_close(module(*given), network(*given), rtol=0, atol=0)
    return module


def test_layers_are_modules_with_their_own_options() -> None:
    torch.manual_seed(0)
    network = Several()
    found = restored(network, torch.randn(1, 3, 8, 8), torch.tensor([3]))
    for name, layer in network.named_modules():
        if name and not list(layer.children()) and not isinstance(layer, nn.BatchNorm2d):
            assert repr(found.get_submodule(name)) == repr(layer)
    called = [n.target for n in found.graph.nodes if n.op == "call_module"]
    assert called.count("inner.0") == 2


@pytest.mark.parametrize("network", [Tied(), TwoWays()], ids=lambda n: type(n).__name__)
def test_a_weight_with_two_uses_stays_an_operator(network: nn.Module) -> None:
    given = torch.tensor([1]) if isinstance(network, Tied) else torch.randn(1, 2, 5)
    found = restored(network, given)
    assert not [n for n in found.graph.nodes if n.op == "call_module"]
