"""``wide_activations: auto`` for ExecuTorch's Qualcomm backend: whose values need 16 bits.

As :mod:`edgebake_targets._onnx_wide` does it: each module's values are rounded to 8 bits alone, and the fewest modules
are made wide with which the outputs stay close. A value of 16 bits counts as exact here, and the weights are rounded on
both sides: what is measured is what 8-bit activations cost. All of it is torch's arithmetic of the graph that the
backend compiles.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from edgebake_targets._qnn_graph import name_of
from edgebake_targets._qnn_quantizer import home
from edgebake_targets._wide import Found, found

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Interpreter, Node

CALLS = 4  # of the calibration samples, spread over them
_Q, _DQ = "quantize_per_tensor", "dequantize_per_tensor"


def searched(narrow: GraphModule, calls: Sequence[tuple[torch.Tensor, ...]], given: Collection[str]) -> Found:
    """The modules to make wide besides ``given``: those at the outputs, then those that lose most.

    ``narrow``: the network after PT2E with 8 bits in all modules but ``given``.
    """
    pairs = [node for node in narrow.graph.nodes if name_of(node) == _Q]
    homes = {pair: _home(pair) for pair in pairs}
    (output,) = (node for node in narrow.graph.nodes if node.op == "output")
    ends = [m for m in dict.fromkeys(home(node) for node in output.all_input_nodes) if m not in given]
    others = [m for m in dict.fromkeys(homes.values()) if m not in (*given, *ends)]
    meter = _Meter(narrow, calls[:: max(1, len(calls) // CALLS)][:CALLS])

    def rounding(modules: Collection[str]) -> float:
        return meter.loss({pair for pair in pairs if homes[pair] in modules})

    return found(
        ends,
        others,
        alone=lambda module: rounding([module]),
        loss=lambda modules: rounding([module for module in others if module not in modules]),
    )


def _home(pair: Node) -> str:
    """The module that makes the value; of what comes in, the one that reads it."""
    made: Any = pair.args[0]
    if made.op == "call_function":
        return home(made)
    readers = [reader for back in pair.users for reader in back.users]
    return home(readers[0]) if readers else home(pair)


def _rounding(module: GraphModule, active: Collection[Node]) -> Interpreter:
    """Runs a graph in which only the quantise/dequantise pairs ``active`` do anything."""
    import torch

    class Rounding(torch.fx.Interpreter):
        """Hands on what the other pairs are given."""

        def run_node(self, n: Node) -> Any:
            first: Any = n.args[0] if n.args else None
            idle = n if name_of(n) == _Q else first if name_of(n) == _DQ and name_of(first) == _Q else None
            return super().run_node(n) if idle is None or idle in active else self.env[first]

    return Rounding(module)


class _Meter:
    """What the outputs lose against no rounding of activations: noise to signal, of the output that loses most."""

    def __init__(self, module: GraphModule, calls: Sequence[tuple[torch.Tensor, ...]]) -> None:
        self._module, self._calls = module, calls
        self._wanted = [self._run(call, set()) for call in calls]

    def _run(self, call: tuple[torch.Tensor, ...], active: Collection[Node]) -> list[torch.Tensor]:
        import torch

        with torch.no_grad():
            made = _rounding(self._module, active).run(*call)
        return [value.double() for value in torch.utils._pytree.tree_leaves(made)]

    def loss(self, active: Collection[Node]) -> float:
        """0 where rounding the values ``active`` changes nothing."""
        noise, signal = [0.0] * len(self._wanted[0]), [0.0] * len(self._wanted[0])
        for call, right in zip(self._calls, self._wanted, strict=True):
            for index, (wanted, got) in enumerate(zip(right, self._run(call, active), strict=True)):
                noise[index] += float(((got - wanted) ** 2).sum())
                signal[index] += float((wanted**2).sum())
        return max((lost / there for lost, there in zip(noise, signal, strict=True) if there), default=0.0)
