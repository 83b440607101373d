"""Plans of .pte files walked with torch's operators, against ExecuTorch's own runtime and portable kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.metrics import sqnr_db
from edgebake.target import NotMeasured
from edgebake.types import DimBounds, MethodSignature, Signature, TensorSpec
from edgebake_targets import _pte_plan
from edgebake_targets.runners import executorch_runtime

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

SPECS = MethodSignature(
    inputs=(TensorSpec(name="x", shape=(1, "n", 8), dtype="float32"),),
    outputs=(
        TensorSpec(name="y", shape=(1, "n", 4), dtype="float32"),
        TensorSpec(name="place", shape=(1, "n"), dtype="int64"),
        TensorSpec(name="total", shape=(), dtype="float32"),
    ),
)
SIGNATURE = Signature(methods={"forward": SPECS}, dims={"n": DimBounds(min=2, max=16)})


class Portable(torch.nn.Module):
    """Views with computed sizes, lists of tensors, several results of one kernel, constants, scalars and booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(8, 4), torch.nn.LayerNorm(8)
        self.register_buffer("table", torch.arange(24.0).reshape(3, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steps = torch.arange(x.shape[1])
        flat = self.norm(x).reshape(x.shape[0] * x.shape[1], 8)
        mixed = torch.cat([flat, self.table], 0)[: x.shape[1]]
        largest, place = mixed.max(dim=-1, keepdim=True)
        masked = torch.where(mixed > largest - 1, mixed, -0.5).view(1, -1, 8)
        return self.linear(masked) + steps[None, :, None], place.view(1, -1), masked.sum()


class Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v * 3, (x,))


def written(module: torch.nn.Module, example: torch.Tensor, path: Path, shapes: Any = None, passes: Any = ()) -> Path:
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    program = torch.export.export(module.eval(), (example,), dynamic_shapes=shapes, strict=False)
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    made = ExecutorchBackendConfig(passes=list(passes))
    path.write_bytes(to_edge_transform_and_lower(program, compile_config=config).to_executorch(made).buffer)
    return path


def no_delegate(number: int, values: list[Any]) -> Mapping[int, Any]:
    raise AssertionError(f"there is no delegate {number}, and it was called with {len(values)} values")


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("portable") / "model.pte"
    return written(Portable(), torch.randn(1, 5, 8), path, ({1: torch.export.Dim("n", min=2, max=16)},))


@pytest.mark.parametrize("length", [2, 5, 16])
def test_a_plan_gives_what_executorchs_runtime_gives(portable: Path, length: int) -> None:
    x = {"x": np.random.default_rng(length).standard_normal((1, length, 8)).astype(np.float32)}
    expected = executorch_runtime.open(portable, SIGNATURE).call("forward", x)
    plan = _pte_plan.open_plans(portable, ["forward"])["forward"]
    found = plan.run(_pte_plan.tensors(plan, SPECS, x), no_delegate, plan.states())
    for spec, value in zip(SPECS.outputs, found, strict=True):
        assert tuple(value.shape) == expected[spec.name].shape
        assert sqnr_db(expected[spec.name], value.numpy()) > 110


def test_both_sides_of_a_branch_are_run(tmp_path: Path) -> None:
    path = written(Branching(), torch.ones(3), tmp_path / "model.pte")
    spec = TensorSpec(name="x", shape=(3,), dtype="float32")
    method = MethodSignature(inputs=(spec,), outputs=(TensorSpec(name="y", shape=(3,), dtype="float32"),))
    runtime = executorch_runtime.open(path, Signature(methods={"forward": method}))
    plan = _pte_plan.open_plans(path, ["forward"])["forward"]
    for sign in (1.0, -1.0):
        x = {"x": np.full(3, sign, np.float32)}
        (found,) = plan.run(_pte_plan.tensors(plan, method, x), no_delegate, plan.states())
        assert found.tolist() == runtime.call("forward", x)["y"].tolist() == [2.0 if sign > 0 else -3.0] * 3


class Viewing(torch.nn.Module):
    """Views of a fixed shape, for which a program has no instruction: they share the memory of what they view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (2, 12)."""
        first = torch.relu(x).view(4, 6)
        second = torch.exp(first).view(3, 8)
        return torch.softmax(second, -1) + torch.neg(first).view(3, 8)


def test_views_without_an_instruction_are_read_where_they_lie(tmp_path: Path) -> None:
    path = written(Viewing(), torch.ones(2, 12), tmp_path / "model.pte")
    spec = TensorSpec(name="x", shape=(2, 12), dtype="float32")
    method = MethodSignature(inputs=(spec,), outputs=(TensorSpec(name="y", shape=(3, 8), dtype="float32"),))
    plan = _pte_plan.open_plans(path, ["forward"])["forward"]
    assert not [name for name, _ in plan.kernels if "view" in name]
    x = {"x": np.random.default_rng(3).standard_normal((2, 12)).astype(np.float32)}
    (found,) = plan.run(_pte_plan.tensors(plan, method, x), no_delegate, plan.states())
    expected = executorch_runtime.open(path, Signature(methods={"forward": method})).call("forward", x)["y"]
    assert sqnr_db(expected, found.numpy()) > 110


def test_operators_that_torch_lacks_are_named(tmp_path: Path) -> None:
    """Here by a name that no library has."""
    path = tmp_path / "model.pte"
    data = written(Branching(), torch.ones(3), path).read_bytes()
    path.write_bytes(data.replace(b"aten::mul", b"aten::mux"))
    with pytest.raises(NotMeasured, match="nothing here computes the operators outside the delegates: aten::mux"):
        _pte_plan.open_plans(path, ["forward"])


class Counter(torch.nn.Module):
    """Hands out the sum before this call, and writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (3,)."""
        before = self.seen * 1
        self.seen.add_(x)
        return before + self.seen


def test_a_state_outside_the_delegates_is_carried_on(tmp_path: Path) -> None:
    path = written(Counter(), torch.ones(3), tmp_path / "model.pte")
    plan = _pte_plan.open_plans(path, ["forward"])["forward"]
    for _ in range(2):
        states = plan.states()
        found = [plan.run([torch.ones(3)], no_delegate, states)[0][0].item() for _ in range(3)]
        assert found == [1, 3, 5]
        assert [value.tolist() for value in states.values()] == [[3.0] * 3]


def test_a_state_with_a_start_of_its_own_is_not_measured(tmp_path: Path) -> None:
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    path = written(Counter(), torch.ones(3), tmp_path / "model.pte", passes=[InitializedMutableBufferPass(["seen"])])
    with pytest.raises(NotMeasured, match="keeps a state outside the delegates that does not start at zero"):
        _pte_plan.open_plans(path, ["forward"])


def test_what_does_not_fit_is_refused_in_words(portable: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactDamaged, match="it has no method 'decode'; its methods: forward"):
        _pte_plan.open_plans(portable, ["decode"])
    (tmp_path / "model.pte").write_bytes(b"not a program at all")
    with pytest.raises(ArtifactDamaged, match="no whole ExecuTorch program"):
        _pte_plan.open_plans(tmp_path / "model.pte", ["forward"])
    plan = _pte_plan.open_plans(portable, ["forward"])["forward"]
    with pytest.raises(StageFailed, match="called without its input 'x'"):
        _pte_plan.tensors(plan, SPECS, {})
    two = MethodSignature(inputs=SPECS.inputs * 2, outputs=SPECS.outputs)
    with pytest.raises(ArtifactDamaged, match="takes 1 inputs and returns 3 outputs; its signature says 2 and 3"):
        _pte_plan.tensors(plan, two, {})
