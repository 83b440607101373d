"""Image inputs: a package that takes 8-bit pixels computes what the network does on the recipe's normalised ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import ask, traced_of, verdicts
from edgebake.errors import RecipeError
from edgebake.metrics import ParityMeter
from edgebake.target import About, LowerRequest, NotMeasured
from edgebake.types import Image8, TensorSpec, Traced
from edgebake_targets import coreml
from edgebake_targets.inspectors import mlpackage
from edgebake_targets.runners import coreml_interpreter

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def traced_image(*shape: int | str, role: Any = "image") -> Traced:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(int(shape[1]), 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    net(torch.zeros([int(size) for size in shape]))
    taken = TensorSpec(name="picture", shape=shape, dtype="float32", role=role)
    return traced_of(net, [taken], [TensorSpec(name="y", shape=(1, 5), dtype="float32")])


def request(folder: Path, scheme: str = "fp16", **about: Any) -> LowerRequest:
    return replace(ask(folder, {}, scheme, image_inputs="image"), about=About(**about))


@pytest.fixture(scope="module")
def colour() -> Traced:
    return traced_image(1, 3, 6, 7)


def parity(traced: Traced, folder: Path, lowered: Any, about: Mapping[str, tuple[float, ...]], channels: int) -> float:
    session = coreml_interpreter.open(folder / lowered.entry, lowered.signature)
    random, meter = np.random.default_rng(3), ParityMeter()
    program = traced.programs["forward"].module()
    for index in range(6):
        image = Image8(pixels=random.integers(0, 256, (channels, 6, 7), np.uint8), mean=about["mean"], std=about["std"])
        x = image.to_float32()
        with torch.no_grad():
            expected = {"y": program(torch.from_numpy(x))[0].numpy()}
        meter.add(index, "noise", expected, session.call("forward", {"picture": x}))
    return float(meter.measurements()["y"]["sqnr_db"])


@pytest.mark.parametrize(
    ("about", "scheme", "decibels"),
    [
        (IMAGENET, "fp32", 100.0),
        (IMAGENET, "fp16", 50.0),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}, "fp32", 100.0),
        ({"mean": (0.1, 0.6, 0.3), "std": (0.1, 0.9, 0.4)}, "fp32", 100.0),
    ],
)
def test_a_package_of_pixels_computes_what_the_network_does(
    colour: Traced, tmp_path: Path, about: Mapping[str, tuple[float, ...]], scheme: str, decibels: float
) -> None:
    lowered = coreml.lower(colour, request(tmp_path, scheme, **about))
    found = verdicts(tmp_path, lowered)
    assert {verdict.state for verdict in found.values()} <= {"pass", "not measured"}
    assert found["structure.inputs"].state == "pass"
    (taken,) = mlpackage.inspect(tmp_path / lowered.entry).inputs
    assert (taken.name, taken.shape, taken.dtype, taken.role) == ("picture", (1, 3, 6, 7), "uint8", "image")
    assert parity(colour, tmp_path, lowered, about, 3) > decibels


def test_grey_images(tmp_path: Path) -> None:
    grey, about = traced_image(1, 1, 6, 7), {"mean": (0.4,), "std": (0.2,)}
    lowered = coreml.lower(grey, request(tmp_path, "fp32", **about))
    assert parity(grey, tmp_path, lowered, about, 1) > 100


def test_samples_that_are_no_pixels_are_not_measured(colour: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(colour, request(tmp_path, **IMAGENET))
    session = coreml_interpreter.open(tmp_path / lowered.entry, lowered.signature)
    noise = np.random.default_rng(0).standard_normal((1, 3, 6, 7)).astype(np.float32)
    with pytest.raises(NotMeasured, match="takes picture as 8-bit pixels, and the samples hold other values"):
        session.call("forward", {"picture": noise})


def test_what_cannot_be_an_image_is_refused(colour: Traced, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no input has the role image"):
        coreml.lower(traced_image(1, 3, 6, 7, role="input"), request(tmp_path, **IMAGENET))
    with pytest.raises(RecipeError, match="no samples of images say how pixels are normalised"):
        coreml.lower(colour, request(tmp_path))
    with pytest.raises(RecipeError, match="the input picture cannot be an image"):
        coreml.lower(traced_image(1, 4, 6, 7), request(tmp_path, **IMAGENET))
    with pytest.raises(RecipeError, match="picture has 1 channels, the recipe's mean has 3"):
        coreml.lower(traced_image(1, 1, 6, 7), request(tmp_path, **IMAGENET))
