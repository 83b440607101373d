"""ExecuTorch on Ethos-U: compiled by Vela for one accelerator, judged by Arm's reference model on the same graphs."""

from __future__ import annotations

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
from edgebake.compress import pt2e
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.fitting import target_misfit
from edgebake.metrics import sqnr_db
from edgebake.target import Asked, GraphRequest
from edgebake.types import Assignment, Lowered, Traced
from edgebake_targets import _ethos_u, _tosa
from edgebake_targets import executorch_ethos_u as target
from edgebake_targets.inspectors import _vela_stream, pte
from edgebake_targets.inspectors._flatbuffers import Malformed
from edgebake_targets.runners import executorch_ethos_u_reference as runner
from xnnpack_cases import VISION, VISION_KINDS, images, vision_network

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
installed = pytest.mark.skipif(target.missing() is not None, reason="Arm's packages are not installed")
Built = tuple[Lowered, Path, torch.export.ExportedProgram]
ALL = dict.fromkeys(VISION_KINDS, "w8a8")


def built(schemes: Mapping[str, str], folder: Path, **options: Any) -> Built:
    """The test network, with a relu6 in it, quantised and lowered as the stages do."""
    given = {**defaults(target), **options}
    assignment = Assignment(schemes=schemes, kinds=VISION_KINDS)
    request = lower_request(folder, given, scheme="w8a8", assignment=assignment)
    program = torch.export.export(vision_network(), (images(1)[0],), strict=False)
    calls = [[(image,)] for image in images(8)]
    asked = GraphRequest(
        program=program, dynamic_shapes=None, quantizer=target.quantizer(request), calibration=calls, options={}
    )
    program = pt2e.apply(asked)
    return lowered_from(program, request), folder, program


def lowered_from(program: torch.export.ExportedProgram, request: Any) -> Lowered:
    return target.lower(Traced(programs={"forward": program}, signature=VISION), request)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(ALL, tmp_path_factory.mktemp("whole"), accelerator="ethos-u55-128")


def scores(made: Built, image: torch.Tensor) -> np.ndarray:
    return runner.open(made[1] / made[0].entry, VISION).call("forward", {"image": image.numpy()})["scores"]


@installed
@pytest.mark.slow
def test_the_graphs_compute_what_the_quantised_network_does_bit_by_bit(whole: Built) -> None:
    for seed in (3, 9):
        (image,) = images(1, seed=seed)
        got = scores(whole, image)
        with torch.no_grad():
            quantised, wanted = whole[2].module()(image)[0].numpy(), vision_network()(image)[0].numpy()
        assert np.array_equal(got, quantised)
        assert 30 < sqnr_db(wanted, got) < 60


@installed
@pytest.mark.slow
def test_all_is_in_one_part_compiled_for_the_accelerator_that_was_asked_for(whole: Built) -> None:
    lowered, folder, _ = whole
    assert lowered.delegation.share == 1.0
    assert {row.op for row in lowered.delegation.left_out} == {
        "quantized_decomposed.quantize_per_tensor",
        "quantized_decomposed.dequantize_per_tensor",
    }
    found = pte.inspect(folder / lowered.entry)
    assert found.delegates == {"EthosUBackend": 1}
    (part,) = found.facts["ethos_u"].values()
    assert part["accelerator"] == "ethos-u55-128"
    weights = 16 * 27 + 16 * 16 + 16 * 9 + 10 * 16
    assert part["weight_bytes"] > weights  # with biases and scales, and nothing in float
    assert part["weight_bytes"] < 4 * weights and part["command_bytes"] > 1000 and part["scratch_bytes"] > 0
    constants = _tosa.parse((folder / lowered.files[1]).read_bytes()).constants
    assert all(constants["int8", count] and not constants["float32", count] for count in (432, 256, 144, 160))
    verdicts = target.structure(folder / lowered.entry, VISION, {})
    assert [v.state for v in verdicts] == ["pass"] * 4 and verdicts[-1].limit == "structure.accelerator"


@installed
@pytest.mark.slow
def test_velas_estimate_is_told_as_one(whole: Built) -> None:
    vela = whole[0].encodings["vela"]
    assert (vela["system_config"], vela["memory_mode"]) == ("Ethos_U55_High_End_Embedded", "Shared_Sram")
    assert vela["cycles"] > 1000 and vela["clock_hz"] == 5e8
    assert set(vela["memory_bytes"]) == {"sram", "off_chip_flash"}
    (note,) = whole[0].notes
    assert note.startswith("Vela's estimate, not measured, of the compiled parts on ethos-u55-128 ")
    assert f"{vela['cycles']} cycles, {vela['cycles'] / 5e5:.3g} ms at 500 MHz" in note


@installed
@pytest.mark.slow
def test_compiling_again_gives_the_same_bytes_and_another_accelerator_others(whole: Built) -> None:
    lowered, folder, _ = whole
    graph = (folder / lowered.files[1]).read_bytes()
    flags = target._ethos_u.Chip.of({**defaults(target), "accelerator": "ethos-u55-128"}).compile_spec().compiler_flags
    first, second = _ethos_u.compiled(graph, flags), _ethos_u.compiled(graph, flags)
    assert first == second and first[0] in (folder / lowered.entry).read_bytes()
    smaller = [flag.replace("u55-128", "u55-32") for flag in flags]
    slower = _ethos_u.compiled(graph, smaller)
    assert slower[0] != first[0] and slower[1].cycles > first[1].cycles
    assert _vela_stream.read(memoryview(slower[0])).accelerator == "ethos-u55-32"


@installed
@pytest.mark.slow
def test_a_changed_graph_and_commands_for_another_accelerator_are_found(whole: Built, tmp_path: Path) -> None:
    lowered, folder, _ = whole
    for name in lowered.files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    program, graph = tmp_path / lowered.entry, tmp_path / lowered.files[1]
    tosa = graph.read_bytes()
    bias = next(n for n in range(len(tosa) - 40, 0, -1) if tosa[n : n + 4] not in (bytes(4), b"\xff" * 4))
    graph.write_bytes(tosa[: bias // 2] + b"\x7f" * 8 + tosa[bias // 2 + 8 :])
    with pytest.raises(ArtifactDamaged, match=r"is not what this TOSA graph|cannot be converted") as failed:
        runner.open(program, VISION)
    assert "build it again" in failed.value.problems[0].fix
    data = program.read_bytes()
    assert data.count(b"ethos-u55-128\0") == 1
    program.write_bytes(data.replace(b"ethos-u55-128\0", b"ethos-u55-256\0"))
    verdict = target.structure(program, VISION, {})[-1]
    assert verdict.state == "fail"
    assert verdict.reason == "part 0 of forward says ethos-u55-256, its commands are for ethos-u55-128"


@installed
@pytest.mark.slow
def test_a_module_that_stays_float_is_left_to_the_processor(tmp_path: Path) -> None:
    made = built({name: "w8a8" for name in ALL if name != "depthwise"}, tmp_path)
    left = {row.op: row.reason for row in made[0].delegation.left_out}
    assert made[0].delegation.share is not None and 0.8 < made[0].delegation.share < 0.95
    assert left["aten.convolution"].startswith("Arm's partitioner: ")
    assert made[0].delegation.partitions == 2 == len(made[0].files) - 1
    (image,) = images(1, seed=9)
    with torch.no_grad():
        assert 30 < sqnr_db(vision_network()(image)[0].numpy(), scores(made, image)) < 70


@installed
@pytest.mark.slow
def test_a_float_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    program = torch.export.export(vision_network(), (images(1)[0],), strict=False)
    with pytest.raises(StageFailed, match=r"ethos-u85-256 takes none of the network's operators: .*aten\.") as failed:
        lowered_from(program, lower_request(tmp_path, defaults(target)))
    assert "give the modules w8a8" in failed.value.problems[0].fix


@installed
@pytest.mark.slow
def test_a_whole_build_tells_the_estimate_and_lets_the_reference_model_decide_nothing(tmp_path: Path) -> None:
    targets = ("executorch-ethos-u", "executorch-xnnpack")
    made = kitchen(tmp_path, [{"target": name, "scheme": "w8a8"} for name in targets])
    roots = [str(Path(place).parent) for place in find_spec("ethosu").submodule_search_locations or ()]  # type: ignore[union-attr]
    done = finish(start(*made.arguments(), PYTHONPATH=os.pathsep.join([*SOURCES, *roots])))
    assert done.code == 0, done.err
    result, xnnpack = done.results
    assert result["measurements"]["runner"] == {"name": "executorch-ethos-u-reference", "kind": "stand-in"}
    found, other = (one["measurements"]["outputs"]["output"]["sqnr_db"] for one in (result, xnnpack))
    assert found == pytest.approx(other, abs=0.05)  # the same scales, and integer arithmetic of the same rules
    assert any(note.startswith("Vela's estimate, not measured") for note in result["measurements"]["notes"])
    told = [verdict["reason"] for verdict in result["verdicts"] if verdict["state"] == "not measured"]
    said = "executorch-ethos-u-reference stands in for a runtime that is not here: its numbers are information only"
    assert told == [said]


@installed
def test_velas_refusal_is_passed_on() -> None:
    flags = ["--accelerator-config=ethos-u55-128", "--config=Arm/vela.ini", "--output-format=raw"]
    with pytest.raises(StageFailed, match=r"Arm's Vela refused a part of the network \(exit code [1-9]") as failed:
        _ethos_u.compiled(b"no graph", flags)
    assert "give its modules fp32" in failed.value.problems[0].fix


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ethos_u, "find_spec", lambda name: None if name == "ethosu" else find_spec("json"))
    found = _ethos_u.missing()
    assert found is not None and found.reason == "Arm's ethos-u-vela is not installed"
    assert found.remedy.startswith("pip install --no-deps tosa-tools==2026.8.0 ethos-u-vela==5.2.0 ")
    monkeypatch.setattr(_ethos_u, "find_spec", lambda _: None)
    found = _ethos_u.missing()
    assert found is not None and found.reason == "Arm's tosa-tools and ethos-u-vela are not installed"


def asked(**options: Any) -> Asked:
    return Asked(
        scheme="w8a8",
        module_schemes=(),
        options={**defaults(target), **options},
        device=None,
        inputs={},
        varying=(),
        channels=None,
    )


def test_dimensions_that_vary_are_refused_with_the_rule_that_fixes_them() -> None:
    (refusal,) = target.refusals(replace(asked(), varying=("seq",)))
    assert refusal.what == "Ethos-U takes fixed shapes only, and 'seq' varies"
    assert (refusal.fix, refusal.key) == ("give it one size in this rule: dims: {seq: {min: 64, max: 64}}", "dims")


def test_memories_that_the_accelerator_cannot_have_are_refused() -> None:
    (refusal,) = target.refusals(asked(accelerator="ethos-u55-64", system_config="Ethos_U65_High_End"))
    assert refusal.what == "Ethos_U65_High_End is no system of ethos-u55-64"
    assert refusal.fix == "one of Ethos_U55_Deep_Embedded, Ethos_U55_High_End_Embedded"
    (refusal,) = target.refusals(asked(system_config="Ethos_U85_SYS_Flash_Low", memory_mode="Dedicated_Sram"))
    assert refusal.what == "Dedicated_Sram keeps activations outside of SRAM, where Ethos_U85_SYS_Flash_Low has flash"
    assert (refusal.fix, refusal.key) == ("memory_mode: Shared_Sram or Sram_Only", "options.memory_mode")
    assert not list(target.refusals(asked(accelerator="ethos-u65-512")))


@installed
def test_systems_and_modes_are_those_of_velas_own_file() -> None:
    (place,) = find_spec("ethosu").submodule_search_locations or ()  # type: ignore[union-attr]
    lines = Path(place, "config_files", "Arm", "vela.ini").read_text("utf-8").splitlines()
    for kind, names in (("System_Config", _ethos_u.SYSTEMS), ("Memory_Mode", _ethos_u.MODES)):
        assert [line.strip("[]").split(".")[1] for line in lines if line.startswith(f"[{kind}.")] == list(names)


def test_phones_do_not_fit_and_are_told_why() -> None:
    found = target_misfit("executorch-ethos-u", target, devices.find("mt6991"))
    assert "npu" in found and "ethos-u" in found


def block(name: str, data: bytes = b"") -> bytes:
    return (
        name.encode().ljust(16, b"\0")
        + struct.pack("<iiii", len(data), 0, 0, 0)
        + data.ljust(-(-len(data) // 16) * 16, b"\0")
    )


def stream(commands: bytes) -> memoryview:
    parts = [block("vela_bin_stream"), block("cmd_data", commands), block("weight_data", b"w" * 5)]
    return memoryview(b"".join([*parts, block("scratch_size", struct.pack("<I", 640)), block("vela_end_stream")]))


def test_streams_are_read_and_damaged_ones_refused() -> None:
    word = struct.pack("<I", 2 << 28 | 8)
    commands = b"COP1" + bytes(4) + word
    found = _vela_stream.read(stream(commands))
    assert found == _vela_stream.Stream(
        accelerator="ethos-u85-256", command_bytes=12, weight_bytes=5, scratch_bytes=640
    )
    for data, said in (
        (stream(commands)[:-40], "with the blocks"),
        (stream(commands)[:100], "reaches beyond"),
        (stream(b"COPX" + commands[4:]), "open with b'COPX'"),
        (stream(commands[:8] + struct.pack("<I", 9 << 28)), "product 9 is no Ethos-U"),
        (memoryview(b""), "with the blocks none"),
    ):
        with pytest.raises(Malformed, match=said):
            _vela_stream.read(data)
