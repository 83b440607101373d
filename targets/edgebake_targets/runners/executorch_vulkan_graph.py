"""Stands in for Vulkan's runtime, which no executorch wheel holds: the graphs of a .pte file computed in torch.

The execution plan is walked as it stands in the file (``_pte_plan``), its Vulkan parts by ``_vulkan_evaluate``. That
shows whether the file says what the network computes, not what a GPU makes of it: its numbers decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.target import Missing, NotMeasured, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _executorch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._pte_plan import Plan
    from edgebake_targets.inspectors._vulkan_graph import Program

RUNS = ("executorch-vulkan",)
KIND: RunnerKind = "stand-in"
DISTRIBUTIONS = ("torch",)
SOURCES = (*_executorch.SOURCES, "edgebake_targets._pte_plan", "edgebake_targets._vulkan_evaluate")


def missing() -> Missing | None:
    """None when torch is installed."""
    return _executorch.missing_packages({"torch": "torch>=2.13"})


def warm_up() -> None:
    """Import torch."""
    import torch  # noqa: F401


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Read the program at ``entry``. NotMeasured names operators and backends that nothing here computes."""
    from edgebake_targets import _pte_plan

    plans = _pte_plan.open_plans(entry, list(signature.methods))
    return _Session(plans, {method: _graphs(plan, entry) for method, plan in plans.items()}, signature)


def _graphs(plan: Plan, entry: Path) -> list[Program]:
    from edgebake_targets import _vulkan_evaluate
    from edgebake_targets.inspectors import _vulkan_graph
    from edgebake_targets.inspectors._flatbuffers import Malformed

    others = sorted({one.backend for one in plan.delegates} - {_vulkan_graph.BACKEND})
    if others:
        raise NotMeasured(f"nothing here computes the parts for {', '.join(others)}")
    try:
        found = [_vulkan_graph.parse(one.blob, plan.named) for one in plan.delegates]
    except Malformed as error:
        raise ArtifactDamaged(f"a Vulkan part is damaged: {error}", where=str(entry)) from error
    absent = sorted(set().union(*map(_vulkan_evaluate.lacking, found)))
    if absent:
        raise NotMeasured(f"nothing here computes the Vulkan operators {', '.join(absent)}")
    return found


class _Session:
    def __init__(self, plans: Mapping[str, Plan], graphs: Mapping[str, list[Program]], signature: Signature) -> None:
        self._plans = plans
        self._graphs = graphs
        self._signature = signature

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once."""
        from edgebake_targets import _pte_plan, _vulkan_evaluate

        plan, specs = self._plans[method], self._signature.methods[method]

        def delegate(number: int, values: list[Any]) -> dict[int, Any]:
            graph = self._graphs[method][number]
            count = len(graph.inputs)
            results = _vulkan_evaluate.run(graph, values[:count])
            places = enumerate(results, start=count)
            return {
                place: _pte_plan.as_declared(result.numpy(), values[place])
                if isinstance(values[place], _pte_plan.Declared)
                else result
                for place, result in places
            }

        return _pte_plan.call(plan, specs, inputs, delegate, plan.states())
