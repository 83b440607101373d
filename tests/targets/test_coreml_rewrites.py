"""What is mended around coremltools' converter: each rewrite computes what torch computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asking import lower_request
from edgebake.types import MethodSignature, TensorSpec
from edgebake_targets import _coreml, _coreml_precision, _coreml_rewrites
from edgebake_targets._coremltools import quiet

REQUEST = lower_request(Path(), {"minimum_os": "iOS18", "compute_precision": "auto"})


class Call(nn.Module):
    """A function of the input and two constants."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("a", torch.tensor([[-7.5, 7.5, 5.0], [-1.0, 0.25, 9.0]]))
        self.register_buffer("b", torch.tensor([[2.0, -2.0, 3.0], [3.0, 2.0, 4.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (2, 3)."""
        return x + self.function(self.a, self.b)


def converted(program: torch.export.ExportedProgram, *shapes: tuple[int, ...], out: tuple[int, ...]) -> Any:
    inputs = tuple(TensorSpec(name=f"x{i}", shape=shape, dtype="float32") for i, shape in enumerate(shapes))
    method = MethodSignature(inputs=inputs, outputs=(TensorSpec(name="y", shape=out, dtype="float32"),))
    with quiet():
        import coremltools as ct

        precision = _coreml_precision.precision(ct, program, REQUEST, {}, ())
        return _coreml._convert_once(program, method, {}, REQUEST, precision, {})


@pytest.mark.parametrize(
    "function",
    [
        torch.fmod,
        lambda a, b: torch.ops.aten.alias(a) * b,
        lambda a, b: a.new_ones((2, 3)) + b,
        lambda a, b: a.new_ones((2, 3), dtype=torch.int32) + b,
    ],
    ids=["fmod", "alias", "new_ones", "new_ones of another dtype"],
)
def test_a_translated_operator_computes_what_torch_does(function: Callable[..., torch.Tensor]) -> None:
    net = Call(function).eval()
    program = torch.export.export(net, (torch.zeros(2, 3),), strict=False).run_decompositions({})
    mil = converted(program, (2, 3), out=(2, 3))
    # Constants were computed by MIL's own inference, so the only operator left adds their value to the input.
    (add,) = [op for op in mil.functions["main"].operations if op.op_type == "add"]
    constant = add.y.val if add.y.val is not None else add.x.val
    np.testing.assert_allclose(constant, net(torch.zeros(2, 3)).numpy(), rtol=1e-6)


def test_the_table_of_operators_is_restored() -> None:
    with quiet():
        from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY as REGISTRY

    before = dict(REGISTRY.name_to_func_mapping)
    named = {name for entry in _coreml_rewrites.TRANSLATIONS for name in entry.names}
    assert not named & before.keys(), "coremltools translates these itself now: take them out of TRANSLATIONS"
    with _coreml_rewrites.translations():
        assert REGISTRY.get_func("fmod") is _coreml_rewrites._fmod
    assert before == REGISTRY.name_to_func_mapping
    REGISTRY.name_to_func_mapping["fmod"] = before["add"]
    try:
        with _coreml_rewrites.translations():
            assert REGISTRY.get_func("fmod") is before["add"]  # what a later coremltools does itself stays
    finally:
        del REGISTRY.name_to_func_mapping["fmod"]


class Attention(nn.Module):
    """Grouped-query attention with an explicit scale, as transformers calls it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q: (1, 6, 5, 16); k, v: (1, 2, 5, 16)."""
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)


SHAPES = ((1, 6, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16))


@pytest.mark.parametrize(("scale", "fused"), [(0.25, 1), (0.3, 0)])
def test_attention_is_fused_where_core_ml_can_and_stays_the_same(scale: float, fused: int) -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape) for shape in SHAPES)
    _, table = next(iter(_coreml._tables()))
    program = torch.export.export(Attention(scale), inputs, strict=False).run_decompositions(table)
    expected = Attention(scale)(*inputs)
    _coreml_rewrites.rewrite_attention(program)
    torch.testing.assert_close(program.module()(*inputs), expected)
    operators = Counter(op.op_type for op in converted(program, *SHAPES, out=SHAPES[0]).functions["main"].operations)
    assert operators["scaled_dot_product_attention"] == fused


def test_heads_are_repeated_for_any_length() -> None:
    sequence = torch.export.Dim("seq", min=2, max=16)
    inputs = tuple(torch.randn(shape) for shape in SHAPES)
    program = torch.export.export(Attention(0.25), inputs, dynamic_shapes=({2: sequence},) * 3, strict=False)
    decomposed = program.run_decompositions(next(iter(_coreml._tables()))[1])
    _coreml_rewrites.rewrite_attention(decomposed)
    for length in (3, 9):
        inputs = tuple(torch.randn(*shape[:2], length, shape[3]) for shape in SHAPES)
        torch.testing.assert_close(decomposed.module()(*inputs), Attention(0.25)(*inputs))


class Reshaped(nn.Module):
    """Views with -1 and an expansion that changes nothing, as transformers writes them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, sequence, 12)."""
        split = x.expand(1, x.shape[1], 12).view(1, x.shape[1], -1, 4)
        return split.expand(1, -1, 3, 4).reshape(1, x.shape[1], -1)


def test_known_sizes_are_written_out_and_the_network_stays_the_same() -> None:
    sequence = torch.export.Dim("seq", min=2, max=16)
    program = torch.export.export(Reshaped(), (torch.randn(1, 6, 12),), dynamic_shapes=({1: sequence},), strict=False)
    decomposed = program.run_decompositions({})
    _coreml_rewrites.state_sizes(decomposed)
    targets = [str(n.target) for n in decomposed.graph.nodes if n.op == "call_function"]
    assert not any("expand" in target for target in targets)
    sizes = [n.args[1] for n in decomposed.graph.nodes if "view" in str(n.target) or "reshape" in str(n.target)]
    assert sizes[0][0] == 1
    assert sizes[0][2:] == [3, 4]
    for length in (2, 6, 11):
        x = torch.randn(1, length, 12)
        torch.testing.assert_close(decomposed.module()(x), Reshaped()(x))
