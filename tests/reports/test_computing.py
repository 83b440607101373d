"""Lines on how an artifact computes."""

from __future__ import annotations

from edgebake.reports._computing import computing, unit_texts


def outputs(*decibels: float | None) -> dict[str, dict[str, float | None]]:
    return {f"y{i}": {"sqnr_db": value} for i, value in enumerate(decibels)}


def test_all_modes_are_shown_with_their_worst_output() -> None:
    modes = {
        "fp32": {"calls": 8, "outputs": outputs(141.87, 130.0)},
        "declared": {"calls": 8, "outputs": outputs(58.2, 61.0)},
        "fp16-worst": {"calls": 8, "outputs": outputs(None, 44.0)},
    }
    assert list(computing({"modes": dict(sorted(modes.items()))})) == [
        ("modes", "fp32 130.0 dB, declared 58.2 dB, fp16-worst NaN (8 calls each)")
    ]


def test_each_unit_has_its_number_or_its_reason() -> None:
    units = {
        "cpu_only": {"calls": 8, "outputs": outputs(70.0), "median_ms": 1.2345},
        "cpu_and_ne": {"reason": "Core ML cannot run it there: -14"},
    }
    assert list(computing({"compute_units": units})) == [
        ("cpu_only", "70.0 dB, 1.23 ms"),
        ("cpu_and_ne", "Core ML cannot run it there: -14"),
    ]


def test_placement_names_what_is_not_on_the_neural_engine() -> None:
    placed = {
        "Neural Engine": {"operators": {"conv": 53, "add": 10, "relu": 9, "mul": 3, "mean": 1}, "cost": 0.987},
        "CPU": {"operators": {"gather": 2}, "cost": None},
    }
    assert list(computing({"placement": placed})) == [
        (
            "placed",
            "Neural Engine: 98.7 % of the work, 76 operators (conv 53, add 10, relu 9, mul 3 and 1 other type); "
            "CPU: 2 operators (gather 2)",
        )
    ]


def test_nothing_is_said_where_nothing_was_measured() -> None:
    assert list(computing({"modes": {}, "compute_units": None})) == []


NPU = {"unit": "NPU", "by": "QnnBackend", "operators": {"Conv2d": 4, "Relu": 1}, "macs": 12_345, "subgraphs": 2}
CPU = {"unit": "CPU", "by": "ExecuTorch's kernels", "operators": {"aten.topk": 1}, "macs": 0, "subgraphs": 0}


def test_work_on_several_units_is_one_line_with_what_passes_between_them() -> None:
    told = list(computing({"delegation": {"share": 1.0, "units": [NPU, CPU], "border_bytes": 4096}}))
    assert told == [
        (
            "units",
            "NPU by QnnBackend: 2 parts, 5 operators (Conv2d 4, Relu 1), 12,345 MACs; "
            "CPU by ExecuTorch's kernels: 1 operator (aten.topk 1), 0 MACs; 4,096 bytes pass between parts in a call",
        )
    ]


def test_work_on_one_unit_needs_no_line() -> None:
    assert list(computing({"delegation": {"share": 1.0, "units": [NPU], "border_bytes": 0}})) == []
    assert list(computing({"delegation": {"share": 1.0}})) == []  # written by an older edgebake


def test_a_part_that_hides_its_operators_says_so() -> None:
    hidden = {**NPU, "operators": {}, "macs": None, "subgraphs": 1}
    assert list(unit_texts([hidden], None)) == ["NPU by QnnBackend: 1 part, operators not shown"]
