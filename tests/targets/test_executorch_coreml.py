"""ExecuTorch with Core ML: what is lowered runs, computes what the network does, and is as small as its scheme says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import Wrapper, everywhere, network, spec, traced_network, traced_of
from edgebake.errors import ArtifactDamaged, RecipeError, StageFailed
from edgebake.locate import float_values
from edgebake.metrics import sqnr_db
from edgebake.target import NotMeasured, runners_of
from edgebake.types import Lowered, MethodSignature, Signature, Traced, Verdict
from edgebake_targets import _coreml_flattened, executorch_coreml
from edgebake_targets._executorch_coreml_checks import parts_of
from edgebake_targets.inspectors import pte
from edgebake_targets.runners import executorch_coreml_interpreter as runner
from executorch_coreml_cases import lower, opened, pieces

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

IDS = np.arange(12, dtype=np.int64)[None] % 50
LEAST = {"fp32": 120, "fp16": 55, "w8": 35, "palette4": 12}
Built = tuple[Path, Lowered]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    traced = traced_network()
    made = {}
    for scheme in LEAST:
        folder = tmp_path_factory.mktemp(scheme)
        made[scheme] = folder, lower(traced, folder, scheme, {} if scheme == "fp32" else everywhere(scheme))
    return made


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("pieces")
    return folder, lower(pieces()[1], folder, "w8", {"first": "w8", "last": "w8"})


@pytest.mark.parametrize("scheme", LEAST)
def test_outputs_are_those_of_the_float_network(built: dict[str, Built], scheme: str) -> None:
    """At a length that it was not traced with; integers go in as int64 and the package takes int32."""
    found = opened(*built[scheme]).call("forward", {"ids": IDS})
    expected = dict(zip(("hidden", "logits"), network()(torch.from_numpy(IDS)), strict=True))
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (np.float32, tuple(value.shape))
        assert sqnr_db(value.detach().numpy(), found[name]) > LEAST[scheme]


def test_weights_take_the_bytes_of_their_scheme(built: dict[str, Built]) -> None:
    elements = 50 * 16 + 32 * 16 * 3 + 24 * 32 * 3 + 24 * 16 + 16 * 20
    for scheme, bits in (("fp32", 32), ("fp16", 16), ("w8", 8), ("palette4", 4)):
        folder, lowered = built[scheme]
        inside = [w for w in pte.inspect(folder / lowered.entry).weights if len(w.shape) > 1]
        assert sum(w.bytes for w in inside) == elements * bits // 8
    sizes = [(folder / "model.pte").stat().st_size for folder, _ in built.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_the_inspector_shows_what_is_inside_the_delegate(built: dict[str, Built]) -> None:
    found = pte.inspect(built["w8"][0] / "model.pte")
    assert found.delegates == {"CoreMLBackend": 1}
    assert found.facts["delegate_operators"]["conv_transpose"] == 1
    facts = found.facts["coreml"]["forward.delegate0"]
    assert (facts["compute_precision"], facts["minimum_os"]) == ("fp16", "iOS17")
    formats = {record.name: record.dtype for record in found.weights}
    assert formats["forward.delegate0.first_weight_w8"] == "int8"
    assert not [name for name in formats if name.startswith("coreml_")]


def test_all_work_is_delegated_where_core_ml_takes_everything(built: dict[str, Built]) -> None:
    delegation = built["fp16"][1].delegation
    assert (delegation.share, delegation.partitions, delegation.left_out) == (1.0, 1, ())


def test_operators_outside_are_named_and_run_as_well(in_pieces: Built) -> None:
    folder, lowered = in_pieces
    left = {item.op: (item.count, item.reason) for item in lowered.delegation.left_out}
    assert left == {
        "aten.asinh": (2, "Core ML's converter does not take it"),
        "aten.argmax": (1, "Core ML's converter does not take it"),
    }
    assert lowered.delegation.partitions == 3
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3))
    y, best = pieces()[0](x)
    found = opened(folder, lowered).call("forward", {"x": x.numpy()})
    assert sqnr_db(y.detach().numpy(), found["y"]) > 35
    assert (found["best"].shape, int(found["best"])) == ((), int(best))


def test_a_part_that_is_changed_changes_the_outputs(in_pieces: Built, tmp_path: Path) -> None:
    """The runner runs the file: other weights in it give other outputs, and the structure's check names them."""
    folder, lowered = in_pieces
    shutil.copytree(folder, tmp_path / "copy")
    entry = tmp_path / "copy" / lowered.entry
    data = bytearray(entry.read_bytes())
    weight = next(w for w in pte.inspect(entry).weights if w.name.endswith("first_weight_w8"))
    stored = next(
        bytes(data[at : at + weight.bytes])
        for at in range(len(data))
        if _digest(data[at : at + weight.bytes]) == weight.digest
    )
    at = data.find(stored)
    data[at : at + len(stored)] = bytes(255 - byte for byte in stored)
    entry.write_bytes(data)
    x = np.ones((1, 3, 8), np.float32)
    before = opened(folder, lowered).call("forward", {"x": x})["y"]
    after = runner.open(entry, lowered.signature).call("forward", {"x": x})["y"]
    assert sqnr_db(before, after) < 10
    wrong = {v.reason for v in verdicts(tmp_path / "copy", lowered) if v.state == "fail"}
    assert wrong == {"first (w8) decodes to other values than those it was built from"}


def _digest(data: bytes | bytearray) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()


def verdicts(folder: Path, lowered: Lowered) -> tuple[Verdict, ...]:
    checks = executorch_coreml.read_checks(folder)
    return executorch_coreml.structure(folder / lowered.entry, lowered.signature, checks)


def test_the_structure_passes_as_built_and_fails_for_another_promise(built: dict[str, Built]) -> None:
    folder, lowered = built["w8"]
    assert [(v.limit, v.state) for v in verdicts(folder, lowered)] == [
        (f"structure.{what}", "pass") for what in ("loads", "inputs", "outputs", "weights")
    ]
    method = lowered.signature.methods["forward"]
    other = MethodSignature(inputs=(spec("ids", 1, 7, dtype="int32"),), outputs=method.outputs[:1])
    checks = executorch_coreml.read_checks(folder)
    found = executorch_coreml.structure(folder / lowered.entry, Signature(methods={"forward": other}), checks)
    assert {v.limit: v.reason for v in found if v.state == "fail"} == {
        "structure.inputs": "ids is int64 [1, 64], not int32 [1, 7]",
        "structure.outputs": "there are 2, promised were 1",
    }


def test_a_program_without_its_part_fails_the_structure(built: dict[str, Built]) -> None:
    folder, lowered = built["w8"]
    checks = executorch_coreml.read_checks(built["fp16"][0])
    found = executorch_coreml.structure(folder / lowered.entry, lowered.signature, checks)
    assert any("the program lacks the Core ML part executorch_" in v.reason for v in found if v.state == "fail")


def test_values_inside_come_by_module_name(built: dict[str, Built]) -> None:
    floats = float_values(network(), [torch.from_numpy(IDS)])
    found = opened(*built["fp16"]).intermediates("forward", {"ids": IDS}, [*floats, "nobody"])
    assert set(found) == {"embed", "norm", "up_norm", "first", "last"}
    assert all(sqnr_db(floats[module], value) > 55 for module, value in found.items())


def test_modes_part_and_overflow_is_told_with_its_module(built: dict[str, Built], tmp_path: Path) -> None:
    session = opened(*built["fp16"])
    assert session.modes == ("fp32", "declared", "fp16-worst")
    assert opened(*built["fp32"]).modes == ()
    expected = network()(torch.from_numpy(IDS))[1].detach().numpy()
    decibels = [sqnr_db(expected, session.call_mode(m, "forward", {"ids": IDS})[0]["logits"]) for m in session.modes]
    assert decibels == sorted(decibels, reverse=True)
    assert decibels[0] > decibels[1] + 1

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow = nn.Linear(4, 4, bias=False)
            nn.init.constant_(self.grow.weight, 300.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.grow(self.grow(x)) * 1e-5

    lowered = lower(traced_of(Large(), [spec("x", 1, 4)], [spec("y", 1, 4)]), tmp_path, "fp16", {"grow": "fp16"})
    large = opened(tmp_path, lowered)
    x = {"x": np.ones((1, 4), np.float32)}
    assert large.call_mode("fp32", "forward", x)[1] == {}
    assert "linear of grow" in large.call_mode("declared", "forward", x)[1].values()


@pytest.mark.slow
def test_the_same_network_gives_the_same_bytes_in_another_process(built: dict[str, Built], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from coreml_cases import everywhere, traced_network; "
        "from executorch_coreml_cases import lower; "
        "lower(traced_network(), Path(sys.argv[1]), 'w8', everywhere('w8'))"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / folder) for folder in ("export", "targets", "tests/helpers"))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    folder = tmp_path / "elsewhere entirely"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment, capture_output=True)
    for name in built["w8"][1].files:
        assert (folder / name).read_bytes() == (built["w8"][0] / name).read_bytes()


def test_the_program_that_was_lowered_is_left_whole_for_the_next_target(tmp_path: Path) -> None:
    """ExecuTorch takes out of it what a delegate has taken."""

    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.arange(8), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.places

    traced = traced_of(Constants(), [spec("x", 1, 8)], [spec("y", 1, 8)])
    before = {*traced.programs["forward"].constants}
    assert before
    lower(traced, tmp_path, "fp32")
    assert {*traced.programs["forward"].constants} == before


def test_nothing_random_and_no_date_is_inside(built: dict[str, Built]) -> None:
    data = (built["w8"][0] / "model.pte").read_bytes()
    assert b"conversion_date" not in data
    assert data[::-1].count(b"debug_info.json") == 0
    (part,) = parts_of(built["w8"][0] / "model.pte")
    other = parts_of(built["fp16"][0] / "model.pte")[0]
    assert part.identifier.startswith("executorch_")
    assert part.identifier != other.identifier


def test_executorchs_own_code_unpacks_what_was_written(built: dict[str, Built], tmp_path: Path) -> None:
    from executorch.backends.apple.coreml import executorchcoreml

    from edgebake_targets.inspectors import _pte_file as file

    program = file.opened(file.mapped(built["w8"][0] / "model.pte"))
    blob = file.blob_of(program, program.table.tables(1)[0].tables(7)[0])
    assert executorchcoreml.unflatten_directory_contents(bytes(blob), str(tmp_path))
    root = tmp_path / _coreml_flattened.ROOT
    unpacked = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    assert unpacked == {name: bytes(data) for name, data in _coreml_flattened.read(blob, "here").items()}
    assert json.loads(unpacked["metadata.json"])["inputNames"] == ["x"]
    taken = executorchcoreml.flatten_directory_contents(str(root))
    assert _coreml_flattened.write(unpacked) == bytes(blob)
    assert _coreml_flattened.read(memoryview(taken), "there").keys() == unpacked.keys()


def test_two_methods_lie_in_one_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 4).eval()
    sizes = {"prefill": 6, "decode": 1}
    programs = {
        name: torch.export.export(Wrapper(linear).eval(), (torch.randn(rows, 8),), strict=False)
        for name, rows in sizes.items()
    }
    methods = {
        name: MethodSignature(inputs=(spec("x", rows, 8),), outputs=(spec("y", rows, 4),))
        for name, rows in sizes.items()
    }
    lowered = lower(Traced(programs=programs, signature=Signature(methods=methods)), tmp_path, "fp16", {"": "fp16"})
    session = opened(tmp_path, lowered)
    for name, rows in sizes.items():
        x = torch.randn(rows, 8)
        assert sqnr_db(linear(x).detach().numpy(), session.call(name, {"x": x.numpy()})["y"]) > 50
    assert {v.state for v in verdicts(tmp_path, lowered)} == {"pass"}


def test_a_grouped_transposed_convolution_keeps_its_normalisation_apart(tmp_path: Path) -> None:
    """coremltools folds it into the wrong channels, and in silence."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 8, 2, groups=2), nn.BatchNorm2d(8))
    nn.init.uniform_(net[1].weight, 0.2, 3)
    net.eval()
    lowered = lower(traced_of(net, [spec("x", 1, 4, 5, 5)], [spec("y", 1, 8, 6, 6)]), tmp_path, "fp32")
    x = torch.randn(1, 4, 5, 5)
    found = opened(tmp_path, lowered).call("forward", {"x": x.numpy()})["y"]
    assert sqnr_db(net(x).detach().numpy(), found) > 100


def test_attention_is_the_fused_operator_of_ios_18(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, scale=0.25)

    x = torch.randn(1, 2, 6, 16)
    traced = traced_of(Attention(), [spec("x", 1, 2, 6, 16)], [spec("y", 1, 2, 6, 16)])
    lowered = lower(traced, tmp_path, "fp32", minimum_os="macOS15")
    inside = pte.inspect(tmp_path / lowered.entry).facts
    assert inside["delegate_operators"]["scaled_dot_product_attention"] == 1
    assert inside["coreml"]["forward.delegate0"]["minimum_os"] == "iOS18"
    assert sqnr_db(Attention()(x).numpy(), opened(tmp_path, lowered).call("forward", {"x": x.numpy()})["y"]) > 100


def test_a_compressed_module_outside_the_parts_is_refused(tmp_path: Path) -> None:
    traced = pieces()[1]
    with pytest.raises(StageFailed, match=r"w4g16 needs input channels divisible by 16, but first has 8"):
        lower(traced, tmp_path / "a", "w4g16", {"first": "w4g16"}, minimum_os="iOS18")

    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.dead = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + 0 * self.dead(torch.zeros_like(x))

    torch.manual_seed(0)
    lost = traced_of(Lost().eval(), [spec("x", 1, 4)], [spec("y", 1, 4)])
    with pytest.raises(StageFailed, match=r"no Core ML part of the program holds the weight of dead"):
        lower(lost, tmp_path / "b", "w8", {"used": "w8", "dead": "w8"})


def test_what_the_system_or_the_parts_cannot_hold_is_refused(tmp_path: Path) -> None:
    traced = pieces()[1]
    with pytest.raises(RecipeError, match="executorch-coreml takes w4 with minimum_os iOS18 or macOS15, not iOS17"):
        lower(traced, tmp_path, "w4", {"first": "w4"})
    with pytest.raises(RecipeError, match="first is to be float16 in a program that computes in float32"):
        lower(traced, tmp_path, "fp32", {"first": "fp16"})
    with pytest.raises(RecipeError, match="the Neural Engine computes in float16 only"):
        lower(traced, tmp_path, "fp32", compute_units="cpu_and_ne")


def test_programs_of_other_backends_and_damaged_ones_are_told_apart(built: dict[str, Built], tmp_path: Path) -> None:
    from xnnpack_cases import VISION, VISION_KINDS, build, images, vision_network

    build(vision_network(), VISION, {}, VISION_KINDS, images(1), tmp_path)
    with pytest.raises(NotMeasured, match="nothing here computes the parts for XnnpackBackend"):
        runner.open(tmp_path / "model.pte", VISION)
    folder, lowered = built["fp16"]
    broken = tmp_path / "broken.pte"
    broken.write_bytes((folder / "model.pte").read_bytes()[:9000])
    with pytest.raises(ArtifactDamaged, match="no whole ExecuTorch program"):
        runner.open(broken, lowered.signature)
    with pytest.raises(ArtifactDamaged, match="it has no method 'decode'; its methods: forward"):
        runner.open(folder / "model.pte", Signature(methods={"decode": lowered.signature.methods["forward"]}))
    one = MethodSignature(inputs=lowered.signature.methods["forward"].inputs, outputs=(spec("y", 1),))
    with pytest.raises(ArtifactDamaged, match="takes 1 inputs and returns 2 outputs; its signature says 1 and 1"):
        runner.open(folder / "model.pte", Signature(methods={"forward": one})).call("forward", {"ids": IDS})
    with pytest.raises(StageFailed, match="called without its input 'ids'"):
        opened(folder, lowered).call("forward", {})


def test_the_target_and_its_runner_are_found_and_complete() -> None:
    assert [name for name, _ in runners_of("executorch-coreml")] == [
        "executorch-macos",
        "executorch-coreml-interpreter",
    ]
    assert executorch_coreml.missing() is None
    assert runner.missing() is None
    assert "edgebake_targets._pte_plan" in runner.SOURCES
