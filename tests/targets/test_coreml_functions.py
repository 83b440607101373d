"""Several methods in one package: functions that share their weights, each of them run and checked by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import WEIGHTS, Wrapper, ask, overwrite, spec, stored_part
from edgebake.trace import trace
from edgebake.types import Loaded, Lowered, MethodSignature, Signature, Traced, Verdict
from edgebake_targets import coreml
from edgebake_targets._coreml_functions import function_of, functions_of
from edgebake_targets._coreml_package import open_package
from edgebake_targets.inspectors import mlpackage
from edgebake_targets.mil import MilModel
from edgebake_targets.runners import coreml_interpreter

ROWS = {"prefill": 8, "decode": 1}


class Shared(nn.Module):
    """Weights that both methods use, and a sum that both write to."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 128))
        self.first, self.last = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, 64)."""
        hidden = torch.relu(self.first(x))
        self.seen.add_(hidden.mean(0, keepdim=True))
        found: torch.Tensor = self.last(hidden + self.seen)
        return found


def network() -> Wrapper:
    torch.manual_seed(0)
    return Wrapper(Shared()).eval()


@pytest.fixture(scope="module")
def traced() -> Traced:
    methods = {
        name: MethodSignature(inputs=(spec("x", rows, 64),), outputs=(spec("y", rows, 64),))
        for name, rows in ROWS.items()
    }
    return trace(Loaded(methods=dict.fromkeys(ROWS, network()), signature=Signature(methods=methods), facts={}))


def lower(traced: Traced, folder: Path) -> Lowered:
    return coreml.lower(traced, ask(folder, dict.fromkeys(("first", "last"), "w8"), "w8", "iOS18"))


@pytest.fixture(scope="module")
def built(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lowered]:
    folder = tmp_path_factory.mktemp("functions")
    return folder, lower(traced, folder)


def structure(folder: Path, lowered: Lowered) -> tuple[Verdict, ...]:
    return coreml.structure(folder / lowered.entry, lowered.signature, coreml.read_checks(folder))


def test_two_methods_are_functions_of_one_package(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    assert lowered.files == ("model.mlpackage", "weights.check.json")
    package = folder / lowered.entry
    opened = open_package(package)
    assert functions_of(opened) == ("prefill", "decode")  # the first method is the default
    assert str(opened.spec.description.defaultFunctionName) == "prefill"
    facts = mlpackage.inspect(package).facts
    assert (facts["functions"], facts["minimum_os"]) == (["prefill", "decode"], "iOS18")
    assert [tuple(s.shape) for s in mlpackage.inspect(package).inputs if s.role == "input"] == [(8, 64)]
    assert lowered.encodings["states"] == {f"model.mlpackage:{name}": {"wrapped_seen": "seen"} for name in ROWS}


def test_weights_that_methods_share_lie_there_once(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    stored = (folder / lowered.entry / WEIGHTS).stat().st_size
    once = 2 * 64 * 128  # int8
    assert once < stored < 1.2 * once
    weights = [record for record in mlpackage.inspect(folder / lowered.entry).weights if record.dtype == "int8"]
    assert sum(record.bytes for record in weights) == once


def test_each_function_is_run_by_its_method_and_states_are_one(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    session = coreml_interpreter.open(folder / lowered.entry, lowered.signature)
    random = np.random.default_rng(0)
    for _ in range(2):
        session.begin()
        net = network()
        for method in ("prefill", "decode", "decode"):
            x = random.standard_normal((ROWS[method], 64)).astype(np.float32)
            with torch.no_grad():
                expected = net(torch.from_numpy(x))[0].numpy()
            y = session.call(method, {"x": x})["y"]
            assert np.linalg.norm(y - expected) < 0.02 * np.linalg.norm(expected), method
    values = session.intermediates("decode", {"x": np.ones((1, 64), np.float32)}, ["first"])
    assert values["first"].shape == (1, 128)


def test_one_function_can_be_opened_alone(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    model = MilModel(folder / lowered.entry, "decode")
    assert model.functions == ("decode", "prefill")
    assert model.predict({"x": np.ones((1, 64), np.float32)}, model.make_state())["y"].shape == (1, 64)


def test_every_function_is_held_against_what_was_recorded(built: tuple[Path, Lowered], tmp_path: Path) -> None:
    folder, lowered = built
    found = structure(folder, lowered)
    assert {verdict.state for verdict in found} == {"pass"}
    limits = ("structure.inputs", "structure.outputs", "structure.weights", "structure.states")
    assert {(v.limit, v.subject) for v in found} == {
        ("structure.loads", "model.mlpackage"),
        *((limit, f"model.mlpackage:{name}") for limit in limits for name in ROWS),
    }


def test_a_spoilt_shared_weight_fails_in_every_function(traced: Traced, tmp_path: Path) -> None:
    lowered = lower(traced, tmp_path)
    package = tmp_path / lowered.entry
    at, values = stored_part(package, "last_weight_w8", "data")
    overwrite(package, at, -values)
    failed = {verdict.subject for verdict in structure(tmp_path, lowered) if verdict.state == "fail"}
    assert failed == {"model.mlpackage:prefill", "model.mlpackage:decode"}


def test_a_function_that_is_not_there_is_named(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    methods = {**lowered.signature.methods, "encode": lowered.signature.methods["decode"]}
    checks = coreml.read_checks(folder)
    found = coreml.structure(folder / lowered.entry, Signature(methods=methods), checks)
    (verdict,) = (verdict for verdict in found if verdict.subject == "model.mlpackage:encode")
    assert (verdict.state, verdict.reason) == ("fail", "it has no function encode")


def test_the_same_methods_give_the_same_bytes(traced: Traced, built: tuple[Path, Lowered], tmp_path: Path) -> None:
    again = lower(traced, tmp_path)
    assert again == built[1]
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    differing = [file for file in files if (tmp_path / file).read_bytes() != (built[0] / file).read_bytes()]
    assert not differing


def test_coremltools_reads_what_was_merged(built: tuple[Path, Lowered]) -> None:
    from coremltools.converters.mil.frontend.milproto.load import load

    folder, lowered = built
    opened = open_package(folder / lowered.entry)
    weights = str((folder / lowered.entry / WEIGHTS).parent)
    program = load(opened.spec, specification_version=opened.spec.specificationVersion, file_weights_dir=weights)
    assert set(program.functions) == set(ROWS)
    assert function_of(opened, "decode").spec.mlProgram.functions["main"].opset == "CoreML8"
