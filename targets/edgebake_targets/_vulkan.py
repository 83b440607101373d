"""What ExecuTorch's Vulkan backend is told, and kept from: its partitioner takes operators that its runtime lacks."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem
from edgebake_targets import _executorch

if TYPE_CHECKING:
    import torch
    from executorch.exir import EdgeProgramManager

# What the partitioner of ExecuTorch 1.4.1 takes (backends/vulkan/op_registry.py, shared with WebGPU) and its Vulkan
# runtime registers nowhere (VK_REGISTER_OP in backends/vulkan/runtime, tag v1.4.1): an app that loads such a program
# ends with "Could not find operator with name". Here those that a CPU kernel can run instead ...
_LEFT_TO_CPU = (
    *("aten.ne.Scalar", "aten.lt.Scalar", "aten.le.Scalar", "aten.ge.Scalar", "aten.gt.Scalar"),
    "aten.logical_not.default",
)
# ... and those that must have been fused into an operator of the runtime.
UNFUSED = frozenset(
    {
        *_LEFT_TO_CPU,
        "quantized_decomposed.choose_qparams.tensor",
        "quantized_decomposed.choose_qparams_per_token_asymmetric.default",
        "quantized_decomposed.dequantize_per_channel.default",
        "quantized_decomposed.dequantize_per_tensor.tensor",
        "quantized_decomposed.dequantize_per_token.default",
        "quantized_decomposed.embedding_4bit.dtype",
        "quantized_decomposed.quantize_per_channel.default",
        "quantized_decomposed.quantize_per_tensor.tensor",
        "quantized_decomposed.quantize_per_token.default",
        "torchao.dequantize_affine.default",
        "torchao.quantize_affine.default",
    }
)
_INT4 = 7  # the largest value
_NO_KERNEL = "the Vulkan runtime has no such operator"
_SKIPPED = re.compile(r"Due to \[(?P<why>.*)\], skipping .*? = (?P<op>[\w.:]+)\(")
_OPERATOR_TEXT = re.compile(r" (for )?op .* = .*\(.*")  # how the partitioner shows an operator within a reason


def partitioner(options: Mapping[str, Any]) -> Any:
    """The backend's partitioner with compile ``options``, kept from operators that its runtime lacks."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir.dialects._ops import ops

    aten = ops.edge.aten
    blocked = [getattr(getattr(aten, name), overload) for _, name, overload in (op.split(".") for op in _LEFT_TO_CPU)]
    return VulkanPartitioner(dict(options), operator_blocklist=blocked)


@contextmanager
def quietly() -> Iterator[dict[str, str]]:
    """Collect the partitioner's reasons, by operator, and keep its other words back.

    The backend writes to the root logger and sets it to INFO when it is imported, so the import comes first.
    """
    root = logging.getLogger()
    level, others = root.level, list(root.handlers)
    import executorch.backends.vulkan.partitioner.vulkan_partitioner  # noqa: F401

    reasons: dict[str, str] = {}
    handler = _Reasons(reasons)
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    try:
        yield reasons
    finally:
        root.handlers = others
        root.setLevel(level)


class _Reasons(logging.Handler):
    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__()
        self._reasons = reasons

    def emit(self, record: logging.LogRecord) -> None:
        found = _SKIPPED.search(record.getMessage())
        if found:
            operator, why = found["op"], _OPERATOR_TEXT.sub("", found["why"])
            self._reasons.setdefault(operator, _NO_KERNEL if operator in _LEFT_TO_CPU else why)


def reasons_by_node(edge: EdgeProgramManager, by_operator: Mapping[str, str]) -> dict[str, str]:
    """``by_operator`` by the names of nodes, as the delegation's table wants it."""
    return {
        node.name: by_operator[name]
        for method in edge.methods
        for node in edge.exported_program(method).graph_module.graph.nodes
        if node.op == "call_function" and (name := getattr(node.target, "__name__", "")) in by_operator
    }


def per_channel_linears(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy where int8 linear layers are written as Vulkan's fusion wants them.

    It takes ``quantized_decomposed.dequantize_per_channel`` with scales (rows,), as PT2E writes it, not torchao's
    ``dequantize_affine`` of whole rows with scales (rows, 1). Int4 is left as it is: whole rows are groups to Vulkan.
    """
    import executorch.exir  # noqa: F401  registers quantized_decomposed
    import torch

    program = program.run_decompositions({})
    graph = program.graph_module.graph
    for node in graph.nodes:
        if node.op != "call_function" or _executorch.op_name(node) != "torchao.dequantize_affine":
            continue
        weight, block, scale, zero, dtype, lowest, highest = node.args[:7]
        shape = tuple(weight.meta["val"].shape)
        users = [_executorch.op_name(user) for user in node.users]
        if highest == _INT4 or tuple(block) != (1, *shape[1:]) or set(users) != {"aten.linear"}:
            continue
        for constant, as_type in ((scale, None), (zero, torch.int64)):
            _flatten(program, constant, as_type)
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        with graph.inserting_before(node):
            rows = graph.call_function(dequantize, (weight, scale, zero, 0, lowest, highest, dtype))
        rows.meta = dict(node.meta)
        node.replace_all_uses_with(rows)
        graph.erase_node(node)
    program.graph_module.recompile()
    return program


def refused_linears(method: str, program: torch.export.ExportedProgram) -> Iterator[Problem]:
    """What ends the app when it loads a program of ``per_channel_linears``, or is computed in part.

    The conditions, under backends/vulkan/runtime/graph/ops of ExecuTorch 1.4.1: check_linear_qcsnw_args in
    impl/QuantizedLinearQCSNW.cpp (int8), prepack_q4_w_4x8_nc_buffer in impl/Q4gswLinear.cpp, whose columns are padded
    to 8 (int4), and glsl/q4gsw_linear_gemm__w_4x8.glsl, which computes the first of several batches only (int4).
    """
    for node in program.graph.nodes:
        name = _executorch.op_name(node) if node.op == "call_function" else ""
        if name not in ("quantized_decomposed.dequantize_per_channel", "torchao.dequantize_affine"):
            continue
        is_int4 = node.args[5 if name.endswith("_per_channel") else 6] == _INT4
        outputs, inputs = node.args[0].meta["val"].shape[:2]
        for user in (user for user in node.users if _executorch.op_name(user) == "aten.linear"):
            shape = user.args[0].meta["val"].shape
            why = ""
            if is_int4 and (outputs % 4 or inputs % 8):
                why = f"has {outputs} output and {inputs} input features: int4 needs multiples of 4 and of 8"
            elif len(shape) not in (2, 3):
                why = f"reads a tensor of {len(shape)} dimensions: integer weights need 2 or 3"
            elif is_int4 and len(shape) == 3 and shape[0] != 1:
                why = f"reads a batch of {shape[0]}: of several, Vulkan's int4 kernels compute the first"
            if why:
                module = _executorch.innermost_module(user) or "a linear layer"
                yield Problem(
                    what=f"{module} {why}",
                    where=f"lower: method {method}",
                    fix=f'give it another scheme, for example modules: {{"{module}": fp32}}',
                )


def _flatten(program: torch.export.ExportedProgram, constant: torch.fx.Node, dtype: torch.dtype | None) -> None:
    """Let the constant behind a placeholder have one axis, in ``dtype`` where that is given."""
    import torch

    signature = program.graph_signature
    paths = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    path = paths[constant.name]
    where = program.state_dict if path in program.state_dict else program.constants
    flat = where[path].detach().reshape(-1).to(dtype or where[path].dtype)
    is_parameter = constant.name in signature.inputs_to_parameters
    where[path] = torch.nn.Parameter(flat, requires_grad=False) if is_parameter else flat
    value = constant.meta["val"]
    constant.meta["val"] = value.reshape(-1).to(dtype or value.dtype)
