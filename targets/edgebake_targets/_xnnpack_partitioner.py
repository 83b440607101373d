"""Which nodes go to XNNPACK, found in one round over the program: lowering costs grow with the rounds.

ExecuTorch's own way to mix dynamically quantised products with the rest is a list of two partitioners. Each of a list
decomposes the whole program twice and lowers what it took before the next begins; one that names the same partitions
at once, and that says when no operator needs a second look, halves the decompositions and lowers once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx.passes.infra.partitioner import Partition

    Kept = tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]


def partitioner(*, dynamic: bool) -> Any:
    """ExecuTorch's XNNPACK partitioner; with ``dynamic``, products with scales chosen at run time go first.

    Those go one by one: merged partitions would part a product from the operator that chooses its input's scale. Only
    products: left to itself, a partitioner of that precision also takes pads, activations and batch norms one by one
    and shatters a network into a delegate per operator.
    """
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    configs = [LinearConfig, AddmmConfig, MMConfig]
    products = XnnpackPartitioner(configs, ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True) if dynamic else None

    class OneRound(XnnpackPartitioner):  # type: ignore[misc]  # ExecuTorch's classes are untyped
        def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
            first = products.generate_partitions(ep) if products else []
            return _numbered(first, _rest(ep, self.get_matched_nodes_from_configs(ep), first))

        def ops_to_not_decompose(self, ep: ExportedProgram) -> Kept:
            return unfiltered(ep, *super().ops_to_not_decompose(ep))

    return OneRound()


def unfiltered(ep: ExportedProgram, kept: list[Any], takes: Callable[[torch.fx.Node], bool]) -> Kept:
    """Operators to keep whole, with no filter where every one of them in ``ep`` will be taken."""
    nodes = ep.graph_module.graph.nodes
    branches = any(node.op == "get_attr" for node in nodes)  # whose operators nothing here has looked at
    if branches or not all(takes(node) for node in nodes if node.target in kept):
        return kept, takes
    return kept, None


def _rest(ep: ExportedProgram, groups: list[list[torch.fx.Node]], first: list[Partition]) -> list[Partition]:
    """Partitions of the nodes in ``groups`` that are in none of ``first``."""
    from executorch.exir.backend.canonical_partitioners import pattern_op_partitioner

    taken = {node for partition in first for node in partition.nodes}
    left = ([node for node in group if node not in taken] for group in groups)
    rest: list[Partition] = pattern_op_partitioner.generate_grouped_partitions_from_list_of_nodes(
        ep.graph_module, [group for group in left if group]
    )
    return rest


def _numbered(first: list[Partition], rest: list[Partition]) -> list[Partition]:
    for number, partition in enumerate((*first, *rest)):
        partition.id = number
    return [*first, *rest]
