"""An ONNX graph under the knife: where weights are used, by which module, and replacing nodes in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgebake.types import ModuleKind
from edgebake_targets._onnx import TRANSPOSED, module_of, prune, set_module

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
KIND_OF_OPERATOR: Mapping[str, ModuleKind] = {
    "MatMul": "linear",
    "Gemm": "linear",
    "Conv": "conv",
    "ConvTranspose": "conv",
    "Gather": "embedding",
}
# The input that holds the weight, also of what compression puts in the place of an operator.
WEIGHT_SLOT = {
    "MatMul": 1,
    "Gemm": 1,
    "Conv": 1,
    "ConvTranspose": 1,
    "Gather": 0,
    "MatMulInteger": 1,
    "MatMulNBits": 1,
}


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """``node`` reads the float matrix ``weight``; ``transposed`` when through a Transpose node. ``module`` owns it."""

    node: onnx.NodeProto
    weight: str
    transposed: bool
    module: str
    kind: ModuleKind

    @property
    def output_axis(self) -> int:
        """Axis of ``weight`` that counts output channels (embedding: rows)."""
        if self.node.op_type == "MatMul":
            return 0 if self.transposed else 1
        if self.node.op_type == "Gemm":
            return 0 if attribute(self.node, "transB", 0) != self.transposed else 1
        return 1 if self.node.op_type == "ConvTranspose" else 0


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute, or what its absence means."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


@dataclass
class Graph:
    """``model`` opened for editing; ``commit`` writes the changes back. Subgraphs stay as they are."""

    model: onnx.ModelProto
    initializers: dict[str, onnx.TensorProto] = field(init=False)
    before: dict[str, list[onnx.NodeProto]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.initializers = {i.name: i for i in self.model.graph.initializer}

    def value(self, name: str) -> NDArray[Any]:
        """Content of an initializer."""
        from onnx import numpy_helper

        value: NDArray[Any] = numpy_helper.to_array(self.initializers[name])
        return value

    def add(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer unless ``name`` is there already; its name."""
        import numpy as np
        from onnx import numpy_helper

        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        return name

    def make(
        self, like: onnx.NodeProto, op_type: str, inputs: list[str], outputs: list[str], **more: Any
    ) -> onnx.NodeProto:
        """A node named after its output, of the same module as ``like``."""
        from onnx import helper

        node = helper.make_node(op_type, inputs, outputs, name=more.pop("name", f"{outputs[0]}_node"), **more)
        set_module(node, module_of(like) or "", like.name)
        return node

    def put_before(self, node: onnx.NodeProto, *inserted: onnx.NodeProto) -> None:
        """Insert nodes in front of ``node``."""
        self.before.setdefault(node.output[0], []).extend(inserted)

    def replace(self, node: onnx.NodeProto, last: onnx.NodeProto) -> None:
        """Turn ``node`` into ``last``, which must produce the same outputs."""
        node.CopyFrom(last)

    def commit(self) -> None:
        """Write nodes and initializers back in a valid order; drop what nothing reads."""
        nodes: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            nodes += [*self.before.pop(node.output[0], ()), node]
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(copies)
        tensors = list(self.initializers.values())
        fresh = [t for t in tensors if not any(t is old for old in self.model.graph.initializer)]
        self.model.graph.initializer.extend(fresh)
        prune(self.model)
        self.initializers = {i.name: i for i in self.model.graph.initializer}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node behind each tensor."""
    return {name: node for node in model.graph.node for name in node.output if name}


def weight_uses(model: onnx.ModelProto, kinds: Mapping[str, ModuleKind]) -> list[WeightUse]:
    """Every node that multiplies by, or looks up in, a float32 initializer that belongs to a module of ``kinds``."""
    from onnx import TensorProto

    floats = {i.name: i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT and len(i.dims) > 1}
    made_by = producers(model)
    found = []
    for node in model.graph.node:
        kind = KIND_OF_OPERATOR.get(node.op_type)
        if kind is None or node.domain not in ("", "ai.onnx"):
            continue
        weight, transposed = node.input[WEIGHT_SLOT[node.op_type]], False
        source = made_by.get(weight)
        if source is not None and source.op_type == "Transpose" and attribute(source, "perm", [1, 0]) == [1, 0]:
            weight, transposed = source.input[0], True
        module = _owner(node, weight, kind, kinds)
        if weight in floats and module:
            found.append(WeightUse(node=node, weight=weight, transposed=transposed, module=module, kind=kind))
    return found


def _owner(node: onnx.NodeProto, weight: str, kind: ModuleKind, kinds: Mapping[str, ModuleKind]) -> str:
    # The scope comes first: a tied weight carries the name of one module but is used by two. It is not enough: a
    # convolution that swallowed its BatchNorm carries the BatchNorm's scope, and functional code carries its caller's.
    scope = module_of(node) or ""
    if _fits(kinds.get(scope), kind):
        return scope
    by_name = weight.removesuffix(TRANSPOSED).removesuffix(".weight")
    return by_name if _fits(kinds.get(by_name), kind) else ""


def _fits(module_kind: ModuleKind | None, operator_kind: ModuleKind) -> bool:
    # A linear layer may come out as a 1x1 convolution, and a 1x1 convolution as a product.
    return module_kind == operator_kind or {module_kind, operator_kind} == {"linear", "conv"}


def stored_type(model: onnx.ModelProto, node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> str:
    """How the weight of ``node`` is stored: numpy's name of the initializer behind it, ``int4`` in MatMulNBits."""
    from onnx import helper

    if node.op_type == "MatMulNBits":
        return f"int{attribute(node, 'bits', 4)}"
    name = node.input[WEIGHT_SLOT[node.op_type]]
    while name in made_by and made_by[name].op_type in ("DequantizeLinear", "Transpose", "Cast"):
        name = made_by[name].input[0]
    stored = next((i for i in model.graph.initializer if i.name == name), None)
    return str(np_name(helper.tensor_dtype_to_np_dtype(stored.data_type))) if stored is not None else ""


def np_name(dtype: np.dtype[Any]) -> str:
    """``float32`` for ``dtype('float32')``."""
    return dtype.name
