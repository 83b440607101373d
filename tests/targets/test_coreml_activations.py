"""Static activations of 8 bits: the package computes what torch's own simulation does, and says so only if it does."""

from __future__ import annotations

import copy
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import Wrapper, ask, calibrated, formats, operations_of, spec, traced_of, verdicts
from edgebake.errors import RecipeError, StageFailed, ToolchainMissing
from edgebake.metrics import ParityMeter
from edgebake.target import About
from edgebake.types import Image8, Lowered, Traced
from edgebake_targets import _coreml_activations, _coreml_checks, coreml
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package, write_package
from edgebake_targets.inspectors import mlpackage
from edgebake_targets.runners import coreml_interpreter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Convolutions(nn.Module):
    """Normalised convolutions, one depthwise, a residual sum, a pooled linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.deep_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 6)
        for norm in (self.stem_norm, self.deep_norm):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 3, 8, 8)."""
        x = nn.functional.relu6(self.stem_norm(self.stem(x)))
        x = x + self.wide(nn.functional.relu6(self.deep_norm(self.deep(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Pre-normalised self-attention with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 10, 32)."""
        y = self.norm(x)
        query, key, value = (
            layer(y).reshape(1, 10, 4, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(1, 2).reshape(1, 10, 32))


@dataclass(frozen=True)
class Case:
    """A network, its modules that compute with weights, its input's shape, how many different values they read."""

    net: Callable[[], nn.Module]
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    values: int


CASES = {
    "convolutions": Case(Convolutions, ("stem", "deep", "wide", "head"), (1, 3, 8, 8), (1, 6), 4),
    "attention": Case(Attention, ("query", "key", "value", "out"), (1, 10, 32), (1, 10, 32), 2),
}


def float_net(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.net().eval()


def traced_float(case: Case) -> Traced:
    return traced_of(float_net(case), [spec("x", *case.shape)], [spec("y", *case.outputs)])


def float_module(case: Case) -> nn.Module:
    return Wrapper(float_net(case)).eval()


def calls(case: Case, count: int = 4, seed: int = 1) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(case.shape, generator=generator),) for _ in range(count)]


@dataclass(frozen=True)
class Built:
    """A package, with the program that it was made from."""

    case: Case
    folder: Path
    lowered: Lowered
    program: Traced

    @property
    def package(self) -> Path:
        return self.folder / self.lowered.entry


def build(
    case: Case,
    folder: Path,
    system: str = "iOS17",
    precision: str = "auto",
    schemes: dict[str, str] | None = None,
    calibration: list[tuple[torch.Tensor]] | None = None,
    **options: str | float,
) -> Built:
    request = ask(folder, schemes or dict.fromkeys(case.modules, "w8a8"), "w8a8", system, precision, **options)
    program = calibrated(traced_float(case), request, calls(case) if calibration is None else calibration)
    return Built(case, folder, coreml.lower(program, request), program)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return {name: build(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


def simulation(built: Built, *, half: bool) -> nn.Module:
    """torch's program with the weights that the package holds; ``half``: and other constants and scales as there."""
    program = copy.deepcopy(built.program.programs["forward"])
    if half:
        _coreml_activations.round_scales(program)
    module = program.module()
    package = open_package(built.package)
    held = {name: constant for name, constant in constants(package).items() if "constexpr" in constant.operator}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            weight = f"{name.removeprefix('wrapped.').replace('.', '_')}_w8a8"
            if weight in held:
                parameter.copy_(torch.from_numpy(decode(package, held.pop(weight)).reshape(parameter.shape)))
            elif half:
                parameter.copy_(parameter.half())
    assert not held
    return module


def decibels(built: Built, module: nn.Module, mode: str) -> float:
    """How close the package comes to ``module`` on values that it was not calibrated on."""
    session = coreml_interpreter.open(built.package, built.lowered.signature)
    meter = ParityMeter()
    for index, (x,) in enumerate(calls(built.case, count=8, seed=2)):
        with torch.no_grad():
            expected = {"y": module(x)[0].numpy()}
        meter.add(index, "noise", expected, session.call_mode(mode, "forward", {"x": x.numpy()})[0])
    return float(meter.measurements()["y"]["sqnr_db"])


@pytest.mark.parametrize(("name", "system"), [("convolutions", "iOS18"), ("attention", "iOS17")])
def test_a_package_of_float32_computes_what_torch_simulates(name: str, system: str, tmp_path: Path) -> None:
    built = build(CASES[name], tmp_path, system, "fp32")
    assert decibels(built, simulation(built, half=False), "fp32") > 100
    assert 35 < decibels(built, float_module(CASES[name]), "fp32") < 60  # 8 bits cost something


@pytest.mark.parametrize("name", CASES)
def test_a_package_of_float16_computes_what_torch_simulates_with_its_constants(
    name: str, built: dict[str, Built]
) -> None:
    assert decibels(built[name], simulation(built[name], half=True), "fp32") > 60
    for mode in ("declared", "fp16-worst"):
        assert 35 < decibels(built[name], float_module(CASES[name]), mode) < 60


@pytest.mark.parametrize("name", CASES)
def test_what_is_quantised_is_recorded_checked_and_shown(name: str, built: dict[str, Built]) -> None:
    case, folder = CASES[name], built[name].folder
    found = verdicts(folder, built[name].lowered)
    assert {verdict.state for verdict in found.values()} == {"pass"}
    assert found["structure.activations"].reason == "the inputs of 4 weights are uint8"
    assert {formats(built[name].package)[f"{module}_weight_w8a8"] for module in case.modules} == {"int8"}
    facts = mlpackage.inspect(built[name].package).facts
    assert facts["quantised_activations"] == {"uint8": case.values}
    assert facts["compute_precision"] == "fp16"
    encodings = built[name].lowered.encodings
    assert encodings["quantised_inputs"] == {"model.mlpackage": sorted(case.modules)}
    assert "what lies between them computes in float16" in encodings["notes"][-1]


def test_ranges_are_those_of_the_calibration_samples(built: dict[str, Built]) -> None:
    case, seen = CASES["attention"], []
    net = float_net(case)
    net.out.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for (x,) in calls(case):
            net(x)
    low, high = float(torch.stack(seen).min()), float(torch.stack(seen).max())
    record = coreml.read_checks(built["attention"].folder)["activations"]["model.mlpackage"]
    ((scale, zero_point),) = record["out_weight_w8a8"]["inputs"]
    assert (high - low) / 255 <= scale * (1 + 1e-6) <= (high - low) / 255 * (1 + 2**-10)  # rounded up to float16
    assert scale == float(np.float16(scale))
    assert zero_point == round(-low / ((high - low) / 255))
    assert record["query_weight_w8a8"]["inputs"] == record["key_weight_w8a8"]["inputs"]


def test_ranges_can_trim_outliers(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(OrderedDict(layer=nn.Linear(1024, 4)))

    scales = {}
    for kind in ("minmax", "histogram", "percentile"):
        case = Case(network, ("layer",), (256, 1024), (256, 4), 1)
        build(case, tmp_path / kind, activation_range=kind, percentile=99.0)
        record = coreml.read_checks(tmp_path / kind)["activations"]["model.mlpackage"]
        ((scales[kind], _zero_point),) = record["layer_weight_w8a8"]["inputs"]
    # 256 levels serve normal values best from -4 to 4 standard deviations; among a million, the farthest is near 5
    assert 0.75 < scales["histogram"] / scales["minmax"] < 0.95
    assert 0.5 < scales["percentile"] / scales["minmax"] < 0.6  # 99 of 100 lie within 2.58 standard deviations


def test_the_same_bytes_come_out_twice(built: dict[str, Built], tmp_path: Path) -> None:
    again = build(CASES["attention"], tmp_path)
    for file in sorted(f for f in tmp_path.rglob("*") if f.is_file()):
        assert file.read_bytes() == (built["attention"].folder / file.relative_to(again.folder)).read_bytes()


def test_only_the_modules_under_the_scheme_read_integers(tmp_path: Path) -> None:
    schemes = {"stem": "w8", "deep": "w8a8", "wide": "palette6", "head": "fp32"}
    one = build(CASES["convolutions"], tmp_path, schemes=schemes)
    assert {verdict.state for verdict in verdicts(tmp_path, one.lowered).values()} == {"pass"}
    assert mlpackage.inspect(one.package).facts["quantised_activations"] == {"uint8": 1}
    record = coreml.read_checks(tmp_path)["activations"]["model.mlpackage"]
    assert list(record) == ["deep_weight_w8a8"]
    assert decibels(one, float_module(CASES["convolutions"]), "declared") > 30


def test_a_module_that_runs_twice_is_observed_each_time(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    one = build(Case(Twice, ("layer",), (1, 8), (1, 8), 2), tmp_path)
    record = coreml.read_checks(tmp_path)["activations"]["model.mlpackage"]
    assert len(record["layer_weight_w8a8"]["inputs"]) == 2
    assert verdicts(tmp_path, one.lowered)["structure.activations"].state == "pass"


class TwoScales(nn.Module):
    """One convolution for two sizes, each with a normalisation of its own: folding would make two weights of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)
        self.large, self.small = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        nn.init.uniform_(self.small.running_var, 0.2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, 8, 12)."""
        return self.large(self.conv(x)).mean(2) + self.small(self.conv(x[:, :, ::2])).mean(2)


@pytest.mark.parametrize("scheme", [pytest.param("w8", marks=pytest.mark.slow), "w8a8"])
def test_a_shared_convolution_stays_one_weight_under_two_normalisations(scheme: str, tmp_path: Path) -> None:
    case = Case(TwoScales, ("conv",), (1, 8, 12), (1, 8), 2)
    one = build(case, tmp_path, schemes={"conv": scheme})
    assert formats(one.package) == {f"conv_weight_{scheme}": "int8"}
    assert {verdict.state for verdict in verdicts(tmp_path, one.lowered).values()} == {"pass"}
    assert decibels(one, float_module(case), "declared") > 35


def test_pixels_go_in(tmp_path: Path) -> None:
    case = CASES["convolutions"]
    taken = replace(spec("x", *case.shape), role="image")
    request = ask(tmp_path, dict.fromkeys(case.modules, "w8a8"), "w8a8", image_inputs="image")
    request = replace(request, about=About(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)))
    program = calibrated(traced_of(float_net(case), [taken], [spec("y", *case.outputs)]), request, calls(case))
    one = Built(case, tmp_path, coreml.lower(program, request), program)
    assert {verdict.state for verdict in verdicts(tmp_path, one.lowered).values()} == {"pass"}
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    x = Image8(pixels=pixels, mean=request.about.mean, std=request.about.std).to_float32()
    found = coreml_interpreter.open(one.package, one.lowered.signature).call("forward", {"x": x})["y"]
    with torch.no_grad():
        want = float_module(case)(torch.from_numpy(x))[0].numpy()
    assert np.linalg.norm(found - want) < 0.02 * np.linalg.norm(want)


def test_float32_stays_where_it_is_asked_for(tmp_path: Path) -> None:
    case = CASES["convolutions"]
    one = build(case, tmp_path, keep_float32="deep")
    assert {verdict.state for verdict in verdicts(tmp_path, one.lowered).values()} == {"pass"}
    assert mlpackage.inspect(one.package).facts["compute_precision"] == "mixed"
    assert decibels(one, float_module(case), "declared") > 35


def test_a_program_that_was_not_observed_is_refused_by_module(tmp_path: Path) -> None:
    case = CASES["attention"]
    with pytest.raises(StageFailed) as caught:
        coreml.lower(traced_float(case), ask(tmp_path, {"query": "w8a8", "out": "w8a8"}, "w8a8"))
    assert [problem.what for problem in caught.value.problems] == [
        f"{module}: its input is not quantised, so it would not compute as w8a8" for module in ("out", "query")
    ]
    assert caught.value.problems[0].where == "model.mlpackage"
    assert caught.value.problems[0].fix == ('give it a scheme with float activations: compress: {modules: {"out": w8}}')


def reading(package: Any, weight: str) -> Any:
    """The operation of ``package`` that reads the constant ``weight``."""
    return next(
        o for o in operations_of(package) if any(weight == a.name for i in o.inputs.values() for a in i.arguments)
    )


def argument(operation: Any, parameter: str) -> Any:
    return operation.inputs[parameter].arguments[0]


def maker(package: Any, value: str) -> Any:
    return next(o for o in operations_of(package) if value in (output.name for output in o.outputs))


def bypassed(package: Any, weight: str) -> None:
    """Let the product of ``weight`` read the float value, as a converter would that drops the pair."""
    product = reading(package, weight)
    quantize = maker(package, argument(maker(package, argument(product, "x").name), "input").name)
    argument(product, "x").name = argument(quantize, "input").name


def rescaled(package: Any, weight: str) -> None:
    """Give the input of the product of ``weight`` the scale of another one, in both operators."""
    dequantize = maker(package, argument(reading(package, weight), "x").name)
    quantize = maker(package, argument(dequantize, "input").name)
    others = [
        o for o in operations_of(package) if o.type == "quantize" and o.outputs[0].name != quantize.outputs[0].name
    ]
    for operation in (quantize, dequantize):
        operation.inputs["scale"].CopyFrom(others[0].inputs["scale"])


def halved(package: Any, weight: str) -> None:
    """Give only the dequantize another scale: the pair no longer hands on what it was given."""
    dequantize = maker(package, argument(reading(package, weight), "x").name)
    others = [o for o in operations_of(package) if o.type == "dequantize" and o is not dequantize]
    other = next(o for o in others if argument(o, "scale") != argument(dequantize, "scale"))
    dequantize.inputs["scale"].CopyFrom(other.inputs["scale"])


def reweighted(package: Any, weight: str) -> None:
    """Give the product another weight: its own is still there, and nothing reads it."""
    argument(reading(package, weight), "weight").name = "key_weight_w8a8"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bypassed, "out: its input is not quantised"),
        (rescaled, "out: its input has the scale"),
        (halved, "out: its input is not quantised"),
        (reweighted, "out: 0 of 1 products read its weight"),
    ],
)
def test_activations_that_are_float_or_otherwise_scaled_fail_the_check(
    change: Any, said: str, built: dict[str, Built], tmp_path: Path
) -> None:
    whole = built["attention"]
    package = open_package(whole.package)
    change(package, "out_weight_w8a8")
    weights = whole.package / "Data/com.apple.CoreML/weights/weight.bin"
    write_package(tmp_path / whole.lowered.entry, package.spec, weights)
    shutil.copy(whole.folder / _coreml_checks.CHECKS_FILE, tmp_path)
    found = verdicts(tmp_path, whole.lowered)
    assert {limit for limit, verdict in found.items() if verdict.state == "fail"} == {"structure.activations"}
    assert said in found["structure.activations"].reason


def test_what_the_scheme_needs_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RecipeError, match="coreml takes w8a8 with minimum_os iOS17 or iOS18 or macOS14 or macOS15, not iOS16"
    ):
        coreml.lower(traced_float(CASES["attention"]), ask(tmp_path, {"out": "w8a8"}, "w8a8", "iOS16"))
    with pytest.raises(StageFailed, match="need ranges from calibration samples, and there are none"):
        build(CASES["attention"], tmp_path / "none", calibration=[])
    monkeypatch.setattr(coreml, "find_spec", lambda _name: None)
    with pytest.raises(ToolchainMissing, match=r"torchao is not installed, which w8a8 needs\n.*pip install torchao"):
        coreml.quantizer(ask(tmp_path / "bare", {"out": "w8a8"}, "w8a8"))
