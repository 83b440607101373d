"""Tracing: programs that are proven equal to eager, and errors in the recipe's words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgebake import trace
from edgebake.errors import RecipeError, StageFailed
from edgebake.models import _shared
from edgebake.recipe import Component
from edgebake.types import DimBounds, Loaded, MethodSignature, Signature, TensorSpec


class Function(nn.Module):
    """A network from a function, with one linear layer to have weights."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(self.linear(x))


def loaded(function: Callable[..., object], minimum: int = 2, maximum: int = 32) -> Loaded:
    component = Component.model_validate(
        {
            "model": {"source": "python", "path": "m:f"},
            "inputs": {"x": {"shape": [1, "seq", 4]}},
            "dims": {"seq": {"min": minimum, "max": maximum}},
        }
    )
    network = Function(function).eval().requires_grad_(False)
    return _shared.finish(component, {"forward": network}, lambda net, given: net(**given), {})


def test_a_program_runs_at_every_size_of_its_dimension() -> None:
    model = loaded(torch.relu, minimum=1)
    traced = trace.trace(model)
    for size in (1, 2, 17, 32):
        x = torch.randn(1, size, 4)
        torch.testing.assert_close(traced.programs["forward"].module()(x)[0], model.methods["forward"](x)[0])


def test_exported_placeholders_carry_the_recipes_names() -> None:
    program = trace.trace(loaded(torch.relu)).programs["forward"]
    assert [n.name for n in program.graph.nodes if n.op == "placeholder"][-1] == "x"


def test_a_dimension_with_one_size_is_exported_fixed() -> None:
    model = loaded(torch.relu, minimum=8, maximum=8)
    assert trace.dynamic_shapes(model.signature.methods["forward"], model.signature.dims) is None
    assert model.signature.methods["forward"].outputs[0].shape == (1, 8, 4)
    assert "forward" in trace.trace(model).programs


def test_a_dimension_that_the_network_fixes_is_named_with_its_input() -> None:
    model = loaded(lambda h: h * torch.ones(int(h.shape[1]), 1))
    with pytest.raises(
        StageFailed, match=r"dimension 'seq' of x\[1\] cannot vary from 2 to 32: .* fixes it at the size"
    ):
        trace.trace(model)


def test_a_dimension_that_the_network_restricts_is_named_with_a_suggestion() -> None:
    model = loaded(lambda h: h + 1 if h.shape[1] > 2 else h)
    with pytest.raises(StageFailed, match=r"dimension 'seq' of x\[1\] cannot vary") as caught:
        trace.trace(model)
    assert "narrow dims" in str(caught.value)


def test_a_network_that_cannot_be_traced_says_why() -> None:
    with pytest.raises(StageFailed, match=r"torch\.export cannot trace the network"):
        trace.trace(loaded(lambda h: h if float(h.sum()) > 0 else -h))


def test_outputs_that_are_not_finite_stop_the_build() -> None:
    with pytest.raises(StageFailed, match=r"output 'output' of the float model is not finite"):
        trace.trace(loaded(lambda h: torch.log(h - h)))


def test_a_value_baked_in_while_tracing_is_found_out() -> None:
    calls = []

    def counting(h: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return h * len(calls)

    with pytest.raises(StageFailed, match="differs from eager"):
        trace.trace(loaded(counting))


def test_an_output_axis_that_is_not_the_dimension_itself_is_refused() -> None:
    with pytest.raises(StageFailed, match=r"axis 1 of output 'output' is \d+ at seq=\d+"):
        loaded(lambda h: torch.cat([h, h], dim=1))


def test_networks_leave_training_mode() -> None:
    model = loaded(nn.Dropout(0.5))
    model.methods["forward"].train()
    program = trace.trace(model).programs["forward"]
    x = torch.randn(1, 5, 4)
    assert torch.equal(program.module()(x)[0], program.module()(x)[0])


def signature(*specs: TensorSpec, **dims: tuple[int, int]) -> Signature:
    bounds = {name: DimBounds(min=low, max=high) for name, (low, high) in dims.items()}
    return Signature(methods={"forward": MethodSignature(inputs=specs, outputs=())}, dims=bounds)


def test_example_inputs_are_seeded_and_fit_every_network() -> None:
    tokens = ("batch", "seq")
    interface = signature(
        TensorSpec(name="input_ids", shape=tokens, dtype="int64"),
        TensorSpec(name="attention_mask", shape=tokens, dtype="int64"),
        TensorSpec(name="position_ids", shape=tokens, dtype="int64"),
        TensorSpec(name="image", shape=(1, 3), dtype="uint8"),
        TensorSpec(name="noise", shape=(1, 3), dtype="float32"),
        batch=(1, 4),
        seq=(1, 64),
    )
    first, again = (trace.example_inputs(interface, "forward", 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[4], trace.example_inputs(interface, "forward", 4)[4])
    ids, mask, positions, image, _ = first
    assert 0 <= int(ids.min()) <= int(ids.max()) < 16
    assert bool((mask == 1).all()) and image.dtype == torch.uint8
    assert positions[0].tolist() == list(range(ids.shape[1]))
    assert 1 < ids.shape[0] != ids.shape[1] > 1
    assert trace.example_inputs(interface, "forward", 3, "max")[0].shape == (4, 64)


def test_dynamic_shapes_share_one_dimension_between_inputs() -> None:
    spec = TensorSpec(name="a", shape=(1, "seq"), dtype="int64")
    interface = signature(spec, TensorSpec(name="b", shape=("seq", 2), dtype="int64"), seq=(2, 9))
    shapes = trace.dynamic_shapes(interface.methods["forward"], interface.dims)
    assert shapes is not None
    assert shapes[0][1] is shapes[1][0]
    assert (shapes[0][1].min, shapes[0][1].max) == (2, 9)


def test_a_dimension_without_bounds_is_refused() -> None:
    interface = signature(TensorSpec(name="a", shape=(1, "seq"), dtype="int64"))
    with pytest.raises(RecipeError, match="'seq' has no bounds"):
        trace.dynamic_shapes(interface.methods["forward"], interface.dims)


def test_the_inventory_lists_what_rules_can_name_once() -> None:
    from transformers.pytorch_utils import Conv1D

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.conv = nn.ConvTranspose2d(3, 4, 2, bias=False)
            self.norm = nn.LayerNorm(4)
            self.gpt = Conv1D(6, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.again = self.head

    wrapper = nn.Module()
    wrapper.wrapped = nn.Module()
    wrapper.wrapped.wrapped = Net()
    assert [(m.name, m.kind, m.parameters) for m in trace.module_inventory(wrapper)] == [
        ("embed", "embedding", 40),
        ("conv", "conv", 48),
        ("gpt", "linear", 30),
        ("head", "linear", 40),
    ]


class Tied(nn.Module):
    """An embedding and a head that reads the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 4), nn.Linear(4, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(ids))
        return out


def test_rules_can_name_a_head_that_is_tied_to_the_embedding() -> None:
    model = {"source": "python", "path": "m:f"}
    component = Component.model_validate({"model": model, "inputs": {"ids": {"shape": [1, 4], "dtype": "int64"}}})
    network = Tied().eval().requires_grad_(False)
    made = _shared.finish(component, {"forward": network}, lambda net, given: net(**given), {})
    assert [module.name for module in trace.live_modules(made)] == ["embedding", "head"]
