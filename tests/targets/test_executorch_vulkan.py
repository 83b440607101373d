"""ExecuTorch with Vulkan: delegated here, as small as its scheme says, and nothing in it that a phone cannot load."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asking import defaults, lower_request
from edgebake.compress import quantize_weights
from edgebake.errors import StageFailed
from edgebake.metrics import sqnr_db
from edgebake.target import ModuleRequest, NotMeasured
from edgebake.trace import dynamic_shapes
from edgebake.types import Assignment, Lowered, MethodSignature, ModuleKind, Signature, TensorSpec, Traced
from edgebake_targets import _vulkan
from edgebake_targets import executorch_vulkan as target
from edgebake_targets.inspectors import _pte_file, _vulkan_graph, pte
from edgebake_targets.inspectors._flatbuffers import Malformed
from edgebake_targets.runners import executorch_vulkan_graph
from xnnpack_cases import (
    TEXT,
    TEXT_KINDS,
    VISION,
    VISION_KINDS,
    Wrapper,
    ids,
    images,
    text_network,
    vision_network,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

MIXED = {"table": "w4g32", "up": "w8", "down": "w4"}
Built = tuple[Lowered, Path]


def traced(module: torch.nn.Module, signature: Signature, example: torch.Tensor, assignment: Assignment) -> Traced:
    request = ModuleRequest(
        module=copy.deepcopy(module), assignment=assignment, options={}, run_calibration=lambda _: None
    )
    dims = dynamic_shapes(signature.methods["forward"], signature.dims)
    program = torch.export.export(
        quantize_weights.apply(request), (example,), dynamic_shapes=None if dims is None else (dims,), strict=False
    )
    return Traced(programs={"forward": program}, signature=signature)


def built_text(schemes: Mapping[str, str], folder: Path, **options: Any) -> Built:
    assignment = Assignment(schemes=schemes, kinds=TEXT_KINDS)
    request = lower_request(folder, defaults(target) | options, assignment=assignment)
    return target.lower(traced(text_network(), TEXT, ids(9), assignment), request), folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built_text(MIXED, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Built:
    assignment = Assignment(schemes=dict.fromkeys(VISION_KINDS, "fp16"), kinds=VISION_KINDS)
    folder = tmp_path_factory.mktemp("vision")
    request = lower_request(folder, defaults(target), assignment=assignment)
    return target.lower(traced(vision_network(), VISION, images(1)[0], assignment), request), folder


def graph_of(folder: Path) -> _vulkan_graph.Program:
    program = _pte_file.opened(_pte_file.mapped(folder / "model.pte"))
    (delegate,) = program.table.tables(1)[0].tables(7)
    return _vulkan_graph.parse(_pte_file.blob_of(program, delegate), program.named)


@pytest.mark.slow
def test_weights_are_stored_in_the_bits_of_their_scheme(mixed: Built, vision: Built) -> None:
    found = {(w.shape, w.dtype): w for w in pte.inspect(mixed[1] / "model.pte").weights if len(w.shape) > 1}
    sizes = {key: (w.bytes, w.scale_bytes) for key, w in found.items()}
    assert sizes == {
        ((100, 64), "int4"): (100 * 32, 100 * 2 * 4),
        ((96, 64), "int8"): (96 * 64, 96 * 4),
        ((64, 96), "int4"): (64 * 48, 64 * 4),
        ((10, 64), "float32"): (4 * 640, 0),
    }
    halves = pte.inspect(vision[1] / "model.pte").weights
    assert {w.dtype for w in halves if w.shape} == {"float16"}
    assert sum(w.bytes for w in halves if len(w.shape) > 1) == 2 * (16 * 27 + 16 * 16 + 16 * 9 + 10 * 16)


@pytest.mark.slow
def test_integer_weights_are_those_of_the_compressed_network(mixed: Built) -> None:
    graph = graph_of(mixed[1])
    held = {call.name: [graph.values[number] for number in call.args] for call in graph.calls}
    wrapped: Any = compressed_text().wrapped
    _, weight, scales, *_ = held["aten._weight_int8pack_mm.default"]
    up = values(weight).float() * values(scales)[:, None]
    assert torch.equal(up, wrapped.up.weight.dequantize())
    _, weight, scales, group, *_ = held["et_vk.linear_q4gsw.default"]
    packed = values(weight)
    ints = torch.stack([packed & 15, packed >> 4], -1).reshape(64, 96).float() - 8
    down = ints * values(scales).T.repeat_interleave(group, 1)
    assert group == 96
    assert torch.equal(down, wrapped.down.weight.dequantize())


def compressed_text() -> torch.nn.Module:
    assignment = Assignment(schemes=MIXED, kinds=TEXT_KINDS)
    return quantize_weights.apply(
        ModuleRequest(module=text_network(), assignment=assignment, options={}, run_calibration=lambda _: None)
    )


def values(tensor: _vulkan_graph.Tensor) -> torch.Tensor:
    assert tensor.constant is not None
    return torch.from_numpy(np.frombuffer(tensor.constant.data, tensor.dtype).reshape(tensor.shape).copy())


@pytest.mark.slow
def test_all_is_delegated_to_operators_of_the_runtime(mixed: Built, vision: Built) -> None:
    for lowered, folder in (mixed, vision):
        found = pte.inspect(folder / "model.pte")
        assert lowered.delegation.share == 1.0
        assert found.delegates == {"VulkanBackend": 1}
        assert not set(found.facts["delegate_operators"]) & _vulkan.UNFUSED
    operators = pte.inspect(mixed[1] / "model.pte").facts["delegate_operators"]
    assert operators["aten._weight_int8pack_mm.default"] == operators["et_vk.linear_q4gsw.default"] == 1
    assert operators["et_vk.embedding_q4gsw.default"] == 2
    assert operators["aten.linear.default"] == 1
    assert pte.inspect(vision[1] / "model.pte").facts["delegate_operators"]["et_vk.conv_with_clamp.default"] == 2


@pytest.mark.slow
def test_the_stand_in_computes_what_the_compressed_network_does(mixed: Built, vision: Built) -> None:
    lowered, folder = mixed
    session = executorch_vulkan_graph.open(folder / lowered.entry, TEXT)
    network = compressed_text()
    for length in (2, 9, 25):
        got = session.call("forward", {"ids": ids(length, seed=9).numpy()})["scores"]
        assert got.shape == (1, length, 10)
        assert sqnr_db(network(ids(length, seed=9))[0].detach().numpy(), got) > 110
    (image,) = images(1, seed=9)
    half = executorch_vulkan_graph.open(vision[1] / "model.pte", VISION).call("forward", {"image": image.numpy()})
    assert 45 < sqnr_db(vision_network()(image)[0].detach().numpy(), half["scores"]) < 90


@pytest.mark.slow
def test_the_stand_in_shows_a_changed_weight_and_names_operators_it_lacks(mixed: Built, tmp_path: Path) -> None:
    lowered, folder = mixed
    data = (folder / lowered.entry).read_bytes()
    path = tmp_path / "model.pte"
    path.write_bytes(data.replace(b"aten._softmax.default", b"aten._softmaz.default"))
    with pytest.raises(NotMeasured, match=r"nothing here computes the Vulkan operators aten\._softmaz"):
        executorch_vulkan_graph.open(path, TEXT)
    weight = next(v for v in graph_of(folder).values if isinstance(v, _vulkan_graph.Tensor) and v.dtype == "int8")
    assert weight.constant is not None
    at = data.index(bytes(weight.constant.data))
    path.write_bytes(data[:at] + bytes(64) + data[at + 64 :])  # one output channel of zeros
    given = {"ids": ids(9, seed=9).numpy()}
    outputs = [executorch_vulkan_graph.open(file, TEXT).call("forward", given) for file in (folder / "model.pte", path)]
    assert sqnr_db(outputs[0]["scores"], outputs[1]["scores"]) < 60


@pytest.mark.slow
def test_the_structure_passes_as_built_and_fails_for_another_promise(mixed: Built) -> None:
    lowered, folder = mixed
    found = target.structure(folder / lowered.entry, lowered.signature, target.read_checks(folder))
    assert [v.state for v in found] == ["pass"] * 3
    output = TensorSpec(name="scores", shape=(1, "seq", 10), dtype="float16")
    method = MethodSignature(inputs=TEXT.methods["forward"].inputs, outputs=(output,))
    other = target.structure(folder / lowered.entry, Signature(methods={"forward": method}, dims=TEXT.dims), {})
    assert [v.reason for v in other if v.state == "fail"] == ["scores is float32 [1, 32, 10], not float16 [1, 32, 10]"]


@pytest.mark.slow
def test_lowering_again_gives_the_same_bytes_and_leaves_the_log_as_it_was(mixed: Built, tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    built_text(MIXED, tmp_path)
    digests = {hashlib.sha256((folder / "model.pte").read_bytes()).hexdigest() for folder in (mixed[1], tmp_path)}
    assert len(digests) == 1
    assert (root.level, root.handlers) == before


@pytest.mark.slow
def test_a_damaged_delegate_is_refused(mixed: Built) -> None:
    program = _pte_file.opened(_pte_file.mapped(mixed[1] / "model.pte"))
    (delegate,) = program.table.tables(1)[0].tables(7)
    blob = memoryview(bytes(_pte_file.blob_of(program, delegate)))
    with pytest.raises(Malformed, match="shorter than its header says"):
        _vulkan_graph.parse(blob[: len(blob) // 2], program.named)
    with pytest.raises(Malformed, match="which the program does not hold whole"):
        _vulkan_graph.parse(blob, {})
    with pytest.raises(Malformed, match="starts with"):
        _vulkan_graph.parse(blob[2:], program.named)


class Compares(torch.nn.Module):
    """A comparison with a number: delegated by ExecuTorch, and absent from its Vulkan runtime."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * (x * 2 > 0.5)


@pytest.mark.slow
def test_operators_that_the_runtime_lacks_stay_on_the_cpu(tmp_path: Path) -> None:
    signature = one_to_one((2, 8), (2, 8))
    nothing = Assignment(schemes={}, kinds={})
    made = traced(Wrapper(Compares()).eval(), signature, torch.randn(2, 8), nothing)
    lowered = target.lower(made, lower_request(tmp_path, defaults(target)))
    assert [(left.op, left.reason) for left in lowered.delegation.left_out] == [
        ("aten.gt", "the Vulkan runtime has no such operator")
    ]
    assert "aten::gt" in pte.inspect(tmp_path / "model.pte").operators


def one_to_one(taken: tuple[int, ...], given: tuple[int, ...]) -> Signature:
    method = MethodSignature(
        inputs=(TensorSpec(name="x", shape=taken, dtype="float32"),),
        outputs=(TensorSpec(name="y", shape=given, dtype="float32"),),
    )
    return Signature(methods={"forward": method})


def lower_linear(scheme: str, width: int, shape: tuple[int, ...], folder: Path) -> Lowered:
    kinds: dict[str, ModuleKind] = {"0": "linear"}
    assignment = Assignment(schemes={"0": scheme}, kinds=kinds)
    module = Wrapper(torch.nn.Sequential(torch.nn.Linear(shape[-1], width))).eval()
    made = traced(module, one_to_one(shape, (*shape[:-1], width)), torch.randn(shape), assignment)
    return target.lower(made, lower_request(folder, defaults(target), assignment=assignment))


@pytest.mark.parametrize(
    ("scheme", "width", "shape", "said"),
    [
        ("w4g32", 10, (1, 64), "0 has 10 output and 64 input features: int4 needs multiples of 4 and of 8"),
        ("w4", 8, (1, 12), "0 has 8 output and 12 input features: int4 needs multiples of 4 and of 8"),
        ("w4", 8, (3, 2, 8), "0 reads a batch of 3: of several, Vulkan's int4 kernels compute the first"),
        ("w8", 8, (1, 2, 2, 8), "0 reads a tensor of 4 dimensions: integer weights need 2 or 3"),
    ],
)
def test_what_the_runtime_cannot_load_or_computes_in_part_is_refused(
    scheme: str, width: int, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match=said) as failed:
        lower_linear(scheme, width, shape, tmp_path)
    assert 'modules: {"0": fp32}' in failed.value.problems[0].fix


class Tied(torch.nn.Module):
    """A linear layer and a table with the same weights: no operator of the runtime's reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(16, 32)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(torch.nn.functional.embedding(numbers, self.head.weight))
        return hidden


@pytest.mark.slow
def test_what_came_out_of_lowering_unfused_is_refused(tmp_path: Path) -> None:
    method = MethodSignature(
        inputs=(TensorSpec(name="ids", shape=(1, 4), dtype="int64"),),
        outputs=(TensorSpec(name="y", shape=(1, 4, 32), dtype="float32"),),
    )
    assignment = Assignment(schemes={"head": "w8"}, kinds={"head": "linear"})
    made = traced(Wrapper(Tied()).eval(), Signature(methods={"forward": method}), ids(4) % 32, assignment)
    with pytest.raises(StageFailed, match=r"its Vulkan runtime lacks: torchao\.dequantize_affine\.default") as failed:
        target.lower(made, lower_request(tmp_path, defaults(target), assignment=assignment))
    assert "integer weights that only linear layers read" in failed.value.problems[0].fix


def test_half_a_network_in_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="down is kept in float32 and head is to be float16"):
        built_text({"head": "fp16"}, tmp_path)


def test_written_buffers_are_refused(tmp_path: Path) -> None:
    method = MethodSignature(inputs=(), outputs=(), buffers=("cache",))
    made = Traced(programs={}, signature=Signature(methods={"forward": method}))
    with pytest.raises(StageFailed, match="the network writes to its buffer cache, and Vulkan loses such writes"):
        target.lower(made, lower_request(tmp_path, defaults(target)))
