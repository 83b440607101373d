"""Size: floors by hand and the reasons for what lies above them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from edgebake.size import duplicates, measure
from edgebake.types import COMPILED, Assignment, Inspection, Module, WeightRecord

LINEAR = Module(name="encoder.linear", kind="linear", parameters=512 * 256)
TABLE = Module(name="embeddings", kind="embedding", parameters=1000 * 64)
NORM = 300  # parameters that belong to no module
FLOAT_BYTES = 4 * (LINEAR.parameters + TABLE.parameters + NORM)
BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5, "palette4": 0.5, "int32": 4.0}


def _record(name: str, shape: tuple[int, ...], dtype: str, scales: int = 0, digest: str = "") -> WeightRecord:
    size = int(math.prod(shape) * BYTES[dtype])
    return WeightRecord(name=name, shape=shape, dtype=dtype, bytes=size, scale_bytes=scales, digest=digest or name)


def _measure(
    records: Sequence[WeightRecord],
    schemes: dict[str, str],
    scheme: str = "fp32",
    graph: int = 100,
    modules: Sequence[Module] = (LINEAR, TABLE),
    **options: Any,
) -> dict[str, Any]:
    total = sum(r.bytes + r.scale_bytes for r in records) + graph
    inspection = Inspection(
        format="pte", inputs=(), outputs=(), operators={}, delegates={}, weights=tuple(records), total_bytes=total
    )
    assignment = Assignment(schemes=schemes, kinds={m.name: m.kind for m in modules})
    given = {"float_bytes": FLOAT_BYTES, **options}
    return measure(inspection, disk_bytes=total, modules=modules, assignment=assignment, scheme=scheme, **given)


NORM_RECORD = _record("norm", (NORM,), "float32")
TABLE_RECORD = _record("embeddings.weight", (1000, 64), "float32")
LINEAR_INT8 = _record("encoder.linear.weight", (512, 256), "int8", scales=512 * 4)


def test_bytes_are_split_into_weights_scales_and_graph() -> None:
    found = _measure([LINEAR_INT8, TABLE_RECORD, NORM_RECORD], {LINEAR.name: "w8"}, "w8", graph=77)
    assert found["weights"] == 512 * 256 + 4 * 64000 + 4 * NORM
    assert (found["scales"], found["graph"]) == (2048, 77)
    assert found["bytes"] == found["weights"] + 2048 + 77
    assert found["of_float"] == found["bytes"] / FLOAT_BYTES
    assert found["dtypes"] == {"float32": {"count": 2, "bytes": 257200}, "int8": {"count": 1, "bytes": 131072}}


def test_floor_of_an_8_bit_layer_counts_its_channels() -> None:
    found = _measure([LINEAR_INT8, TABLE_RECORD, NORM_RECORD], {LINEAR.name: "w8"}, "w8")
    assert found["floor_bytes"] == 512 * 256 + 4 * 512 + 4 * 64000 + 4 * NORM


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("fp32", 4 * 131072),
        ("fp16", 2 * 131072),
        ("w8a8", 131072 + 4 * 512),
        ("w4g32", 65536 + 4 * 4096),
        ("palette6", 98304 + 128),
    ],
)
def test_floor_by_scheme(scheme: str, expected: int) -> None:
    found = _measure([], {LINEAR.name: scheme}, modules=[LINEAR], float_bytes=4 * 131072, channels={LINEAR.name: 512})
    assert found["floor_bytes"] == expected


def test_half_as_default_halves_what_belongs_to_no_module() -> None:
    found = _measure([], {LINEAR.name: "fp16", TABLE.name: "fp16"}, "fp16")
    assert found["floor_bytes"] == FLOAT_BYTES // 2


def test_at_the_floor_nothing_needs_explaining() -> None:
    records = [LINEAR_INT8, _record("embeddings.weight", (1000, 64), "int8", scales=4000), NORM_RECORD]
    found = _measure(records, {LINEAR.name: "w8", TABLE.name: "w8"}, "w8")
    assert found["reasons"] == []


def test_a_layer_that_the_target_leaves_in_float_is_named_even_at_the_floor() -> None:
    found = _measure([LINEAR_INT8, TABLE_RECORD, NORM_RECORD], {LINEAR.name: "w8"}, "w8")
    assert found["reasons"] == [{"why": "stays fp32: embeddings (0.2 MiB)", "bytes": 256000}]


def test_duplicate_tensors_are_found_by_digest() -> None:
    twin = _record("lm_head.weight", (1000, 64), "float32", digest=TABLE_RECORD.digest)
    assert duplicates([TABLE_RECORD, twin, NORM_RECORD]) == [("lm_head.weight", 256000)]
    nameless = [_record("a", (9,), "float32"), _record("b", (9,), "float32")]
    assert duplicates(nameless) == []
    found = _measure([LINEAR_INT8, TABLE_RECORD, twin, NORM_RECORD], {LINEAR.name: "w8"})
    assert found["reasons"] == [{"why": "the same tensor more than once: lm_head.weight (0.2 MiB)", "bytes": 256000}]


def test_a_layer_that_should_be_compressed_and_is_not() -> None:
    float_linear = _record("encoder.linear.weight", (512, 256), "float32")
    found = _measure([float_linear, TABLE_RECORD, NORM_RECORD], {LINEAR.name: "w8"})
    (reason,) = found["reasons"]
    assert reason["bytes"] == 4 * 131072
    assert reason["why"].startswith("weights kept in float beyond what the schemes say: encoder.linear.weight")


def test_four_bits_stored_as_eight() -> None:
    found = _measure([LINEAR_INT8, TABLE_RECORD, NORM_RECORD], {LINEAR.name: "w4g32"})
    assert found["reasons"][0] == {
        "why": "weights stored wider than their scheme, as int8 (64.0 KiB)",
        "bytes": 65536,
    }


def test_scales_above_theory() -> None:
    wasteful = _record("encoder.linear.weight", (512, 256), "int8", scales=80_000)
    found = _measure([wasteful, TABLE_RECORD, NORM_RECORD], {LINEAR.name: "w8"})
    assert found["reasons"] == [{"why": "scales, zero points and tables above theory (76.1 KiB)", "bytes": 77952}]


def test_reasons_come_largest_first() -> None:
    twin = _record("lm_head.weight", (1000, 64), "float32", digest=TABLE_RECORD.digest)
    found = _measure([LINEAR_INT8, TABLE_RECORD, twin, NORM_RECORD], {LINEAR.name: "w8"}, graph=500_000)
    assert [r["bytes"] for r in found["reasons"]] == [500_000, 256_000]
    assert found["reasons"][0]["why"] == "graph, programs and metadata (0.5 MiB)"


def test_tied_weights_have_one_floor() -> None:
    tied = [TABLE, Module(name="lm_head", kind="linear", parameters=TABLE.parameters)]
    found = _measure([], {}, modules=tied, float_bytes=4 * TABLE.parameters)
    assert found["floor_bytes"] == 4 * TABLE.parameters


def compiled(size: int) -> WeightRecord:
    return WeightRecord(name="EPContext.0", shape=(size,), dtype=COMPILED, bytes=size, digest="c")


def test_a_compiled_part_is_neither_weights_nor_graph() -> None:
    """Its weights and programs are one; what it was made from is told where the target knows it."""
    found = _measure([compiled(400_000)], {LINEAR.name: "w8"}, graph=50, compiled_from=133_120)
    assert (found["weights"], found["graph"], found["compiled"], found["compiled_from"]) == (0, 50, 400_000, 133_120)
    assert found["reasons"] == [
        {"why": "compiled parts, above the weights they were made from (0.3 MiB)", "bytes": 400_000 - 133_120}
    ]
    (reason,) = _measure([compiled(400_000)], {LINEAR.name: "w8"}, graph=50)["reasons"]
    assert reason["why"] == "compiled parts, whose weights and programs cannot be told apart (0.4 MiB)"


def test_files_that_the_one_that_runs_does_not_read_are_told_apart() -> None:
    records = [LINEAR_INT8, TABLE_RECORD, NORM_RECORD]
    inspection = Inspection(
        format="onnx", inputs=(), outputs=(), operators={}, delegates={}, weights=tuple(records), total_bytes=400_000
    )
    found = measure(inspection, disk_bytes=1_000_000, float_bytes=FLOAT_BYTES)
    assert found["beside"] == 600_000
    assert found["weights"] + found["scales"] + found["graph"] == 400_000
    assert {"why": "files beside the one that runs (0.6 MiB)", "bytes": 600_000} in found["reasons"]


def test_convolutions_have_their_first_axis_as_channels() -> None:
    conv = Module(name="conv", kind="conv", parameters=32 * 9)
    record = _record("conv.weight", (32, 1, 3, 3), "int8", scales=128)
    found = _measure([record], {"conv": "w8a8"}, modules=[conv], float_bytes=4 * 288)
    assert found["floor_bytes"] == 288 + 128


def test_no_float_weights_no_ratio() -> None:
    assert _measure([], {}, modules=[], float_bytes=0)["of_float"] is None
