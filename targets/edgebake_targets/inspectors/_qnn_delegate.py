"""What ExecuTorch's Qualcomm backend leaves in a .pte: the chip, whether graphs share weights, the binary's operators.

Layout: executorch/backends/qualcomm/serialization/qc_compiler_spec.fbs of ExecuTorch 1.4. In the context binary, which
is Qualcomm's own, nodes have the names that ExecuTorch's graph had for them: ``aten_linear_default_3``.
"""

from __future__ import annotations

import re
from collections import Counter

from edgebake_targets.inspectors._flatbuffers import Table, root
from edgebake_targets.inspectors._qnn_binary import graphs

BACKEND = "QnnBackend"
_OPTIONS = "qnn_compile_spec"
# A dialect, an operator, its overload, and a number where the graph has several.
_NAMED = re.compile(r"(aten|quantized_decomposed|dim_order_ops)_(\w+?)_([^_\W]+?)(?:_\d+)?")


def chip(delegate: Table) -> str:
    """QNN's number of the chip; empty when the file does not say."""
    options = _options(delegate)
    soc_info = None if options is None else options.table(0)
    return "" if soc_info is None else str(soc_info.whole(0, "i"))


def shares_weights(delegate: Table) -> bool:
    """Whether the binary was compiled to hold weights once that several of its graphs read."""
    options = _options(delegate)
    backend = None if options is None else options.table(1)
    htp = None if backend is None else backend.table(1)
    return htp is not None and bool(htp.whole(8, "?"))


def operators(blob: memoryview) -> Counter[str]:
    """``aten.linear`` to how many nodes of the binary's graphs it is; a node of another name counts under that.

    Malformed for a binary of a layout that is not known here.
    """
    names = (name for graph in graphs(blob) for name in graph.nodes)
    return Counter(f"{found[1]}.{found[2]}" if (found := _NAMED.fullmatch(name)) else name for name in names)


def _options(delegate: Table) -> Table | None:
    for spec in delegate.tables(2):  # BackendDelegate.compile_specs: key and value
        if spec.text(0) == _OPTIONS:
            return root(spec.blob(1))
    return None
