"""Which compute unit Core ML means to run each operator on: its compute plan, counted (macOS 14.4 or later)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = {
    "MLNeuralEngineComputeDevice": "Neural Engine",
    "MLGPUComputeDevice": "GPU",
    "MLCPUComputeDevice": "CPU",
}
NOWHERE = "not placed"
_VERSION = re.compile(r"^ios[0-9]+\.")  # operators are listed with the operator set that they are of


def placement_of(plan: Any) -> dict[str, dict[str, Any]]:
    """Unit to ``{"operators": {type: count}, "cost": share of the estimated work or None}``, most work first.

    ``plan``: a ``coremltools.models.compute_plan.MLComputePlan`` of an ML Program. Constants run nowhere.
    """
    counts: dict[str, Counter[str]] = {}
    costs: dict[str, float | None] = {}
    for function in plan.model_structure.program.functions.values():
        for operation in _operations(function.block):
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
            if usage is None and cost is None:  # what is decided at load: constants and their decompression
                continue
            unit = NOWHERE if usage is None else _unit(usage.preferred_compute_device)
            counts.setdefault(unit, Counter())[_VERSION.sub("", operation.operator_name)] += 1
            if cost is not None:
                costs[unit] = (costs.get(unit) or 0.0) + cost.weight
    most = sorted(counts, key=lambda unit: (-(costs.get(unit) or 0.0), unit))
    return {unit: {"operators": dict(sorted(counts[unit].items())), "cost": costs.get(unit)} for unit in most}


def _unit(device: Any) -> str:
    kind = type(device).__name__
    return _NAMES.get(kind, kind)


def _operations(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def by_method(plans: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The placements of several methods' plans in one; costs are averaged, for each plan counts its own as 1."""
    merged: dict[str, dict[str, Any]] = {}
    for plan in plans.values():
        for unit, row in placement_of(plan).items():
            at = merged.setdefault(unit, {"operators": {}, "cost": None})
            at["operators"] = dict(sorted((Counter(at["operators"]) + Counter(row["operators"])).items()))
            if row["cost"] is not None:
                at["cost"] = (at["cost"] or 0.0) + row["cost"] / len(plans)
    return merged
