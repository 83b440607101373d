"""What ExecuTorch's Qualcomm backend leaves in a .pte: the chip, whether graphs share weights, the binary's operators.

Layout: executorch/backends/qualcomm/serialization/qc_compiler_spec.fbs of ExecuTorch 1.4. The context binary itself is
Qualcomm's own; in what QNN 2.49 writes, each graph has a flatbuffer table of its operators' names, the backend's names
of the nodes that they were: ``aten_linear_default_3``.
"""

from __future__ import annotations

import re
from collections import Counter

from edgebake_targets.inspectors._flatbuffers import Table, root

BACKEND = "QnnBackend"
_OPTIONS = "qnn_compile_spec"
# A reference to the text right behind it, that text's length, and the text: a dialect, an operator, its overload, and a
# number where the graph has several.
_NAMED = re.compile(
    rb"\x04\0\0\0(..)\0\0((aten|quantized_decomposed|dim_order_ops)_(\w+?)_([^_\W]+?)(?:_\d+)?)\0", re.S
)


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
    """``aten.linear`` to how many of the binary's graphs' nodes it names; empty for a binary that names none."""
    found = Counter[str]()
    for match in _NAMED.finditer(blob):
        if int.from_bytes(match[1], "little") == len(match[2]):
            found[f"{match[3].decode()}.{match[4].decode()}"] += 1
    return found


def _options(delegate: Table) -> Table | None:
    for spec in delegate.tables(2):  # BackendDelegate.compile_specs: key and value
        if spec.text(0) == _OPTIONS:
            return root(spec.blob(1))
    return None
