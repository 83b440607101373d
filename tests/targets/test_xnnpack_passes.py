"""Lowering to XNNPACK with the passes that a partition needs: the same bytes as with all of them."""

from __future__ import annotations

import copy
import gc
import operator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.fx.passes.tools_common import legalize_graph

from edgebake.types import DimBounds, MethodSignature, ModuleKind, Signature, TensorSpec
from edgebake_targets import _executorch
from edgebake_targets._xnnpack_partitioner import partitioner
from edgebake_targets._xnnpack_passes import needed_only, sort_in_place, unchanged
from xnnpack_cases import Wrapper, build


def disordered() -> torch.fx.GraphModule:
    """A graph whose nodes stand before what they read, with sizes computed beside tensors."""
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    last = graph.call_function(torch.add, (x, y))
    size = graph.call_function(operator.mul, (2, 3))
    products = [graph.call_function(torch.mul, (x, n)) for n in range(4)]
    joined = graph.call_function(torch.cat, (products,))
    scaled = graph.call_function(torch.mul, (joined, size))
    last.args = (scaled, products[2])
    graph.output((last, products[1]))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def seen(module: torch.fx.GraphModule) -> list[tuple[str, str, list[str]]]:
    return [(node.name, str(node.args), [user.name for user in node.users]) for node in module.graph.nodes]


def test_sorting_in_place_gives_the_order_of_torch_and_its_users() -> None:
    ours, theirs = disordered(), disordered()
    for _ in range(3):  # it is not stable: each sort begins where the last ended
        sort_in_place(ours)
        legalize_graph(theirs)
        assert seen(ours) == seen(theirs)
    ours.graph.lint()


def test_a_cycle_is_said() -> None:
    module = disordered()
    first, *_, last = (node for node in module.graph.nodes if node.target is torch.mul)
    first.args = (last, 0)
    with pytest.raises(RuntimeError, match="cycles"):
        sort_in_place(module)


class Net(torch.nn.Module):
    """What decoders compute, and what the backend's passes change: a fused ReLU, a long join, convolutions, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.up, self.down, self.gain = (
            torch.nn.Linear(8, 16),
            torch.nn.Linear(16, 8),
            torch.nn.Parameter(torch.ones(8)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean(dim=3).transpose(1, 2)
        x = self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        x = x + self.down(torch.nn.functional.silu(self.up(x)))
        x = torch.cat([x * float(n) for n in range(1, 7)], dim=-1)
        return torch.cat([x, torch.relu(x + 1.0)], dim=-1)


def lowered(program: torch.export.ExportedProgram, *, needed: bool) -> bytes:
    with needed_only() if needed else nullcontext():
        edge = _executorch.to_edge({"forward": copy.deepcopy(program)}, (partitioner(dynamic=False),))
    return bytes(_executorch.to_executorch(edge, fuse_quantised=False).buffer)


@pytest.mark.slow
def test_the_file_is_the_same_to_the_byte() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        program = torch.export.export(Net().eval(), (torch.randn(1, 3, 8, 8),))
        assert lowered(program, needed=True) == lowered(program, needed=False)


def partition(function: torch.nn.Module, *args: torch.Tensor) -> torch.export.ExportedProgram:
    from executorch.exir import EdgeCompileConfig, to_edge

    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    return to_edge(torch.export.export(function.eval(), args), compile_config=config).exported_program()


class Called(torch.nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        (lambda x: x * torch.sigmoid(x) + torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), True),
        (lambda x: torch.cat([x, -x], dim=-1).permute(0, 1, 3, 2), True),
        (lambda x: torch.cat([x] * 6, dim=-1), False),
        (lambda x: torch.relu(x + 1), False),
        (lambda x: x.clone() + 1, False),
        (lambda x: torch.softmax(x, -1), False),
    ],
)
def test_only_partitions_that_no_pass_looks_at_are_left_as_they_are(function: object, *, plain: bool) -> None:
    assert unchanged(partition(Called(function), torch.randn(1, 2, 3, 4))) is plain


def test_images_with_channels_last_get_their_copies() -> None:
    image = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    assert not unchanged(partition(Called(lambda x: x + 1), image))


def test_nothing_that_was_lowered_is_held_afterwards(tmp_path: Path) -> None:
    wide = torch.nn.Sequential(torch.nn.Linear(72, 88), torch.nn.ReLU(), torch.nn.Linear(88, 72))
    kinds: dict[str, ModuleKind] = {"0": "linear", "2": "linear"}
    signature = Signature(
        methods={
            "forward": MethodSignature(
                inputs=(TensorSpec(name="x", shape=("rows", 72), dtype="float32"),),
                outputs=(TensorSpec(name="y", shape=("rows", 72), dtype="float32"),),
            )
        },
        dims={"rows": DimBounds(min=1, max=8)},
    )
    network = Wrapper(wide).eval()
    build(network, signature, dict.fromkeys(kinds, "w8a8d"), kinds, [torch.randn(3, 72)], tmp_path)
    del wide, network
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and x.shape == (88, 72)]
    assert not [(x.dtype, x.shape) for x in alive]
