"""Defects of ONNX artifacts, edited with the onnx library; how to run an ONNX file without edgebake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tampering import Edit, Mutation, Outputs, control

FILE = "model.onnx"
Change = Callable[[np.ndarray], np.ndarray]


def run(folder: Path, samples: Mapping[str, np.ndarray]) -> Outputs:
    """Outputs of ``folder``'s model for ``samples`` (inputs by name, first axis = samples), as float64."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    taken, names = {i.name for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    count = len(next(iter(samples.values())))
    rows = [session.run(names, {k: v[i : i + 1] for k, v in samples.items() if k in taken}) for i in range(count)]
    return {name: np.concatenate([row[n] for row in rows]).astype(np.float64) for n, name in enumerate(names)}


def _graph(change: Callable[[Any], None], folder: Path) -> None:
    model = onnx.load_model(folder / FILE)
    change(model.graph)
    onnx.checker.check_model(model)
    onnx.save_model(model, folder / FILE)


def graph(change: Callable[[Any], None]) -> Edit:
    """An edit of the graph."""
    return partial(_graph, change)


def _set(graph: Any, name: str, value: np.ndarray) -> None:
    stored = next(i for i in graph.initializer if i.name == name)
    before = numpy_helper.to_array(stored)
    assert value.shape == before.shape
    assert not np.array_equal(value, before), f"{name} stays what it is"
    stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, before.dtype), name))


def _get(graph: Any, name: str) -> np.ndarray:
    return np.array(numpy_helper.to_array(next(i for i in graph.initializer if i.name == name)))


def weight(name: str, change: Change) -> Edit:
    """An edit of one constant."""
    return graph(lambda g: _set(g, name, change(_get(g, name))))


def swapped(one: str, other: str) -> Edit:
    """Two constants in each other's place."""

    def change(g: Any) -> None:
        first, second = _get(g, one), _get(g, other)
        _set(g, one, second)
        _set(g, other, first)

    return graph(change)


def node(name: str, **attributes: Any) -> Edit:
    """Another operator (``op_type``), or other attributes, for the node of this name."""

    def change(g: Any) -> None:
        found = next(n for n in g.node if n.name == name)
        found.op_type = attributes.get("op_type", found.op_type)
        for key in attributes.keys() - {"op_type"}:
            held = next(a for a in found.attribute if a.name == key)
            held.CopyFrom(helper.make_attribute(key, attributes[key]))

    return graph(change)


def rewired(name: str, slot: int, source: str) -> Edit:
    """Input ``slot`` of a node read from ``source``."""

    def change(g: Any) -> None:
        next(n for n in g.node if n.name == name).input[slot] = source

    return graph(change)


def outputs_exchanged(g: Any) -> None:
    """Each of the first two outputs under the other's name."""
    names = {g.output[0].name: g.output[1].name, g.output[1].name: g.output[0].name}
    for made in g.node:
        made.output[:] = [names.get(o, o) for o in made.output]


def input_ignored(name: str, value: float) -> Edit:
    """Every reader of the input ``name`` gets a constant instead."""

    def change(g: Any) -> None:
        entry = next(i for i in g.input if i.name == name)
        shape = [d.dim_value for d in entry.type.tensor_type.shape.dim]
        g.initializer.append(numpy_helper.from_array(np.full(shape, value, np.float32), "constant_input"))
        for reader in g.node:
            reader.input[:] = ["constant_input" if i == name else i for i in reader.input]

    return graph(change)


def output_cast(to: int) -> Edit:
    """The first output in another type, its values the same but for rounding."""

    def change(g: Any) -> None:
        name = g.output[0].name
        maker = next(n for n in g.node if name in n.output)
        maker.output[:] = ["before_cast" if o == name else o for o in maker.output]
        g.node.append(helper.make_node("Cast", ["before_cast"], [name], to=to))
        g.output[0].type.tensor_type.elem_type = to

    return graph(change)


def channel(index: int, factor: float, axis: int = 0) -> Change:
    """One channel multiplied."""

    def change(values: np.ndarray) -> np.ndarray:
        where = [slice(None)] * values.ndim
        where[axis] = slice(index, index + 1)
        values[tuple(where)] = np.clip(values[tuple(where)] * factor, *_range(values.dtype)).astype(values.dtype)
        return values

    return change


def _range(dtype: np.dtype) -> tuple[float, float]:
    info = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    return float(info.min), float(info.max)


def put(value: float, *index: int) -> Change:
    """One value replaced."""

    def change(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return change


def zeroed(values: np.ndarray) -> np.ndarray:
    """All zero."""
    return np.zeros_like(values)


def drawn_again(values: np.ndarray) -> np.ndarray:
    """Values of another seed with the same mean and spread."""
    drawn = np.random.default_rng(7).normal(values.mean(), values.std(), values.shape)
    return np.clip(drawn, *_range(values.dtype)).astype(values.dtype)


def second_zero_point(g: Any) -> None:
    """A zero point for weights that have none (MatMulInteger's fourth input)."""
    found = next(n for n in g.node if n.op_type == "MatMulInteger")
    g.initializer.append(numpy_helper.from_array(np.int8(3), "wrong_zero_point"))
    found.input.append("wrong_zero_point")


MUTATIONS = (
    Mutation("channel-scaled", "layered", "fp32", weight("first.weight", channel(9, 1.05))),
    Mutation("weights-swapped", "layered", "fp32", swapped("second.weight", "third.weight")),
    Mutation("bias-zeroed", "layered", "fp32", weight("third.bias", zeroed)),
    Mutation("relu-to-sigmoid", "layered", "fp32", node("node_relu_1", op_type="Sigmoid")),
    Mutation("add-to-sub", "layered", "fp32", node("node_add", op_type="Sub")),
    Mutation("channels-permuted", "layered", "fp32", weight("second.weight", lambda w: np.roll(w, 1, axis=0))),
    Mutation("weight-transposed", "layered", "fp32", weight("second.weight", lambda w: w.T)),
    Mutation("sign-flipped", "layered", "fp32", weight("head.weight", channel(4, -1))),
    Mutation("other-seed", "layered", "fp32", weight("third.weight", drawn_again)),
    Mutation("output-off", "layered", "fp32", weight("head.bias", lambda b: b + 0.01)),
    Mutation("nan", "layered", "fp32", weight("head.weight", put(np.nan, 2, 5))),
    Mutation("infinite", "layered", "fp32", weight("third.bias", put(np.inf, 9))),
    Mutation("product-factor", "layered", "fp32", node("node_linear_2", alpha=0.99)),
    Mutation("residual-lost", "layered", "fp32", rewired("node_add", 0, "relu_1")),
    Mutation("channel-scaled", "layered", "fp16", weight("first.weight_half", channel(9, 1.25))),
    Mutation("bias-zeroed", "layered", "fp16", weight("head.bias_half", zeroed)),
    Mutation("weight-scale", "layered", "w8a8", weight("second.weight_scale", channel(22, 2.0))),
    Mutation("activation-scale", "layered", "w8a8", weight("add_scale", lambda s: s * 0.25)),
    Mutation("zero-point", "layered", "w8a8", weight("pixels_zero_point", lambda z: z - 8)),
    Mutation("integers-swapped", "layered", "w8a8", swapped("second.weight_quantized", "third.weight_quantized")),
    Mutation("bias-zeroed", "layered", "w8a8", weight("first.bias_quantized", zeroed)),
    Mutation("weight-scale", "layered", "w8a8d", weight("third.weight_scale_0", channel(0, 1.5))),
    Mutation("zero-point", "layered", "w8a8d", graph(second_zero_point)),
    Mutation("sign-flipped", "layered", "w8a8d", weight("head.weight_int8_0_columns", channel(6, -1, axis=1))),
)
MORE_MUTATIONS = (
    Mutation("softmax-axis", "rows", "fp32", node("node_softmax", axis=1)),
    Mutation("mask-ignored", "rows", "fp32", rewired("node_softmax", 0, "div_1")),
    Mutation("epsilon", "rows", "fp32", node("node_layer_norm", epsilon=1e-2)),
    Mutation("input-ignored", "rows", "fp32", input_ignored("seen", 1.0)),
    Mutation("outputs-exchanged", "rows", "fp32", graph(outputs_exchanged)),
    Mutation("depthwise-channel", "rows", "fp32", weight("depth.weight", channel(1, 1.01))),
    Mutation("folded-shift-lost", "rows", "fp32", weight("stem.bias", zeroed)),
    Mutation("padding-moved", "rows", "fp32", node("node_conv2d_1", pads=[2, 1, 0, 1])),
    Mutation("weight-scale", "rows", "w8a8", weight("stem.weight_scale", channel(1, 1.5))),
    Mutation("query-key-swapped", "rows", "w8a8", swapped("query.weight.T_quantized", "key.weight.T_quantized")),
)
CONTROLS = tuple(control("layered", scheme) for scheme in ("fp32", "fp16", "w8a8", "w8a8d"))
MORE_CONTROLS = tuple(control("rows", scheme) for scheme in ("fp32", "w8a8"))
# Defects whose effect is below the limit: verify must not cry wolf.
HARMLESS = (
    Mutation("last-bit", "layered", "fp32", weight("second.weight", lambda w: _nudged(w, 12, 34))),
    Mutation("one-step", "layered", "w8a8", weight("third.weight_quantized", lambda w: _stepped(w, 3, 3))),
    Mutation("one-step", "layered", "w8a8d", weight("third.weight_int8_0_columns", lambda w: _stepped(w, 3, 3))),
)


def _nudged(values: np.ndarray, *index: int) -> np.ndarray:
    values[index] = np.nextafter(values[index], np.float32(np.inf))
    return values


def _stepped(values: np.ndarray, *index: int) -> np.ndarray:
    values[index] += 1 if values[index] < 100 else -1
    return values
