"""The .pte inspector: reads programs that edgebake did not make, and refuses damaged ones with a reason."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from edgebake.errors import ArtifactDamaged
from edgebake.types import Delegation
from edgebake_targets import _executorch
from edgebake_targets.inspectors import pte

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Network(torch.nn.Module):
    """A product for the delegate and an operator that stays outside with a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(32, 16)
        self.norm = torch.nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm(self.linear(x)), count + 1


def programs(xnnpack: bool) -> tuple[bytes, Delegation]:
    """What ExecuTorch's own calls write, with a constant method beside the network; what lowering counts of it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    torch.manual_seed(0)
    example = (torch.randn(2, 32), torch.ones(3, dtype=torch.int64))
    program = torch.export.export(Network().eval(), example, strict=False)
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()] if xnnpack else [],
        constant_methods={"get_vocab_size": 32000, "use_kv_cache": True, "name": "tiny"},
    )
    counted = _executorch.delegation(edge, {}, "left")
    return bytes(edge.to_executorch().buffer), counted


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[bytes, Delegation]]:
    return {"delegated": programs(xnnpack=True), "portable": programs(xnnpack=False)}


@pytest.fixture(scope="module")
def delegated(made: dict[str, tuple[bytes, Delegation]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pte") / "delegated.pte"
    path.write_bytes(made["delegated"][0])
    return path


@pytest.fixture(scope="module")
def portable(made: dict[str, tuple[bytes, Delegation]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pte") / "portable.pte"
    path.write_bytes(made["portable"][0])
    return path


def test_inputs_outputs_and_constant_methods_are_read(delegated: Path) -> None:
    found = pte.inspect(delegated)
    assert [(spec.shape, spec.dtype) for spec in found.inputs] == [((2, 32), "float32"), ((3,), "int64")]
    assert [(spec.shape, spec.dtype) for spec in found.outputs] == [((2, 16), "float32"), ((3,), "int64")]
    assert found.facts["methods"] == ["forward"]
    assert found.facts["constants"]["get_vocab_size"] == 32000
    assert found.facts["constants"]["use_kv_cache"] is True
    assert found.total_bytes == delegated.stat().st_size


def test_weights_inside_a_delegate_are_counted_with_their_bytes(delegated: Path) -> None:
    found = pte.inspect(delegated)
    assert found.delegates == {"XnnpackBackend": 1}
    assert found.facts["delegate_operators"] == {"fully_connected": 1}
    assert found.operators["aten::native_layer_norm"] == 1
    by_shape = {record.shape: record for record in found.weights if record.bytes > 64}
    assert by_shape[(16, 32)].dtype == "float32"
    assert by_shape[(16, 32)].bytes == 4 * 16 * 32
    assert sum(record.bytes for record in found.weights if record.shape == (16,)) == 3 * 64


def test_a_delegate_and_the_kernels_around_it_are_rows_of_their_own(
    made: dict[str, tuple[bytes, Delegation]], delegated: Path
) -> None:
    """The file tells what lowering counted: a product of 2 x 16 floats goes to the norm outside."""
    counted, found = made["delegated"][1], pte.inspect(delegated)
    assert [(row.unit, row.by, row.subgraphs) for row in found.units] == [
        ("CPU", "XnnpackBackend", 1),
        ("CPU", "ExecuTorch's kernels", 0),
    ]
    assert [(row.unit, row.by, row.subgraphs) for row in counted.units] == [
        (row.unit, row.by, row.subgraphs) for row in found.units
    ]
    assert found.units[0].operators == {"fully_connected": 1}
    assert counted.units[0].operators == {"aten.linear": 1}
    assert counted.units[0].macs == 2 * 32 * 16
    assert set(counted.units[1].operators) == {"aten.native_layer_norm", "aten.add"}
    assert found.border_bytes == counted.border_bytes == 4 * 2 * 16


def test_without_delegates_nothing_passes_a_border(made: dict[str, tuple[bytes, Delegation]], portable: Path) -> None:
    counted, found = made["portable"][1], pte.inspect(portable)
    assert found.border_bytes == counted.border_bytes == 0
    assert [row.by for row in found.units] == [row.by for row in counted.units] == ["ExecuTorch's kernels"]
    assert (counted.share, counted.partitions) == (0.0, 0)


def test_a_portable_program_has_the_same_weights_outside(portable: Path) -> None:
    found = pte.inspect(portable)
    assert found.delegates == {}
    assert sum(int(np.prod(record.shape)) for record in found.weights if record.dtype == "float32") >= 16 * 32 + 48


def test_equal_payloads_have_equal_digests(tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("first", torch.arange(12.0))
            self.register_buffer("second", torch.arange(12.0) * 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.first + self.second

    program = torch.export.export(Twice().eval(), (torch.randn(12),), strict=False)
    path = tmp_path / "twice.pte"
    path.write_bytes(bytes(to_edge_transform_and_lower(program).to_executorch().buffer))
    digests = [record.digest for record in pte.inspect(path).weights if record.shape == (12,)]
    assert len(set(digests)) == 2


def test_an_empty_file_and_text_are_no_programs(tmp_path: Path) -> None:
    for content in (b"", b"hello, this is text and no program at all", b"\0" * 64):
        path = tmp_path / "other.pte"
        path.write_bytes(content)
        with pytest.raises(ArtifactDamaged, match="no whole ExecuTorch program"):
            pte.inspect(path)
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        pte.inspect(tmp_path / "absent.pte")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_that_was_cut_short_is_refused_with_both_sizes(delegated: Path, tmp_path: Path, share: float) -> None:
    data = delegated.read_bytes()
    path = tmp_path / "cut.pte"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactDamaged, match=f"it has {int(len(data) * share)} bytes"):
        pte.inspect(path)


def test_flipped_bytes_are_read_or_refused_but_never_crash(delegated: Path, portable: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    refused = 0
    for number in range(400):
        data = bytearray((delegated if number % 2 else portable).read_bytes())
        for _ in range(4):
            data[chance.randrange(min(len(data), 6000))] = chance.randrange(256)
        path = tmp_path / "flipped.pte"
        path.write_bytes(bytes(data))
        try:
            pte.inspect(path)
        except ArtifactDamaged:
            refused += 1
    assert refused > 20


def test_a_binary_of_qualcomms_that_cannot_be_read_is_not_measured(delegated: Path, tmp_path: Path) -> None:
    named = (14).to_bytes(4, "little") + b"XnnpackBackend"
    other = (10).to_bytes(4, "little") + b"QnnBackend".ljust(14, b"\0")
    path = tmp_path / "model.pte"
    path.write_bytes(delegated.read_bytes().replace(named, other))
    found = pte.inspect(path)
    assert found.delegates == {"QnnBackend": 1}
    assert found.units[0].operators == {}
    known = "it is no context binary of a layout that is known here (QAIRT 2.48 to 2.51)"
    assert found.facts["operators_inside"] == f"not measured: {known}"
