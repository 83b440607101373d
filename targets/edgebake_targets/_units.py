"""Which unit of a device computes what of a graph, and how much passes between the parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from edgebake.types import LeftOut, UnitWork

EXECUTORCH_KERNELS, ONNX_RUNTIME_KERNELS = "ExecuTorch's kernels", "CPUExecutionProvider"
UNKNOWN = "unknown"
# Backends as files name them, to what they compute on.
UNIT_OF: Mapping[str, str] = {
    EXECUTORCH_KERNELS: "CPU",
    ONNX_RUNTIME_KERNELS: "CPU",
    "CoreMLBackend": "Neural Engine, GPU or CPU",
    "EnnBackend": "NPU",
    "EthosUBackend": "NPU",
    "MLXBackend": "GPU",
    "MPSBackend": "GPU",
    "NeuropilotBackend": "NPU",
    "NeutronBackend": "NPU",
    "NvTensorRTRTXExecutionProvider": "GPU",
    "OpenVINOExecutionProvider": "NPU, GPU or CPU",
    "OpenvinoBackend": "NPU, GPU or CPU",
    "QNNExecutionProvider": "NPU",
    "QnnBackend": "NPU",
    "VgfBackend": "GPU",
    "VitisAIExecutionProvider": "NPU",
    "VulkanBackend": "GPU",
    "XnnpackBackend": "CPU",
}


@dataclass
class Tally:
    """Operators as they are met, with their multiply-accumulates and why a backend left them out."""

    operators: Counter[str] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    uncounted: set[str] = field(default_factory=set)
    subgraphs: int = 0

    def add(self, operator: str, macs: int | None, reason: str = "") -> None:
        """Count one more ``operator``; ``macs`` is None where they cannot be told."""
        self.operators[operator] += 1
        self.macs[operator] += macs or 0
        if macs is None:
            self.uncounted.add(operator)
        if reason:
            self.reasons.setdefault(operator, Counter())[reason] += 1

    def work(self, by: str) -> UnitWork:
        """The row of what ``by`` computes."""
        return UnitWork(
            unit=UNIT_OF.get(by, UNKNOWN),
            by=by,
            operators=dict(sorted(self.operators.items())),
            macs=None if self.uncounted else self.macs.total(),
            subgraphs=self.subgraphs,
        )

    def left_out(self) -> tuple[LeftOut, ...]:
        """Heaviest first; of several reasons the most frequent."""
        order = sorted(self.operators, key=lambda op: (-self.macs[op], -self.operators[op], op))
        return tuple(
            LeftOut(op=op, count=self.operators[op], macs=self.macs[op], reason=self._reason(op)) for op in order
        )

    def _reason(self, operator: str) -> str:
        told = self.reasons.get(operator)
        return told.most_common(1)[0][0] if told else ""


def border_bytes(
    made_in: Mapping[str, str], reads: Iterable[tuple[str, str]], size_of: Callable[[str], int | None]
) -> int | None:
    """Bytes of the tensors that pass between parts, each once for every part that reads it.

    ``made_in``: tensor to the part that computes it. ``reads``: parts and the tensors they read. None when the size of
    one is unknown.
    """
    crossing = {(part, name) for part, name in reads if made_in.get(name, part) != part}
    sizes = [size_of(name) for _, name in crossing]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None
