"""Buffers that a network writes to become Core ML states, and a write that got lost is seen and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import Wrapper, ask, operations_of, spec, verdicts
from edgebake.errors import RecipeError, StageFailed
from edgebake.metrics import ParityMeter
from edgebake.target import LowerRequest
from edgebake.types import Lowered, MethodSignature, Signature, Traced
from edgebake_targets import _coreml_checks, coreml
from edgebake_targets._coreml_package import open_package, write_package
from edgebake_targets.mil import MilModel
from edgebake_targets.runners import coreml_interpreter

STATES = {"wrapped_seen": "seen", "wrapped_rows": "rows"}


class Memory(nn.Module):
    """A sum over calls, and the last input in the middle row of three, as a cache is written by slice."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("seen", torch.full((4,), start))
        self.register_buffer("rows", torch.zeros(1, 3, 4))
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (4,)."""
        before = self.rows.sum(1)[0]  # type: ignore[operator]
        self.seen.add_(self.lin(x))  # type: ignore[operator]
        self.rows[:, 1:2, :] = x  # type: ignore[operator]
        return self.seen * 2 + before  # type: ignore[operator]


def exported(net: nn.Module) -> Traced:
    program = torch.export.export(Wrapper(net).eval(), (torch.ones(4),), strict=False)
    method = MethodSignature(inputs=(spec("x", 4),), outputs=(spec("y", 4),))
    return Traced(programs={"forward": program}, signature=Signature(methods={"forward": method}))


def request(folder: Path, scheme: str = "fp16", system: str = "iOS18") -> LowerRequest:
    return ask(folder, {}, scheme, system)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lowered]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("memory")
    return folder, coreml.lower(exported(Memory()), request(folder))


def test_what_a_network_keeps_is_kept_between_predictions(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    assert {verdict.state for verdict in verdicts(folder, lowered).values()} <= {"pass", "not measured"}
    assert verdicts(folder, lowered)["structure.states"].state == "pass"
    assert lowered.encodings["states"] == {"model.mlpackage": STATES}
    assert "states are float16 between predictions" in lowered.encodings["notes"][-1]
    torch.manual_seed(0)
    net = Memory().eval()
    model = MilModel(folder / lowered.entry)
    state, meter = model.make_state(), ParityMeter()
    random = np.random.default_rng(1)
    with torch.no_grad():
        for step in range(20):
            x = random.standard_normal(4).astype(np.float32)
            expected = {"y": net(torch.from_numpy(x)).numpy()}
            meter.add(step, "steps", expected, model.predict({"x": x}, state))
    assert meter.measurements()["y"]["sqnr_db"] > 50


class Counting(nn.Module):
    """Counts its calls in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(4, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (4,)."""
        self.calls.add_(1)  # type: ignore[operator]
        return x + self.calls  # type: ignore[operator]


def test_a_state_that_counts_is_said_to_end_at_2048(tmp_path: Path) -> None:
    lowered = coreml.lower(exported(Counting()), request(tmp_path, "fp32"))
    assert lowered.notes == (
        "the buffer calls holds integers, and Core ML's states are float16: beyond 2048 they are not exact",
    )
    model = MilModel(tmp_path / lowered.entry)
    state = model.make_state()
    for before, after in ((2046, 2047), (2047, 2048), (2048, 2048)):
        state.write_state("wrapped_calls", np.full(4, before, np.float16))
        model.predict({"x": np.zeros(4, np.float32)}, state)
        assert state.read_state("wrapped_calls")[0] == after


def without_write(folder: Path, lowered: Lowered, into: Path, state: str) -> Path:
    """The package as a converter leaves it that drops a write: everything else is whole."""
    package = open_package(folder / lowered.entry)
    kept = operations_of(package)
    (lost,) = [
        place
        for place, operation in enumerate(kept)
        if operation.type == "write_state" and operation.inputs["input"].arguments[0].name == state
    ]
    del kept[lost]
    path = into / lowered.entry
    write_package(path, package.spec, folder / lowered.entry / "Data/com.apple.CoreML/weights/weight.bin")
    shutil.copy(folder / _coreml_checks.CHECKS_FILE, into)
    return path


@pytest.mark.parametrize("state", sorted(STATES))
def test_a_dropped_write_is_named(built: tuple[Path, Lowered], tmp_path: Path, state: str) -> None:
    folder, lowered = built
    path = without_write(folder, lowered, tmp_path, state)
    said = f"it never writes to {STATES[state]}, so the next prediction would see old values"
    found = verdicts(tmp_path, lowered)
    assert {limit for limit, verdict in found.items() if verdict.state == "fail"} == {"structure.states"}
    assert found["structure.states"].reason == said
    with pytest.raises(StageFailed) as caught:
        _coreml_checks.record_states(open_package(path), STATES)
    assert caught.value.problems[0].what == said
    assert caught.value.problems[0].fix == "pass the buffer as an input with role state and return its new value"


def test_a_state_that_is_not_there_or_not_promised_is_named(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    with pytest.raises(StageFailed, match="the buffer cache is no state of it"):
        _coreml_checks.record_states(open_package(folder / lowered.entry), {**STATES, "wrapped_cache": "cache"})
    with pytest.raises(StageFailed, match="the state wrapped_rows is there but was not promised"):
        _coreml_checks.record_states(open_package(folder / lowered.entry), {"wrapped_seen": "seen"})


def test_what_states_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="writes to its buffer rows; packages hold states since iOS 18"):
        coreml.lower(exported(Memory()), request(tmp_path / "old", system="iOS17"))
    with pytest.raises(StageFailed, match=r"the buffer seen does not start at zero, as Core ML.s states do"):
        coreml.lower(exported(Memory(start=1.0)), request(tmp_path / "start"))


def test_a_write_to_an_input_is_refused(tmp_path: Path) -> None:
    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return x + 1

    with pytest.raises(StageFailed, match="the network writes to its input x"):
        coreml.lower(exported(InPlace()), request(tmp_path))


def test_the_runner_begins_where_it_is_told(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    session = coreml_interpreter.open(folder / lowered.entry, lowered.signature)
    x = {"x": np.ones(4, np.float32)}
    first, second = (session.call("forward", x)["y"] for _ in range(2))
    assert not np.allclose(first, second)
    session.begin()
    again, _ = session.call_mode("declared", "forward", x)
    assert np.array_equal(again["y"], first)
    session.begin()
    assert np.array_equal(session.call("forward", x)["y"], first)
