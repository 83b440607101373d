"""Integer weights before tracing: only what is assigned changes, and group sizes must divide."""

from __future__ import annotations

import copy

import pytest
import torch

from edgebake.compress import quantize_weights
from edgebake.errors import RecipeError
from edgebake.target import ModuleRequest
from edgebake.types import Assignment, ModuleKind

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Network(torch.nn.Module):
    """A table and two linear layers under ``wrapped``."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.wrapped = torch.nn.ModuleDict(
            {
                "table": torch.nn.Embedding(50, width, padding_idx=0),
                "first": torch.nn.Linear(width, 32),
                "second": torch.nn.Linear(32, 8),
            }
        )

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        hidden = self.wrapped["first"](self.wrapped["table"](ids))
        return (self.wrapped["second"](torch.relu(hidden)),)


KINDS: dict[str, ModuleKind] = {"table": "embedding", "first": "linear", "second": "linear"}
IDS = torch.arange(16).reshape(1, 16)


def apply(module: torch.nn.Module, schemes: dict[str, str]) -> torch.nn.Module:
    assignment = Assignment(schemes=schemes, kinds=KINDS)
    return quantize_weights.apply(
        ModuleRequest(module=module, assignment=assignment, options={}, run_calibration=lambda _: None)
    )


def network(width: int = 64) -> Network:
    torch.manual_seed(0)
    return Network(width).eval()


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))


def test_only_assigned_modules_change() -> None:
    done = apply(network(), {"first": "w4g32a8d"})
    parts = done.wrapped
    assert type(parts["first"].weight) is not torch.nn.Parameter
    assert type(parts["second"].weight) is torch.nn.Parameter
    assert type(parts["table"].weight) is torch.nn.Parameter


def test_four_bits_have_fifteen_levels_per_group() -> None:
    done = apply(network(), {"first": "w4g32a8d"})
    weight = done.wrapped["first"].weight
    values = weight.qdata
    assert values.min() >= -8
    assert values.max() <= 7
    assert weight.scale.shape == (32, 2)


def test_an_int8_table_is_close_and_a_quarter_the_size() -> None:
    want = network()(IDS)[0]
    done = apply(network(), {"table": "w8"})
    assert done.wrapped["table"].weight.qdata.dtype == torch.int8
    assert 0.9999 < cosine(done(IDS)[0], want) < 1.0


@pytest.mark.parametrize(
    ("scheme", "bits", "scales", "least"), [("w8", 8, (32, 1), 0.9999), ("w4g32", 4, (32, 2), 0.98)]
)
def test_linear_weights_alone_become_integers(scheme: str, bits: int, scales: tuple[int, int], least: float) -> None:
    want = network()(IDS)[0]
    done = apply(network(), {"first": scheme})
    weight = done.wrapped["first"].weight
    assert weight.target_dtype == getattr(torch, f"int{bits}")
    assert 2 ** (bits - 1) - 2 <= int(weight.qdata.abs().max()) <= 2 ** (bits - 1)
    assert tuple(weight.scale.shape) == scales
    assert weight.activation_quantization is None
    assert least < cosine(done(IDS)[0], want) < 1.0


def test_a_group_that_does_not_divide_is_refused_with_the_module_and_its_size() -> None:
    with pytest.raises(RecipeError, match="divisible by 32, but first has 48") as caught:
        apply(network(width=48), {"first": "w4g32a8d", "second": "w4g32a8d"})
    assert len(caught.value.problems) == 1


def test_schemes_of_other_methods_are_left_alone() -> None:
    done = apply(network(), {"first": "w8a8", "second": "w8a8d", "table": "fp16"})
    assert all(type(part.weight) is torch.nn.Parameter for part in done.wrapped.values())


def test_the_float_network_keeps_its_weights() -> None:
    original = network()
    memo = {id(parameter): parameter for parameter in original.parameters()}
    shared = copy.deepcopy(original, memo)
    want = original(IDS)[0]
    apply(shared, {"first": "w4g32a8d", "table": "w8"})
    assert torch.equal(original(IDS)[0], want)
    assert original.wrapped["table"].padding_idx == 0
