"""Stands in for a device of Arm's: a .pte whose delegates are computed by the TOSA graphs that they were made from.

The execution plan is walked as it stands in the file (``_pte_plan``), each delegate by Arm's reference model. The
numbers say what the graphs mean, not what a driver or an NPU makes of them: they decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import NotMeasured, Session
from edgebake.types import Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._pte_plan import Plan

# A delegate's bytes, what its compiler was told and the program's folder, to the TOSA graph it was made from.
GraphOf = Callable[[bytes, Mapping[str, bytes], Path], bytes]

SOURCES = tuple(f"edgebake_targets.{name}" for name in ("_arm", "_pte_plan", "_tosa", "_tosa_session"))


def warm_up() -> None:
    """Import torch, ExecuTorch's kernels that quantise at the border of a part, and the reference model."""
    import executorch.kernels.quantized  # noqa: F401
    import torch  # noqa: F401
    import tosa_reference_model  # noqa: F401


def opened(entry: Path, signature: Signature, backend: str, graph_of: GraphOf) -> Session:
    """Read the program at ``entry``; ``graph_of`` proves which graph beside it a part of ``backend`` was made from."""
    from edgebake_targets import _pte_plan

    warm_up()  # the plan is read with the kernels that there are
    plans = _pte_plan.open_plans(entry, list(signature.methods))
    found = {method: graphs(plan, entry, backend, graph_of) for method, plan in plans.items()}
    return _Session(plans, found, signature)


def graphs(plan: Plan, entry: Path, backend: str, graph_of: GraphOf) -> list[tuple[int, bytes]]:
    """For each delegate how many inputs its graph has, and the graph. NotMeasured names other backends' parts."""
    from edgebake_targets import _tosa

    others = sorted({one.backend for one in plan.delegates} - {backend})
    if others:
        raise NotMeasured(f"nothing here computes the parts for {', '.join(others)}")
    found = [graph_of(bytes(one.blob), one.options, entry.parent) for one in plan.delegates]
    return [(len(_tosa.parse(graph).inputs), graph) for graph in found]


class _Session:
    def __init__(
        self, plans: Mapping[str, Plan], graphs: Mapping[str, list[tuple[int, bytes]]], signature: Signature
    ) -> None:
        self._plans = plans
        self._graphs = graphs
        self._signature = signature

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once."""
        from edgebake_targets import _pte_plan, _tosa

        plan, specs = self._plans[method], self._signature.methods[method]

        def delegate(number: int, values: list[Any]) -> dict[int, Any]:
            count, graph = self._graphs[method][number]
            results = _tosa.run(graph, [value.numpy() for value in values[:count]])
            return {
                place: _pte_plan.as_declared(result, values[place]) for place, result in enumerate(results, start=count)
            }

        return _pte_plan.call(plan, specs, inputs, delegate, plan.states())
