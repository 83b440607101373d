"""Inputs that take only some shapes: listed in the package, shared between inputs, and what Core ML does not take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from asking import defaults
from coreml_cases import ask, spec, traced_network, traced_of, verdicts
from edgebake.errors import RecipeError, UsageError
from edgebake.metrics import sqnr_db
from edgebake.target import Asked
from edgebake.trace import trace
from edgebake.types import DimBounds, Loaded, MethodSignature, Signature, TensorSpec, Traced
from edgebake_targets import _coreml_shapes, coreml
from edgebake_targets._coreml_package import open_package
from edgebake_targets.inspectors import mlpackage
from edgebake_targets.mil import MilModel

SEQ = DimBounds(min=4, max=32, sizes=(16, 4, 32))


class Attending(nn.Module):
    """Tokens that look at each other where a mask lets them: two inputs of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        """x: (1, seq, 16), mask: (1, seq)."""
        query, key, value = self.heads(x).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / 4 + (mask[:, None, :] - 1) * 1e4
        return (scores.softmax(-1) @ value,)


def attending() -> tuple[nn.Module, list[TensorSpec], list[TensorSpec]]:
    torch.manual_seed(0)
    return Attending().eval(), [spec("x", 1, "seq", 16), spec("mask", 1, "seq")], [spec("y", 1, "seq", 16)]


def traced_attention(net: nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Traced:
    method = MethodSignature(inputs=tuple(inputs), outputs=tuple(outputs))
    signature = Signature(methods={"forward": method}, dims={"seq": SEQ})
    return trace(Loaded(methods={"forward": net}, signature=signature, facts={}))


def listed(package: Path) -> dict[str, tuple[list[int], list[list[int]]]]:
    """Default and listed shapes of every input, as they are stored."""
    description = open_package(package).spec.description
    arrays = {feature.name: feature.type.multiArrayType for feature in description.input}
    return {
        name: (list(array.shape), [list(shape.shape) for shape in array.enumeratedShapes.shapes])
        for name, array in arrays.items()
    }


@pytest.mark.slow
def test_inputs_of_one_dimension_list_its_sizes_in_the_same_order(tmp_path: Path) -> None:
    net, inputs, outputs = attending()
    traced = traced_attention(net, inputs, outputs)
    lowered = coreml.lower(traced, ask(tmp_path, {"heads": "fp32"}, "fp32", "iOS18"))
    package = tmp_path / lowered.entry
    assert listed(package) == {
        "x": ([1, 16, 16], [[1, 16, 16], [1, 4, 16], [1, 32, 16]]),
        "mask": ([1, 16], [[1, 16], [1, 4], [1, 32]]),
    }
    assert [found.shape for found in mlpackage.inspect(package).inputs] == [(1, "4|16|32", 16), (1, "4|16|32")]
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    model = MilModel(package)
    for length in SEQ.sizes:
        x, mask = torch.randn(1, length, 16), (torch.arange(length) < length - 1).float()[None]
        assert sqnr_db(net(x, mask)[0].detach().numpy(), model.predict({"x": x, "mask": mask})["y"]) > 100
    with pytest.raises(UsageError, match=r"x takes float32 \(1, 16, 16\) or \(1, 4, 16\) or \(1, 32, 16\), not the"):
        model.predict({"x": torch.zeros(1, 8, 16), "mask": torch.ones(1, 8)})


@pytest.mark.slow
def test_one_input_lists_its_shapes_before_ios_18(tmp_path: Path) -> None:
    inputs, outputs = [spec("x", 1, "rows", 8)], [spec("output", 1, "rows", 4)]
    traced = traced_of(nn.Linear(8, 4), inputs, outputs, rows=DimBounds(min=2, max=6, sizes=(2, 6)))
    lowered = coreml.lower(traced, ask(tmp_path, {}, "fp32", "iOS15"))
    assert listed(tmp_path / lowered.entry) == {"x": ([1, 2, 8], [[1, 2, 8], [1, 6, 8]])}
    assert verdicts(tmp_path, lowered)["structure.inputs"].state == "pass"


def test_combinations_of_sizes_are_the_same_for_every_input() -> None:
    ct = pytest.importorskip("coremltools")
    method = MethodSignature(inputs=(spec("a", "h", "w"), spec("b", "w"), spec("c", 3)), outputs=())
    dims = {"h": DimBounds(min=1, max=2, sizes=(1, 2)), "w": DimBounds(min=5, max=9, sizes=(9, 5))}
    found = _coreml_shapes.shapes_of(ct, method, dims)
    assert [list(shape.shape) for shape in found["a"].shapes] == [[1, 9], [1, 5], [2, 9], [2, 5]]
    assert [list(shape.shape) for shape in found["b"].shapes] == [[9], [5], [9], [5]]
    assert found["c"] == [3]
    assert found["a"].symbolic_shape[1] == found["b"].symbolic_shape[0]


def asked(
    inputs: tuple[TensorSpec, ...], sizes: Mapping[str, tuple[int, ...]], system: str, *ranges: str
) -> list[tuple[str, str]]:
    found = Asked(
        scheme="fp16",
        module_schemes=(),
        options={**defaults(coreml), "minimum_os": system},
        device=None,
        inputs={"forward": inputs},
        varying=(*sizes, *ranges),
        channels=None,
        sizes=sizes,
    )
    return [(refusal.key, refusal.what) for refusal in coreml.refusals(found)]


def test_what_core_ml_does_not_take_is_refused_before_anything_runs() -> None:
    one, two = (spec("x", 1, "seq"),), (spec("x", 1, "seq"), spec("mask", 1, "seq"))
    sizes = {"seq": (16, 32)}
    assert asked(one, sizes, "iOS15") == asked(two, sizes, "iOS18") == asked(two, sizes, "macOS15") == []
    assert asked(two, sizes, "macOS14") == [
        (
            "options.minimum_os",
            "forward: before iOS 18 and macOS 15 one input may have listed shapes, here x, mask have",
        )
    ]
    assert asked((spec("x", "batch", "seq"),), sizes, "iOS18", "batch") == [
        ("dims", "forward: shapes of a Core ML function are all listed or all ranges, and batch is a range")
    ]
    many = {"seq": tuple(range(1, 17)), "batch": tuple(range(1, 10))}
    assert asked((spec("x", "batch", "seq"),), many, "iOS18") == [
        ("dims", "forward: 144 combinations of sizes, and Core ML takes 128 shapes of an input")
    ]


def test_lower_refuses_the_same_where_the_model_tells_the_inputs(tmp_path: Path) -> None:
    traced = traced_network()
    method = replace(traced.signature.methods["forward"], inputs=(spec("ids", 1, "seq"), spec("more", 1, "seq")))
    signature = replace(traced.signature, methods={"forward": method}, dims={"seq": SEQ})
    with pytest.raises(RecipeError, match="before iOS 18 and macOS 15 one input may have listed shapes"):
        coreml.lower(replace(traced, signature=signature), ask(tmp_path, {}, "fp32", "iOS17"))
