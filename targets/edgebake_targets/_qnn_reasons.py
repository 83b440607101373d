"""Why Qualcomm's backend leaves an operator outside: what it, and the vendor's library beneath it, say of each node.

For the process that lowers: what it and its libraries print goes to one file, and what was printed while an operator
was looked at is about that operator.
"""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LONGEST = 240  # letters of a reason
_VENDOR = re.compile(
    r"\[(?:ERROR|WARNING)\] \[Qnn ExecuTorch\]:\s*<[EW]>\s*(?:\[\d+\]\s*)?(.+)"
)  # a number: of what it made
_BUILDER = re.compile(r"\[QNN [^\]]*\]\s*:?\s*(.+)")  # warnings of ExecuTorch's builders
_FOLLOWS = ("QnnBackend_validateOpConfig failed", "Failed to validate op")  # said after every refusal


@contextmanager
def told(log: Path) -> Iterator[dict[str, str]]:
    """Node name to reason, filled while the partitioner looks at nodes; ``log`` takes what this process prints."""
    from executorch.backends.qualcomm.partition import qnn_partitioner

    support = qnn_partitioner.QnnOperatorSupport
    asked, reasons = support.is_node_supported, dict[str, str]()

    def listening(self: Any, submodules: Any, node: torch.fx.Node) -> bool:
        with _said(log) as lines:
            taken = bool(asked(self, submodules, node))
        if taken or node.op != "call_function":
            reasons.pop(node.name, None)
        else:
            reasons[node.name] = _reason(self, node, lines)
        return taken

    support.is_node_supported = listening
    try:
        yield reasons
    finally:
        support.is_node_supported = asked


@contextmanager
def _said(log: Path) -> Iterator[list[str]]:
    """Lines that are printed within, by C code too, and Python's warnings."""
    lines: list[str] = []
    _flush()
    start = log.stat().st_size
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield lines
    _flush()
    with log.open("rb") as file:
        file.seek(start)
        printed = file.read().decode("utf-8", "replace")
    lines += [*(str(one.message) for one in warned), *printed.splitlines()]


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def _reason(support: Any, node: torch.fx.Node, lines: list[str]) -> str:
    from executorch.backends.qualcomm.partition import common_defs

    name = str(getattr(node.target, "__name__", node.target))
    if node.target in common_defs.not_supported_operator:
        return f"ExecuTorch never gives {name} to QNN"
    if node.target in common_defs.to_be_implemented_operator or name in support.skip_node_op_set:
        return f"ExecuTorch has no builder of {name} for QNN"
    return complained(lines) or f"ExecuTorch's builder of {name}, or QNN's check of it, refused without a word"


def complained(lines: Iterable[str]) -> str:
    """The vendor's own words among ``lines``, else those of ExecuTorch's builder; empty when nobody complained."""
    lines = list(lines)
    vendor = [found for found in _words(_VENDOR, lines) if not found.startswith(_FOLLOWS)]
    if vendor:
        return f"QNN: {vendor[0]}"[:_LONGEST]
    return next((f"ExecuTorch: {found}"[:_LONGEST] for found in _words(_BUILDER, lines)), "")


def _words(pattern: re.Pattern[str], lines: Iterable[str]) -> Iterator[str]:
    return (match[1].strip() for line in lines if (match := pattern.search(line)))
