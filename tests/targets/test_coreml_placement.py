"""Reading a compute plan: Core ML makes one on a Mac only, its structure is of types that are here, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from coremltools.models import compute_device, compute_plan

from edgebake_targets import _coreml_placement as placement

DEVICES = {
    "ne": compute_device.MLNeuralEngineComputeDevice,
    "gpu": compute_device.MLGPUComputeDevice,
    "cpu": compute_device.MLCPUComputeDevice,
}


def operation(kind: str, *, blocks: tuple[Any, ...] = (), on: str = "", cost: float | None = None) -> Any:
    """An operator whose proxy, Core ML's own object on a Mac, carries what the plan says of it."""
    return compute_plan.MLModelStructureProgramOperation(
        inputs={}, operator_name=kind, outputs=[], blocks=list(blocks), __proxy__=(on, cost)
    )


def block(*operations: Any) -> Any:
    return compute_plan.MLModelStructureProgramBlock(inputs=[], operations=list(operations), output_names=[])


class Plan:
    """The two questions that MLComputePlan answers; it refuses to be made without a Mac."""

    def __init__(self, *operations: Any) -> None:
        function = compute_plan.MLModelStructureProgramFunction(inputs=[], block=block(*operations))
        program = compute_plan.MLModelStructureProgram(functions={"main": function})
        self.model_structure = SimpleNamespace(program=program)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        on, _ = operation.__proxy__
        if not on:
            return None
        kind = DEVICES[on]
        device = kind.__new__(kind)
        return compute_plan.MLComputePlanDeviceUsage(
            preferred_compute_device=device, supported_compute_devices=[device]
        )

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        _, cost = operation.__proxy__
        return None if cost is None else compute_plan.MLComputePlanCost(weight=cost)


def test_operators_are_counted_where_core_ml_prefers_them() -> None:
    plan = Plan(
        operation("const"),
        operation("ios17.gather", on="cpu", cost=0.05),
        operation("ios17.conv", on="ne", cost=0.6),
        operation("ios17.conv", on="ne", cost=0.3),
        operation("ios15.softmax", on="gpu", cost=0.05),
    )
    found = placement.placement_of(plan)
    assert list(found) == ["Neural Engine", "CPU", "GPU"]
    assert found["Neural Engine"] == {"operators": {"conv": 2}, "cost": pytest.approx(0.9)}
    assert found["CPU"] == {"operators": {"gather": 1}, "cost": pytest.approx(0.05)}


def test_branches_count_and_what_is_not_placed_is_said() -> None:
    inner = block(operation("ios17.add", on="cpu", cost=0.1))
    found = placement.placement_of(Plan(operation("cond", blocks=(inner,), cost=0.2)))
    assert found[placement.NOWHERE] == {"operators": {"cond": 1}, "cost": 0.2}
    assert found["CPU"]["operators"] == {"add": 1}


def test_methods_share_one_account() -> None:
    plans = {
        "prefill": Plan(operation("ios17.conv", on="ne", cost=1.0)),
        "decode": Plan(operation("ios17.conv", on="ne", cost=0.5), operation("ios17.add", on="cpu", cost=0.5)),
    }
    assert placement.by_method(plans) == {
        "Neural Engine": {"operators": {"conv": 2}, "cost": 0.75},
        "CPU": {"operators": {"add": 1}, "cost": 0.25},
    }
