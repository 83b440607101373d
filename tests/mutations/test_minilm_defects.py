"""The shipped sentence encoder: defects of single parts fall below the limits that its recipe asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from mutations_onnx import node, swapped, weight
from onnx import numpy_helper
from tampering import EXIT_LIMIT, assert_unharmed_passes, judged, tampered

from baking import finish, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """minilm-l6 for onnx-cpu in float32 and w8a8d: the folder that holds both."""
    folder = tmp_path_factory.mktemp("minilm")
    chosen = ("build", "minilm-l6", "--only", "*@onnx-cpu#*", "--out", folder / "dist", "--store", folder / "store")
    done = finish(start(*chosen), within_s=1200)
    assert done.code == 0, done.out + done.err
    return folder / "dist" / "minilm-l6" / "model" / "onnx-cpu" / "any"


def _constant_read_by(folder: Path, operator: str, slot: int, number: int) -> str:
    """Name of the constant in input ``slot`` of the ``number``-th such operator that reads one there."""
    graph = onnx.load_model(folder / "model.onnx").graph
    stored = {i.name for i in graph.initializer}
    found = [n.input[slot] for n in graph.node if n.op_type == operator and len(n.input) > slot]
    return [name for name in found if name in stored][number]


def _square_products(folder: Path) -> list[str]:
    """Weights of 384 by 384: query, key, value and output of each layer."""
    graph = onnx.load_model(folder / "model.onnx").graph
    return [i.name for i in graph.initializer if list(i.dims) == [384, 384]]


def _half_of_channels_stronger(values: np.ndarray) -> np.ndarray:
    values[::2] *= 8
    return values


def test_two_projections_swapped(encoder: Path) -> None:
    names = _square_products(encoder / "fp32")
    folder = tampered(encoder / "fp32", "swapped", swapped(names[4], names[5]), {})
    _assert_fails(folder)


def test_one_normalisation_without_its_shift(encoder: Path) -> None:
    name = _constant_read_by(encoder / "fp32", "LayerNormalization", 2, 5)
    _assert_fails(tampered(encoder / "fp32", "shift", weight(name, np.zeros_like), {}))


def test_a_softmax_over_the_wrong_axis(encoder: Path) -> None:
    graph = onnx.load_model(encoder / "fp32" / "model.onnx").graph
    third = [n.name for n in graph.node if n.op_type == "Softmax"][2]
    _assert_fails(tampered(encoder / "fp32", "softmax", node(third, axis=2), {}))


def test_wrong_scales_of_an_int8_weight(encoder: Path) -> None:
    graph = onnx.load_model(encoder / "w8a8d" / "model.onnx").graph
    scales = [i.name for i in graph.initializer if "_scale_" in i.name and numpy_helper.to_array(i).size > 1]
    _assert_fails(tampered(encoder / "w8a8d", "scales", weight(scales[-1], _half_of_channels_stronger), {}))


@pytest.mark.parametrize("scheme", ["fp32", "w8a8d"])
def test_the_unharmed_control_signed_again_passes(scheme: str, encoder: Path) -> None:
    assert_unharmed_passes(encoder / scheme)


def _assert_fails(folder: Path) -> None:
    result, code, failed = judged(folder)
    measured = next(iter(result.measurements["outputs"].values()))["sqnr_db"]
    print(f"\nMUTATION minilm-l6 {folder.name}: {measured:.1f} dB, {sorted(failed)}")
    assert (result.state, code) == ("fail", EXIT_LIMIT), result.verdicts
    assert "parity.sqnr_db" in failed
