"""The exported source: .pt2 files count as code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgebake import trace
from edgebake.errors import RecipeError, TrustError
from edgebake.models import exported
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.types import Loaded


def load(base: Path, trust: bool = True, path: str = "net.pt2") -> Loaded:
    component = Component.model_validate(
        {
            "model": {"source": "exported", "path": path},
            "inputs": {"a": {"shape": ["n", 3]}, "b": {"shape": ["n", 3]}},
            "dims": {"n": {"min": 2, "max": 9}},
        }
    )
    return exported.load(LoadRequest(model=component.model, component=component, base=base, trust=trust))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.inner(x - y)


def write(network: torch.nn.Module, file: Path, dtype: torch.dtype = torch.float32) -> None:
    n = torch.export.Dim("n", min=2, max=9)
    x, y = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)  # one tensor twice would be traced as one
    torch.export.save(torch.export.export(network, (x, y), dynamic_shapes=({0: n}, {0: n})), file)


def test_an_exported_program_is_loaded_only_with_trust(tmp_path: Path) -> None:
    write(Net(), tmp_path / "net.pt2")
    with pytest.raises(TrustError, match="--trust"):
        load(tmp_path, trust=False)
    assert load(tmp_path).facts["parameters"] == 8


def test_its_inputs_go_by_position_and_it_can_be_traced_again(tmp_path: Path) -> None:
    network = Net()
    write(network, tmp_path / "net.pt2")
    loaded = load(tmp_path)
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(loaded.methods["forward"](a, b)[0], network(a, b))
    program = trace.trace(loaded).programs["forward"]
    torch.testing.assert_close(program.module()(a, b)[0], network(a, b))


def test_a_half_precision_program_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    write(Net().half(), tmp_path / "net.pt2", torch.float16)
    with pytest.raises(RecipeError, match=r"torch.float16, not float32"):
        load(tmp_path)
    (tmp_path / "net.pt2").write_bytes(b"not a program")
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load(tmp_path)


class Nested(torch.nn.Module):
    def forward(self, both: tuple[torch.Tensor, torch.Tensor], *, scale: torch.Tensor) -> torch.Tensor:
        return (both[0] - both[1]) * scale


def test_inputs_are_put_back_into_the_tuples_and_keywords_of_the_export(tmp_path: Path) -> None:
    network = Nested()
    a, b, c = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    torch.export.save(torch.export.export(network, ((a, b),), {"scale": c}), tmp_path / "net.pt2")
    component = Component.model_validate(
        {
            "model": {"source": "exported", "path": "net.pt2"},
            "inputs": {"a": {"shape": [2, 3]}, "b": {"shape": [2, 3]}, "c": {"shape": [2, 3]}},
        }
    )
    loaded = exported.load(LoadRequest(model=component.model, component=component, base=tmp_path, trust=True))
    torch.testing.assert_close(loaded.methods["forward"](a, b, c)[0], (a - b) * c)
