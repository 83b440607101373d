"""Which nodes go to XNNPACK, found in one round over the program: lowering costs grow with the rounds.

ExecuTorch's own way to mix dynamically quantised products with the rest is a list of two partitioners. Each of a list
decomposes the whole program twice and lowers what it took before the next begins; one that names the same partitions
at once, and that says when no operator needs a second look, halves the decompositions and lowers once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.canonical_partitioners.pattern_op_partitioner import (
    generate_grouped_partitions_from_list_of_nodes,
)

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx.passes.infra.partitioner import Partition

Kept = tuple[list["torch._ops.OpOverload"], Callable[["torch.fx.Node"], bool] | None]


class OneRoundPartitioner(XnnpackPartitioner):  # type: ignore[misc]  # ExecuTorch takes partitioners by inheritance
    """ExecuTorch's XNNPACK partitioner; with ``dynamic``, products with scales chosen at run time go first.

    Those go one by one: merged partitions would part a product from the operator that chooses its input's scale. Only
    products: left to itself, a partitioner of that precision also takes pads, activations and batch norms one by one
    and shatters a network into a delegate per operator.
    """

    def __init__(self, *, dynamic: bool) -> None:
        super().__init__()
        configs = [LinearConfig, AddmmConfig, MMConfig]
        precision = ConfigPrecisionType.DYNAMIC_QUANT
        self._products = XnnpackPartitioner(configs, precision, per_op_mode=True) if dynamic else None

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """The products' partitions, then those of all nodes that are in none of them."""
        first = self._products.generate_partitions(ep) if self._products else []
        taken = {node for partition in first for node in partition.nodes}
        groups = ([n for n in group if n not in taken] for group in self.get_matched_nodes_from_configs(ep))
        rest = generate_grouped_partitions_from_list_of_nodes(ep.graph_module, [group for group in groups if group])
        for number, partition in enumerate((*first, *rest)):
            partition.id = number
        return [*first, *rest]

    def ops_to_not_decompose(self, ep: ExportedProgram) -> Kept:
        """Operators to keep whole; with no filter where every one of them in ``ep`` will be taken."""
        kept, takes = super().ops_to_not_decompose(ep)
        nodes = ep.graph_module.graph.nodes
        if all(takes(node) for node in nodes if node.target in kept) and not any(n.op == "get_attr" for n in nodes):
            return kept, None
        return kept, takes
