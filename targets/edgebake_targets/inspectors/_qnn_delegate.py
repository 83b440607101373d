"""What ExecuTorch's Qualcomm backend writes beside its context binary: the chip that it was compiled for.

Layout: executorch/backends/qualcomm/serialization/qc_compiler_spec.fbs of ExecuTorch 1.4.
"""

from __future__ import annotations

from edgebake_targets.inspectors._flatbuffers import Table, root

BACKEND = "QnnBackend"
_OPTIONS = "qnn_compile_spec"


def chip(delegate: Table) -> str:
    """QNN's number of the chip; empty when the file does not say."""
    for spec in delegate.tables(2):  # BackendDelegate.compile_specs: key and value
        if spec.text(0) == _OPTIONS:
            soc_info = root(spec.blob(1)).table(0)
            return "" if soc_info is None else str(soc_info.whole(0, "i"))
    return ""
