"""Networks that write to their own buffers: every sequence of calls begins where the network was loaded."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgebake import locate, signatures, trace
from edgebake.buffers import Snapshot, untouched
from edgebake.errors import StageFailed
from edgebake.reference_run import run_float
from edgebake.types import Call, DimBounds, Loaded, MethodSignature, Sample, Signature, TensorSpec


class Memory(nn.Module):
    """Sums what it is given, counts its calls, and keeps one buffer that it never writes to."""

    seen: torch.Tensor
    calls: torch.Tensor
    still: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.full((1, 4), 3.0))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("still", torch.ones(1, 4))
        self.linear = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.linear.weight)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x: (1, 4); the buffer itself goes out, too."""
        self.seen.add_(self.linear(x) * self.still)
        self.calls = self.calls + 1
        return self.seen * self.calls, self.seen


@pytest.fixture
def loaded() -> Loaded:
    x, y, z = (TensorSpec(name=name, shape=(1, 4), dtype="float32") for name in "xyz")
    method = MethodSignature(inputs=(x,), outputs=(y, z))
    return Loaded(methods={"forward": Memory().eval()}, signature=Signature(methods={"forward": method}), facts={})


def sample(*values: float) -> Sample:
    calls = tuple(Call(inputs={"x": np.full((1, 4), value, np.float32)}) for value in values)
    return Sample(calls=calls, source=str(values))


def test_a_buffer_that_is_part_of_a_larger_tensor_is_put_back(loaded: Loaded) -> None:
    """As programs read from a file may hold theirs."""
    network = loaded.methods["forward"]
    network.seen = torch.full((2, 4), 3.0)[:1]  # type: ignore[assignment]
    with torch.no_grad(), untouched(network) as snapshot:
        network(torch.ones(1, 4))
        assert "seen" in snapshot.written()
    assert float(network.get_buffer("seen")[0, 0]) == 3


def test_what_was_written_is_named_and_put_back(loaded: Loaded) -> None:
    network = loaded.methods["forward"]
    with untouched(network) as snapshot:
        network(torch.ones(1, 4))
        assert snapshot.written() == ("calls", "seen")
        assert float(network.get_buffer("seen")[0, 0]) == 4
    assert float(network.get_buffer("seen")[0, 0]) == 3
    assert float(network.get_buffer("calls")[0]) == 0


def test_an_exception_puts_back_too(loaded: Loaded) -> None:
    network = loaded.methods["forward"]
    with pytest.raises(RuntimeError, match="halt"), untouched(network):
        network(torch.ones(1, 4))
        raise RuntimeError("halt")
    assert float(network.get_buffer("seen")[0, 0]) == 3


def test_a_buffer_that_methods_share_is_copied_once() -> None:
    network = Memory()
    held = Snapshot.of([network, network]).held
    assert len(held) == 6
    assert len({id(each.value) for each in held}) == 3


def test_every_sample_starts_where_the_network_was_loaded(loaded: Loaded) -> None:
    given = [sample(1, 1), sample(1), sample(1, 1)]
    calls = [[float(call.outputs["y"][0, 0]) for call in recorded] for recorded in run_float(loaded, given)]
    assert calls == [[4, 10], [4], [4, 10]]  # (3 + 1) * 1, (3 + 2) * 2
    assert float(loaded.methods["forward"].get_buffer("seen")[0, 0]) == 3


def test_tracing_leaves_buffers_alone_and_names_those_that_are_written(loaded: Loaded) -> None:
    traced = trace.trace(loaded)
    assert traced.signature.methods["forward"].buffers == ("calls", "seen")
    assert loaded.signature.methods["forward"].buffers == ()
    listed = replace(traced.signature, dims={"n": DimBounds(min=1, max=4), "m": DimBounds(min=2, max=8, sizes=(8, 2))})
    for signature in (traced.signature, listed):
        assert signatures.from_json(json.loads(json.dumps(signatures.to_json(signature)))) == signature
    program = traced.programs["forward"]
    assert float(program.state_dict["seen"][0, 0]) == 3
    assert [module.name for module in trace.live_modules(loaded)] == ["linear"]  # found by gradients
    seen = loaded.methods["forward"].get_buffer("seen")
    assert float(seen[0, 0]) == 3
    assert not seen.requires_grad


class Held(nn.Module):
    """Writes to a buffer that it reaches through a list, and to one that nothing reads before it is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 4), persistent=False)
        self.register_buffer("place", torch.zeros(1, 4))
        self.caches = [self.get_buffer("seen")]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """x: (1, 4)."""
        here = self.get_buffer("place").copy_(x[0, :1].to(torch.int64))
        here.add_(1)
        return (self.caches[0].add_(x) * here,)


def loaded_of(network: nn.Module) -> Loaded:
    x, y = (TensorSpec(name=name, shape=(1, 4), dtype="float32") for name in "xy")
    method = MethodSignature(inputs=(x,), outputs=(y,))
    return Loaded(methods={"forward": network.eval()}, signature=Signature(methods={"forward": method}), facts={})


def test_a_buffer_that_a_list_holds_is_kept_and_one_that_nothing_reads_is_none() -> None:
    network = Held()
    traced = trace.trace(loaded_of(network))
    assert traced.signature.methods["forward"].buffers == ("seen",)
    assert not any(tensor.any() for tensor in network.buffers())
    program = traced.programs["forward"]
    assert "place" not in program.graph_signature.buffers
    with untouched(program.module()):
        ((_, twice),) = run_float(
            Loaded(methods={"forward": program.module()}, signature=traced.signature, facts={}), [sample(2, 3)]
        )
    assert float(twice.outputs["y"][0, 0]) == (2 + 3) * (3 + 1)
    functional = program.run_decompositions({})
    assert list(functional.graph_signature.buffers_to_mutate.values()) == ["seen"]


class Forgetful(nn.Module):
    """Writes, but not while it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """x: (1, 4)."""
        if not torch.compiler.is_exporting():
            self.get_buffer("seen").add_(x)
        return (x + 1,)


def test_a_write_that_the_program_lacks_is_named() -> None:
    with pytest.raises(
        StageFailed, match=r"forward: the exported program loses .* writes to its buffer seen"
    ) as caught:
        trace.trace(loaded_of(Forgetful()))
    assert "as an input with role state" in str(caught.value)


class Stray(nn.Module):
    """Keeps a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(1, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """x: (1, 4)."""
        return (self.seen.add_(x) * 2,)


def test_a_tensor_that_is_written_and_no_buffer_is_refused() -> None:
    with pytest.raises(StageFailed, match="the module inside writes to a tensor that is none of its buffers") as caught:
        trace.trace(loaded_of(nn.Sequential(OrderedDict(inside=Stray()))))
    assert "self.register_buffer" in str(caught.value)


def test_locating_an_error_leaves_buffers_alone(loaded: Loaded) -> None:
    traced = trace.trace(loaded)
    ((call,),) = run_float(loaded, [sample(1)])
    found = locate.locate(loaded, traced, call, None)
    assert found["graph_sqnr_db"] > 100
    assert float(traced.programs["forward"].state_dict["seen"][0, 0]) == 3
