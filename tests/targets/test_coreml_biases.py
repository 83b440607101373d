"""Biases that make up for what palettes, groups and pruning add on average; what is left to the step, and refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import ask, spec, traced_of, verdicts
from edgebake.errors import StageFailed
from edgebake.metrics import sqnr_db
from edgebake.types import Call, Sample, SampleSet, Traced
from edgebake_targets import _coreml_biases, coreml
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package
from edgebake_targets._coreml_rounded import rounded
from edgebake_targets._coreml_weights import float_weights
from edgebake_targets.runners import coreml_interpreter

ODD = {"conv": "palette2", "mix": "palette2g16", "last": "w4g16"}


class Normalised(nn.Module):
    """A convolution whose normalisation takes the mean, a layer with a bias, one without either."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(32)
        self.mix, self.last = nn.Linear(32, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 16, 8)."""
        return self.last(torch.relu(self.mix(torch.relu(self.norm(self.conv(x))).transpose(1, 2))))


def normalised() -> Normalised:
    torch.manual_seed(0)
    net = Normalised()
    net.norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(net.norm.weight, 0.5, 1.5)
    return net.eval()


def samples(count: int, seed: int) -> SampleSet:
    """Inputs that are far from a mean of zero, so that errors of weights do not cancel."""
    random = np.random.default_rng(seed)
    calls = [Call(inputs={"x": (random.random((1, 16, 8)) + 0.5).astype(np.float32)}) for _ in range(count)]
    return SampleSet(samples=tuple(Sample(calls=(call,), source=str(i)) for i, call in enumerate(calls)))


@pytest.fixture(scope="module")
def traced_normalised() -> Traced:
    return traced_of(normalised(), [spec("x", 1, 16, 8)], [spec("y", 1, 4, 16)])


def test_the_mean_of_the_error_goes_where_it_is_taken_off(traced_normalised: Traced, tmp_path: Path) -> None:
    """To the mean of the normalisation that is folded in, and to the bias; a layer with neither stays."""
    given = samples(4, seed=0)
    request = replace(ask(tmp_path, ODD, "fp16", "iOS18", correct_biases=True), calibration=given)
    program = traced_normalised.programs["forward"]
    before = {name: value.clone() for name, value in program.state_dict.items()}
    weights = {w.module: w for w in float_weights(program, request.assignment)}
    found = _coreml_biases.corrected(weights.values(), traced_normalised, "forward", request)
    assert {name.removeprefix("wrapped.") for name in found} == {"norm.running_mean", "mix.bias"}
    net, x = normalised(), torch.cat([torch.from_numpy(s.calls[0].tensors()["x"]) for s in given])
    hidden = torch.relu(net.norm(net.conv(x))).transpose(1, 2)
    factor = (net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()).detach()
    stored = {n: torch.from_numpy(rounded(ODD[n], w.values, 0, np.float16, None)) for n, w in weights.items()}
    other = nn.functional.conv1d(x, stored["conv"] / factor[:, None, None], stride=2, padding=1)
    mean = net.norm.running_mean + (other - net.conv(x)).mean((0, 2))
    bias = net.mix.bias - (hidden @ (stored["mix"] - net.mix.weight).T).mean((0, 1))
    for name, expected in (("norm.running_mean", mean), ("mix.bias", bias)):
        value = next(value for key, value in found.items() if key.endswith(name))
        torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(program.state_dict[name], value) for name, value in before.items())


def test_nothing_is_done_unasked_nor_for_what_the_step_corrects(traced_normalised: Traced, tmp_path: Path) -> None:
    for schemes, asked in ((ODD, False), ({"conv": "w8", "mix": "w4", "last": "fp16"}, True)):
        request = replace(ask(tmp_path, schemes, "fp16", "iOS18", correct_biases=asked), calibration=samples(1, 0))
        weights = float_weights(traced_normalised.programs["forward"], request.assignment)
        assert _coreml_biases.corrected(weights, traced_normalised, "forward", request) == {}


def test_without_samples_it_says_what_to_add(traced_normalised: Traced, tmp_path: Path) -> None:
    request = ask(tmp_path, ODD, "fp16", "iOS18", correct_biases=True)
    text = r"every method, and there is none for forward\n.*calibration: \.\.\.}, .*correct_biases: false}"
    for calibration in (None, SampleSet(samples=())):
        with pytest.raises(StageFailed, match=text):
            coreml.lower(traced_normalised, replace(request, calibration=calibration))


@pytest.mark.slow
def test_a_corrected_package_is_closer_and_its_weights_are_the_same(traced_normalised: Traced, tmp_path: Path) -> None:
    """On samples that were not used; and what was corrected for is what the package holds."""
    net, decibels, weights = normalised(), {}, {}
    for asked in (False, True):
        folder = tmp_path / str(asked)
        request = ask(folder, ODD, "fp16", "iOS18", correct_biases=asked)
        lowered = coreml.lower(traced_normalised, replace(request, calibration=samples(32, seed=1)))
        assert {v.state for v in verdicts(folder, lowered).values()} == {"pass"}
        session = coreml_interpreter.open(folder / lowered.entry, lowered.signature)
        inputs = [sample.calls[0].tensors() for sample in samples(8, seed=2)]
        found = np.stack([session.call("forward", given)["y"] for given in inputs])
        expected = np.stack([net(torch.from_numpy(given["x"])).detach().numpy() for given in inputs])
        decibels[asked] = sqnr_db(expected, found)
        assert any(note.startswith("biases make up for") for note in lowered.encodings["notes"]) is asked
        package = open_package(folder / lowered.entry)
        weights[asked] = {n: decode(package, constants(package)[f"{n}_weight_{s}"]) for n, s in ODD.items()}
    print(decibels)
    assert decibels[True] > decibels[False] + 3
    program = traced_normalised.programs["forward"]
    for weight in float_weights(program, request.assignment):
        same = rounded(weight.scheme, weight.values, weight.axis, np.float16, None).reshape(-1)
        for each in weights.values():
            np.testing.assert_array_equal(each[weight.module].reshape(-1), same)


SCHEMES = (
    *("w8", "w8t", "w8g32", "w4", "w4t", "w4g16", "palette1", "palette4", "palette6g16", "palette4s", "palette6v2"),
    *("sparse50", "sparse2of4", "sparse50-w8", "sparse75-palette4"),
)


@pytest.mark.slow
def test_every_family_is_rounded_as_it_is_stored(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in SCHEMES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    torch.manual_seed(3)
    traced = traced_of(Rows().eval(), [spec("x", 1, 64)], [spec("y", 1, 64)])
    schemes = {f"layers.{number}": scheme for number, scheme in enumerate(SCHEMES)}
    lowered = coreml.lower(traced, ask(tmp_path, schemes, "fp16", "iOS18"))
    package = open_package(tmp_path / lowered.entry)
    stored = constants(package)
    for weight in float_weights(traced.programs["forward"], ask(tmp_path, schemes, "fp16", "iOS18").assignment):
        name = re.sub(r"\W", "_", f"{weight.module}.weight.{weight.scheme}")
        found = rounded(weight.scheme, weight.values, weight.axis, np.float16, None)
        np.testing.assert_allclose(decode(package, stored[name]), found, rtol=1e-6, atol=0, err_msg=weight.scheme)
