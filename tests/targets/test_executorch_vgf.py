"""ExecuTorch with VGF: lowered whole, and judged by Arm's reference model on graphs that are proven to be its parts."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asking import defaults, lower_request
from baking import SOURCES, finish, kitchen, start
from edgebake import devices
from edgebake.compress import cast, pt2e
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.metrics import sqnr_db
from edgebake.target import Asked, GraphRequest, ModuleRequest, NotMeasured
from edgebake.types import Assignment, Lowered, MethodSignature, Signature, TensorSpec, Traced
from edgebake_targets import _arm, _pte_plan, _tosa, _tosa_session, _vgf
from edgebake_targets import executorch_vgf as target
from edgebake_targets.inspectors import _pte_file, pte
from edgebake_targets.inspectors._flatbuffers import Malformed
from edgebake_targets.runners import executorch_vgf_reference as runner
from xnnpack_cases import VISION, VISION_KINDS, Wrapper, images, vision_network

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
installed = pytest.mark.skipif(target.missing() is not None, reason="Arm's packages are not installed")
Built = tuple[Lowered, Path]
MIXED = {**dict.fromkeys(VISION_KINDS, "w8a8"), "head": "fp32"}


def calibrated(schemes: Mapping[str, str], folder: Path) -> tuple[torch.export.ExportedProgram, Any]:
    """The test network as the stages hand it on, and the request that lowers it."""
    named = {name: scheme for name, scheme in schemes.items() if scheme != "fp32"}
    request = lower_request(folder, defaults(target), assignment=Assignment(schemes=named, kinds=VISION_KINDS))
    program = torch.export.export(vision_network(), (images(1)[0],), strict=False)
    if named:
        calls = [[(image,)] for image in images(8)]
        asked = GraphRequest(
            program=program, dynamic_shapes=None, quantizer=target.quantizer(request), calibration=calls, options={}
        )
        program = pt2e.apply(asked)
    return program, request


def built(schemes: Mapping[str, str], folder: Path) -> Built:
    return lowered_from(*calibrated(schemes, folder), folder)


def lowered_from(program: torch.export.ExportedProgram, request: Any, folder: Path) -> Built:
    request = replace(request, folder=folder)
    return target.lower(Traced(programs={"forward": program}, signature=VISION), request), folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built({}, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def int8_program(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.export.ExportedProgram, Any]:
    return calibrated(dict.fromkeys(VISION_KINDS, "w8a8"), tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="module")
def int8(int8_program: tuple[torch.export.ExportedProgram, Any], tmp_path_factory: pytest.TempPathFactory) -> Built:
    return lowered_from(*int8_program, tmp_path_factory.mktemp("int8"))


def scores(made: Built, image: torch.Tensor) -> np.ndarray:
    return runner.open(made[1] / made[0].entry, VISION).call("forward", {"image": image.numpy()})["scores"]


def wanted(image: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return vision_network()(image)[0].numpy()


@installed
@pytest.mark.slow
def test_the_reference_model_computes_what_the_network_does(whole: Built, int8: Built) -> None:
    for seed in (3, 9):
        (image,) = images(1, seed=seed)
        assert sqnr_db(wanted(image), scores(whole, image)) > 110
        assert 25 < sqnr_db(wanted(image), scores(int8, image)) < 60


@installed
@pytest.mark.slow
def test_all_is_in_one_part_and_integers_are_stored_as_such(whole: Built, int8: Built) -> None:
    for lowered, folder in (whole, int8):
        assert lowered.delegation.share == 1.0
        assert pte.inspect(folder / lowered.entry).delegates == {"VgfBackend": 1}
        assert len(lowered.files) == 2 and (folder / lowered.files[1]).is_file()
        assert [v.state for v in target.structure(folder / lowered.entry, VISION, {})] == ["pass"] * 3
    constants = [_tosa.parse((made[1] / made[0].files[1]).read_bytes()).constants for made in (whole, int8)]
    for count in (16 * 27, 16 * 16, 16 * 9, 10 * 16):
        assert constants[0]["float32", count] and not constants[0]["int8", count]
        assert constants[1]["int8", count] and not constants[1]["float32", count]


@installed
@pytest.mark.slow
def test_modules_that_stay_float_do(tmp_path: Path) -> None:
    made = built(MIXED, tmp_path)
    constants = [_tosa.parse((tmp_path / name).read_bytes()).constants for name in made[0].files[1:]]
    assert sum(c["float32", 160] for c in constants) == 1 and not any(c["int8", 160] for c in constants)
    assert sum(c["int8", 16 * 27] for c in constants) == 1
    (image,) = images(1, seed=9)
    assert 25 < sqnr_db(wanted(image), scores(made, image)) < 60


@installed
@pytest.mark.slow
def test_lowering_again_gives_the_same_bytes(
    int8: Built, int8_program: tuple[torch.export.ExportedProgram, Any], tmp_path: Path
) -> None:
    again = lowered_from(*int8_program, tmp_path)
    digests = [
        [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in lowered.files]
        for lowered, folder in (int8, again)
    ]
    assert digests[0] == digests[1]


def copied(made: Built, folder: Path) -> Path:
    for name in made[0].files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((made[1] / name).read_bytes())
    return folder / made[0].files[1]


@installed
@pytest.mark.slow
def test_a_changed_graph_or_part_is_found(whole: Built, tmp_path: Path) -> None:
    graph = copied(whole, tmp_path)
    program = tmp_path / whole[0].entry
    tosa, whole_program = graph.read_bytes(), program.read_bytes()
    weight = vision_network().wrapped.head.bias.detach().numpy().tobytes()
    assert tosa.count(weight) == 1
    graph.write_bytes(tosa.replace(weight, bytes(len(weight))))
    with pytest.raises(ArtifactDamaged, match="is not what this TOSA graph converts to") as failed:
        runner.open(program, VISION)
    assert "build it again" in failed.value.problems[0].fix
    graph.write_bytes(tosa[: len(tosa) // 2])
    with pytest.raises(ArtifactDamaged, match="this TOSA graph cannot be converted"):
        runner.open(program, VISION)
    graph.write_bytes(tosa)
    opened = _pte_file.opened(memoryview(whole_program))
    (delegate,) = opened.table.tables(1)[0].tables(7)
    part = bytes(_pte_file.blob_of(opened, delegate))
    program.write_bytes(whole_program.replace(part, part[:-8] + bytes(8)))
    assert program.read_bytes() != whole_program
    with pytest.raises(ArtifactDamaged, match="no TOSA graph lies beside the program for its part"):
        runner.open(program, VISION)


@installed
@pytest.mark.slow
def test_half_precision_is_stored_and_computed_as_such(tmp_path: Path) -> None:
    assignment = Assignment(schemes=dict.fromkeys(VISION_KINDS, "fp16"), kinds=VISION_KINDS)
    asked = ModuleRequest(module=vision_network(), assignment=assignment, options={}, run_calibration=lambda _: None)
    program = torch.export.export(cast.apply(asked), (images(1)[0],), strict=False)
    made = lowered_from(program, lower_request(tmp_path, defaults(target), assignment=assignment), tmp_path)
    assert made[0].delegation.share == 1.0
    constants = _tosa.parse((tmp_path / made[0].files[1]).read_bytes()).constants
    assert all(constants["float16", count] and not constants["float32", count] for count in (432, 256, 144, 160))
    (image,) = images(1, seed=9)
    assert 55 < sqnr_db(wanted(image), scores(made, image)) < 80


class Sorts(torch.nn.Module):
    """An operator that TOSA has not, between two that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.second(torch.sort(torch.relu(self.first(x))).values)
        return values


def row(shape: tuple[int, ...], out: tuple[int, ...]) -> Signature:
    inputs = (TensorSpec(name="x", shape=shape, dtype="float32"),)
    outputs = (TensorSpec(name="y", shape=out, dtype="float32"),)
    return Signature(methods={"forward": MethodSignature(inputs=inputs, outputs=outputs)})


@installed
@pytest.mark.slow
def test_what_tosa_lacks_stays_outside_and_is_computed_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x, signature = Wrapper(Sorts()).eval(), torch.randn(2, 8), row((2, 8), (2, 4))
    program = torch.export.export(network, (x,), strict=False)
    lowered = target.lower(
        Traced(programs={"forward": program}, signature=signature), lower_request(tmp_path, defaults(target))
    )
    assert lowered.delegation.partitions == 2 and len(lowered.files) == 3
    assert [(left.op, left.reason) for left in lowered.delegation.left_out] == [
        ("aten.sort", "Arm's TOSA backend does not take this operator")
    ]
    got = runner.open(tmp_path / lowered.entry, signature).call("forward", {"x": x.numpy()})["y"]
    assert sqnr_db(network(x)[0].detach().numpy(), got) > 110


class Alone(torch.nn.Module):
    """Nothing for TOSA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x).values


@installed
@pytest.mark.slow
def test_a_network_without_an_operator_for_it_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(Wrapper(Alone()).eval(), (torch.randn(2, 8),), strict=False)
    traced = Traced(programs={"forward": program}, signature=row((2, 8), (2, 8)))
    with pytest.raises(StageFailed, match=r"takes none of the network's operators: aten\.sort") as failed:
        target.lower(traced, lower_request(tmp_path, defaults(target)))
    assert "executorch-vulkan" in failed.value.problems[0].fix


@installed
@pytest.mark.slow
def test_integer_weights_that_stayed_float_are_refused(tmp_path: Path) -> None:
    program, request = calibrated({}, tmp_path)
    promised = Assignment(schemes={"head": "w8a8"}, kinds=VISION_KINDS)
    traced = Traced(programs={"forward": program}, signature=VISION)
    with pytest.raises(StageFailed, match="integer weights came out of lowering as floats: head") as failed:
        target.lower(traced, replace(request, assignment=promised))
    assert "give these modules fp32" in failed.value.problems[0].fix


@installed
@pytest.mark.slow
def test_a_whole_build_shows_what_the_reference_model_says_and_lets_it_decide_nothing(tmp_path: Path) -> None:
    made = kitchen(tmp_path, [{"target": name, "scheme": "w8a8"} for name in ("executorch-vgf", "executorch-xnnpack")])
    program = _vgf.converter()
    assert program is not None
    done = finish(start(*made.arguments(), PYTHONPATH=os.pathsep.join([*SOURCES, str(program.parents[3])])))
    assert done.code == 0, done.err
    result, xnnpack = done.results
    assert result["measurements"]["runner"] == {"name": "executorch-vgf-reference", "kind": "stand-in"}
    found, other = (one["measurements"]["outputs"]["output"]["sqnr_db"] for one in (result, xnnpack))
    assert found == pytest.approx(other, abs=0.05)  # the same scales, and integer arithmetic of the same rules
    told = [verdict["reason"] for verdict in result["verdicts"] if verdict["state"] == "not measured"]
    said = "executorch-vgf-reference stands in for a runtime that is not here: its numbers are information only"
    assert told == [said]


@installed
def test_the_converters_refusal_is_passed_on() -> None:
    with pytest.raises(StageFailed, match="Arm's model converter refused a part of the network") as failed:
        _vgf.convert(b"no graph")
    assert "executorch-vulkan" in failed.value.problems[0].fix


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: set[str] = {"tosa_reference_model"}
    monkeypatch.setattr(_vgf, "find_spec", lambda name: None if name in absent else find_spec("json"))
    monkeypatch.setattr(_vgf, "converter", lambda: Path("model-converter"))
    found = _vgf.missing()
    assert found is not None
    assert found.reason == "Arm's tosa-tools is not installed"
    assert found.remedy.startswith("pip install --no-deps tosa-tools==2026.8.0 ai-ml-sdk-model-converter==0.11.0 ")
    monkeypatch.undo()
    monkeypatch.setattr(_vgf, "find_spec", lambda _: None)
    found = _vgf.missing()
    assert found is not None
    assert found.reason == "Arm's tosa-tools and ai-ml-sdk-model-converter are not installed"
    with pytest.raises(StageFailed, match="ai-ml-sdk-model-converter is not installed") as failed:
        _vgf.convert(b"")
    assert failed.value.problems[0].fix == _vgf.REMEDY


def test_dimensions_that_vary_are_refused_with_the_rule_that_fixes_them() -> None:
    asked = Asked(
        scheme="fp32",
        module_schemes=(),
        options={},
        device=devices.find("mt6991").row,
        inputs={},
        varying=("seq",),
        channels=None,
    )
    (refusal,) = target.refusals(asked)
    assert refusal.what == "VGF takes fixed shapes only, and 'seq' varies"
    assert (refusal.fix, refusal.key) == ("give it one size in this rule: dims: {seq: {min: 64, max: 64}}", "dims")


def test_what_is_no_tosa_graph_is_refused() -> None:
    for data in (b"", b"\x08\0\0\0TOSX" + bytes(32)):
        with pytest.raises(Malformed, match="a TOSA graph is marked b'TOSA'"):
            _tosa.parse(data)
    empty = struct.pack("<I4sHHi", 12, b"TOSA", 4, 4, 4)  # a root table without fields
    with pytest.raises(Malformed, match="without a block of operators"):
        _tosa.parse(empty)


def test_a_part_without_its_graph_is_not_judged(tmp_path: Path) -> None:
    with pytest.raises(ArtifactDamaged, match="no TOSA graph lies beside the program") as failed:
        _arm.graph_of(b"part", tmp_path, _vgf.convert)
    assert "build it again" in failed.value.problems[0].fix


def test_parts_for_other_backends_are_named(tmp_path: Path) -> None:
    other = _pte_plan.Delegate(backend="XnnpackBackend", blob=memoryview(b""))
    plan = _pte_plan.Plan(
        method="forward", values=(), inputs=(), outputs=(), instructions=(), kernels=(), delegates=(other,), named={}
    )
    with pytest.raises(NotMeasured, match="nothing here computes the parts for XnnpackBackend"):
        _tosa_session.graphs(plan, tmp_path / "model.pte", _vgf.BACKEND, _vgf.graph_of)


def test_a_network_that_writes_to_its_buffers_is_refused_with_the_way_out(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.BatchNorm1d(4).train(), (torch.randn(2, 4),), strict=False)
    specs = replace(row((2, 4), (2, 4)).methods["forward"], buffers=("running_mean",))
    traced = Traced(programs={"forward": program}, signature=Signature(methods={"forward": specs}))
    with pytest.raises(StageFailed, match="VGF keeps nothing between calls") as failed:
        target.lower(traced, lower_request(tmp_path, defaults(target)))
    assert "role: state" in failed.value.problems[0].fix


@installed
@pytest.mark.slow
def test_inputs_that_a_graph_does_not_take_are_told(whole: Built) -> None:
    graph = (whole[1] / whole[0].files[1]).read_bytes()
    with pytest.raises(ArtifactDamaged, match="does not run a TOSA graph of this program") as failed:
        _tosa.run(graph, [np.zeros((1, 3, 32, 32), np.float32)] * 2)
    assert "build the artifact again" in failed.value.problems[0].fix
