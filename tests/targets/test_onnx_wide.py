"""Activations of 16 bits where 8 lose too much: what the option names or finds, and what the graphs then hold.

The graphs of the Qualcomm target, on the CPU as they are written: no compiler and no simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from asking import defaults, lower_request
from edgebake.errors import RecipeError
from edgebake.types import Assignment, MethodSignature, Signature, TensorSpec, Traced
from edgebake_targets import onnx_qnn
from edgebake_targets._onnx import module_of
from edgebake_targets._onnx_lower import compressed_models
from edgebake_targets._onnx_wide import as_written
from onnx_cases import Wrapper, kinds_of, samples


class Spiky(torch.nn.Module):
    """Two branches; in the first, what nobody reads is a thousand times as large as what is, which 8 bits then lose."""

    def __init__(self) -> None:
        super().__init__()
        self.spiky, self.after = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1)
        self.calm = torch.nn.Conv2d(4, 4, 1)
        self.last = torch.nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.spiky.weight[0] *= 1000
            self.after.weight[:, 0] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = self.last(self.after(self.spiky(x).clamp(-500, 6000)) + torch.relu(self.calm(x)))
        return kept


def inputs(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def network() -> tuple[Wrapper, Traced]:
    torch.manual_seed(0)
    module = Wrapper(Spiky()).eval()
    spec = MethodSignature(
        inputs=(TensorSpec(name="x", shape=(1, 4, 8, 8), dtype="float32"),),
        outputs=(TensorSpec(name="y", shape=(1, 4, 8, 8), dtype="float32"),),
    )
    program = torch.export.export(module, (torch.randn(1, 4, 8, 8),), strict=False)
    return module, Traced(programs={"forward": program}, signature=Signature(methods={"forward": spec}))


def rounded(network: tuple[Wrapper, Traced], **options: Any) -> tuple[onnx.ModelProto, list[str]]:
    """The graph in w8a8 before it is compiled, and what reports say of it."""
    module, traced = network
    kinds = kinds_of(module)
    assignment = Assignment(schemes=dict.fromkeys(kinds, "w8a8"), kinds=kinds)
    request = lower_request(Path(), defaults(onnx_qnn) | options, scheme="w8a8", assignment=assignment)
    request = replace(request, calibration=samples(inputs(16, seed=2)))
    said: list[str] = []
    static = lambda *given: onnx_qnn._static(said, *given)  # noqa: E731
    return compressed_models(traced, request, onnx_qnn.OPSET, static=static)["forward"], said


def decibels(module: Wrapper, model: onnx.ModelProto) -> float:
    session, signal, noise = as_written(model), 0.0, 0.0
    for given in inputs(4, seed=3):
        with torch.no_grad():
            (wanted,) = module(torch.from_numpy(given["x"]))
        (got,) = session.run(None, given)
        signal += float((wanted.numpy() ** 2).sum())
        noise += float(((wanted.numpy() - got) ** 2).sum())
    return 10 * float(np.log10(signal / noise))


def widths(model: onnx.ModelProto) -> Mapping[str, int]:
    """Width of what each convolution reads and makes, by its module; an operator of two widths is no operator."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    bits = {onnx.TensorProto.UINT8: 8, onnx.TensorProto.UINT16: 16}
    made_by = {name: node for node in model.graph.node for name in node.output}
    read_by = {name: node for node in model.graph.node for name in node.input}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            ends = {bits[types[made_by[node.input[0]].input[2]]], bits[types[read_by[node.output[0]].input[2]]]}
            assert len(ends) == 1
            found[str(module_of(node))] = ends.pop()
    return found


def clamps(model: onnx.ModelProto) -> set[str]:
    """Those that ranges did not take in: in front of one, most levels would go to what is thrown away."""
    return {"Clip", "Relu"} & {node.op_type for node in model.graph.node}


def test_auto_finds_the_module_whose_values_8_bits_lose_and_takes_the_outputs(network: Any) -> None:
    narrow, _ = rounded(network)
    model, said = rounded(network, wide_activations="auto")
    assert set(widths(narrow).values()) == {8}
    assert widths(model) == {"spiky": 16, "after": 16, "calm": 8, "last": 16}
    assert clamps(narrow) == clamps(model) == set()
    assert decibels(network[0], model) > decibels(network[0], narrow) + 6
    (text,) = said
    assert text.startswith("wide_activations: auto: 3 of ") and text.endswith(": last, the network itself, spiky")
    assert " dB with the outputs alone, " in text and "with 16 bits everywhere" in text


def test_named_modules_are_wide_and_their_readers_with_them(network: Any) -> None:
    model, said = rounded(network, wide_activations="cal*")
    assert widths(model) == {"spiky": 8, "after": 8, "calm": 16, "last": 8}
    assert clamps(model) == set()
    assert said == []


def test_what_needs_no_16_bits_is_said_and_left(network: Any) -> None:
    model, said = rounded(network, wide_activations="spiky auto")
    assert widths(model)["calm"] == 8
    assert clamps(model) == set()
    assert said[0].startswith("wide_activations: auto: 2 of ") and said[0].endswith(": last, the network itself")


def test_ranges_of_16_bits_have_room_beyond_the_samples_but_not_beyond_a_clamp(network: Any) -> None:
    ends = []
    for wide in ("", "spiky"):
        model, _ = rounded(network, wide_activations=wide)
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        conv = next(node for node in model.graph.node if node.op_type == "Conv" and module_of(node) == "spiky")
        (rounding,) = (node for node in model.graph.node if conv.output[0] in node.input)
        scale, zero = float(stored[rounding.input[1]]), int(stored[rounding.input[2]])
        largest = np.iinfo(stored[rounding.input[2]].dtype).max
        ends.append((-zero * scale, (largest - zero) * scale))
    (low, high), (wide_low, wide_high) = ends
    assert low == pytest.approx(-500, rel=0.01) and wide_low == pytest.approx(-500, rel=0.01)  # where it is clamped
    assert wide_high == pytest.approx(2 * high, rel=0.01) and wide_high < 6000


def test_a_glob_that_matches_nothing_names_the_nearest_module(network: Any) -> None:
    with pytest.raises(RecipeError, match=r"no module with operators matches 'spikey'\n.*such as 'spiky'"):
        rounded(network, wide_activations="spikey")
