"""Buffers that a network writes to, in a .pte with Core ML parts: states of one part, or kept outside all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import spec, traced_of
from edgebake.errors import RecipeError
from edgebake.types import Lowered, Traced
from edgebake_targets import _coreml_checks, executorch_coreml
from executorch_coreml_cases import lower, opened

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
XS = [np.full((1, 4), value, np.float32) for value in (1, 2, 3)]


class Memory(nn.Module):
    """A running sum, and the last input in the middle row of three."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 4))
        self.register_buffer("rows", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 4)."""
        before = self.rows.sum(0)
        self.seen.add_(x)
        self.rows[1:2] = x
        return self.seen * 2 + before


class Outside(nn.Module):
    """Read by Core ML, written by an operator that it does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 4)."""
        new = torch.asinh(self.seen + x)
        self.seen.copy_(new)
        return new * 2


class Twice(nn.Module):
    """Read by two parts, before and behind such an operator, and written by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 4)."""
        self.seen.add_(torch.asinh(self.seen + x))
        return self.seen * 2


def traced(network: nn.Module) -> Traced:
    return traced_of(network.eval(), [spec("x", 1, 4)], [spec("y", 1, 4)])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lowered]:
    folder = tmp_path_factory.mktemp("memory")
    return folder, lower(traced(Memory()), folder, "fp16", minimum_os="iOS18")


def test_states_are_refused_before_ios_18(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="writes to its buffer rows; packages hold states since iOS 18"):
        lower(traced(Memory()), tmp_path, "fp16")


def test_states_are_kept_between_calls_and_begin_at_zero(built: tuple[Path, Lowered]) -> None:
    _, lowered = built
    assert lowered.encodings["states"] == {"forward": {"wrapped_rows": "rows", "wrapped_seen": "seen"}}
    assert "states are float16 between predictions" in lowered.encodings["notes"][-1]
    session = opened(*built)
    for _ in range(2):
        session.begin()
        found = [float(session.call("forward", {"x": x})["y"][0, 0]) for x in XS]
        assert found == [2, 7, 14]  # twice the sum so far, and the input before
    session.begin()
    assert session.call_mode("fp32", "forward", {"x": XS[0]})[0]["y"][0, 0] == 2


def test_the_structure_knows_the_states_that_were_promised(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    checks = executorch_coreml.read_checks(folder)
    found = executorch_coreml.structure(folder / lowered.entry, lowered.signature, checks)
    assert {v.limit: v.state for v in found}["structure.states"] == "pass"
    ((identifier, part),) = checks["parts"].items()
    promised = {**part, "states": {"wrapped_seen": "seen", "wrapped_cache": "cache"}}
    found = executorch_coreml.structure(
        folder / lowered.entry, lowered.signature, {**checks, "parts": {identifier: promised}}
    )
    (wrong,) = [v for v in found if v.state == "fail"]
    assert wrong.limit == "structure.states"
    assert wrong.reason == "the buffer cache is no state of it; the state wrapped_rows is there but was not promised"
    assert _coreml_checks.CHECKS_FILE in lowered.files


@pytest.mark.parametrize("network", [Outside, Twice])
def test_a_buffer_that_no_part_has_for_itself_is_kept_outside(network: Callable[[], nn.Module], tmp_path: Path) -> None:
    """ExecuTorch gave it to the first part that reads it, which never saw what was written elsewhere."""
    float_network = network()
    lowered = lower(traced(network()), tmp_path, "fp32", minimum_os="iOS18")
    assert lowered.delegation.partitions == 2
    assert "states" not in lowered.encodings
    session = opened(tmp_path, lowered)
    for _ in range(2):
        session.begin()
        float_network.get_buffer("seen").zero_()
        for x in XS:
            with torch.no_grad():
                expected = float_network(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(session.call("forward", {"x": x})["y"], expected, rtol=1e-5)
