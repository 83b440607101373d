"""The onnx-qnn target on tiny networks: compiled for a Snapdragon and run on the vendor's simulator."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgebake import devices
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.types import COMPILED
from edgebake_targets import _onnx_qnn_compile, _qnn, onnx_qnn
from edgebake_targets._onnx_qnn_compile import compile_context
from edgebake_targets.inspectors.onnx import inspect
from edgebake_targets.runners import onnxruntime_qnn
from onnx_cases import Wrapper, image_inputs
from qnn_cases import (
    Determined,
    Normed,
    image,
    lower,
    padded_text,
    sqnr,
    text,
    traced_vector,
    vector,
    vectors,
)

pytestmark = pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed")
SM8650 = {"soc_model": "57"}


# Floors are 4-6 dB below what was measured.
@pytest.mark.parametrize(("scheme", "floor"), [("fp16", 66), ("w8a16", 52), ("w8a8", 42), ("w4a16", 22)])
def test_every_scheme_runs_a_convolutional_network_on_the_npu(tmp_path: Path, scheme: str, floor: float) -> None:
    module, traced = image()
    lowered = lower(traced, module, tmp_path, scheme, image_inputs(16, seed=2))
    assert sqnr(module, tmp_path, lowered, image_inputs(4)) > floor
    assert (lowered.delegation.share, lowered.delegation.partitions) == (1.0, 1)
    assert lowered.delegation.left_out == ()


def test_values_of_two_widths_run_on_the_npu(tmp_path: Path) -> None:
    module, traced = image()
    lowered = lower(traced, module, tmp_path, "w8a8", image_inputs(16, seed=2), wide_activations="stem* point")
    assert sqnr(module, tmp_path, lowered, image_inputs(4)) > 42
    assert lowered.delegation.left_out == ()
    model = onnx.load_model(tmp_path / onnx_qnn.PLAIN_FILE)
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name in zeros}
    assert types == {onnx.TensorProto.UINT8, onnx.TensorProto.UINT16}


@pytest.mark.parametrize(("scheme", "floor"), [("fp16", 62), ("w8a16", 37)])
def test_attention_with_padding_stays_on_the_npu_and_close(tmp_path: Path, scheme: str, floor: float) -> None:
    """Signed weights of the norm would leave it on the CPU, and the mask of the lowest float ruin the scores."""
    module, traced = text()
    lowered = lower(traced, module, tmp_path, scheme, padded_text(12))
    assert sqnr(module, tmp_path, lowered, padded_text(4)) > floor
    assert lowered.delegation.left_out == ()
    assert lowered.signature.methods["forward"].inputs[0].shape == (1, 8)


def test_a_norm_written_out_becomes_the_operator_that_the_npu_has(tmp_path: Path) -> None:
    module = Wrapper(Normed()).eval()
    traced = traced_vector(module, vector(64, 1, 8))
    lowered = lower(traced, module, tmp_path, "w8a16", vectors(8, 1, 8))
    assert sqnr(module, tmp_path, lowered, vectors(4, 1, 8)) > 39
    assert inspect(tmp_path / onnx_qnn.PLAIN_FILE).operators["RMSNormalization"] == 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("built")
    module, traced = image()
    return folder, lower(traced, module, folder, "w8a8", image_inputs(8, seed=2))


def test_the_artifact_names_its_files_and_who_reads_them(built: tuple[Path, Any]) -> None:
    folder, lowered = built
    assert lowered.entry == "model.onnx"
    assert sorted(lowered.files) == ["model.onnx", "model.plain.onnx"]
    assert lowered.encodings["files"] == {"context": "model.onnx", "plain": "model.plain.onnx"}
    runtime = lowered.encodings["runtime"]
    assert runtime["written_by"] == runtime["oldest_reader"]
    assert runtime["written_by"].startswith("QAIRT 2.")
    assert (runtime["device"], runtime["soc_model"]) == ("sm8650", "57")
    assert lowered.encodings["plain_runtime"]["written_by"] == f"onnx {onnx.__version__}"
    assert lowered.encodings["plain_runtime"]["oldest_reader"] == "ONNX 1.18 (operator set 23, file format 10)"
    plain = inspect(folder / "model.plain.onnx")
    assert {w.dtype for w in plain.weights if len(w.shape) > 1} == {"int8"}
    assert lowered.encodings["compiled_from"] == sum(w.bytes + w.scale_bytes for w in plain.weights)


def test_inspect_shows_what_a_context_binary_was_compiled_for(built: tuple[Path, Any]) -> None:
    found = inspect(built[0] / "model.onnx")
    assert found.delegates == {"QNNExecutionProvider": 1}
    assert found.operators == {"com.microsoft.EPContext": 1}
    assert found.facts["soc_model"] == "57"
    assert found.facts["compiled_by"].startswith("QAIRT 2.")
    assert 1000 < found.facts["context_bytes"] < found.total_bytes
    assert [(w.name, w.dtype, w.bytes) for w in found.weights] == [
        ("EPContext.0", COMPILED, found.facts["context_bytes"])
    ]
    assert [(i.name, i.shape) for i in found.inputs] == [("image", (1, 3, 16, 16))]


def test_two_folders_and_processes_give_the_same_bytes(built: tuple[Path, Any], tmp_path: Path) -> None:
    module, traced = image()
    lower(traced, module, tmp_path, "w8a8", image_inputs(8, seed=2))
    for name in ("model.onnx", "model.plain.onnx"):
        assert (tmp_path / name).read_bytes() == (built[0] / name).read_bytes()


@pytest.mark.slow
def test_the_binary_lies_beside_where_asked_and_holds_the_same(built: tuple[Path, Any], tmp_path: Path) -> None:
    module, traced = image()
    lowered = lower(traced, module, tmp_path, "w8a8", image_inputs(8, seed=2), embed=False)
    assert sorted(lowered.files) == ["model.onnx", "model.plain.onnx", "model_qnn.bin"]
    assert lowered.encodings["files"]["binary"] == "model_qnn.bin"
    binary = (tmp_path / "model_qnn.bin").read_bytes()
    inside, beside = inspect(built[0] / "model.onnx"), inspect(tmp_path / "model.onnx")
    assert inside.facts["context_bytes"] == len(binary) == sum(w.bytes for w in beside.weights)
    assert beside.facts["context_files"] == ["model_qnn.bin"]
    assert lowered.delegation == built[1].delegation
    assert sqnr(module, tmp_path, lowered, image_inputs(4)) > 33
    (tmp_path / "model_qnn.bin").unlink()
    with pytest.raises(ArtifactDamaged, match="Qualcomm's runtime cannot load the context binary"):
        onnxruntime_qnn.open(tmp_path / lowered.entry, lowered.signature)


# --- what the NPU does not take ---------------------------------------------------------------------------------------


def test_an_operator_that_the_npu_lacks_is_named_with_the_remedy(tmp_path: Path) -> None:
    module = Wrapper(Determined()).eval()
    traced = traced_vector(module, vector(8, 1))
    with pytest.raises(StageFailed) as caught:
        lower(traced, module, tmp_path, "fp16", vectors(2, 1))
    message = str(caught.value)
    assert "1 operators do not run on the NPU of sm8650: Det " in message
    assert "`Det` are not supported by QNN EP" in message
    assert "options: {cpu_fallback: true}" in message


@pytest.mark.parametrize("embed", [True, False])
def test_with_fallback_what_runs_on_the_cpu_is_listed_with_the_vendors_reason(tmp_path: Path, embed: bool) -> None:
    module = Wrapper(Determined()).eval()
    traced = traced_vector(module, vector(8, 1))
    lowered = lower(traced, module, tmp_path, "fp16", vectors(2, 1), cpu_fallback=True, embed=embed)
    by_operator = {row.op: row for row in lowered.delegation.left_out}
    assert by_operator["Det"].count == 1
    assert "not supported by QNN EP" in by_operator["Det"].reason
    assert lowered.delegation.partitions == 2
    assert lowered.delegation.share == 1.0  # a determinant has no multiply-accumulates that we count
    npu, cpu = lowered.delegation.units
    assert (npu.unit, npu.subgraphs, npu.macs) == ("NPU", 2, 64 * 64 + 64 * 8)
    assert npu.operators["FullyConnected"] == 2  # the vendor's names: what was compiled
    assert (cpu.unit, dict(cpu.operators), cpu.macs) == ("CPU", {"Det": 1}, 0)
    assert lowered.delegation.border_bytes == 2 * 64 * 2 + 2  # halves: hidden to both others, the determinant
    found = inspect(tmp_path / "model.onnx")
    assert found.border_bytes == lowered.delegation.border_bytes
    assert [(row.unit, row.subgraphs, row.macs) for row in found.units] == [("NPU", 2, None), ("CPU", 0, 0)]
    assert (found.units[0].operators, found.left_out) == (npu.operators, lowered.delegation.left_out)


def test_a_chip_that_qnn_does_not_know_is_refused_not_run_on_the_cpu(built: tuple[Path, Any], tmp_path: Path) -> None:
    model = onnx.load_model(built[0] / "model.plain.onnx")
    with pytest.raises(StageFailed, match=r"refused the graph for sm0000: .*\n?.*device"):
        compile_context(model, tmp_path / "out.onnx", {"soc_model": "9999"}, "sm0000", cpu_fallback=False)
    with pytest.raises(StageFailed, match="the whole graph stayed on the CPU"):
        compile_context(model, tmp_path / "out2.onnx", {"soc_model": "9999"}, "sm0000", cpu_fallback=True)


def test_a_binary_for_another_chip_than_asked_is_refused(built: tuple[Path, Any], tmp_path: Path) -> None:
    """What a compiler that does not honour the chip would leave: a whole file for another one."""
    plain, compiled = (onnx.load_model(built[0] / name) for name in ("model.plain.onnx", "model.onnx"))
    other = tmp_path / "out.onnx"
    onnx.save_model(compiled, other)
    with pytest.raises(StageFailed, match=r"compiled for QNN's chip 57, not 69 \(sm8750\)\n.*onnxruntime-qnn=="):
        _onnx_qnn_compile.read_back(plain, other, {"soc_model": "69"}, {}, "sm8750", [])
    with pytest.raises(StageFailed, match=r"wrote nothing for sm8750"):
        _onnx_qnn_compile.read_back(plain, tmp_path / "none.onnx", {"soc_model": "69"}, {}, "sm8750", [])


def test_an_option_that_the_provider_would_ignore_is_an_error(built: tuple[Path, Any], tmp_path: Path) -> None:
    model = onnx.load_model(built[0] / "model.plain.onnx")
    with pytest.raises(StageFailed, match=r"knows no option htp_soul, and would ignore it\n.*onnxruntime-qnn=="):
        compile_context(model, tmp_path / "out.onnx", {**SM8650, "htp_soul": "1"}, "sm8650", cpu_fallback=False)


def test_every_option_of_the_target_is_one_that_the_provider_knows() -> None:
    import onnxruntime_qnn

    options = {option.name: option.default for option in onnx_qnn.OPTIONS} | {"vtcm_mib": 4}
    told = onnx_qnn.provider_options(options, devices.find("sm8650").row)
    assert told["vtcm_mb"] == "4"
    assert _qnn.unknown_options(told, Path(onnxruntime_qnn.get_library_path())) == []


CHIPS = [name for name in devices.names() if "soc_model" in devices.find(name).facts]


@pytest.mark.slow
def test_chips_and_options_each_give_a_binary_of_their_own(built: tuple[Path, Any], tmp_path: Path) -> None:
    """None of them is ignored."""
    model = onnx.load_model(built[0] / "model.plain.onnx")
    defaults = {option.name: option.default for option in onnx_qnn.OPTIONS}
    asked = [
        ("sm8550", {}),
        ("sm8650", {}),
        ("sm8750", {}),
        ("sm8650", {"optimization": 1}),
        ("sm8650", {"vtcm_mib": 2}),
    ]
    found = set()
    for number, (chip, options) in enumerate(asked):
        out, row = tmp_path / f"{number}.onnx", devices.find(chip).row
        told = onnx_qnn.provider_options(defaults | options, row)
        compiled = compile_context(model, out, told, chip, cpu_fallback=False)
        assert compiled.facts.soc_model == str(row["soc_model"])
        found.add(out.read_bytes())
    assert len(found) == len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_that_a_profile_names_compiles(built: tuple[Path, Any], tmp_path: Path, chip: str) -> None:
    model = onnx.load_model(built[0] / "model.plain.onnx")
    told = onnx_qnn.provider_options({o.name: o.default for o in onnx_qnn.OPTIONS}, devices.find(chip).row)
    compiled = compile_context(model, tmp_path / "out.onnx", told, chip, cpu_fallback=False)
    assert compiled.facts.soc_model == told["soc_model"]


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for the interpreter")
def test_a_compiler_that_crashes_is_one_clear_failure(
    built: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho compiling Conv >&2\nkill -SEGV $$\n")
    dying.chmod(dying.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(dying))
    model = onnx.load_model(built[0] / "model.plain.onnx")
    with pytest.raises(StageFailed) as caught:
        compile_context(model, tmp_path / "out.onnx", SM8650, "sm8650", cpu_fallback=False)
    message = str(caught.value)
    assert "Qualcomm's compiler ended with signal 11 on a graph of Add, Conv, Gemm, ReduceMean" in message
    assert "compress.modules" in message and "compiling Conv" in message


# --- the runner -------------------------------------------------------------------------------------------------------


def test_the_runner_refuses_files_without_a_binary(built: tuple[Path, Any], tmp_path: Path) -> None:
    folder, lowered = built
    with pytest.raises(ArtifactDamaged, match="holds no context binary for an NPU"):
        onnxruntime_qnn.open(folder / "model.plain.onnx", lowered.signature)
    with pytest.raises(ArtifactDamaged, match="the artifact's file is not there"):
        onnxruntime_qnn.open(tmp_path / "none.onnx", lowered.signature)
    (tmp_path / "cut.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-100])
    with pytest.raises(ArtifactDamaged, match="cut short"):
        onnxruntime_qnn.open(tmp_path / "cut.onnx", lowered.signature)


def test_a_binary_that_was_changed_is_an_error_not_another_answer(built: tuple[Path, Any], tmp_path: Path) -> None:
    folder, lowered = built
    model = onnx.load_model(folder / "model.onnx")
    cache = next(a for a in model.graph.node[0].attribute if a.name == "ep_cache_context")
    cache.s = bytes(len(cache.s))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    module, _ = image()
    with pytest.raises((ArtifactDamaged, StageFailed), match=r"cannot load the context binary|ended with"):
        sqnr(module, tmp_path, replace(lowered, entry="model.onnx"), image_inputs(1))


def test_calibration_is_asked_for_by_name(tmp_path: Path) -> None:
    module, traced = image()
    with pytest.raises(StageFailed, match=r"(?s)calibration samples.*samples.calibration"):
        lower(traced, module, tmp_path, "w8a8", [])


def test_weights_are_per_channel_norms_unsigned_and_tables_of_8_bits(tmp_path: Path) -> None:
    module, traced = text()
    lower(traced, module, tmp_path, "w8a16", padded_text(4))
    tables = [w for w in inspect(tmp_path / "model.plain.onnx").weights if w.shape == (96, 64)]
    assert [w.dtype for w in tables] == ["uint8"]
    model = onnx.load_model(tmp_path / "model.plain.onnx")
    stored = {i.name: i for i in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        weight = made_by.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or weight.input[0] not in stored:
            continue
        scales = int(np.prod(stored[weight.input[1]].dims, dtype=int))
        if node.op_type == "MatMul":
            assert scales == stored[weight.input[0]].dims[1]
        if node.op_type == "LayerNormalization":
            assert stored[weight.input[0]].data_type == onnx.TensorProto.UINT8
