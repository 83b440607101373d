"""GELU by its tanh approximation, spelled out: ExecuTorch's XNNPACK backend computes the exact one whatever is asked.

ExecuTorch 1.4.1, ``backends/xnnpack/operators/op_gelu.py``, does not read ``approximate``. The two differ by up to
4.7e-4: a Gemma layer is 82 dB from the float model with the one for the other.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from edgebake.types import Traced
from edgebake_targets._executorch_llm import with_graph

if TYPE_CHECKING:
    import torch


def spelled_out(traced: Traced) -> Traced:
    """``traced`` with ``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` (Hendrycks, Gimpel 2016, section 2) for it.

    Programs without it are the same objects; tensors are shared.
    """
    programs = {name: _spelled_out(program) for name, program in traced.programs.items()}
    return replace(traced, programs=programs)


def _spelled_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    if not any(map(_approximate, program.graph.nodes)):
        return program
    graph = copy.deepcopy(program.graph)
    for node in [node for node in graph.nodes if _approximate(node)]:
        with graph.inserting_before(node):
            made = _nodes(node)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return with_graph(program, graph)


def _approximate(node: torch.fx.Node) -> bool:
    import torch

    return node.target is torch.ops.aten.gelu.default and "tanh" in (*node.args[1:], node.kwargs.get("approximate"))


def _nodes(node: torch.fx.Node) -> torch.fx.Node:
    """Before ``node``, what it computes; every value has its shape."""
    import torch

    aten, x = torch.ops.aten, node.args[0]

    def call(operator: torch._ops.OpOverload, *args: object) -> torch.fx.Node:
        made = node.graph.call_function(operator, args)  # type: ignore[arg-type]
        made.meta = dict(node.meta)
        return made

    bent = call(aten.add.Tensor, call(aten.mul.Tensor, call(aten.mul.Tensor, x, x), 0.044715), 1.0)
    inner = call(aten.mul.Tensor, call(aten.mul.Tensor, x, bent), math.sqrt(2 / math.pi))
    share = call(aten.add.Tensor, call(aten.tanh.default, inner), 1.0)
    return call(aten.mul.Tensor, call(aten.mul.Tensor, x, 0.5), share)
