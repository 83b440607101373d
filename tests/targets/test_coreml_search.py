"""``keep_float32: auto``: what float16 cannot hold is found on calibration samples, kept in float32 and listed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import ask, everywhere, spec, traced_network, traced_of
from edgebake.errors import RecipeError
from edgebake.reference_run import run_float
from edgebake.target import FloatCalls
from edgebake.trace import trace
from edgebake.types import (
    Call,
    Loaded,
    Lowered,
    MethodSignature,
    Sample,
    SampleSet,
    Signature,
    TensorSpec,
    Traced,
)
from edgebake_targets import coreml
from edgebake_targets.mil import MilModel
from edgebake_targets.runners import coreml_interpreter

# The masks below become infinities on purpose, and the converter says so.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


class Attention(nn.Module):
    """Scores beyond float16, and a mask as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: (1, 6, 8), mask: (1, 1, 6), additive."""
        return torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2) + mask, -1) @ x


class Masked(nn.Module):
    """The mask is made outside of every module; what the head takes in is beyond float16."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head, self.last = Attention(), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x: (1, 6, 8), mask: (1, 6), ones and zeros."""
        additive = (1.0 - mask.float())[:, None, :] * torch.finfo(torch.float32).min
        found = self.attention(x * 300, additive)
        return cast(torch.Tensor, self.head(found * 300) / 300 + self.last(x))


class Wrapped(nn.Module):
    """As models/ wraps a network."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        """A tuple, as methods return."""
        return (self.wrapped(x, mask),)


class Cancelling(nn.Module):
    """A small difference of large numbers: nothing overflows, and nothing is left of it in float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: any shape."""
        return (x + 10000.0) - 10000.0


def samples(count: int, **specs: TensorSpec) -> SampleSet:
    """Seeded inputs; of masks, the last two places are zero."""
    found = []
    for index in range(count):
        random = np.random.default_rng(index)
        shapes = {name: [int(size) for size in s.shape] for name, s in specs.items()}
        inputs = {name: random.standard_normal(shape).astype(np.float32) * 3 for name, shape in shapes.items()}
        if "mask" in inputs:
            inputs["mask"] = np.array([[1, 1, 1, 1, 0, 0]], np.int32)
        found.append(Sample(calls=(Call(inputs=inputs),), source=str(index)))
    return SampleSet(samples=tuple(found))


X, MASK = spec("x", 1, 6, 8), spec("mask", 1, 6, dtype="int32")


@pytest.fixture(scope="module")
def masked() -> Traced:
    torch.manual_seed(0)
    methods = {"forward": MethodSignature(inputs=(X, MASK), outputs=(spec("y", 1, 6, 4),))}
    network = Wrapped(Masked()).eval()
    return trace(Loaded(methods={"forward": network}, signature=Signature(methods=methods), facts={}))


def searched(traced: Traced, folder: Path, calibration: SampleSet, **options: str) -> Lowered:
    request = ask(folder, {}, **{"keep_float32": "auto", **options})
    return coreml.lower(traced, replace(request, calibration=calibration, float_calls=float_calls(traced)))


def float_calls(traced: Traced) -> FloatCalls:
    """As a build runs the network."""
    methods = {name: program.module() for name, program in traced.programs.items()}
    return lambda given: run_float(Loaded(methods=methods, signature=traced.signature, facts={}), given)


def worst_errors(traced: Traced, package: Path, given: SampleSet) -> dict[str, float]:
    """Largest error of the output over its largest value, by mode."""
    model, found = MilModel(package), {}
    for mode in ("declared", "fp16-worst"):
        errors = []
        for sample in given:
            inputs = sample.calls[0].tensors()
            with torch.no_grad():
                (exact,) = traced.programs["forward"].module()(*map(torch.from_numpy, inputs.values()))
            errors.append(np.abs(model.predict(inputs, mode=mode)["y"] - exact.numpy()).max() / exact.abs().max())
        found[mode] = float(max(errors))
    return found


def test_what_overflows_is_found_kept_and_listed(masked: Traced, tmp_path: Path) -> None:
    calibration, unseen = samples(3, x=X, mask=MASK), samples(6, x=X, mask=MASK)
    plain = coreml.lower(masked, ask(tmp_path / "plain", {}))
    assert np.isnan(worst_errors(masked, tmp_path / "plain" / plain.entry, unseen)["declared"])
    lowered = searched(masked, tmp_path / "auto", calibration)
    assert lowered.encodings["float32_modules"] == [".", "attention", "head"]  # the rest stays in float16
    assert worst_errors(masked, tmp_path / "auto" / lowered.entry, unseen)["declared"] < 0.01
    assert worst_errors(masked, tmp_path / "auto" / lowered.entry, unseen)["fp16-worst"] < 0.01
    assert len(lowered.notes) == 3
    assert lowered.notes[0] == (
        "the network itself computes in float32 (keep_float32: auto): "
        "mul_cast_fp16 (mul) leaves the range of float16 in mode declared on calibration call 0"
    )
    assert any(note.startswith("attention computes in float32 (keep_float32: auto): ") for note in lowered.notes)
    session = coreml_interpreter.open(tmp_path / "auto" / lowered.entry, lowered.signature)
    _, strange = session.call_mode("declared", "forward", unseen.samples[0].calls[0].tensors())
    assert strange == {}


@pytest.mark.slow
def test_the_same_search_gives_the_same_bytes(masked: Traced, tmp_path: Path) -> None:
    calibration = samples(2, x=X, mask=MASK)
    pair = [searched(masked, tmp_path / name, calibration) for name in ("one", "two")]
    assert pair[0] == pair[1]
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.slow
def test_what_loses_without_overflow_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    traced = traced_of(nn.Sequential(nn.Linear(8, 8), Cancelling()).eval(), [X], [spec("y", 1, 6, 8)])
    plain = coreml.lower(traced, ask(tmp_path / "plain", {}))
    assert worst_errors(traced, tmp_path / "plain" / plain.entry, samples(2, x=X))["declared"] > 0.3
    lowered = searched(traced, tmp_path / "auto", samples(2, x=X))
    assert lowered.encodings["float32_modules"] == ["1"]
    assert "loses" in lowered.notes[0]
    assert worst_errors(traced, tmp_path / "auto" / lowered.entry, samples(4, x=X))["declared"] < 0.01


@pytest.mark.slow
def test_nothing_is_kept_where_float16_is_enough(tmp_path: Path) -> None:
    given = SampleSet(samples=(Sample(calls=(Call(inputs={"ids": np.arange(9)[None]}),), source="one"),))
    request = ask(tmp_path, everywhere("w8"), "w8", keep_float32="auto")
    traced = traced_network()
    lowered = coreml.lower(traced, replace(request, calibration=given, float_calls=float_calls(traced)))
    assert lowered.notes == ()
    assert "float32_modules" not in lowered.encodings


@pytest.mark.slow
def test_modules_that_are_named_stay_beside_those_that_are_found(masked: Traced, tmp_path: Path) -> None:
    lowered = searched(masked, tmp_path, samples(1, x=X, mask=MASK), keep_float32="last auto attention")
    assert lowered.encodings["float32_modules"] == [".", "attention", "head", "last"]
    assert len(lowered.notes) == 2  # of those that were found


def test_a_search_without_samples_is_refused(masked: Traced, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keep_float32: auto runs the package on calibration samples, and there are"):
        coreml.lower(masked, ask(tmp_path, {}, keep_float32="auto"))
