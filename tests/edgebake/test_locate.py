"""Where the error begins."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from edgebake.locate import float_values, locate, program_values, rank
from edgebake.types import Loaded, MethodSignature, ReferenceCall, Signature, TensorSpec, Traced


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.middle = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.last(torch.tanh(self.middle(torch.relu(self.first(x))))),)


def _case() -> tuple[Loaded, Traced, ReferenceCall]:
    torch.manual_seed(0)
    net = Net().eval().requires_grad_(False)
    damaged = copy.deepcopy(net)
    damaged.middle.weight[3] *= 3
    x = torch.randn(1, 8)
    spec = {"inputs": (TensorSpec(name="x", shape=(1, 8), dtype="float32"),)}
    outputs = (TensorSpec(name="y", shape=(1, 4), dtype="float32"),)
    signature = Signature(methods={"forward": MethodSignature(**spec, outputs=outputs)})
    loaded = Loaded(methods={"forward": net}, signature=signature, facts={})
    traced = Traced(programs={"forward": torch.export.export(damaged, (x,))}, signature=signature)
    call = ReferenceCall(method="forward", inputs={"x": x.numpy()}, outputs={"y": net(x)[0].numpy()})
    return loaded, traced, call


def test_the_module_that_was_damaged_comes_first() -> None:
    found = locate(*_case(), None)
    assert found["modules"][0]["module"] == "middle"
    assert found["modules"][0]["before_db"] > 100 > found["modules"][0]["sqnr_db"]
    assert "compressed graph before lowering" in found["reason"]


def test_values_from_inside_the_artifact_are_used_where_its_runtime_gives_them() -> None:
    loaded, traced, call = _case()
    floats = float_values(loaded.methods["forward"], [torch.from_numpy(call.inputs["x"])])
    inside = {**floats, "last": floats["last"] + 1}
    found = locate(loaded, traced, call, lambda modules: {name: inside[name] for name in modules})
    assert [row["module"] for row in found["modules"]] == ["last"]
    assert "inside the artifact" in found["reason"]


def test_an_unharmed_network_has_no_place_where_error_begins() -> None:
    loaded, _, call = _case()
    x = torch.from_numpy(call.inputs["x"])
    same = torch.export.export(loaded.methods["forward"], (x,))
    assert rank(float_values(loaded.methods["forward"], [x]), program_values(same, [x])) == []


def test_modules_of_other_shapes_are_not_compared_and_nan_counts_as_lost() -> None:
    floats = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    broken = {"a": np.ones(5, np.float32), "b": np.full(4, np.nan, np.float32)}
    assert [row["module"] for row in rank(floats, broken)] == ["b"]


def test_a_value_that_is_right_again_at_once_is_no_beginning() -> None:
    rng = np.random.default_rng(0)
    floats = {n: rng.normal(size=64).astype(np.float32) for n in ("conv", "norm", "relu", "next", "last")}
    noise = {n: rng.normal(size=64).astype(np.float32) for n in floats}
    scale = {"conv": 1.0, "norm": 0.5, "relu": 0.01, "next": 0.3, "last": 0.3}  # conv holds its norm, norm a clamp
    compressed = {n: floats[n] + scale[n] * noise[n] for n in floats}
    rows = rank(floats, compressed)
    assert [row["module"] for row in rows[:2]] == ["conv", "next"]  # conv: from nothing to its rounding, 40 dB
    assert rows[0]["sqnr_db"] > 35
    assert rows[1]["before_db"] > 35
    assert rows[1]["sqnr_db"] < 15
