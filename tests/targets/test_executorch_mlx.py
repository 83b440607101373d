"""ExecuTorch with MLX: lowered here, as small as its scheme says, and not measured where there is no Apple silicon."""

from __future__ import annotations

import copy
import hashlib
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from asking import defaults, lower_request
from edgebake.compress import cast, quantize_weights
from edgebake.errors import StageFailed, ToolchainMissing
from edgebake.target import ModuleRequest, NotMeasured, runners_of
from edgebake.trace import dynamic_shapes
from edgebake.types import Assignment, Lowered, MethodSignature, Signature, TensorSpec, Traced
from edgebake.validate import choose_runner
from edgebake_targets import _mlx, _mlx_weights
from edgebake_targets import executorch_mlx as target
from edgebake_targets.inspectors import pte
from edgebake_targets.runners import executorch_macos
from xnnpack_cases import TEXT, TEXT_KINDS, Wrapper, ids, text_network

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

CASES = {
    "fp32": {},
    "fp16": dict.fromkeys(TEXT_KINDS, "fp16"),
    "mixed": {"up": "w4g32", "down": "w4g32", "head": "w8", "table": "w8"},
}
Built = tuple[Lowered, Path]


def traced_text(schemes: dict[str, str]) -> Traced:
    module = copy.deepcopy(text_network())
    request = ModuleRequest(
        module=module,
        assignment=Assignment(schemes=schemes, kinds=TEXT_KINDS),
        options={},
        run_calibration=lambda _: None,
    )
    for method in (quantize_weights, cast):
        module = method.apply(request)
    shapes = (dynamic_shapes(TEXT.methods["forward"], TEXT.dims),)
    program = torch.export.export(module, (ids(9),), dynamic_shapes=shapes, strict=False)
    return Traced(programs={"forward": program}, signature=TEXT)


def lower(traced: Traced, schemes: dict[str, str], folder: Path) -> Built:
    assignment = Assignment(schemes=schemes, kinds=TEXT_KINDS)
    return target.lower(traced, lower_request(folder, defaults(target), assignment=assignment)), folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return {name: lower(traced_text(s), s, tmp_path_factory.mktemp(name)) for name, s in CASES.items()}


def elements(folder: Path) -> dict[str, int]:
    """Weight elements of the artifact by dtype."""
    counts: dict[str, int] = {}
    for record in pte.inspect(folder / "model.pte").weights:
        if len(record.shape) > 1:
            counts[record.dtype] = counts.get(record.dtype, 0) + int(np.prod(record.shape))
    return counts


LINEAR, TABLE = 64 * 96, 100 * 64


def test_weights_are_stored_in_the_bits_of_their_scheme(built: dict[str, Built]) -> None:
    assert elements(built["fp32"][1])["float32"] >= 2 * LINEAR + 640 + TABLE
    assert elements(built["fp16"][1])["float16"] >= 2 * LINEAR + 640 + TABLE
    assert elements(built["mixed"][1]) == {"int4": 2 * LINEAR, "int8": 640 + TABLE}
    packed = {w.name: w for w in pte.inspect(built["mixed"][1] / "model.pte").weights if w.dtype == "int4"}
    assert [w.bytes for w in packed.values()] == [LINEAR // 2] * 2
    assert all(w.scale_bytes >= LINEAR // 32 * 4 for w in packed.values())
    sizes = [(folder / "model.pte").stat().st_size for _, folder in built.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_everything_is_delegated_and_its_operators_are_shown(built: dict[str, Built]) -> None:
    for name, (lowered, folder) in built.items():
        assert lowered.delegation.share == 1.0, name
        assert pte.inspect(folder / "model.pte").delegates == {"MLXBackend": lowered.delegation.partitions}
    operators = pte.inspect(built["mixed"][1] / "model.pte").facts["delegate_operators"]
    assert operators["quantized_matmul"] == 3
    assert operators["softmax"] == 1
    assert "quantized_matmul" not in pte.inspect(built["fp32"][1] / "model.pte").facts["delegate_operators"]


def test_the_structure_passes_as_built_and_fails_for_another_promise(built: dict[str, Built]) -> None:
    lowered, folder = built["mixed"]
    entry = folder / lowered.entry
    found = target.structure(entry, lowered.signature, target.read_checks(folder))
    assert [(v.limit, v.state) for v in found] == [
        (f"structure.{what}", "pass") for what in ("loads", "inputs", "outputs")
    ]
    output = TensorSpec(name="scores", shape=(1, "seq", 10), dtype="float16")
    method = MethodSignature(inputs=TEXT.methods["forward"].inputs, outputs=(output,))
    other = target.structure(entry, Signature(methods={"forward": method}, dims=TEXT.dims), {})
    assert [v.reason for v in other if v.state == "fail"] == ["scores is float32 [1, 32, 10], not float16 [1, 32, 10]"]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_held_against_the_networks_value_by_value(built: dict[str, Built], case: str) -> None:
    """Each of them, its scales too; one value that differs is named with its module."""
    traced = traced_text(CASES[case])
    path = built[case][1] / "model.pte"
    tables = 4 if case != "mixed" else 8  # two linear layers, the head and a table; with scales each
    assert _mlx_weights.refuse_changed(path, traced) >= tables
    state = dict(traced.programs["forward"].state_dict)
    name = next(key for key in state if key.endswith("up.weight"))
    changed = state[name].detach().clone()
    inner = changed.qdata if case == "mixed" else changed
    inner.view(-1)[7] += 1
    traced.programs["forward"]._state_dict = {**state, name: changed}
    with pytest.raises(StageFailed, match=r"other values than the network's for up\n"):
        _mlx_weights.refuse_changed(path, traced)


def test_a_program_that_is_cut_short_does_not_load(built: dict[str, Built], tmp_path: Path) -> None:
    lowered, folder = built["fp32"]
    (tmp_path / "model.pte").write_bytes((folder / "model.pte").read_bytes()[:700])
    found = target.structure(tmp_path / "model.pte", lowered.signature, {})
    assert [v.state for v in found] == ["fail", "not measured", "not measured"]


def test_lowering_again_gives_the_same_bytes_and_takes_nothing_from_the_program(tmp_path: Path) -> None:
    traced = traced_text(CASES["mixed"])
    program = traced.programs["forward"]
    before = {*program.state_dict}, {*program.constants}
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lower(traced, CASES["mixed"], tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "model.pte").read_bytes()).hexdigest())
    assert len(digests) == 1
    assert ({*program.state_dict}, {*program.constants}) == before


def test_a_width_that_mlx_has_no_kernel_for_is_refused(tmp_path: Path) -> None:
    module = Wrapper(torch.nn.Sequential(torch.nn.Linear(40, 8))).eval()
    assignment = Assignment(schemes={"0": "w8"}, kinds={"0": "linear"})
    request = ModuleRequest(module=module, assignment=assignment, options={}, run_calibration=lambda _: None)
    program = torch.export.export(quantize_weights.apply(request), (torch.randn(1, 40),), strict=False)
    specs = MethodSignature(
        inputs=(TensorSpec(name="x", shape=(1, 40), dtype="float32"),),
        outputs=(TensorSpec(name="y", shape=(1, 8), dtype="float32"),),
    )
    traced = Traced(programs={"forward": program}, signature=Signature(methods={"forward": specs}))
    with pytest.raises(StageFailed, match=r"dequantize_affine|came out of lowering as floats: 0"):
        target.lower(traced, lower_request(tmp_path, defaults(target), assignment=assignment))


@pytest.mark.skipif((platform.system(), platform.machine()) == ("Darwin", "arm64"), reason="this is Apple silicon")
def test_outputs_are_not_measured_here_and_the_reason_is_told(built: dict[str, Built]) -> None:
    reason = choose_runner("executorch-mlx")
    assert reason == (
        "executorch-macos: MLX and ExecuTorch's Core ML backend execute on Macs with Apple silicon only "
        "(copy the component's folder to such a Mac and run `edgebake verify` there)"
    )
    assert [name for name, _ in runners_of("executorch-coreml")] == [
        "executorch-macos",
        "executorch-coreml-interpreter",
    ]
    lowered, folder = built["fp32"]
    with pytest.raises(NotMeasured, match="the installed executorch was built without MLXBackend"):
        executorch_macos.open(folder / lowered.entry, lowered.signature)


def test_the_installation_is_left_as_it_was(built: dict[str, Built]) -> None:
    folder = _mlx.installed()
    assert folder is not None
    if _mlx.is_whole(folder):
        pytest.skip("this wheel carries the generated files")
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == [
        "__init__.py",
        "generate.py",
        "mlx_graph_serialize.py",
        "schema.fbs",
    ]
    (made,) = sys.modules["executorch.backends.mlx.serialization"].__path__
    assert not (Path(made).parent / "runtime").exists()
    assert target.missing() is None


def test_a_schema_that_cannot_be_compiled_is_told(tmp_path: Path) -> None:
    folder = _mlx.installed()
    assert folder is not None
    flatc = _mlx.compiler(folder)
    assert flatc is not None
    broken, made = tmp_path / "broken", tmp_path / "made"
    shutil.copytree(folder, broken)
    (broken / "schema.fbs").write_text("table {")
    made.mkdir()
    with pytest.raises(ToolchainMissing, match="flatc cannot compile the MLX backend's schema"):
        _mlx.generate(broken, made, flatc)
