"""``wide_activations: auto``: whose values need 16 bits, found by running rounded graphs on calibration samples.

The outputs, and what is read for them, have them in any case: with 256 levels for a thousand classes, the first two
are often equal. Each module's values are rounded alone in the float graph, as the graph of 8 bits rounds them: what
the outputs lose by it says how much the module asks for. In that order, the fewest modules are made wide with which
the whole graph comes within a decibel of one that is wide everywhere, or far enough that nobody asks for more. All
graphs run on the CPU as they are written, without a kernel's shortcuts: what a vendor's processor rounds besides is
not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgebake_targets._onnx_widths import ends_of, home
from edgebake_targets._wide import Found, found

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from edgebake_targets._onnx_qnn_quantize import Ready

    Feed = dict[str, NDArray[Any]]

SAMPLES = 8  # calls of the calibration samples, spread over them
_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
_OUTPUT = "_QuantizeLinear_Input"  # what ONNX Runtime calls the value behind a rounded output of the graph


class Kept:
    """The calibration calls as they go by; a few of them, spread over all, stay in ``feeds``."""

    def __init__(self, calls: Iterable[Feed], count: int) -> None:
        self._calls = calls
        self._every = max(1, count // SAMPLES)
        self.feeds: list[Feed] = []

    def __iter__(self) -> Iterator[Feed]:
        for number, feed in enumerate(self._calls):
            if number % self._every == 0 and len(self.feeds) < SAMPLES:
                self.feeds.append(feed)
            yield feed


def searched(ready: Ready, feeds: Sequence[Feed], given: Sequence[str]) -> Found:
    """The modules to make wide besides ``given``: those at the outputs, then those that lose most."""
    meter = _Meter(ready.model, feeds)
    nodes = ready.folded.graph.node
    ends = [module for module in ends_of(ready.folded) if module not in given]
    base = [*given, *ends]
    narrow = ready.rounded(base)
    others = [m for m in dict.fromkeys(map(home, nodes)) if m not in base]
    return found(
        ends,
        others,
        alone=lambda module: meter.loss(rounding_only(ready.model, narrow, ready.values([module]))),
        loss=lambda modules: meter.loss(narrow if not modules else ready.rounded([*base, *modules])),
    )


class _Meter:
    """How much graphs lose against the float graph: noise to signal over all calls, of the output that loses most."""

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._names = [value.name for value in model.graph.output]
        self._wanted = list(self._outputs(model))

    def _outputs(self, model: onnx.ModelProto) -> Iterator[list[NDArray[Any]]]:
        session = as_written(model)
        for feed in self._feeds:
            yield session.run(self._names, feed)

    def loss(self, model: onnx.ModelProto) -> float:
        """0 where ``model`` computes the same."""
        noise, signal = [0.0] * len(self._names), [0.0] * len(self._names)
        for got, wanted in zip(self._outputs(model), self._wanted, strict=True):
            for index, (value, right) in enumerate(zip(got, wanted, strict=True)):
                noise[index] += float(((value.astype("float64") - right) ** 2).sum())
                signal[index] += float((right.astype("float64") ** 2).sum())
        return max((lost / there for lost, there in zip(noise, signal, strict=True) if there), default=0.0)


def as_written(model: onnx.ModelProto) -> Any:
    """A session that rounds where the graph says so and nowhere else: integer kernels saturate on some CPUs."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rounding_only(model: onnx.ModelProto, narrow: onnx.ModelProto, values: Collection[str]) -> onnx.ModelProto:
    """The float graph, with ``values`` rounded as in ``narrow`` and nothing else."""
    import onnx

    steps = {name: step for name, step in _steps(narrow).items() if name in values}
    alone = type(model)()
    alone.CopyFrom(model)
    nodes = []
    for node in model.graph.node:
        copy = type(node).FromString(node.SerializeToString())
        nodes.append(copy)
        for index, name in enumerate(node.output):
            if name in steps:
                copy.output[index] = f"{name}_exact"
                nodes.append(onnx.helper.make_node(_Q, [f"{name}_exact", *steps[name]], [f"{name}_rounded"]))
                nodes.append(onnx.helper.make_node(_DQ, [f"{name}_rounded", *steps[name]], [name]))
    del alone.graph.node[:]
    alone.graph.node.extend(nodes)
    needed = {name for step in steps.values() for name in step}
    alone.graph.initializer.extend(tensor for tensor in narrow.graph.initializer if tensor.name in needed)
    return alone


def _steps(narrow: onnx.ModelProto) -> Mapping[str, tuple[str, str]]:
    """Value to the names of the scale and zero point that it is rounded with."""
    nodes = [node for node in narrow.graph.node if node.op_type == _Q]
    return {node.input[0].removesuffix(_OUTPUT): (node.input[1], node.input[2]) for node in reversed(nodes)}
