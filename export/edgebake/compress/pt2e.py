"""PT2E: observe an exported program with the target's quantizer on calibration samples, then fix its scales.

Numerics: torchao's PT2E flow (prepare_pt2e, convert_pt2e), https://docs.pytorch.org/ao/stable/tutorials_source/pt2e_quant_ptq.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgebake import mapped
from edgebake.buffers import Snapshot, untouched
from edgebake.errors import StageFailed
from edgebake.rowwise import by_rows
from edgebake.target import GraphRequest
from edgebake.types import ActsOn

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "graph"
DISTRIBUTIONS = ("torch", "torchao")
SOURCES = ("edgebake.mapped", "edgebake.rowwise")
OPS = ("torchao.quantization.pt2e.quantize_pt2e",)  # registers the operators that a stored program holds

_QUANTISE = tuple(
    f"quantized_decomposed.quantize_per_{of}" for of in ("tensor.default", "tensor.tensor", "channel.default")
)


def apply(request: GraphRequest) -> torch.export.ExportedProgram:
    """The program with quantise/dequantise pairs and integer weights; inputs, outputs and dynamic shapes stay.

    Scales of static activations come from ``request.calibration``; StageFailed when they are needed and there is none.
    Buffers that the network writes to hold in every sample what they held at first.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = _example(request)
    module = request.program.module(check_guards=False)
    calls = sum(map(len, request.calibration))
    with torch.no_grad(), by_rows(), untouched(module):  # the programs share the network's buffers
        own, weights = list(module.buffers()), list(module.parameters())
        _part_norms(module)
        observed = prepare_pt2e(module, request.quantizer)
        start = Snapshot.of((observed,)).only(own)  # what observers have seen is to stay
        # Observers on weights see them when the program runs: it has to run once even where no activation is observed.
        for sample in request.calibration if calls else ((example,),):
            start.restore()
            for inputs in sample:
                observed(*inputs)
        start.restore()
        converted = convert_pt2e(observed, fold_quantize=False)
        if getattr(request.quantizer, "fold_quantize", True):
            _fold_quantised(converted)
        for weight in weights:
            mapped.release(weight)  # looked at for its range, and integers by now
        _forget()
        _refuse_uncalibrated(converted, calls)
        return torch.export.export(
            converted,
            example,
            dynamic_shapes=per_input(request.dynamic_shapes, len(example)),
            strict=False,
        )


def _forget() -> None:
    """Let go of networks that torch and torchao remember for the life of the process: each by its device."""
    from torch.ao.quantization.fx import utils
    from torchao import utils as own

    for remembers in (utils.assert_and_get_unique_device, own._assert_and_get_unique_device):
        remembers.cache_clear()


def _fold_quantised(model: torch.fx.GraphModule) -> None:
    """Put the integers in the place of the weights that are quantised, as ``convert_pt2e`` does.

    It evaluates whatever is constant and keeps all of it until it is done: every weight that torchao has quantised
    before, once more in float.
    """
    from torchao.quantization.pt2e.constant_fold import ConstantFolder, replace_node_with_constant

    graph = model.graph
    constants = _constants(graph)
    quantised = [node for node in graph.nodes if node in constants and str(node.target) in _QUANTISE]
    needed = _ancestors(quantised)

    class Integers(ConstantFolder):  # type: ignore[misc]  # torchao's classes are untyped
        def run_node(self, node: torch.fx.Node) -> Any:
            wanted = node in needed or node.op != "call_function"
            return super().run_node(node) if wanted else self.unknown_value

    folder = Integers(model, skip_constructors=True)
    folder.run()
    for node in quantised:
        if node in folder.node_replacements:
            replace_node_with_constant(model, node, folder.node_replacements[node])
    for node in [node for node in graph.find_nodes(op="get_attr") if not node.users]:
        graph.erase_node(node)
        if all(other.target != node.target for other in graph.find_nodes(op="get_attr")):
            owner, _, leaf = str(node.target).rpartition(".")
            delattr(model.get_submodule(owner), leaf)  # or it is exported and stored beside its integers
    graph.eliminate_dead_code()
    graph.lint()
    model.recompile()


def _constants(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Nodes that are computed from weights alone."""
    found: set[torch.fx.Node] = set()
    for node in graph.nodes:
        given = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and given and found.issuperset(given)):
            found.add(node)
    return found


def _ancestors(nodes: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """``nodes`` and all that they are computed from."""
    found: set[torch.fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _part_norms(module: torch.fx.GraphModule) -> None:
    """Put an ``alias`` before each normalisation that torchao would fold into its convolution, and wrongly.

    ``_fuse_conv_bn_`` changes a weight or a result that others read too, and takes the weight of a transposed
    convolution in groups, (channels, channels per group), for (channels, channels).
    """
    import torch

    aten = torch.ops.aten
    norms = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
    readers = Counter(str(n.target) for n in module.graph.nodes if n.op == "get_attr" for _ in n.users)
    for node in [node for node in module.graph.nodes if node.target in norms]:
        source = node.args[0]
        if "conv" not in str(source.target):
            continue
        shared = len(source.users) > 1 or readers[str(getattr(source.args[1], "target", ""))] > 1
        if shared or ("transpose" in str(source.target) and len(source.args) > 6 and source.args[6] != 1):
            with module.graph.inserting_before(node):
                apart = module.graph.call_function(aten.alias.default, (source,))
            apart.meta = dict(source.meta)
            node.update_arg(0, apart)
    module.recompile()


def _example(request: GraphRequest) -> tuple[Any, ...]:
    example = request.program.example_inputs
    if example is not None:
        return tuple(example[0])
    for sample in request.calibration:
        if sample:
            return sample[0]
    raise StageFailed(
        "the exported program carries no example inputs and there are no calibration samples",
        where="compress: pt2e",
        fix="give samples.calibration",
    )


def _refuse_uncalibrated(converted: torch.fx.GraphModule, calls: int) -> None:
    """A static scale without a sample behind it is a default that fits nothing."""
    static = [node for node in converted.graph.nodes if str(node.target).endswith("quantize_per_tensor.default")]
    if static and not calls:
        raise StageFailed(
            f"{len(static)} activations need ranges from calibration samples, and there are none",
            where="compress: pt2e",
            fix="give samples.calibration, or a scheme with dynamic activations such as w8a8d",
        )


def per_input(dynamic_shapes: Any, inputs: int) -> tuple[Any, ...] | None:
    """``dynamic_shapes`` as one entry for each of ``inputs`` positional inputs, None where nothing is dynamic.

    A program exported from ``forward(self, *inputs)`` was described as ``((a, b),)``; as a module it takes
    ``(a, b)``, and torch.export wants the description to follow. Names of inputs are dropped for the same reason.
    """
    if not dynamic_shapes:
        return None
    entries = _values(dynamic_shapes)
    if len(entries) == 1 and isinstance(entries[0], (tuple, list)):
        group = _values(entries[0])
        if len(group) == inputs and all(entry is None or isinstance(entry, (dict, tuple, list)) for entry in group):
            entries = group
    return entries if any(entries) else None


def _values(shapes: Any) -> tuple[Any, ...]:
    return tuple(shapes.values()) if isinstance(shapes, dict) else tuple(shapes)
