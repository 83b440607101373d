"""Shared by the ExecuTorch family: lowering to one .pte, what the backend took of the work, planned memory."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, StageFailed
from edgebake.target import LowerRequest, Missing
from edgebake.types import Delegation, Lowered, Signature, Traced, canonical_module_name
from edgebake_targets import _executorch_macs
from edgebake_targets._units import EXECUTORCH_KERNELS, Tally, border_bytes

if TYPE_CHECKING:
    import torch
    from executorch.exir import EdgeProgramManager, ExecutorchProgramManager

ARTIFACT = "model.pte"
DISTRIBUTIONS = ("executorch", "torch", "torchao")
_HERE = Path(__file__).parent
# What every target of the family reaches: the inspector of .pte files looks into Core ML's and other backends' parts.
SOURCES = tuple(
    ".".join(("edgebake_targets", *file.relative_to(_HERE).with_suffix("").parts))
    for pattern in (
        "_executorch*.py",
        "_coreml*.py",
        "_decoder*.py",
        "_units.py",
        "_weight_record.py",
        "inspectors/*.py",
    )
    for file in sorted(_HERE.glob(pattern))
    if file.stem != "__init__"
)

# Bookkeeping of the graph: nothing that a kernel would have to be written for.
# (`dequantize_affine` outside a delegate is folded into the int8 embedding that follows it, or the emitter refuses it.)
_NOT_WORK = (
    "getitem",
    "sym_size",
    "executorch_call_delegate",
    "aten.sym_size",
    "aten.alias",
    "torchao.dequantize_affine",
)
_PASSED_ON = ("getitem", "aten.alias")  # what stands for a value of the node before it


def missing_packages(packages: Mapping[str, str]) -> Missing | None:
    """Missing for the first absent module of ``packages`` (import name -> pip requirement); imports none of them."""
    for module, requirement in packages.items():
        if find_spec(module) is None:
            return Missing(
                reason=f"the Python package {module!r} is not installed",
                remedy=f"pip install '{requirement}'",
            )
    return None


def to_edge(
    programs: Mapping[str, torch.export.ExportedProgram],
    partitioner: Sequence[Any],
    constants: dict[str, Any] | None = None,
    passes: Sequence[Any] | None = None,
) -> EdgeProgramManager:
    """Delegate every method of ``programs`` with ``partitioner``; StageFailed with ExecuTorch's own words.

    ``constants``: methods without inputs, name to what they return; ``passes``: what the backend runs before.
    """
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    # Quantised operators are outside the edge dialect's op set, and XNNPACK's and Vulkan's passes want plain
    # `clone`/`_to_copy` instead of their dim-order variants.
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    try:
        with _without_deprecations(), _shared_weights():
            return to_edge_transform_and_lower(
                {name: _own(program) for name, program in programs.items()},
                partitioner={name: list(partitioner) for name in programs},
                transform_passes=passes,
                compile_config=config,
                constant_methods=constants,
            )
    except Exception as error:  # its passes, and those of the backend, raise whatever Python raises
        raise _upstream(error) from error


@contextmanager
def _shared_weights() -> Iterator[None]:
    """Copies of programs share their tensors: before a backend sees the parts of a program, ExecuTorch copies them all.

    Backends put other tensors in the place of those that they change.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    of_parameter = torch.nn.Parameter.__deepcopy__.__code__

    class Shared(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            copies = func is torch.Tensor.__deepcopy__
            if func is torch.Tensor.clone:  # parameters are copied by a clone of their data
                copies = sys._getframe(1).f_code is of_parameter
            return args[0] if copies else func(*args, **(kwargs or {}))

    with Shared():
        yield


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """ExecuTorch copies programs and checks sizes in ways that torch deprecates; only its authors can change that."""
    with warnings.catch_warnings():
        for message in (".*LeafSpec.*", "_check_is_size will be removed"):
            warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        yield


def _own(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """``program`` with dictionaries of its own, its tensors shared: lowering takes out what a delegate has taken."""
    from torch.export import ExportedProgram

    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=dict(program.state_dict),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def refuse_writes(traced: Traced, why: str) -> None:
    """StageFailed, with ``why``, for a backend that keeps no buffer which the network writes."""
    written = sorted({name for method in traced.signature.methods.values() for name in method.buffers})
    if written:
        raise StageFailed(
            f"the network writes to its buffer {', '.join(written)}, and {why}",
            where="lower",
            fix="hand it on as an input with role: state and an output",
        )


def refuse_states(traced: Traced) -> None:
    """StageFailed for written buffers that a .pte cannot hold: not starting at zero, or shared by methods."""
    problems = [*_started(traced), *_shared(traced)]
    if problems:
        raise StageFailed(list(dict.fromkeys(problems)))


def _started(traced: Traced) -> Iterator[Problem]:
    for method, program in traced.programs.items():
        for key, value in {**program.constants, **program.state_dict}.items():
            name = canonical_module_name(key)
            if name in traced.signature.methods[method].buffers and bool(value.any()):
                yield Problem(
                    what=f"the buffer {name} does not start at zero, and ExecuTorch keeps no start of buffers that are "
                    "written",
                    fix="let it start at zeros and add what it starts at where it is read",
                )


def _shared(traced: Traced) -> Iterator[Problem]:
    written = {name for method in traced.signature.methods.values() for name in method.buffers}
    for name in sorted(written):
        users = [
            method
            for method, program in traced.programs.items()
            if name in {canonical_module_name(key) for key in program.graph_signature.buffers}
        ]
        if len(users) > 1:
            yield Problem(
                what=f"{' and '.join(users)} share the buffer {name}, and ExecuTorch gives each method one of its own",
                fix="hand it on as an input with role: state and an output, or make one method of both",
            )


def to_executorch(edge: EdgeProgramManager, *, fuse_quantised: bool) -> ExecutorchProgramManager:
    """Plan memory and emit; ``fuse_quantised`` turns ``dequantize + embedding`` into ExecuTorch's int8 embedding."""
    from executorch.exir import ExecutorchBackendConfig

    try:
        with _without_deprecations():
            return edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=fuse_quantised))
    except Exception as error:  # as above
        raise _upstream(error) from error


def _upstream(error: Exception) -> StageFailed:
    text = str(error).strip() or type(error).__name__
    return StageFailed(
        f"ExecuTorch could not lower the program: {type(error).__name__}: {text[:2000]}",
        where="lower",
        fix="the stage's log has the whole trace; where the message names an operator, rewrite that part of the "
        "network or give its modules another scheme",
    )


def write(program: ExecutorchProgramManager, folder: Path) -> str:
    """Write ``model.pte`` into ``folder`` and return its name."""
    with (folder / ARTIFACT).open("wb") as file:
        program.write_to_file(file)
    return ARTIFACT


def emitted(
    edge: EdgeProgramManager,
    request: LowerRequest,
    signature: Signature,
    delegation: Delegation,
    encodings: Mapping[str, Any],
    *,
    fuse_quantised: bool = False,
) -> Lowered:
    """Write ``model.pte`` with what was delegated; see ``to_executorch``.

    Whoever reads the file afterwards lets go of ``edge`` first: it holds the weights several times over.
    """
    program = to_executorch(edge, fuse_quantised=fuse_quantised)
    entry = write(program, request.folder)
    _empty_caches(edge)
    return Lowered(
        files=(entry,),
        entry=entry,
        signature=signature,
        delegation=delegation,
        planned_memory_bytes=planned_memory(program),
        encodings=encodings,
    )


def _empty_caches(edge: EdgeProgramManager) -> None:
    """Of fake evaluation: their keys hold every delegate that was evaluated, with the weights it was made of."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    FakeTensorMode.cache_clear()
    for method in edge.methods:
        for node in edge.exported_program(method).graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
                value.fake_mode.shape_env.fake_tensor_cache.clear()


def planned_memory(program: ExecutorchProgramManager) -> int:
    """Bytes of all planned arenas, summed over the methods: each loaded method holds its own."""
    plans = program.executorch_program.execution_plan
    return sum(size for plan in plans for size in plan.non_const_buffer_sizes)


def delegation(edge: EdgeProgramManager, reasons: Mapping[str, str], otherwise: str = "") -> Delegation:
    """What the backend took of all methods, in multiply-accumulates; named dimensions count at their upper bound.

    ``reasons`` maps node names to why the partitioner refused them, ``otherwise`` is the reason where it named none. A
    program without any multiply-accumulate is judged by its number of operators.
    """
    inside: dict[str, Tally] = {}
    outside, moved = Tally(), 0
    for method in sorted(edge.methods):
        module = edge.exported_program(method).graph_module
        for node in module.graph.nodes:
            if is_delegate_call(node):
                tally = inside.setdefault(lowered_module(module, node).backend_id, Tally())
                tally.subgraphs += 1
                for inner in filter(is_work, delegate_nodes(module, node)):
                    tally.add(op_name(inner), node_macs(inner))
            elif is_work(node):
                outside.add(op_name(node), node_macs(node), reasons.get(node.name, otherwise))
        moved += _moved(module.graph)
    counts = [tally.macs for tally in (*inside.values(), outside)]
    if not any(count.total() for count in counts):
        counts = [tally.operators for tally in (*inside.values(), outside)]
    whole = sum(count.total() for count in counts)
    return Delegation(
        share=1 - counts[-1].total() / whole if whole else None,
        partitions=sum(tally.subgraphs for tally in inside.values()),
        left_out=outside.left_out(),
        reason="" if whole else "the program has no operators",
        units=(
            *(tally.work(backend) for backend, tally in sorted(inside.items())),
            *([outside.work(EXECUTORCH_KERNELS)] if outside.operators else []),
        ),
        border_bytes=moved,
    )


def _moved(graph: torch.fx.Graph) -> int:
    """Bytes that pass between the delegates of one method and what lies outside them."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    made_in: dict[str, str] = {}
    for node in nodes:
        if not op_name(node).startswith(_PASSED_ON):
            made_in[node.name] = _part(node)
        elif node.args[0].name in made_in:
            made_in[node.name] = made_in[node.args[0].name]
    reads = [
        (_part(node), given.name) for node in nodes for given in node.all_input_nodes if is_work(node) or _part(node)
    ]
    tensors = {node.name: node.meta.get("val") for node in nodes}
    return border_bytes(made_in, reads, lambda name: _bytes(tensors[name])) or 0


def _part(node: torch.fx.Node) -> str:
    return node.name if is_delegate_call(node) else ""


def _bytes(value: Any) -> int:
    """Size of a fake tensor, symbolic sizes at their upper bound; numbers pass for nothing."""
    return math.prod(_executorch_macs.dims(value)) * value.element_size() if hasattr(value, "element_size") else 0


def is_delegate_call(node: torch.fx.Node) -> bool:
    """Whether ``node`` hands its inputs to a backend."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "executorch_call_delegate"


def delegate_nodes(module: torch.fx.GraphModule, call: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The operators inside one delegate call, as they were before the backend compiled them."""
    yield from lowered_module(module, call).original_module.graph.nodes


def lowered_module(module: torch.fx.GraphModule, call: torch.fx.Node) -> Any:
    """What one delegate call runs."""
    return getattr(module, str(getattr(call.args[0], "target", "")))


def is_work(node: torch.fx.Node) -> bool:
    """Whether ``node`` is an operator that some kernel has to run."""
    return node.op == "call_function" and not op_name(node).startswith(_NOT_WORK)


def op_name(node: torch.fx.Node) -> str:
    """``aten.linear`` of a torch or edge operator."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).replace("::", ".")
    return str(getattr(node.target, "__name__", node.target))


def node_macs(node: torch.fx.Node) -> int:
    """Multiply-accumulates of one operator; 0 for everything but convolutions, matrix products and attention."""
    return _executorch_macs.count(op_name(node), node) if node.op == "call_function" else 0


@dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """A weight that an exported program holds as integers: the module it belongs to, its values, their SHA-256."""

    module: str
    count: int
    digest: str


def integer_weights(program: torch.export.ExportedProgram) -> Iterator[IntegerWeight]:
    """Every integer constant of ``program`` that a dequantise operator turns into a weight."""
    import torch

    for node in program.graph.nodes:
        if node.op != "call_function" or ".dequantize_" not in op_name(node):
            continue
        value = _constant_of(program, node.args[0])
        if isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8) and value.dim() > 1:
            user = next(iter(node.users), node)
            yield IntegerWeight(
                module=innermost_module(user) or "",
                count=value.numel(),
                digest=sha256(value.contiguous().numpy().data).hexdigest(),
            )


def _constant_of(program: torch.export.ExportedProgram, node: Any) -> Any:
    """The tensor behind a placeholder, or behind one part of a torchao tensor; None for activations."""
    if getattr(node, "op", "") == "call_function" and op_name(node) == "export.access_subclass_inner_tensor":
        whole = _constant_of(program, node.args[0])
        return None if whole is None else getattr(whole, node.args[1])
    signature = program.graph_signature
    name = getattr(node, "name", "")
    path = signature.inputs_to_parameters.get(name) or signature.inputs_to_buffers.get(name)
    if path is None:
        lifted = signature.inputs_to_lifted_tensor_constants.get(name)
        return program.constants.get(lifted) if lifted else None
    return program.state_dict[path] if path in program.state_dict else program.constants.get(path)


def innermost_module(node: torch.fx.Node) -> str | None:
    """Canonical name of the module whose forward made ``node``."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else None
    return None if path is None else canonical_module_name(str(path))
