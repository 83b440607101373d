"""PT2E: dynamic sizes survive, ranges come from calibration, only the chosen modules change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgebake.compress import pt2e
from edgebake.errors import StageFailed
from edgebake.target import GraphRequest
from edgebake.types import Assignment
from edgebake_targets import _coreml_quantizer, _xnnpack_quantizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Network(torch.nn.Module):
    """Two linear layers behind an argument list of any length, as model sources wrap networks."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapped = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.wrapped(inputs[0]),)


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def quantised(schemes: dict[str, str], calibration: list[tuple[Any, ...]]) -> torch.export.ExportedProgram:
    shapes = (({0: torch.export.Dim("rows", min=2, max=64)},),)
    program = torch.export.export(network(), (torch.randn(4, 16),), dynamic_shapes=shapes, strict=False)
    quantizer = _xnnpack_quantizer.build(Assignment(schemes=schemes, kinds={}), "histogram")
    return pt2e.apply(
        GraphRequest(program=program, dynamic_shapes=shapes, quantizer=quantizer, calibration=[calibration], options={})
    )


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def calibration(scale: float = 1.0) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 16, generator=generator) * scale,) for _ in range(4)]


def test_the_result_is_close_and_takes_sizes_it_was_not_traced_with() -> None:
    program = quantised({"0": "w8a8", "2": "w8a8"}, calibration())
    x = calibration()[0][0].repeat(4, 1)
    want, got = network()(x)[0], program.module()(x)[0]
    assert torch.nn.functional.cosine_similarity(want.flatten(), got.flatten(), dim=0) > 0.999
    assert not torch.equal(want, got)


def test_modules_outside_the_assignment_stay_float() -> None:
    program = quantised({"2": "w8a8"}, calibration())
    names = operators(program)
    assert sum("dequantize_per_channel" in name for name in names) == 1
    assert "wrapped.0.weight" in program.state_dict


def test_static_and_dynamic_activations_live_in_one_network() -> None:
    names = operators(quantised({"0": "w8a8", "2": "w8a8d"}, calibration()))
    assert sum(name.endswith("choose_qparams.tensor") for name in names) == 1
    assert any(name.endswith("quantize_per_tensor.default") for name in names)


def test_static_activations_without_samples_are_refused() -> None:
    with pytest.raises(StageFailed, match="need ranges from calibration"):
        quantised({"0": "w8a8"}, [])


def test_dynamic_activations_need_no_samples() -> None:
    program = quantised({"0": "w8a8d", "2": "w8a8d"}, [])
    x = calibration()[0][0]
    want, got = network()(x)[0], program.module()(x)[0]
    assert torch.nn.functional.cosine_similarity(want.flatten(), got.flatten(), dim=0) > 0.999


def test_ranges_follow_the_calibration_samples() -> None:
    x = calibration()[0][0]
    want = network()(x)[0]

    def error(scale: float) -> float:
        program = quantised({"0": "w8a8", "2": "w8a8"}, calibration(scale))
        return float((program.module()(x)[0] - want).abs().max())

    assert error(1.0) < error(0.1)  # ranges of small samples clip
    assert error(1.0) < error(30.0)  # ranges of large samples are coarse


def test_a_clamp_behind_a_convolution_shares_its_scale() -> None:
    """A scale for the values before ReLU6 would spend most of its levels on what the clamp throws away."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(), torch.nn.Conv2d(4, 4, 3)).eval()
    image = torch.randn(1, 3, 8, 8) * 10
    program = torch.export.export(layers, (image,), strict=False)
    quantizer = _xnnpack_quantizer.build(Assignment(schemes={"0": "w8a8", "2": "w8a8"}, kinds={}), "minmax")
    done = pt2e.apply(
        GraphRequest(program=program, dynamic_shapes=None, quantizer=quantizer, calibration=[[(image,)]], options={})
    )
    first = next(node for node in done.graph.nodes if "conv2d" in str(node.target))
    (clamp,) = first.users
    assert "relu6" in str(clamp.target) or "hardtanh" in str(clamp.target)
    (quantise,) = clamp.users
    assert float(quantise.args[1]) == pytest.approx(6 / 255, rel=1e-3)


def test_the_float_program_is_left_as_it_was() -> None:
    original = network()
    program = torch.export.export(original, (torch.randn(4, 16),), strict=False)
    before = {name: value.clone() for name, value in program.state_dict.items()}
    quantizer = _xnnpack_quantizer.build(Assignment(schemes={"0": "w8a8d"}, kinds={}), "histogram")
    pt2e.apply(GraphRequest(program=program, dynamic_shapes=None, quantizer=quantizer, calibration=[], options={}))
    assert all(torch.equal(before[name], value) for name, value in program.state_dict.items())


class Sum(torch.nn.Module):
    """A layer whose results add up in a buffer, from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (16,)."""
        self.seen.add_(self.layer(x))  # type: ignore[operator]
        return self.seen + 1  # type: ignore[operator]


def observed_inputs(
    net: torch.nn.Module, module: str, x: torch.Tensor, samples: int = 1, calls: int = 1
) -> torch.export.ExportedProgram:
    """``net`` with the input of ``module`` quantised, as the Core ML target asks for it; every call is of ``x``."""
    program = torch.export.export(net.eval(), (x,), strict=False)
    quantizer = _coreml_quantizer.build(Assignment(schemes={module: "w8a8"}, kinds={}), "minmax")
    request = GraphRequest(
        program=program, dynamic_shapes=None, quantizer=quantizer, calibration=[[(x,)] * calls] * samples, options={}
    )
    done = pt2e.apply(request)
    assert any("dequantize" in name for name in operators(done))
    return done


def test_states_begin_where_they_began_before_calibration() -> None:
    torch.manual_seed(0)
    net, x = Sum(), torch.randn(16)
    program = observed_inputs(net, "layer", x)
    assert not program.state_dict["seen"].any() and not net.seen.any()  # type: ignore[operator]
    with torch.no_grad():
        assert torch.allclose(program.module()(x), net.layer(x) + 1, atol=0.02)


class Total(torch.nn.Module):
    """A layer that reads the sum of all that came in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (16,)."""
        self.seen.add_(x)  # type: ignore[operator]
        return self.layer(self.seen)


@pytest.mark.parametrize(("samples", "calls"), [(1, 1), (1, 3), (4, 3), (4, 1)])
def test_every_calibration_sample_begins_with_the_states_at_their_start(samples: int, calls: int) -> None:
    """A scale of the sums over all samples would leave fewer levels to those of one."""
    program = observed_inputs(Total(), "layer", torch.ones(16), samples, calls)
    (scale,) = [n.args[1] for n in program.graph.nodes if str(n.target).endswith("quantize_per_tensor.default")][:1]
    assert scale == pytest.approx(calls / 255, rel=1e-5)  # of unsigned bytes from 0 to the largest sum
    assert not program.state_dict["seen"].any()


def norm(channels: int) -> torch.nn.BatchNorm1d:
    made = torch.nn.BatchNorm1d(channels)
    torch.nn.init.uniform_(made.running_var, 0.2, 4)  # type: ignore[arg-type]
    return made


class TwoScales(torch.nn.Module):
    """One convolution for two sizes, each with a normalisation of its own, as detectors share their heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(8, 8, 1)
        self.large, self.small = norm(8), norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 8, length)."""
        return self.large(self.conv(x)).mean(2) + self.small(self.conv(x[:, :, ::2])).mean(2)


class ReadTwice(torch.nn.Module):
    """A convolution whose result is read with and without normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv1d(8, 8, 1), norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 8, length)."""
        y = self.conv(x)
        return y + self.norm(y)


def transposed(groups: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.ConvTranspose1d(8, 8, 3, groups=groups), norm(8))


@pytest.mark.parametrize(
    ("make", "module"),
    [
        pytest.param(TwoScales, "conv", id="two norms", marks=pytest.mark.slow),
        pytest.param(ReadTwice, "conv", id="read twice", marks=pytest.mark.slow),
        pytest.param(lambda: transposed(2), "0", id="groups", marks=pytest.mark.slow),
        pytest.param(lambda: transposed(8), "0", id="depthwise", marks=pytest.mark.slow),
    ],
)
def test_a_norm_that_torchao_would_fold_wrongly_stays(make: Callable[[], torch.nn.Module], module: str) -> None:
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(1, 8, 12)
    with torch.no_grad():
        want, got = net(x), observed_inputs(net, module, x).module()(x)
    assert float((want - got).norm() / want.norm()) < 0.02


@pytest.mark.parametrize(
    ("shapes", "inputs", "want"),
    [
        (None, 2, None),
        (({0: "a"}, None), 2, ({0: "a"}, None)),
        ({"x": {0: "a"}, "y": None}, 2, ({0: "a"}, None)),
        ((({0: "a"}, {}),), 2, ({0: "a"}, {})),
        (({0: "a"},), 1, ({0: "a"},)),
        ((({0: "a"},),), 1, ({0: "a"},)),
        (({}, {}), 2, None),
    ],
)
def test_dynamic_shapes_become_one_entry_per_input(shapes: Any, inputs: int, want: Any) -> None:
    assert pt2e.per_input(shapes, inputs) == want
