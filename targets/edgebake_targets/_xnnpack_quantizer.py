"""Which nodes of an exported program XNNPACK's PT2E quantizer may annotate, from the modules' schemes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from edgebake.types import Assignment, canonical_module_name
from edgebake_targets._executorch import innermost_module, op_name
from edgebake_targets._observers import observer, weight_observer

if TYPE_CHECKING:
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, Quantizer

PRODUCTS = ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv_transpose1d", "aten.conv_transpose2d")
_PRODUCTS_3D = ("aten.conv3d", "aten.conv_transpose3d", "aten.convolution")
_BINARY = ("aten.add", "aten.add_", "aten.mul", "aten.mul_")
_JOINS = (*_BINARY, "aten.cat", "aten.adaptive_avg_pool2d")
_RELU = ("aten.relu", "aten.relu_")
_CLAMPS = ("aten.hardtanh", "aten.hardtanh_", "aten.relu6", "aten.relu6_")
# Operators whose output has the values of their input (some of them), so that int8 in means int8 out.
_TRANSPARENT = (
    *_RELU,
    *_CLAMPS,
    "aten.clone",
    "aten.contiguous",
    "aten.dropout",
    "aten.expand",
    "aten.flatten",
    "aten.max_pool2d",
    "aten.permute",
    "aten.reshape",
    "aten.slice",
    "aten.squeeze",
    "aten.transpose",
    "aten.unsqueeze",
    "aten.view",
)


# Upstream takes 2**-12: channels whose weights, and activations whose values, stay below 0.03 lose most of their 256
# levels, and those below 1e-4 become zero. XNNPACK asks only that requantisation scales lie in [2**-32, 256).
_SMALLEST_SCALE = 2**-20


def build(assignment: Assignment, activation_range: str, percentile: float = 99.99) -> Quantizer:
    """A quantizer for the modules of w8a8 (static) and w8a8d (dynamic); everything else stays as it is."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantizer import ComposableQuantizer

    class HeldToModules(ComposableQuantizer):  # type: ignore[misc]  # torchao's classes are untyped
        """XNNPACK's quantizers without their turning scalars into tensors, which makes integer indices float."""

        def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            _part_shared_weights(model)
            return model

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            _annotate_clamped(model, assignment, static)
            super().annotate(model)
            return model

    quantizers = []
    static = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
    static = _static(static, activation_range, percentile)
    if assignment.of("w8a8"):
        quantizers.append(XNNPACKQuantizer().set_global(static).set_filter_function(StaticNodes(assignment).annotated))
    if assignment.of("w8a8d"):
        config = _fine_weights(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
        quantizers.append(XNNPACKQuantizer().set_global(config).set_filter_function(partial(_dynamic, assignment)))
    return HeldToModules(quantizers)


def _part_shared_weights(model: torch.fx.GraphModule) -> None:
    """Give each use of a weight or bias its own node: upstream annotates a convolution only if these are free."""
    for constant in [node for node in model.graph.nodes if is_constant(node) and len(node.users) > 1]:
        products = [user for user in constant.users if op_name(user) in PRODUCTS and constant in user.args[1:3]]
        for product in products[1:]:
            with model.graph.inserting_before(product):
                copy = model.graph.get_attr(str(constant.target))
            copy.meta = dict(constant.meta)
            product.replace_input_with(constant, copy)
    model.recompile()


def _annotate_clamped(model: torch.fx.GraphModule, assignment: Assignment, config: QuantizationConfig) -> None:
    """Products with ReLU6 or hardtanh behind them: one scale for the clamped output.

    XNNPACK computes both in one kernel. Upstream knows only ReLU so, and would choose the product's scale from values
    that the clamp then throws away: most of the 256 levels are lost (EfficientNet-lite0: 7.9 dB).
    """
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    for node in [node for node in model.graph.nodes if op_name(node) in _CLAMPS]:
        product = node.args[0]
        if len(product.users) > 1 or module_of(product, assignment, "w8a8") is None or "transpose" in op_name(product):
            continue
        activation, weight, *rest = product.args[:3]
        bias = [constant for constant in rest if constant is not None]
        specs = {activation: config.input_activation, weight: config.weight} | dict.fromkeys(bias, config.bias)
        product.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=config.output_activation, _annotated=True)
        for constant in (weight, *bias):
            constant.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)


def _static(config: QuantizationConfig, activation_range: str, percentile: float) -> QuantizationConfig:
    """``config`` with activation ranges from ``activation_range`` and scales as small as they have to be."""
    kind = observer(activation_range, percentile)
    spec = replace(config.input_activation, observer_or_fake_quant_ctr=kind.with_args(eps=_SMALLEST_SCALE))
    return replace(_fine_weights(config), input_activation=spec, output_activation=spec)


def _fine_weights(config: QuantizationConfig) -> QuantizationConfig:
    kind = weight_observer(_SMALLEST_SCALE)
    return replace(config, weight=replace(config.weight, observer_or_fake_quant_ctr=kind))


def _dynamic(assignment: Assignment, node: torch.fx.Node) -> bool:
    return is_constant(node) or module_of(node, assignment, "w8a8d") is not None


class StaticNodes:
    """The nodes that compute in int8 under w8a8, found backwards along the data flow and remembered."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._known: dict[torch.fx.Node, bool] = {}

    def annotated(self, node: torch.fx.Node) -> bool:
        """Whether the quantizer may annotate ``node``; weights and biases follow the product they belong to."""
        return is_constant(node) or self._is_int8(node)

    def _is_int8(self, node: torch.fx.Node) -> bool:
        """Whether the output of ``node`` is int8. Iterative: the chains of a deep network exceed Python's stack."""
        pending = [node]
        while pending:
            top = pending[-1]
            sources = self._sources(top)
            unknown = [source for source in sources if source not in self._known]
            if unknown and top not in self._known:
                pending.extend(unknown)
                continue
            pending.pop()
            if top not in self._known:
                self._known[top] = self._decide(top, sources)
        return self._known[node]

    def _sources(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """The nodes on whose format that of ``node`` depends; none where it does not follow from its inputs."""
        name, inputs = op_name(node), list(node.all_input_nodes)
        if name in _TRANSPARENT:
            return inputs[:1]
        if name not in _JOINS or (name in _BINARY and len(inputs) != len(node.args[:2])):
            return []  # also x + 1.0: a scalar has no scale
        return inputs

    def _decide(self, node: torch.fx.Node, sources: list[torch.fx.Node]) -> bool:
        if sources:
            return all(self._known[source] for source in sources)
        return module_of(node, self._assignment, "w8a8") is not None


def is_constant(node: torch.fx.Node) -> bool:
    """Whether ``node`` is a parameter or buffer of the graph module."""
    return node.op == "get_attr"


def module_of(node: torch.fx.Node, assignment: Assignment, *schemes: str) -> str | None:
    """The assigned module that the product ``node`` computes, if it is given one of ``schemes``.

    It is the innermost module on the node's stack or, where a parent computes with a child's weights (as attention
    does with its output projection), the owner of the weights.
    """
    if op_name(node) not in (*PRODUCTS, *_PRODUCTS_3D):
        return None
    for name in (innermost_module(node), _owner(node)):
        if name is not None and name in assignment.schemes:
            return name if assignment.schemes[name] in schemes else None
    return None


def _owner(node: torch.fx.Node) -> str | None:
    weight = node.args[1] if len(node.args) > 1 else None
    if getattr(weight, "op", "") != "get_attr":
        return None
    return canonical_module_name(str(getattr(weight, "target", "")).rpartition(".")[0])
