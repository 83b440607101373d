"""Stands in for Arm's GPUs, which no Linux machine has: the TOSA graphs of a .pte's VGF parts on Arm's reference model.

The graphs lie beside the program. Each is converted again and must give the very bytes of the part that it stands for;
then the execution plan is walked as it stands in the file (``_pte_plan``). The numbers say what the graphs mean, not
what a driver makes of them: they decide nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import Missing, NotMeasured, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _executorch, _vgf

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._pte_plan import Plan

RUNS = ("executorch-vgf",)
KIND: RunnerKind = "stand-in"
APART = True  # the reference model is native code that ends its process where a graph is wrong
DISTRIBUTIONS = ("torch", *_vgf.VERSIONS)
SOURCES = (
    *_executorch.SOURCES,
    *(f"edgebake_targets.{name}" for name in ("_pte_plan", "_tosa", "_vgf")),
)


def missing() -> Missing | None:
    """None when torch and Arm's packages are installed."""
    return _executorch.missing_packages({"torch": "torch>=2.13"}) or _vgf.missing()


def warm_up() -> None:
    """Import torch and the reference model."""
    import torch  # noqa: F401
    import tosa_reference_model  # noqa: F401


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Read the program at ``entry``; ArtifactDamaged when a part is not what the graph beside it converts to."""
    from edgebake_targets import _pte_plan

    plans = _pte_plan.open_plans(entry, list(signature.methods))
    return _Session(plans, {method: _graphs(plan, entry) for method, plan in plans.items()}, signature)


def _graphs(plan: Plan, entry: Path) -> list[tuple[int, bytes]]:
    """For each delegate how many inputs its graph has, and the graph."""
    from edgebake_targets import _tosa

    others = sorted({one.backend for one in plan.delegates} - {_vgf.BACKEND})
    if others:
        raise NotMeasured(f"nothing here computes the parts for {', '.join(others)}")
    found = [_vgf.graph_of(bytes(one.blob), entry.parent) for one in plan.delegates]
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
