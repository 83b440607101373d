"""Static QDQ of a whole graph for Qualcomm's HTP: every operator between two of integers, weights per channel."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake import scheme as schemes
from edgebake.errors import StageFailed
from edgebake.target import LowerRequest
from edgebake.types import Assignment
from edgebake_targets._onnx import clean_keeping_scopes, module_of
from edgebake_targets._onnx_graph import WEIGHT_SLOT, attribute
from edgebake_targets._onnx_ranges import HEADROOM, observed, ranges_of, store, wide_range
from edgebake_targets._onnx_static import Feed, silent, turn_weights
from edgebake_targets._onnx_wide import Kept, searched
from edgebake_targets._onnx_widths import fold_clamps, modules_of, overrides, values_of
from edgebake_targets._wide import SEARCH, named, words

if TYPE_CHECKING:
    import onnx

    from edgebake_targets._ranges import Range, Seen


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A float graph that calibration samples have run through, to be rounded in one way or another.

    ``folded``: the graph without the clamps that ranges replace; ``ends``: what they clamped to. ``nodes``: names of
    the operators with integer weights and their schemes; ``left_float``: of those that stay float.
    """

    model: onnx.ModelProto
    folded: onnx.ModelProto
    ends: Mapping[str, Range]
    folder: Path
    seen: Mapping[str, Seen]
    nodes: Mapping[str, str]
    left_float: tuple[str, ...]
    options: Mapping[str, Any]

    def rounded(self, modules: Collection[str] = ()) -> onnx.ModelProto:
        """The graph in integers, the values of ``modules`` wider than those of the others."""
        import onnx
        from onnxruntime.quantization import quantize_static

        result = self.folder / "integers.onnx"
        with silent():
            quantize_static(self.folded, result, None, **self._config(self.values(modules)))
        quantized = onnx.load_model(result)
        clean_keeping_scopes(quantized)
        return quantized

    def values(self, modules: Collection[str]) -> set[str]:
        """The rounded values that operators of ``modules`` make."""
        return values_of(self.folded, modules, self.seen)

    def _config(self, wide: Collection[str]) -> dict[str, Any]:
        """Arguments of ``quantize_static``: QNN's own rules, and what they get wrong."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

        bits = activation_bits(self.nodes)
        widths = overrides(self.folded, wide, self.seen, self.left_float) if wide else {}
        types = _weight_types(self.folded, self.nodes) | widths
        rules = get_qnn_qdq_config(
            self.folded,
            None,
            activation_type={8: QuantType.QUInt8, 16: QuantType.QUInt16}[bits],
            weight_type=QuantType.QInt8,
            per_channel=True,
            init_overrides=types,
            add_qtype_converts=not widths,
            keep_removable_activations=True,  # those that could go are gone
            nodes_to_exclude=list(self.left_float),
        )
        narrow = {name for name, given in types.items() if given[0].get("quant_type") is QuantType.QUInt8}
        large = [name for name in (wide if bits == 8 else self.seen) if name not in narrow]
        anywhere, room = (-math.inf, math.inf), HEADROOM if bits == 8 else 1.0
        ranges = ranges_of(self.seen, self.options) | {
            name: wide_range(self.seen[name], self.options, self.ends.get(name, anywhere), room) for name in large
        }
        names = ("activation_type", "weight_type", "op_types_to_quantize", "nodes_to_exclude", "per_channel")
        return {
            **{name: getattr(rules, name) for name in names},
            "extra_options": rules.extra_options,
            "calibration_cache_path": store(ranges, self.folder / "ranges.json"),
        }


def quantize(
    model: onnx.ModelProto, nodes: Mapping[str, str], calls: Iterable[Feed], count: int, request: LowerRequest
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """``model`` in integers, but for the modules that the assignment leaves in float; the HTP computes these in half.

    ``nodes``: names of the operators with integer weights and their schemes, of one width of activations. Also what
    reports say of it. StageFailed without calibration calls for this method.
    """
    import onnx

    if not count:
        raise StageFailed("static integers need calibration samples for every method", fix="add samples.calibration")
    turn_weights(model, list(nodes))
    model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # its preprocessing is done: folded at export
    left_float = _left_float(model, request.assignment)
    folded, ends = fold_clamps(model, left_float)
    wide, calls = named(request.options, modules_of(folded)), Kept(calls, count)
    with tempfile.TemporaryDirectory(prefix="edgebake-") as name:
        folder = Path(name)
        onnx.save_model(model, folder / "float.onnx")
        types = {node.op_type for node in model.graph.node} - {"Cast"}
        seen = observed(folder / "float.onnx", calls, request.options, types)
        there = {name for node in folded.graph.node for name in (*node.input, *node.output)}
        ready = Ready(
            model=model,
            folded=folded,
            ends=ends,
            folder=folder,
            seen={name: seen[name] for name in seen if name in there},
            nodes=nodes,
            left_float=tuple(left_float),
            options=request.options,
        )
        if SEARCH not in words(request.options):
            return ready.rounded(wide), ()
        found = searched(ready, calls.feeds, wide)
        return ready.rounded([*wide, *found.modules]), found.notes


def activation_bits(nodes: Mapping[str, str]) -> int:
    """The one width of activations of the schemes of ``nodes``."""
    return {schemes.parse(name).activation_bits for name in nodes.values()}.pop() or 8


def _weight_types(model: onnx.ModelProto, nodes: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Overrides by tensor: integer weights per output channel, norms' weights unsigned per tensor.

    Left to itself, ONNX Runtime's quantizer gives MatMul one scale per tensor (MiniLM at w8a16: 12 dB instead of 30),
    and norms signed weights, which HTP's LayerNorm does not take: each then runs on the CPU (13 of MiniLM's).
    """
    from onnxruntime.quantization import QuantType

    types = {4: QuantType.QInt4, 8: QuantType.QInt8}
    constants = {i.name for i in model.graph.initializer}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        if node.name in nodes and node.op_type == "Gather":
            found |= _looked_up(model, node, schemes.parse(nodes[node.name]).activation_bits)
        elif node.name in nodes:
            chosen = types[schemes.parse(nodes[node.name]).weight_bits]
            weight = node.input[WEIGHT_SLOT[node.op_type]]
            found[weight] = [{"quant_type": chosen, "axis": _channels(node), "symmetric": True}]
        elif node.op_type in ("LayerNormalization", "RMSNormalization") and node.input[1] in constants:
            found[node.input[1]] = [{"quant_type": QuantType.QUInt8, "symmetric": False}]
    return found


def _looked_up(model: onnx.ModelProto, node: onnx.NodeProto, bits: int | None) -> dict[str, list[dict[str, Any]]]:
    """A table of 8 bits, and its rows widened to ``bits`` for their readers: the HTP looks up without converting."""
    from onnxruntime.quantization import QuantType

    if bits == 8:
        return {}  # as the activations are
    readers = {reader.name for reader in model.graph.node if node.output[0] in reader.input}
    wider = {"quant_type": QuantType.QUInt16, "recv_nodes": readers}
    return {
        node.input[0]: [{"quant_type": QuantType.QUInt8, "symmetric": False}],
        node.output[0]: [{"quant_type": QuantType.QUInt8, "convert": wider}],
    }


def _channels(node: onnx.NodeProto) -> int:
    """Axis of the output channels in the weight of ``node``."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"MatMul": 1, "Conv": 0, "ConvTranspose": 1}[node.op_type]


def _left_float(model: onnx.ModelProto, assignment: Assignment) -> list[str]:
    """Nodes of the modules that have no integer scheme although this target could give them one, or a float one."""
    integer = {m for m, name in assignment.schemes.items() if schemes.parse(name).needs_calibration}
    kept = {m for m, kind in assignment.kinds.items() if m not in integer and kind != "embedding"}
    kept |= {m for m in assignment.schemes if m not in integer}
    return [node.name for node in model.graph.node if module_of(node) in kept]
