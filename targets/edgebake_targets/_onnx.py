"""Exported program to clean ONNX: the signature's names, named dimensions, weights once, nodes with their module."""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.types import MethodSignature, Signature, TensorSpec, Traced, canonical_module_name

if TYPE_CHECKING:
    import onnx
    import torch

SCOPES = "pkg.torch.onnx.name_scopes"
# A protobuf message ends at 2 GiB; the graph itself needs some of it.
EXTERNAL_DATA_FROM_BYTES = 1_800_000_000
TRANSPOSED = ".T"
_NO_STACK = "_empty_nn_module_stack"


def export(program: torch.export.ExportedProgram, signature: MethodSignature, opset: int) -> onnx.ModelProto:
    """ONNX of one method: inputs and outputs by the signature's names, float32, weights inside.

    BatchNorm is folded into the convolution before it, transposed copies of weights are named ``<parameter>.T``.
    StageFailed when the exporter fails or the graph's inputs, outputs or dimensions are not the signature's.
    """
    import torch

    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=True,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                opset_version=opset,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise StageFailed(
                f"torch.onnx.export could not convert the network: {first_line(error)}",
                fix="rewrite the operator it names, or choose another opset (options: {opset: ...})",
            ) from error
    if exported is None:
        raise StageFailed("torch.onnx.export returned nothing")
    model: onnx.ModelProto = exported.model_proto
    check_names(model, signature)
    name_dimensions(model, signature)
    clean(model)
    name_weights(model, program)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's own deprecation warnings, which a user cannot act on, out of sight."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


def first_line(error: BaseException) -> str:
    """The first line of ``error`` and, where it has one, of its cause."""
    lines = [str(e).strip().splitlines()[0] for e in (error, error.__cause__) if e is not None and str(e).strip()]
    return ": ".join(lines) or type(error).__name__


# --- names ------------------------------------------------------------------------------------------------------------


def check_names(model: onnx.ModelProto, signature: MethodSignature) -> None:
    """StageFailed unless the graph has exactly the signature's inputs and outputs, in order."""
    pairs = (
        ("inputs", [i.name for i in model.graph.input], [s.name for s in signature.inputs]),
        ("outputs", [o.name for o in model.graph.output], [s.name for s in signature.outputs]),
    )
    for what, got, wanted in pairs:
        if got != wanted:
            raise StageFailed(
                f"the ONNX graph's {what} are {', '.join(got)}; the signature says {', '.join(wanted)}",
                fix="return every output once, and keep states as inputs and outputs, not as buffers",
            )


def refuse_states(traced: Traced) -> None:
    """StageFailed for buffers that the network writes to: torch's exporter drops the write without a word."""
    written = sorted({name for method in traced.signature.methods.values() for name in method.buffers})
    if written:
        raise StageFailed(
            f"the network writes to its buffer {', '.join(written)}, and an ONNX model keeps nothing between calls",
            fix="pass it as an input with role state and return its new value",
        )


def fixed(signature: Signature) -> Signature:
    """``signature`` with numbers in the place of dimensions that have one size."""
    sizes = {name: bounds.max for name, bounds in signature.dims.items() if bounds.min == bounds.max}

    def spec(given: TensorSpec) -> TensorSpec:
        return replace(given, shape=tuple(sizes.get(d, d) if isinstance(d, str) else d for d in given.shape))

    methods = {
        name: replace(m, inputs=tuple(map(spec, m.inputs)), outputs=tuple(map(spec, m.outputs)))
        for name, m in signature.methods.items()
    }
    return Signature(methods=methods, dims={n: b for n, b in signature.dims.items() if n not in sizes})


def name_dimensions(model: onnx.ModelProto, signature: MethodSignature) -> None:
    """Give dynamic dimensions the signature's names instead of torch's symbols (``s48`` -> ``seq``)."""
    symbols: dict[str, str] = {}
    for value, spec in zip(model.graph.input, signature.inputs, strict=True):
        for axis, (dim, wanted) in enumerate(zip(value.type.tensor_type.shape.dim, spec.shape, strict=True)):
            if isinstance(wanted, str) and not dim.dim_param:
                raise StageFailed(
                    f"dimension {wanted!r} (axis {axis} of input {spec.name!r}) was traced as {dim.dim_value}",
                    fix=f"trace with a dynamic {wanted!r}, or write the number in the recipe's inputs",
                )
            if isinstance(wanted, str):
                symbols.setdefault(dim.dim_param, wanted)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), dim.dim_param)


def clean(model: onnx.ModelProto) -> None:
    """Drop stack traces, doc strings and stale shapes; keep for each node its canonical module and operator name."""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    parts: list[Any] = [model, model.graph, *model.graph.initializer, *model.graph.input, *model.graph.output]
    for part in (*parts, *model.graph.node):
        part.doc_string = ""
    for part in (*model.graph.initializer, *model.graph.input, *model.graph.output, model.graph):
        del part.metadata_props[:]
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "[]")
        module, operator = _innermost(scopes)
        set_module(node, module, operator)


def clean_keeping_scopes(model: onnx.ModelProto) -> None:
    """What ``clean`` does, on a graph that was cleaned before and then went through another tool."""
    del model.metadata_props[:]
    del model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    model.producer_name, model.producer_version = "edgebake", ""
    for node in model.graph.node:
        node.doc_string = ""


def _innermost(scopes: str) -> tuple[str, str]:
    # The exporter writes the list of modules from the outermost in, then the operator's name in the fx graph.
    names = [str(name) for name in ast.literal_eval(scopes)]
    if not names or names[0].startswith(_NO_STACK):
        return "", names[-1] if names else ""
    return canonical_module_name(names[-2]) if len(names) > 1 else "", names[-1]


def set_module(node: onnx.NodeProto, module: str, operator: str) -> None:
    """Record that ``node`` computes (part of) ``operator`` in ``module``."""
    del node.metadata_props[:]
    node.metadata_props.add(key=SCOPES, value=str([module, operator]))


def module_of(node: onnx.NodeProto) -> str | None:
    """Canonical name of the module that ``node`` came from; None when the node was inserted after the export."""
    for prop in node.metadata_props:
        if prop.key == SCOPES:
            return _innermost(prop.value)[0]
    return None


# --- weights ----------------------------------------------------------------------------------------------------------


def name_weights(model: onnx.ModelProto, program: torch.export.ExportedProgram) -> None:
    """Name initializers after their parameters, merge equal ones, and keep a tied weight once (transposed where used).

    The exporter's constant folding turns ``weight.T`` into a fresh, anonymous constant: for a tied weight that would
    be a second copy of the largest tensor of a language model.
    """
    _merge_equal(model)
    _rename(model, {i.name: canonical_module_name(i.name) for i in model.graph.initializer})
    present = {i.name for i in model.graph.initializer}
    # A tied weight has several names; the one that the graph uses already goes first.
    parameters = dict(sorted(_matrices(program).items(), key=lambda item: item[0] not in present))
    renamed: dict[str, str] = {}
    for initializer in model.graph.initializer:
        if initializer.name in parameters or len(initializer.dims) != 2:
            continue
        origin = _transposed_origin(initializer, parameters)
        if origin in present:
            _use_transposed(model, initializer.name, origin)
        elif origin:
            renamed[initializer.name] = origin + TRANSPOSED
    _rename(model, renamed)
    prune(model)


def _merge_equal(model: onnx.ModelProto) -> None:
    first: dict[str, str] = {}
    instead: dict[str, str] = {}
    for initializer in model.graph.initializer:
        kept = first.setdefault(digest_of(initializer), initializer.name)
        if kept != initializer.name:
            instead[initializer.name] = kept
    outputs = {value.name for value in model.graph.output}
    _reconnect(model.graph, {old: new for old, new in instead.items() if old not in outputs})
    prune(model)


def digest_of(tensor: onnx.TensorProto) -> str:
    """SHA-256 of type, shape and content."""
    from onnx import numpy_helper

    data = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
    head = f"{tensor.data_type}:{list(tensor.dims)}:".encode()
    return hashlib.sha256(head + data).hexdigest()


def _rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    taken = {i.name for i in model.graph.initializer} | {o for n in model.graph.node for o in n.output}
    taken |= {i.name for i in model.graph.input}
    fitting = {old: new for old, new in names.items() if new != old and new not in taken}
    for initializer in model.graph.initializer:
        initializer.name = fitting.get(initializer.name, initializer.name)
    _reconnect(model.graph, fitting)


def _reconnect(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _reconnect(inner, names)


def _matrices(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    return {canonical_module_name(n): t for n, t in program.state_dict.items() if t.ndim == 2 and t.is_floating_point()}


def _transposed_origin(initializer: onnx.TensorProto, parameters: Mapping[str, torch.Tensor]) -> str:
    import numpy as np
    from onnx import numpy_helper

    value = numpy_helper.to_array(initializer)
    for name, tensor in parameters.items():
        if tuple(tensor.shape) != value.shape[::-1] or str(tensor.dtype) != f"torch.{value.dtype}":
            continue
        candidate = tensor.detach().numpy().T
        # One row settles nearly every comparison; whole matrices of a language model would take minutes.
        if np.array_equal(candidate[0], value[0]) and np.array_equal(candidate, value):
            return name
    return ""


def _use_transposed(model: onnx.ModelProto, copy: str, original: str) -> None:
    from onnx import helper

    node = helper.make_node("Transpose", [original], [copy], name=f"{copy}_transpose", perm=[1, 0])
    model.graph.node.insert(0, node)
    kept = [i for i in model.graph.initializer if i.name != copy]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def prune(model: onnx.ModelProto) -> None:
    """Remove initializers and nodes that no output depends on."""
    wanted = {value.name for value in model.graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if any(name in wanted for name in node.output):
            nodes.append(node)
            wanted.update(_read_by(node))
    initializers = [i for i in model.graph.initializer if i.name in wanted]
    if len(nodes) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(reversed(nodes))
    if len(initializers) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(initializers)


def _read_by(node: onnx.NodeProto) -> set[str]:
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            names |= {value.name for value in inner.output}
            names |= {name for deeper in inner.node for name in _read_by(deeper)}
    return names


def live_parameters(program: torch.export.ExportedProgram) -> frozenset[str]:
    """Canonical names of the parameters and buffers that some output depends on."""
    reached: set[Any] = set()
    pending = [program.graph.output_node()]
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending.extend(node.all_input_nodes)
    placeholders = {node.name for node in reached if node.op == "placeholder"}
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {n: t for n, t in {**program.state_dict, **program.constants}.items() if hasattr(t, "data_ptr")}
    # A tied weight has several names, of which the graph may use one.
    used = {_identity(tensors[target]) for name, target in stored.items() if name in placeholders and target in tensors}
    return frozenset(canonical_module_name(name) for name, tensor in tensors.items() if _identity(tensor) in used)


def _identity(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


# --- files ------------------------------------------------------------------------------------------------------------


def file_name(method: str, methods: Iterable[str]) -> str:
    """``model.onnx`` for a component whose one method is ``forward``, else ``<method>.onnx``."""
    return "model.onnx" if list(methods) == ["forward"] else f"{method}.onnx"


def save(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Write ``model`` to ``path``, weights in ``<path>.data`` when they exceed 1.8 GB; names of the files written."""
    import onnx

    payload = sum(len(i.raw_data) for i in model.graph.initializer)
    if payload <= EXTERNAL_DATA_FROM_BYTES:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return (path.name,)
    data = f"{path.name}.data"
    onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=1024)
    return (path.name, data)


def dimensions(spec: TensorSpec, known: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of ``spec`` in numbers; a name that ``known`` does not have counts as 1."""
    return tuple(known.get(d, 1) if isinstance(d, str) else d for d in spec.shape)
