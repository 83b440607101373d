"""Which operators XNNPACK's partitioner keeps whole, and when it asks for a second look at them."""

from __future__ import annotations

import torch

from edgebake_targets._xnnpack_partitioner import partitioner


class Net(torch.nn.Module):
    """A product, an activation between, and a product whose second factor is an input where ``other`` says so."""

    def __init__(self, *, other: bool) -> None:
        super().__init__()
        self.first, self.second, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4), other

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x)))
        return torch.nn.functional.linear(found, y) if self.other else found + y.sum()


def exported(*, other: bool) -> torch.export.ExportedProgram:
    args = torch.randn(2, 8), torch.randn(3, 4)
    return torch.export.export(Net(other=other).eval(), args).run_decompositions({})


def test_where_every_product_is_taken_no_second_look_is_asked_for() -> None:
    kept, takes = partitioner(dynamic=False).ops_to_not_decompose(exported(other=False))
    assert torch.ops.aten.linear.default in kept
    assert takes is None


def test_where_one_is_not_taken_the_filter_says_which() -> None:
    program = exported(other=True)
    _, takes = partitioner(dynamic=False).ops_to_not_decompose(program)
    assert takes is not None
    products = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [takes(node) for node in products] == [True, True, False]
