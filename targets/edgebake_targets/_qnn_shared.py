"""One context binary with an entry point for each method: weights that several graphs hold lie in it once.

``python -m edgebake_targets._qnn_shared REQUEST``: REQUEST is a JSON file with ``provider`` (the provider's options),
``methods`` and ``answer`` (where the JSON answer goes). The working folder holds ``<method>.plain.onnx`` for each
method, and gets ``<method>.onnx`` and the binary. Graphs are named after the path they are read from, so paths are
relative: the same files and options give the same bytes in any folder.

The vendor's x86 libraries write such a binary and end with a segmentation fault when they load it (QAIRT 2.51,
contextCreateFromBinary). The sessions that wrote it run on the simulator, though.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebake_targets._qnn import session_options, unknown_options
from edgebake_targets._qnn_compiler import traced

COMPILED_WITH = "edgebake.compiled_with"  # metadata of the files: JSON of the provider's options and the methods


def plain_name(method: str) -> str:
    """The file of ``method`` that the binary was compiled from."""
    return f"{method}.plain.onnx"


def context_name(method: str) -> str:
    """The file that leads to the entry point of ``method`` in the binary."""
    return f"{method}.onnx"


def copy_plain(folder: Path, work: Path, methods: Iterable[str]) -> None:
    """The plain files of ``methods``, and what large ones keep beside them, from ``folder`` into ``work``."""
    for method in methods:
        for file in sorted(folder.glob(f"{plain_name(method)}*")):
            shutil.copyfile(file, work / file.name)


def sessions(provider: Mapping[str, str], methods: Sequence[str]) -> dict[str, Any]:
    """Compile the plain files in the working folder into one binary; the sessions by method, ready to run.

    What one session compiles, the next adds to, until one is told to stop.
    """
    import onnxruntime

    made = {}
    for number, method in enumerate(methods):
        options = session_options({**provider, **_tracing(method)}, cpu_fallback=False)
        last = {"ep.stop_share_ep_contexts": "1"} if number == len(methods) - 1 else {}
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": context_name(method),
            "ep.context_node_name_prefix": f"{method}_",
            "ep.share_ep_contexts": "1",
            **last,
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        made[method] = onnxruntime.InferenceSession(plain_name(method), options)
    return made


def _trace(method: str) -> Path:
    return Path(f"trace-{method}")


def _tracing(method: str) -> dict[str, str]:
    _trace(method).mkdir(exist_ok=True)
    return {"enable_framework_op_trace": "1", "framework_op_trace_dir": str(_trace(method))}


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Compile; as ``_qnn_compiler.main`` answers, with ``taken`` by method."""
    import onnxruntime_qnn
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    methods = request["methods"]
    given = {**request["provider"], **_tracing(methods[0])}
    unknown = unknown_options(given, Path(onnxruntime_qnn.get_library_path()))
    if unknown:
        return {"unknown": unknown, "refused": "", "left_out": [], "taken": {}}
    refused = ""
    try:
        sessions(request["provider"], methods)
    except (state.Fail, state.EPFail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented) as error:
        refused = str(error)
    told = {method: traced(_trace(method)) for method in methods}
    return {
        "unknown": [],
        "refused": refused,
        "left_out": [node for _, left in told.values() for node in left],
        "taken": {method: taken for method, (taken, _) in told.items()},
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["answer"]).write_text(json.dumps(main(asked)), encoding="utf-8")
