"""Palettes that spend their values where the outputs depend on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import ask, spec, traced_of, verdicts
from edgebake.errors import StageFailed
from edgebake.metrics import sqnr_db
from edgebake.target import LowerRequest
from edgebake.types import Assignment, Call, MethodSignature, Sample, SampleSet, Signature, TensorSpec, Traced
from edgebake_targets import _coreml_compress, _coreml_sensitivity, coreml
from edgebake_targets._coreml_weights import FloatWeight, float_weights
from edgebake_targets.runners import coreml_interpreter


class Uneven(nn.Module):
    """A convolution that is normalised, and a layer whose second half of inputs is almost always off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 4, 6)."""
        return self.last(torch.relu(self.norm(self.conv(x))).transpose(1, 2))


def uneven() -> Uneven:
    torch.manual_seed(0)
    net = Uneven()
    net.norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(net.norm.weight, 0.5, 1.5)
    with torch.no_grad():
        net.norm.bias[16:] = -1
        net.last.weight[:, 16:] *= 8
    return net.eval()


def samples(count: int, seed: int = 0) -> SampleSet:
    random = np.random.default_rng(seed)
    calls = [Call(inputs={"x": random.standard_normal((1, 4, 6)).astype(np.float32)}) for _ in range(count)]
    return SampleSet(samples=tuple(Sample(calls=(call,), source=str(i)) for i, call in enumerate(calls)))


def request_with(request: LowerRequest, calibration: SampleSet | None) -> LowerRequest:
    return replace(request, calibration=calibration)


@pytest.fixture(scope="module")
def traced_uneven() -> Traced:
    return traced_of(uneven(), [spec("x", 1, 4, 6)], [spec("y", 1, 6, 16)])


def weights_of(traced: Traced, *modules: str, scheme: str = "palette3") -> tuple[FloatWeight, ...]:
    assignment = Assignment(schemes=dict.fromkeys(modules, scheme), kinds=dict.fromkeys(modules, "linear"))
    return float_weights(traced.programs["forward"], assignment)


def exact_diagonal(given: SampleSet, conv: torch.Tensor, last: torch.Tensor) -> list[np.ndarray]:
    """Of J^T J by the folded convolution's weight and by the last layer's, summed over the samples."""
    net = uneven()
    factor = (net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()).detach()
    bias = ((net.conv.bias - net.norm.running_mean) * factor + net.norm.bias).detach()
    sums = [torch.zeros_like(conv), torch.zeros_like(last)]
    for sample in given:
        x = torch.from_numpy(sample.calls[0].tensors()["x"])

        def outputs(conv: torch.Tensor, last: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            hidden = torch.relu(torch.conv1d(x, conv, bias, padding=1)).transpose(1, 2)
            return torch.nn.functional.linear(hidden, last).flatten()

        for total, jacobian in zip(sums, torch.autograd.functional.jacobian(outputs, (conv, last)), strict=True):
            total.add_(jacobian.square().sum(0))
    return [total.numpy() for total in sums]


def test_sensitivities_estimate_the_diagonal_of_gauss_newton(traced_uneven: Traced) -> None:
    """Also of a weight into which a batch normalisation is folded, of which torch's program knows only the factors."""
    few = samples(8)
    again = SampleSet(samples=few.samples * 100)
    found = _coreml_sensitivity.weighed(weights_of(traced_uneven, "conv", "last"), traced_uneven, "forward", again)
    exact = exact_diagonal(few, *(torch.from_numpy(weight.values) for weight in found))
    for weight, diagonal in zip(found, exact, strict=True):
        assert weight.sensitivity is not None and weight.sensitivity.shape == weight.values.shape
        expected = (diagonal / diagonal.mean() + 0.1) / 1.1
        assert sqnr_db(expected, weight.sensitivity) > 20
        assert np.ptp(expected) > 1


def test_only_palettes_are_weighed_and_nothing_is_computed_without_one(traced_uneven: Traced) -> None:
    weights = (*weights_of(traced_uneven, "conv", scheme="w8"), *weights_of(traced_uneven, "last"))
    conv, last = _coreml_sensitivity.weighed(weights, traced_uneven, "forward", samples(2))
    assert conv.sensitivity is None and last.sensitivity is not None
    assert _coreml_sensitivity.weighed(weights[:1], traced_uneven, "forward", None) == weights[:1]


def test_a_palette_keeps_close_what_weighs_more() -> None:
    random = np.random.default_rng(2)
    values = random.standard_normal((64, 64)).astype(np.float32)
    sensitivity = np.where(values > 0, 1, 0.01).astype(np.float32) * random.uniform(0.5, 1, values.shape).astype("f4")
    errors = {}
    for name, weight in (("plain", None), ("weighed", sensitivity)):
        indices, table = _coreml_compress.palettise(values, 3, np.float32, weight)
        errors[name] = (sensitivity * np.square(values - table[indices])).sum()
        assert np.array_equal(indices, np.abs(values[..., None] - table).argmin(axis=-1))
    assert errors["weighed"] < 0.5 * errors["plain"]


def test_sensitive_palettes_come_closer_to_the_float_network(traced_uneven: Traced, tmp_path: Path) -> None:
    """On samples that were not used, and with the same bytes each time."""
    schemes = dict.fromkeys(("conv", "last"), "palette3")
    decibels, files = {}, {}
    for name, palettes in (("plain", "kmeans"), ("weighed", "sensitive_kmeans"), ("again", "sensitive_kmeans")):
        request = ask(tmp_path / name, schemes, "palette3", "iOS18", palettes=palettes)
        lowered = coreml.lower(traced_uneven, request_with(request, samples(32)))
        assert lowered.encodings["palettes"] == palettes
        assert {v.state for v in verdicts(tmp_path / name, lowered).values()} == {"pass"}
        session = coreml_interpreter.open(tmp_path / name / lowered.entry, lowered.signature)
        inputs = [sample.calls[0].tensors() for sample in samples(16, seed=1)]
        found = np.stack([session.call("forward", given)["y"] for given in inputs])
        expected = np.stack([uneven()(torch.from_numpy(given["x"])).detach().numpy() for given in inputs])
        decibels[name] = sqnr_db(expected, found)
        files[name] = {f.name: f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()}
    assert decibels["weighed"] > decibels["plain"] + 2
    assert files["weighed"] == files["again"] and files["weighed"] != files["plain"]


@pytest.mark.parametrize("calibration", [None, SampleSet(samples=())])
def test_sensitive_palettes_without_samples_say_what_to_add(
    traced_uneven: Traced, tmp_path: Path, calibration: SampleSet | None
) -> None:
    request = ask(tmp_path, {"last": "palette3"}, "palette3", "iOS18", palettes="sensitive_kmeans")
    text = r"samples for every method, and there is none for forward\n.*calibration: \.\.\.}, .*palettes: kmeans}"
    with pytest.raises(StageFailed, match=text):
        coreml.lower(traced_uneven, request_with(request, calibration))


def test_a_weight_that_no_output_feels_is_named() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.first(x), self.second(x).argmax(-1)

    torch.manual_seed(0)
    traced = traced_of(Chooses(), [spec("x", 1, 4, 4)], [spec("y", 1, 4, 8), spec("best", 1, 4, dtype="int64")])
    given = SampleSet(samples=(Sample(calls=(Call(inputs={"x": np.ones((1, 4, 4), np.float32)}),), source="a"),))
    weights = weights_of(traced, "first", "second")
    with pytest.raises(StageFailed, match=r"by the weight of second on .*\n.*palettes: kmeans}") as caught:
        _coreml_sensitivity.weighed(weights, traced, "forward", given)
    assert len(caught.value.problems) == 1


class Sums(nn.Module):
    """Adds what its layer makes of the input to the state that it is given, or to one of its own."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        if own:
            self.register_buffer("seen", torch.ones(1, 4))

    def forward(self, x: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x: (1, 4)."""
        if state:
            return (state[0] + self.layer(x)) ** 2, state[0] + self.layer(x)
        self.seen.add_(self.layer(x))  # type: ignore[operator]
        return (self.seen**2,)  # type: ignore[operator]


@pytest.mark.parametrize("own", [False, True])
def test_states_are_carried_within_a_sample_and_left_as_they_were(own: bool) -> None:
    """y = (h + Wx)^2 with h the sum of what came before: its gradient by W[i, j] is 2 (h + Wx)_i x_j."""
    torch.manual_seed(0)
    net = Sums(own).eval()
    start = net.seen.clone() if own else torch.zeros(1, 4)
    state = [TensorSpec(name="h", shape=(1, 4), dtype="float32", role="state", state_from="h_out")]
    inputs, outputs = (
        [spec("x", 1, 4), *([] if own else state)],
        [spec("y", 1, 4), *([] if own else [spec("h_out", 1, 4)])],
    )
    program = torch.export.export(net, tuple(torch.zeros(1, 4) for _ in inputs), strict=False)
    method = MethodSignature(inputs=tuple(inputs), outputs=tuple(outputs))
    traced = Traced(programs={"forward": program}, signature=Signature(methods={"forward": method}))
    xs = np.random.default_rng(3).standard_normal((3, 1, 4)).astype(np.float32)
    sequence = Sample(calls=tuple(Call(inputs={"x": x}) for x in xs), source="a")
    given = SampleSet(samples=(sequence,) * 300)
    (found,) = _coreml_sensitivity.weighed(weights_of(traced, "layer"), traced, "forward", given)
    seen, expected = start, torch.zeros(4, 4)
    for x in map(torch.from_numpy, xs):
        seen = seen + x @ net.layer.weight.detach().T
        expected += (2 * seen.T * x).square() + (0 if own else x.square().expand(4, 4))
    assert found.sensitivity is not None
    assert sqnr_db(((expected / expected.mean() + 0.1) / 1.1).numpy(), found.sensitivity) > 15
    assert not own or torch.equal(program.state_dict["seen"], start)
