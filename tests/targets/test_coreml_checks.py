"""The checks of a Core ML package: what was damaged, left out or promised otherwise is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import (
    WEIGHTS,
    ask,
    everywhere,
    overwrite,
    spec,
    stored_part,
    traced_of,
    verdicts,
)
from edgebake.errors import StageFailed
from edgebake.types import (
    Lowered,
    MethodSignature,
    Signature,
    Traced,
)
from edgebake_targets import coreml


def damaged(folder: Path, lowered: Lowered, constant: str, part: str, change: Any) -> None:
    """Overwrite one stored part of a constant in the weight file."""
    at, values = stored_part(folder / lowered.entry, constant, part)
    flat = values.reshape(-1)
    change(flat)
    overwrite(folder / lowered.entry, at, flat)


def double_one(values: np.ndarray[Any, Any]) -> None:
    values[len(values) // 3] *= 2


@pytest.mark.parametrize(
    ("scheme", "system", "part"),
    [
        ("w8", "iOS17", "scale"),
        ("w8", "iOS18", "scale"),
        ("palette6", "iOS17", "lut"),
        ("palette4", "iOS18", "lut"),
        ("fp16", "iOS17", "val"),
    ],
)
def test_one_damaged_scale_or_table_entry_fails_the_check(
    traced: Traced, tmp_path: Path, scheme: str, system: str, part: str
) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, everywhere(scheme), scheme, system))
    damaged(tmp_path, lowered, f"embed_weight_{scheme}", part, double_one)
    found = verdicts(tmp_path, lowered)
    assert found["structure.loads"].state == "pass"
    assert found["structure.weights"].state == "fail"
    assert "embed" in found["structure.weights"].reason


def test_a_truncated_weight_file_does_not_load(traced: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, everywhere("w8"), "w8"))
    file = tmp_path / lowered.entry / WEIGHTS
    file.write_bytes(file.read_bytes()[:200])
    found = verdicts(tmp_path, lowered)
    assert found["structure.loads"].state == "fail"
    assert found["structure.weights"].state == "not measured"


def test_other_inputs_and_outputs_than_promised_fail(traced: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, {}, "fp16"))
    inputs, outputs = (
        (spec("ids", 1, "seq", dtype="int64"),),
        (spec("hidden", 1, "seq", 17), spec("scores", 1, "seq", 20)),
    )
    promised = Signature(
        methods={"forward": MethodSignature(inputs=inputs, outputs=outputs)}, dims=lowered.signature.dims
    )
    found = {v.limit: v for v in coreml.structure(tmp_path / lowered.entry, promised, coreml.read_checks(tmp_path))}
    assert found["structure.inputs"].state == "fail"
    assert "int32 1x4..64, not int64" in found["structure.inputs"].reason
    assert found["structure.outputs"].state == "fail"
    assert "hidden is float32" in found["structure.outputs"].reason
    assert "scores is not there" in found["structure.outputs"].reason
    assert found["structure.weights"].state == "not measured"


def test_a_module_that_the_program_does_not_use_is_named(traced: Traced, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"weight of nowhere.*\n.*modules: {\"nowhere\": fp16}"):
        coreml.lower(traced, ask(tmp_path, {"first": "w8", "nowhere": "w8"}, "w8"))


def test_a_weight_that_is_computed_is_named(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    torch.manual_seed(0)
    net = traced_of(Scaled(), [spec("x", 1, 8)], [spec("y", 1, 16)])
    with pytest.raises(StageFailed, match=r"weight of layer is computed.*\n.*modules: {\"layer\": fp16}"):
        coreml.lower(net, ask(tmp_path, {"layer": "w8"}, "w8"))
