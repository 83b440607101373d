"""Large weights by rows: the same bits, and never more than a few rows of them in float beside the result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.pt2e import quantize_pt2e  # noqa: F401  registers torch.ops.quantized_decomposed

from edgebake import rowwise

SIZES: list[int] = []


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights of 64 elements count as large; at most 40 are taken at a time."""
    monkeypatch.setattr(rowwise, "LEAST", 64)
    monkeypatch.setattr(rowwise, "_PART", 40)
    SIZES.clear()
    return iter([None])


class Watch(TorchFunctionMode):
    """Notes how many elements the operators that are taken by rows are given."""

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:  # type: ignore[type-arg, override]
        if "quantize" in str(func) and type(args[0]) in (torch.Tensor, torch.nn.Parameter):
            SIZES.append(args[0].numel())
        return func(*args, **(kwargs or {}))  # type: ignore[operator, dict-item]


@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(4)])
def test_a_table_of_embeddings_is_the_same_bit_for_bit(granularity: PerAxis | PerGroup) -> None:
    torch.manual_seed(0)
    whole, parted = torch.nn.Embedding(33, 8), torch.nn.Embedding(33, 8)
    parted.load_state_dict(whole.state_dict())
    words = torch.tensor([0, 7, 32])
    for table in (whole, parted):
        config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=granularity)
        if table is whole:
            quantize_(table, config, filter_fn=lambda *_: True)
            continue
        with Watch(), rowwise.by_rows():
            quantize_(table, config, filter_fn=lambda *_: True)
            got, program = table(words), torch.export.export(table, (words,)).module()
            again = program(words)
    assert torch.equal(whole.weight.qdata, parted.weight.qdata)  # type: ignore[attr-defined]
    assert torch.equal(whole.weight.scale, parted.weight.scale)  # type: ignore[attr-defined]
    assert torch.equal(whole(words), got)
    assert torch.equal(whole(words), again)
    assert SIZES
    assert max(SIZES) == 40


def test_weights_per_channel_are_the_same_bit_for_bit() -> None:
    operators = torch.ops.quantized_decomposed
    weight, scales = torch.randn(33, 8), torch.rand(33) + 0.1
    bounds = (scales, torch.zeros(33, dtype=torch.int64), 0, -127, 127, torch.int8)
    wanted = operators.quantize_per_channel(weight, *bounds)
    with Watch(), rowwise.by_rows():
        got = operators.quantize_per_channel.default(weight, *bounds)
        back = operators.dequantize_per_channel.default(got, *bounds)
    assert torch.equal(wanted, got)
    assert torch.equal(operators.dequantize_per_channel(wanted, *bounds), back)
    assert max(SIZES) == 40


def test_scales_of_columns_and_of_a_whole_weight_are_left_alone() -> None:
    operators = torch.ops.quantized_decomposed
    weight, scales = torch.randn(33, 8), torch.rand(8) + 0.1
    with Watch(), rowwise.by_rows():
        got = operators.quantize_per_channel(
            weight, scales, torch.zeros(8, dtype=torch.int64), 1, -127, 127, torch.int8
        )
    assert got.shape == weight.shape
    assert SIZES == [264]
