"""``keep_float32``: modules of a float16 package that compute in float32; and where an overflow is said to begin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import ask, spec, traced_of, verdicts
from edgebake.errors import RecipeError
from edgebake.types import Lowered, Traced
from edgebake_targets import coreml
from edgebake_targets.inspectors import mlpackage
from edgebake_targets.runners import coreml_interpreter

X = {"x": np.full((1, 4, 6), 3.0, np.float32)}


class Norm(nn.Module):
    """A mean of squares that leaves float16's range in between."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: any shape."""
        return (x * 100).pow(2).mean(-1, keepdim=True) / 1e4 + x


class Network(nn.Module):
    """A convolution whose normalisation is folded, the overflowing module, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.stage = nn.Sequential(Norm())
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 4, 6)."""
        return self.last(self.stage(self.bn(self.conv(x)) + 4 * x))


@pytest.fixture(scope="module")
def overflowing() -> Traced:
    torch.manual_seed(0)
    return traced_of(Network().eval(), [spec("x", 1, 4, 6)], [spec("y", 1, 4, 3)])


def types(folder: Path, lowered: Lowered) -> dict[str, str]:
    """The declared type of each value of the package, without the converter's suffix for float16."""
    from edgebake_targets._coreml_constants import operations
    from edgebake_targets._coreml_package import open_package, proto

    names = proto("MIL_pb2").DataType
    outputs = [output for op in operations(open_package(folder / lowered.entry)) for output in op.outputs]
    return {o.name.removesuffix("_cast_fp16"): names.Name(o.type.tensorType.dataType).lower() for o in outputs}


def test_an_overflow_is_named_with_its_module_and_kept_away(overflowing: Traced, tmp_path: Path) -> None:
    plain = coreml.lower(overflowing, ask(tmp_path / "half", {}))
    session = coreml_interpreter.open(tmp_path / "half" / plain.entry, plain.signature)
    outputs, found = session.call_mode("declared", "forward", X)
    assert not np.isfinite(outputs["y"]).all()
    assert next(iter(found.values())).endswith(" of stage.0")
    lowered = coreml.lower(overflowing, ask(tmp_path / "kept", {}, keep_float32="stage.*"))
    session = coreml_interpreter.open(tmp_path / "kept" / lowered.entry, lowered.signature)
    outputs, found = session.call_mode("declared", "forward", X)
    assert found == {}
    with torch.no_grad():
        (expected,) = overflowing.programs["forward"].module()(torch.from_numpy(X["x"]))
    assert np.abs(outputs["y"] - expected.numpy()).max() < 0.02 * np.abs(expected.numpy()).max()
    assert lowered.encodings["float32_modules"] == ["stage.0"]
    assert "computes in float32 on request: stage.0" in lowered.encodings["notes"]
    assert mlpackage.inspect(tmp_path / "kept" / lowered.entry).facts["compute_precision"] == "mixed"


def test_a_convolution_stays_float32_with_the_normalisation_it_took_in(overflowing: Traced, tmp_path: Path) -> None:
    schemes = {"conv": "w8", "last": "w8"}
    lowered = coreml.lower(overflowing, ask(tmp_path, schemes, "w8", keep_float32="conv, stage.0"))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    found = types(tmp_path, lowered)
    assert found["conv_weight_w8"] == "float32"
    assert found["last_weight_w8"] == "float16"
    assert lowered.encodings["float32_modules"] == ["conv", "stage.0"]


def test_what_keep_float32_cannot_name_is_refused(overflowing: Traced, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no module with operators matches 'stage.norm'"):
        coreml.lower(overflowing, ask(tmp_path, {}, keep_float32="stage.norm conv"))
    with pytest.raises(RecipeError, match="computes in float32 everywhere"):
        coreml.lower(overflowing, ask(tmp_path, {}, "fp32", keep_float32="conv"))
