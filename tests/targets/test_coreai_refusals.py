"""What the Core AI target does not lower, and what it says then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreai_cases import INSTALLED, ask, verdicts
from coreml_cases import spec, traced_of
from edgebake.errors import RecipeError, StageFailed
from edgebake.types import MethodSignature, Signature, Traced
from edgebake_targets import coreai


@INSTALLED
def test_what_cannot_be_lowered_is_refused_by_name(traced: Traced, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="w4g32 needs input channels divisible by 32, but conv has 16"):
        coreai.lower(traced, ask(tmp_path / "a", {"conv": "w4g32"}, "w4g32"))
    with pytest.raises(StageFailed, match="does not use the weight of nobody, so it cannot be compressed"):
        coreai.lower(traced, ask(tmp_path / "b", {"nobody": "w8"}, "w8"))
    same = traced_of(nn.Linear(8, 8), [spec("x", 2, 8)], [spec("x", 2, 8)])
    with pytest.raises(RecipeError, match="'x' names two inputs or outputs"):
        coreai.lower(same, ask(tmp_path / "c", {}))


@INSTALLED
def test_rounding_of_a_scaled_integer_is_no_fault(tmp_path: Path) -> None:
    """Values half a step off, and large: float32 rounds the product of integer and scale by more than that is exact."""
    steps = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 1.5, (4000, 1)).astype(np.float32))
    weight = steps * torch.tensor([127.0, 126.5]).repeat(32)
    table = traced_of(nn.Embedding.from_pretrained(weight), [spec("ids", 1, 4, dtype="int64")], [spec("y", 1, 4, 64)])
    made = coreai.lower(table, ask(tmp_path, {"": "w8"}, "w8"))
    assert verdicts(tmp_path, made)["structure.weights"].state == "pass"


@INSTALLED
def test_a_written_buffer_is_refused_by_name(tmp_path: Path) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x)
            return self.seen * 2

    method = MethodSignature(inputs=(spec("x", 4),), outputs=(spec("y", 4),))
    program = torch.export.export(Counter(), (torch.ones(4),), strict=False)
    counting = Traced(programs={"forward": program}, signature=Signature(methods={"forward": method}))
    with pytest.raises(StageFailed, match="writes to its buffer seen, which this target does not lower") as said:
        coreai.lower(counting, ask(tmp_path, {}))
    assert "role state" in str(said.value)


@INSTALLED
def test_the_converters_words_are_passed_on(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x)

    odd = traced_of(Odd(), [spec("x", 4, 4)], [spec("y", 4)])
    with pytest.raises(StageFailed, match=r"coreai-torch cannot convert forward .*svd"):
        coreai.lower(odd, ask(tmp_path, {}))


@INSTALLED
def test_a_scheme_that_gains_nothing_is_an_error(tmp_path: Path) -> None:
    wide = traced_of(nn.Linear(1, 64, bias=False), [spec("x", 2, 1)], [spec("y", 2, 64)])
    with pytest.raises(StageFailed, match="w8 compresses nothing: weights, scales and tables take"):
        coreai.lower(wide, ask(tmp_path, {"": "w8"}, "w8"))
