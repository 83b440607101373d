"""The runner: packages of the coreml target run on any system, module by module and mode by mode."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coreml_cases import ask, everywhere, network, spec, traced_network, traced_of
from edgebake import runclient, signatures
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.locate import float_values
from edgebake.metrics import sqnr_db
from edgebake.reference import write
from edgebake.target import NotMeasured, runners_of
from edgebake.types import Call, Lowered, MethodSignature, ReferenceCall, Sample, SampleSet, Signature
from edgebake_targets import coreml
from edgebake_targets.runners import coreml_interpreter
from mil_packages import block, function, model, operation, save

IDS = np.arange(12, dtype=np.int64)[None] % 50


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Lowered]]:
    traced = traced_network()
    made = {}
    for scheme in ("fp32", "fp16", "w8"):
        folder = tmp_path_factory.mktemp(scheme)
        made[scheme] = folder, coreml.lower(traced, ask(folder, everywhere(scheme), scheme))
    return made


def opened(lowered: dict[str, tuple[Path, Lowered]], scheme: str) -> coreml_interpreter.InterpreterSession:
    folder, made = lowered[scheme]
    return coreml_interpreter.open(folder / made.entry, made.signature)


@pytest.mark.parametrize(("scheme", "least"), [("fp32", 120), ("fp16", 55), ("w8", 30)])
def test_outputs_are_those_of_the_float_network(
    lowered: dict[str, tuple[Path, Lowered]], scheme: str, least: float
) -> None:
    session = opened(lowered, scheme)
    found = session.call("forward", {"ids": IDS})
    expected = dict(zip(("hidden", "logits"), network()(torch.from_numpy(IDS)), strict=True))
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert sqnr_db(value.detach().numpy(), found[name]) > least


@pytest.mark.parametrize(("scheme", "least"), [("fp32", 120), ("fp16", 55)])
def test_values_inside_come_by_module_name(lowered: dict[str, tuple[Path, Lowered]], scheme: str, least: float) -> None:
    """A convolution with its normalisation folded in shows under the normalisation's name."""
    floats = float_values(network(), [torch.from_numpy(IDS)])
    found = opened(lowered, scheme).intermediates("forward", {"ids": IDS}, [*floats, "nobody"])
    assert set(found) == {"embed", "norm", "up_norm", "first", "last"}
    for module, value in found.items():
        assert value.shape == floats[module].shape, module
        assert sqnr_db(floats[module], value) > least, module


def test_modes_are_offered_where_there_is_float16(lowered: dict[str, tuple[Path, Lowered]]) -> None:
    assert opened(lowered, "fp32").modes == ()
    session = opened(lowered, "fp16")
    assert session.modes == ("fp32", "declared", "fp16-worst")
    expected = network()(torch.from_numpy(IDS))[1].detach().numpy()
    found = {mode: session.call_mode(mode, "forward", {"ids": IDS}) for mode in session.modes}
    decibels = [sqnr_db(expected, outputs["logits"]) for outputs, _ in found.values()]
    assert decibels == sorted(decibels, reverse=True)
    assert len(set(decibels)) == 3
    assert all(strange == {} for _, strange in found.values())


def test_without_a_record_there_are_no_modules(lowered: dict[str, tuple[Path, Lowered]], tmp_path: Path) -> None:
    folder, made = lowered["fp32"]
    shutil.copytree(folder / made.entry, tmp_path / made.entry)
    session = coreml_interpreter.open(tmp_path / made.entry, made.signature)
    assert session.intermediates("forward", {"ids": IDS}, ["embed"]) == {}


def test_each_method_has_its_package(tmp_path: Path) -> None:
    """The entry names the first one; the others lie beside it."""
    methods = {}
    for name, factor in (("prefill", 2.0), ("decode", 3.0)):
        ops = [operation("mul", {"y": ("float32", (2,))}, x="%x", y=factor)]
        save(tmp_path / f"{name}.mlpackage", model(function({"x": ("float32", (2,))}, ops, ["y"])))
        methods[name] = MethodSignature(inputs=(spec("x", 2),), outputs=(spec("y", 2),))
    session = coreml_interpreter.open(tmp_path / "prefill.mlpackage", Signature(methods=methods))
    x = np.ones(2, np.float32)
    assert [session.call(m, {"x": x})["y"].tolist() for m in methods] == [[2, 2], [3, 3]]


def test_scalars_keep_their_rank(tmp_path: Path) -> None:
    """Core ML has no scalars: they go in and come out as vectors of one."""

    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """x: ()."""
            return x * 2

    made = coreml.lower(traced_of(Scale(), [spec("x")], [spec("y")]), ask(tmp_path, {}, "fp32"))
    session = coreml_interpreter.open(tmp_path / made.entry, made.signature)
    y = session.call("forward", {"x": np.array(1.5, np.float32)})["y"]
    assert (y.shape, float(y)) == ((), 3.0)


CANNOT = {
    "warp": r"operator warp \(1 times\) cannot be interpreted",
    "random_normal": r"the program draws random numbers \(random_normal\), others on every system",
}


@pytest.mark.parametrize("operator", CANNOT)
def test_what_it_cannot_judge_is_not_measured(tmp_path: Path, operator: str) -> None:
    ops = [operation(operator, {"y": ("float32", (2,))}, shape=[2])]
    path = save(tmp_path / "m.mlpackage", model(function({"x": ("float32", (2,))}, ops, ["y"])))
    methods = {"forward": MethodSignature(inputs=(spec("x", 2),), outputs=(spec("y", 2),))}
    with pytest.raises(NotMeasured, match=CANNOT[operator]):
        coreml_interpreter.open(path, Signature(methods=methods))


def test_a_use_that_it_cannot_evaluate_is_not_measured(tmp_path: Path) -> None:
    ops = [operation("cast", {"y": ("float32", (2,))}, x="%x", dtype="fp7")]
    save(tmp_path / "m.mlpackage", model(function({"x": ("float32", (2,))}, ops, ["y"])))
    methods = {"forward": MethodSignature(inputs=(spec("x", 2),), outputs=(spec("y", 2),))}
    session = coreml_interpreter.open(tmp_path / "m.mlpackage", Signature(methods=methods))
    with pytest.raises(NotMeasured, match=r"cast y: .*fp7"):
        session.call("forward", {"x": np.ones(2, np.float32)})


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    given = {"x": np.ones(2, np.float32)}
    folder = tmp_path / "reference"
    folder.mkdir()
    samples = SampleSet(samples=(Sample(calls=(Call(inputs=given),), source="s"),))
    write(folder, samples, [(ReferenceCall(method="forward", inputs=given, outputs={"y": given["x"]}),)], {})
    return folder


PROMISED = Signature(methods={"forward": MethodSignature(inputs=(spec("x", 2),), outputs=(spec("y", 2),))})


def test_the_host_tells_what_cannot_be_measured(tmp_path: Path, recorded: Path) -> None:
    ops = [operation("warp", {"y": ("float32", (2,))}, x="%x")]
    path = save(tmp_path / "m.mlpackage", model(function({"x": ("float32", (2,))}, ops, ["y"])))
    with runclient.opened("coreml-interpreter", path, signatures.to_json(PROMISED), recorded) as client:
        assert client.opened == {"not_measured": "operator warp (1 times) cannot be interpreted"}


def test_a_later_call_that_cannot_be_evaluated_is_a_failure_in_words(tmp_path: Path, recorded: Path) -> None:
    """The choice is made by the values: the largest sample took the other branch."""
    yes = block([operation("cast", {"a": ("float32", (2,))}, x="%x", dtype="fp7")], ["a"])
    ops = [
        operation("reduce_sum", {"sum": ("float32", ())}, x="%x", axes=[0], keep_dims=False),
        operation("less", {"few": ("bool", ())}, x="%sum", y=0.0),
        operation("cond", {"y": ("float32", (2,))}, [yes, block([], ["x"])], pred="%few"),
    ]
    path = save(tmp_path / "m.mlpackage", model(function({"x": ("float32", (2,))}, ops, ["y"])))
    given = {"x": np.full(2, -1, np.float32)}
    folder = tmp_path / "two"
    folder.mkdir()
    inputs = [*[{"x": np.ones(2, np.float32)}] * 3, given]
    samples = SampleSet(samples=tuple(Sample(calls=(Call(inputs=i),), source="s") for i in inputs))
    write(folder, samples, [(ReferenceCall(method="forward", inputs=i, outputs={"y": i["x"]}),) for i in inputs], {})
    with (
        runclient.opened("coreml-interpreter", path, signatures.to_json(PROMISED), folder) as client,
        pytest.raises(StageFailed, match=r"ran on other inputs, and not on these: .*cast a: .*fp7"),
    ):
        client.outputs()


def test_the_host_tells_what_is_damaged_in_the_runners_words(tmp_path: Path, recorded: Path) -> None:
    ops = [operation("relu", {"y": ("float32", (2,))}, x="%nobody")]
    path = save(tmp_path / "m.mlpackage", model(function({"x": ("float32", (2,))}, ops, ["y"])))
    with (
        pytest.raises(ArtifactDamaged, match="relu y: x reads 'nobody', which nothing before it defines") as caught,
        runclient.opened("coreml-interpreter", path, signatures.to_json(PROMISED), recorded),
    ):
        pass
    assert "Traceback" not in str(caught.value)


def test_apples_own_runtime_goes_first() -> None:
    assert [name for name, _ in runners_of("coreml")] == ["coreml-macos", "coreml-interpreter"]
    assert coreml_interpreter.missing() is None
    assert "edgebake_targets.mil.ops.conv" in coreml_interpreter.SOURCES
