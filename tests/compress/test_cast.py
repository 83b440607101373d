"""fp16: the whole network or single modules, float32 at the border, the original's weights untouched."""

from __future__ import annotations

import copy

import torch

from edgebake.compress import cast
from edgebake.target import ModuleRequest
from edgebake.types import Assignment, ModuleKind


class Network(torch.nn.Module):
    """Linear layers that share a weight, two normalisations, an integer input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(20, 16)
        self.inner = torch.nn.Linear(16, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.layer_norm = torch.nn.LayerNorm(16, eps=1e-12)
        self.head = torch.nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.layer_norm(self.norm(self.inner(self.table(ids) + shift)))
        return self.head(hidden), hidden


KINDS: dict[str, ModuleKind] = {"table": "embedding", "inner": "linear", "head": "linear"}
INPUTS = (torch.arange(8), torch.full((16,), 0.25))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def apply(module: torch.nn.Module, schemes: dict[str, str]) -> torch.nn.Module:
    assignment = Assignment(schemes=schemes, kinds=KINDS)
    return cast.apply(ModuleRequest(module=module, assignment=assignment, options={}, run_calibration=lambda _: None))


def test_all_modules_in_half_make_the_whole_network_half_with_float_outputs() -> None:
    want = network()(*INPUTS)
    done = apply(network(), dict.fromkeys(KINDS, "fp16"))
    floats = {name for name, value in done.state_dict().items() if value.dtype == torch.float32}
    assert floats == {"layer_norm.weight", "layer_norm.bias"}
    assert done.table.weight.dtype == done.norm.running_var.dtype == torch.float16
    for reference, got in zip(want, done(*INPUTS), strict=True):
        assert got.dtype == torch.float32
        assert torch.allclose(reference, got, atol=2e-2)
        assert not torch.equal(reference, got)


def test_a_shared_weight_stays_shared() -> None:
    done = apply(network(), dict.fromkeys(KINDS, "fp16"))
    assert done.head.weight is done.table.weight


def test_single_modules_compute_in_half_and_the_rest_in_float() -> None:
    done = apply(network(), {"inner": "fp16"})
    assert done.inner.weight.dtype == torch.float16
    assert done.table.weight.dtype == done.norm.weight.dtype == torch.float32
    want, got = network()(*INPUTS)[0], done(*INPUTS)[0]
    assert got.dtype == torch.float32
    assert 0 < float((want - got).detach().abs().max()) < 1e-2


def test_casts_are_traced_and_module_names_stay() -> None:
    for schemes in ({"inner": "fp16"}, dict.fromkeys(KINDS, "fp16")):
        done = apply(network(), schemes)
        program = torch.export.export(done, INPUTS, strict=False)
        assert "inner.weight" in program.state_dict
        for want, got in zip(done(*INPUTS), program.module()(*INPUTS), strict=True):
            assert torch.equal(want, got)


def test_nothing_assigned_changes_nothing() -> None:
    original = network()
    assert apply(original, {"inner": "w8a8"}) is original
    assert original.inner.weight.dtype == torch.float32


def test_the_float_network_keeps_its_weights() -> None:
    original = network()
    shared = copy.deepcopy(original, {id(parameter): parameter for parameter in original.parameters()})
    want = original(*INPUTS)[0]
    apply(shared, dict.fromkeys(KINDS, "fp16"))
    assert torch.equal(original(*INPUTS)[0], want)
