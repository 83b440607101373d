"""MilModel on packages that coremltools made: images, flexible and missing inputs, labels, functions, states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgebake.errors import UsageError
from edgebake_targets._coremltools import quiet
from edgebake_targets.mil import MilModel, Mode
from mil_packages import function, model, operation, save

SIZE = (5, 7)  # height, width


class Scaled(torch.nn.Module):
    """Channels weighted differently, so that their order shows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([0.5, 0.25, 0.125])[:channels].reshape(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, channels, height, width)."""
        return x * self.weights


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MilModel]:
    with quiet():
        import coremltools as ct

    def made(module: torch.nn.Module, *example: torch.Tensor, **options: Any) -> MilModel:
        folder = tmp_path_factory.mktemp("made")
        with quiet():
            traced = torch.jit.trace(module.eval(), example)
            given = {"minimum_deployment_target": ct.target.iOS17, "compute_precision": ct.precision.FLOAT32, **options}
            converted = ct.convert(traced, skip_model_load=True, **given)
            converted.save(str(folder / "m.mlpackage"))
        return MilModel(folder / "m.mlpackage")

    return made


def pixels(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("layout", ["RGB", "BGR", "GRAYSCALE"])
def test_images_come_in_their_layout_with_scale_and_bias(convert: Callable[..., MilModel], layout: str) -> None:
    import coremltools as ct

    channels = 1 if layout == "GRAYSCALE" else 3
    bias: Any = -1.5 if channels == 1 else [-1.0, -2.0, -3.0]
    kind = ct.ImageType(
        name="image", shape=(1, channels, *SIZE), scale=1 / 64, bias=bias, color_layout=getattr(ct.colorlayout, layout)
    )
    made = convert(Scaled(channels), torch.zeros(1, channels, *SIZE), inputs=[kind], outputs=[ct.TensorType(name="y")])
    array = pixels(*SIZE, channels)
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    planes = array.transpose(2, 0, 1)[None].astype(np.float32)
    if layout == "BGR":
        planes = planes[:, ::-1]
    offsets = np.reshape(np.asarray(bias, np.float32), (1, -1, 1, 1))
    expected = Scaled(channels)(torch.from_numpy(planes / 64 + offsets)).numpy()
    for given in (image, array):
        np.testing.assert_allclose(made.predict({"image": given})["y"], expected, rtol=1e-6)
    with pytest.raises(UsageError, match=r"image\.convert\("):
        made.predict({"image": image.convert("CMYK")})
    with pytest.raises(UsageError, match=r"the input image takes an image of \(height, width\) \(5, 7\), .*not 6 x 7"):
        made.predict({"image": pixels(6, 7, channels)})
    with pytest.raises(UsageError, match=r"pass a PIL image or a uint8 array"):
        made.predict({"image": planes})


@pytest.mark.parametrize("layout", ["RGB", "BGR", "GRAYSCALE"])
def test_images_come_out_as_pictures(convert: Callable[..., MilModel], layout: str) -> None:
    import coremltools as ct

    channels = 1 if layout == "GRAYSCALE" else 3
    colour = getattr(ct.colorlayout, layout)
    made = convert(
        torch.nn.Hardtanh(0.0, 255.0),
        torch.zeros(1, channels, *SIZE),
        inputs=[ct.TensorType(name="x", shape=(1, channels, *SIZE))],
        outputs=[ct.ImageType(name="picture", color_layout=colour)],
    )
    array = pixels(*SIZE, channels)
    planes = array.transpose(2, 0, 1)[None].astype(np.float32)
    picture = made.predict({"x": planes[:, ::-1] if layout == "BGR" else planes})["picture"]
    assert (picture.mode, picture.size) == ("L" if channels == 1 else "RGB", SIZE[::-1])
    np.testing.assert_array_equal(np.asarray(picture).reshape(array.shape), array)


def test_flexible_shapes_are_held_to_what_is_allowed(convert: Callable[..., MilModel]) -> None:
    import coremltools as ct

    enumerated = ct.EnumeratedShapes(shapes=[(1, 3), (1, 6)])
    made = convert(torch.nn.ReLU(), torch.zeros(1, 3), inputs=[ct.TensorType(name="x", shape=enumerated)])
    (name,) = made.interface.outputs
    assert made.predict({"x": np.full((1, 6), -1.0)})[name].tolist() == [[0.0] * 6]
    with pytest.raises(UsageError, match=r"the input x takes float32 \(1, 3\) or \(1, 6\), not the shape \(1, 4\)"):
        made.predict({"x": np.zeros((1, 4))})
    ranged = (1, ct.RangeDim(2, 8))
    made = convert(torch.nn.ReLU(), torch.zeros(1, 3), inputs=[ct.TensorType(name="x", shape=ranged)])
    (name,) = made.interface.outputs
    assert made.predict({"x": torch.ones(1, 8)})[name].shape == (1, 8)
    with pytest.raises(UsageError, match=r"takes float32 \(1, 2..8\), not the shape \(1, 9\)"):
        made.predict({"x": np.zeros((1, 9))})


class Added(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Both (2, 2)."""
        return x + y


def test_an_optional_input_may_be_left_out(convert: Callable[..., MilModel]) -> None:
    import coremltools as ct

    default = ct.TensorType(name="y", shape=(2, 2), default_value=np.full((2, 2), 3.0, np.float32))
    made = convert(
        Added(), torch.zeros(2, 2), torch.zeros(2, 2), inputs=[ct.TensorType(name="x", shape=(2, 2)), default]
    )
    (name,) = made.interface.outputs
    x = np.ones((2, 2), np.float32)
    assert made.predict({"x": x})[name].tolist() == [[4, 4], [4, 4]]
    assert made.predict({"x": x, "y": x})[name].tolist() == [[2, 2], [2, 2]]
    with pytest.raises(UsageError, match=r"the input x is missing\n    -> pass x: float32 \(2, 2\)"):
        made.predict({"y": x})
    with pytest.raises(UsageError, match=r"the model has no input 'z'\n    -> its inputs: x, y"):
        made.predict({"x": x, "z": x})


@pytest.mark.parametrize("labels", [["cat", "dog", "hen"], [10, 20, 30]])
def test_classifiers_give_a_label_and_its_probabilities(convert: Callable[..., MilModel], labels: list[Any]) -> None:
    import coremltools as ct

    made = convert(
        torch.nn.Softmax(dim=1),
        torch.zeros(1, 3),
        inputs=[ct.TensorType(name="x", shape=(1, 3))],
        classifier_config=ct.ClassifierConfig(labels, predicted_feature_name="label"),
    )
    x = np.array([[0.1, 2.0, -1.0]], np.float32)
    found = made.predict({"x": x})
    assert found.pop("label") == labels[1]
    (probabilities,) = found.values()
    expected = torch.softmax(torch.from_numpy(x), 1)[0].tolist()
    assert {k: pytest.approx(v, abs=1e-6) for k, v in zip(labels, expected, strict=True)} == probabilities


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (3,)."""
        self.total.add_(x.half())
        return self.total.float() * 2


def test_states_carry_on_from_call_to_call(convert: Callable[..., MilModel]) -> None:
    import coremltools as ct

    state = ct.StateType(wrapped_type=ct.TensorType(shape=(3,), dtype=np.float16), name="total")
    made = convert(
        Counter(),
        torch.zeros(3),
        inputs=[ct.TensorType(name="x", shape=(3,))],
        outputs=[ct.TensorType(name="y")],
        states=[state],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
    )
    one, other = made.make_state(), made.make_state()
    x = np.array([1, 2, 3], np.float32)
    assert [made.predict({"x": x}, state=one)["y"].tolist() for _ in range(3)][-1] == [6, 12, 18]
    assert made.predict({"x": x}, state=other)["y"].tolist() == [2, 4, 6]
    assert one.read_state("total").tolist() == [3, 6, 9]
    assert one.read_state("total").dtype == np.float16
    one.write_state("total", np.zeros(3, np.float16))
    assert made.predict({"x": x}, state=one)["y"].tolist() == [2, 4, 6]
    with pytest.raises(UsageError, match=r"the model has states\n    -> pass state=model.make_state\(\)"):
        made.predict({"x": x})
    with pytest.raises(UsageError, match=r"the state total is of the shape \(3,\), not \(2,\)"):
        one.write_state("total", np.zeros(2))
    with pytest.raises(UsageError, match=r"there is no state 'sum'\n    -> states: total"):
        one.read_state("sum")


def scaling(factor: float) -> Any:
    return function({"x": ("float32", (2,))}, [operation("mul", {"y": ("float32", (2,))}, x="%x", y=factor)], ["y"])


def test_functions_are_chosen_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "m.mlpackage", model(scaling(2.0), adapter=scaling(7.0)))
    x = np.array([1, 10], np.float32)
    assert MilModel(path).predict({"x": x})["y"].tolist() == [2, 20]
    adapter = MilModel(path, function="adapter")
    assert adapter.predict({"x": x})["y"].tolist() == [7, 70]
    assert adapter.functions == ("adapter", "main")
    with pytest.raises(UsageError, match=r"there is no function 'lora'\n    -> functions: adapter, main"):
        MilModel(path, function="lora")


def test_types_are_checked_and_values_inside_can_be_read(tmp_path: Path) -> None:
    ops = [
        operation("cast", {"h": ("float16", (2,))}, x="%x", dtype="fp16"),
        operation("exp", {"e": ("float16", (2,))}, x="%h"),
        operation("add", {"n2": ("int32", (2,))}, x="%n", y=1),
        operation("cast", {"y": ("float32", (2,))}, x="%e", dtype="fp32"),
    ]
    main = function({"x": ("float32", (2,)), "n": ("int32", (2,))}, ops, ["y", "n2"])
    made = MilModel(save(tmp_path / "m.mlpackage", model(main)))
    given = {"x": np.array([0.3, 12.0], np.float32), "n": np.array([1, 2])}
    found = made.predict(given)
    assert (found["y"].dtype, found["n2"].dtype, found["n2"].tolist()) == (np.float32, np.int32, [2, 3])
    assert np.isinf(found["y"][1])
    np.testing.assert_allclose(made.predict(given, mode=Mode.FP32)["y"], np.exp(given["x"]), rtol=1e-6)
    inside = made.intermediates(given, ["e", "h", "nothing"])
    assert sorted(inside) == ["e", "h"]
    assert inside["h"][0] == np.float16(0.3)
    with pytest.raises(UsageError, match=r"the input n takes int32 \(2\), not float64"):
        made.predict({**given, "n": np.array([1.0, 2.0])})
    with pytest.raises(UsageError, match="the input n holds integers that int32 cannot"):
        made.predict({**given, "n": np.array([1, 2**40])})


def test_the_interpreter_needs_no_coremltools_import(tmp_path: Path) -> None:
    """10 s and half a GB, which every run would pay."""
    import subprocess
    import sys

    path = save(tmp_path / "m.mlpackage", model(scaling(2.0)))
    script = (
        "import sys; from edgebake_targets.mil import MilModel; import numpy as np; "
        f"print(MilModel({str(path)!r}).predict({{'x': np.ones(2)}})['y'].tolist(), 'coremltools' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=_paths())
    assert done.stdout.strip() == "[2.0, 2.0] False"


def _paths() -> dict[str, str]:
    import os
    import sys

    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
