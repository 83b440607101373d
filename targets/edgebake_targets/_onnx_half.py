"""A float32 ONNX graph in half precision, with float32 inputs and outputs and float32 where half would overflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgebake_targets._onnx_graph import Graph, attribute, producers

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

FLOAT, HALF = 1, 10  # TensorProto.DataType
HALF_MAX = 65504.0
SMALL = 4096  # bytes: what is larger is a weight, what is smaller may be kept in both types
# Sums of squares, exponentials and their inverses leave the range of half (6e-8 .. 65504) on ordinary activations.
WIDE = frozenset(
    {
        *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization"),
        *("InstanceNormalization", "LpNormalization", "BatchNormalization", "MeanVarianceNormalization"),
        *("Softmax", "LogSoftmax", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd"),
        *("ReduceLogSumExp", "Pow", "Exp", "Log", "Reciprocal", "Sqrt", "Softplus", "CumSum", "Range", "Sin", "Cos"),
        # These make float32 by their attributes.
        *("Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform", "RandomNormalLike", "Bernoulli"),
    }
)


def to_half(value: NDArray[Any]) -> NDArray[np.float16]:
    """``value`` in half; finite values beyond 65504 (attention masks) become +-65504, infinities stay."""
    import numpy as np

    clipped = np.where(np.isinf(value), value, np.clip(value, -HALF_MAX, HALF_MAX))
    return clipped.astype(np.float16)


def convert(model: onnx.ModelProto, stay: Iterable[str]) -> None:
    """Turn the graph into half precision in place; nodes named in ``stay`` and those of WIDE keep computing in float32.

    Casts are inserted where the two meet, once per tensor. Weights become float16 wherever a half node reads them.
    """
    half = _Half(graph=Graph(model), types=_types(model), stay=frozenset(stay))
    half.run()


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, by ONNX's shape inference on a copy without the large weights."""
    import onnx

    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model)
    del skeleton.graph.initializer[:]
    for initializer in model.graph.initializer:
        if len(initializer.raw_data) <= SMALL:
            skeleton.graph.initializer.append(initializer)
        else:
            value = onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, list(initializer.dims))
            skeleton.graph.input.append(value)
    graph = onnx.shape_inference.infer_shapes(skeleton).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return types | {i.name: i.data_type for i in model.graph.initializer}


@dataclass
class _Half:
    """The walk over the graph: ``now`` is the type that a tensor, float32 before, has after conversion."""

    graph: Graph
    types: dict[str, int]
    stay: frozenset[str]
    now: dict[str, int] = field(default_factory=dict)
    casts: set[str] = field(default_factory=set)

    def run(self) -> None:
        exits = self._exits()
        precise = self.stay | _angles(self.graph)
        for node in self.graph.model.graph.node:
            if node.name in exits:
                continue
            kept = node.name in precise or self._keeps(node)
            for index, name in enumerate(node.input):
                if self.types.get(name) == FLOAT:
                    node.input[index] = self._as(
                        name, FLOAT if kept or _fixed_float(node, index, self.graph.model) else HALF, node
                    )
            if not kept and node.op_type == "Cast" and attribute(node, "to", FLOAT) == FLOAT:
                node.attribute[0].i = HALF
            self.now |= dict.fromkeys(node.output, FLOAT if kept else HALF)
        self.graph.commit()
        self._share_weights()

    def _exits(self) -> set[str]:
        """Put a cast to float32 in front of every float output; names of these casts."""
        from onnx import helper

        names: set[str] = set()
        graph = self.graph.model.graph
        made = {name for node in graph.node for name in node.output}
        for output in [v.name for v in graph.output if self.types.get(v.name) == FLOAT and v.name in made]:
            inner = f"{output}_inner"
            for node in graph.node:
                for names_of in (node.input, node.output):
                    for index, name in enumerate(names_of):
                        names_of[index] = inner if name == output else name
            self.types[inner] = FLOAT
            graph.node.append(helper.make_node("Cast", [inner], [output], name=f"{output}_output", to=FLOAT))
            names.add(f"{output}_output")
        return names

    def _keeps(self, node: onnx.NodeProto) -> bool:
        if node.op_type in WIDE or any(a.HasField("g") for a in node.attribute):
            return True
        return not _allows_half(node, self.graph.model) or any(self._vanishes(name) for name in node.input)

    def _vanishes(self, name: str) -> bool:
        """A small constant such as an epsilon that half would round to zero."""
        import numpy as np

        tensor = self.graph.initializers.get(name)
        if tensor is None or tensor.data_type != FLOAT or len(tensor.raw_data) > 64:
            return False
        value = self.graph.value(name)
        return bool(np.any((value != 0) & (np.abs(value) < 6e-8)))

    def _as(self, name: str, wanted: int, node: onnx.NodeProto) -> str:
        if name in self.graph.initializers:
            if wanted == FLOAT:
                return name
            half = f"{name}_half"
            if half not in self.graph.initializers:
                self.graph.add(half, to_half(self.graph.value(name)))
            return half
        if self.now.get(name, FLOAT) == wanted:
            return name
        cast = f"{name}_as_{'float' if wanted == FLOAT else 'half'}"
        if cast not in self.casts:
            self.casts.add(cast)
            self.graph.put_before(node, self.graph.make(node, "Cast", [name], [cast], to=wanted))
        return cast

    def _share_weights(self) -> None:
        """Where float32 and half nodes read the same large weight, keep the half one and widen it where needed."""
        model = self.graph.model
        both = [n for n in self.graph.initializers if f"{n}_half" in self.graph.initializers and self._large(n)]
        for name in both:
            wide = f"{name}_wide"
            readers = [n for n in model.graph.node if name in n.input]
            self.graph.put_before(readers[0], self.graph.make(readers[0], "Cast", [f"{name}_half"], [wide], to=FLOAT))
            for reader in readers:
                for index, read in enumerate(reader.input):
                    if read == name:
                        reader.input[index] = wide
        self.graph.commit()

    def _large(self, name: str) -> bool:
        return len(self.graph.initializers[name].raw_data) > SMALL


def _angles(graph: Graph) -> frozenset[str]:
    """Nodes that compute the arguments of sines: half resolves an angle of 1000 rad to 0.5 rad only.

    The walk stops at layers with weights, so that a network with sine activations still becomes half.
    """
    made_by = producers(graph.model)
    pending = [n for n in graph.model.graph.node if n.op_type in ("Sin", "Cos")]
    found: set[str] = set()
    while pending:
        node = pending.pop()
        weights = (graph.initializers.get(name) for name in node.input)
        if node.name in found or any(w is not None and len(w.raw_data) > SMALL for w in weights):
            continue
        found.add(node.name)
        pending += [made_by[name] for name in node.input if name in made_by]
    return frozenset(found)


def _formal(index: int, schema: Any) -> Any:
    return schema.inputs[min(index, len(schema.inputs) - 1)]


def _schema(node: onnx.NodeProto, opset: int) -> Any:
    import onnx

    if node.domain not in ("", "ai.onnx"):
        return None
    return onnx.defs.get_schema(node.op_type, opset)


def _opset(model: onnx.ModelProto) -> int:
    return int(next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))


def _fixed_float(node: onnx.NodeProto, index: int, model: onnx.ModelProto) -> bool:
    """Inputs such as Resize's scales are float32 by the standard."""
    schema = _schema(node, _opset(model))
    return schema is not None and bool(_formal(index, schema).type_str == "tensor(float)")


def _allows_half(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    """Whether the standard defines the operator on float16 (Range, NonMaxSuppression and others are not)."""
    schema = _schema(node, _opset(model))
    if schema is None:
        return False
    typed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    used = (_formal(i, schema).type_str for i, name in enumerate(node.input) if name)
    allowed = [typed[t] for t in used if t in typed]
    return all("tensor(float16)" in types for types in allowed if "tensor(float)" in types)
