"""The python source: a callable beside the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgebake.errors import RecipeError, StageFailed
from edgebake.models import python
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.types import Loaded

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(4, width)

    def forward(self, left, right):
        hidden = self.inner(left)
        return {"difference": hidden - self.inner(right), "nothing": None, "scale": 3,
                "past": [{"key": hidden, "value": hidden + 1}]}

def build(width=2):
    return Net(width)

def two(width=2):
    shared = Net(width)
    return {"first": shared, "second": shared}

def half():
    return Net(2).half()

def wrong():
    return "network"

def raising():
    return [][2]
"""
VECTOR = {"shape": ["n", 4]}
BOTH = {"left": VECTOR, "right": VECTOR}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "own_net.py").write_text(NET)
    return tmp_path


def load(base: Path, path: str = "own_net:build", inputs: dict[str, Any] = BOTH, **more: Any) -> Loaded:
    methods = more.pop("methods", None)
    component = Component.model_validate(
        {
            "model": {"source": "python", "path": path, **more},
            "dims": {"n": {"min": 1, "max": 8}},
            **({"methods": methods} if methods else {"inputs": inputs}),
        }
    )
    return python.load(LoadRequest(model=component.model, component=component, base=base))


def test_outputs_are_named_by_path_and_constants_dropped(base: Path) -> None:
    outputs = load(base).signature.methods["forward"].outputs
    assert [(o.name, o.shape) for o in outputs] == [
        ("difference", ("n", 2)),
        ("past.0.key", ("n", 2)),
        ("past.0.value", ("n", 2)),
    ]


def test_inputs_go_by_name_whatever_their_order_in_the_recipe(base: Path) -> None:
    a, b = torch.randn(1, 4), torch.randn(1, 4)
    straight = load(base).methods["forward"](a, b)[0]
    swapped = load(base, inputs={"right": VECTOR, "left": VECTOR}).methods["forward"](b, a)[0]
    assert torch.equal(straight, swapped)


def test_inputs_go_by_position_where_the_network_has_other_names(base: Path) -> None:
    a, b = torch.randn(1, 4), torch.randn(1, 4)
    assert torch.equal(
        load(base).methods["forward"](a, b)[0],
        load(base, inputs={"x": VECTOR, "y": VECTOR}).methods["forward"](a, b)[0],
    )


def test_options_reach_the_callable_and_wrong_ones_are_refused(base: Path) -> None:
    assert load(base, options={"width": 3}).signature.methods["forward"].outputs[0].shape == ("n", 3)
    with pytest.raises(RecipeError, match="does not take these options"):
        load(base, options={"depth": 3})


def test_untrained_networks_draw_the_same_weights_for_the_same_seed(base: Path) -> None:
    x = torch.ones(1, 4), torch.zeros(1, 4)
    first, again, other = (load(base, seed=s).methods["forward"](*x)[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_half_precision_networks_become_float32(base: Path) -> None:
    assert load(base, "own_net:half").signature.methods["forward"].outputs[0].dtype == "float32"


def test_several_methods_share_one_networks_weights(base: Path) -> None:
    loaded = load(base, "own_net:two", methods={"first": BOTH, "second": BOTH})
    first, second = (dict(m.named_parameters()) for m in loaded.methods.values())
    assert first["wrapped.inner.weight"] is second["wrapped.inner.weight"]
    assert loaded.facts["parameters"] == 10


def test_a_state_dict_is_loaded_and_one_that_does_not_fit_is_refused(base: Path) -> None:
    from safetensors.torch import save_file

    save_file({"inner.weight": torch.ones(2, 4), "inner.bias": torch.zeros(2)}, base / "w.safetensors")
    save_file({"outer.weight": torch.ones(2, 4)}, base / "other.safetensors")
    loaded = load(base, state_dict="w.safetensors")
    assert torch.equal(loaded.methods["forward"](torch.ones(1, 4), torch.zeros(1, 4))[0], torch.full((1, 2), 4.0))
    with pytest.raises(RecipeError, match=r"no weights for inner.weight; .*no module for outer.weight"):
        load(base, state_dict="other.safetensors")


def test_a_pickled_state_dict_needs_permission_and_can_hold_tensors_only(base: Path) -> None:
    torch.save({"inner.weight": torch.ones(2, 4), "inner.bias": torch.zeros(2)}, base / "w.pt")
    with pytest.raises(RecipeError, match="pickles: true"):
        load(base, state_dict="w.pt")
    assert load(base, state_dict="w.pt", pickles=True).facts["parameters"] == 10


def test_what_is_not_a_network_is_refused(base: Path) -> None:
    with pytest.raises(RecipeError, match="returned str"):
        load(base, "own_net:wrong")
    with pytest.raises(RecipeError, match="no callable 'absent'"):
        load(base, "own_net:absent")


def test_a_module_that_fails_to_import_says_why(base: Path) -> None:
    (base / "broken_net.py").write_text("import no_such_library")
    with pytest.raises(StageFailed, match="No module named 'no_such_library'"):
        load(base, "broken_net:build")


def test_shapes_that_the_network_refuses_are_told_with_its_message(base: Path) -> None:
    with pytest.raises(StageFailed, match=r"refuses left \(\d, 5\)"):
        load(base, inputs={"left": {"shape": ["n", 5]}, "right": {"shape": ["n", 5]}})


def test_two_recipes_with_a_module_of_the_same_name_get_their_own(base: Path, tmp_path: Path) -> None:
    load(base)
    other = tmp_path / "other"
    other.mkdir()
    (other / "own_net.py").write_text(NET.replace("width=2", "width=5"))
    assert load(other).signature.methods["forward"].outputs[0].shape == ("n", 5)


def test_a_state_must_be_fed_by_an_output_of_its_shape(base: Path) -> None:
    state = {"shape": ["n", 4], "role": "state"}
    with pytest.raises(RecipeError, match="has no output 'hidden'"):
        load(base, inputs={"left": VECTOR, "right": {**state, "state_from": "hidden"}})
    with pytest.raises(RecipeError, match="that feeds it is"):
        load(base, inputs={"left": VECTOR, "right": {**state, "state_from": "difference"}})


def test_what_the_callable_raises_is_said_with_its_line_and_whose_code_it_is(base: Path) -> None:
    with pytest.raises(StageFailed) as failure:
        load(base, "own_net:raising")
    (problem,) = failure.value.problems
    assert problem.what == "own_net:raising raised IndexError: list index out of range"
    assert problem.where == f"own_net.py:{NET[: NET.index('[][2]')].count(chr(10)) + 1}"
    assert "code that the recipe names" in problem.fix
