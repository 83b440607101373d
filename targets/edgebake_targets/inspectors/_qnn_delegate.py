"""What ExecuTorch's Qualcomm backend writes beside its context binary: its chip, and whether its graphs share weights.

Layout: executorch/backends/qualcomm/serialization/qc_compiler_spec.fbs of ExecuTorch 1.4.
"""

from __future__ import annotations

from edgebake_targets.inspectors._flatbuffers import Table, root

BACKEND = "QnnBackend"
_OPTIONS = "qnn_compile_spec"


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


def _options(delegate: Table) -> Table | None:
    for spec in delegate.tables(2):  # BackendDelegate.compile_specs: key and value
        if spec.text(0) == _OPTIONS:
            return root(spec.blob(1))
    return None
