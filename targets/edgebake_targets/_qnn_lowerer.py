"""The process that lowers one network for one chip with ExecuTorch's Qualcomm backend, and ends.

``python -m edgebake_targets._qnn_lowerer REQUEST`` in the environment of ``_qnn_toolchain``. REQUEST is a JSON file
with ``program`` (.pt2), ``calibration`` (.npz of ``<call>.<input>``, or none), ``inputs`` (names in the program's
order), ``scheme``, ``schemes`` (of modules that have their own), ``wide`` (modules with 16-bit activations),
``search`` (whether to find more of them), ``soc_model``, ``activation_range``, ``out`` (a folder), ``stage`` (a file
that names what is being done), ``log`` (the file that takes what this process prints) and ``answer`` (where the JSON
answer goes).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake_targets import _executorch, _qnn_graph, _qnn_reasons

if TYPE_CHECKING:
    import torch
    from executorch.exir import EdgeProgramManager

# Of what the backend puts around a context binary: magic number, then the time of the build in nanoseconds, by which
# some of its releases tell binaries in one process apart.
_MAGIC, _STAMP = b"\xcd\xab\x78\x56", slice(4, 12)


def main(request: Mapping[str, Any]) -> dict[str, Any]:
    """Lower and write ``model.pte``; delegation, planned memory and what reports say, as plain data."""
    import torch

    stage = Path(request["stage"])
    stage.write_text("reading the network", encoding="utf-8")
    program = torch.export.load(request["program"])
    module = program.module(check_guards=False)
    _qnn_graph.rewrite(module)
    example = tuple(program.example_inputs[0])
    notes: tuple[str, ...] = ()
    if request["scheme"] != "fp16":
        stage.write_text("quantising", encoding="utf-8")
        module, notes = rounded(module, request)
    stage.write_text("compiling", encoding="utf-8")
    with _qnn_reasons.told(Path(request["log"])) as reasons:
        edge = compiled(module, example, int(request["soc_model"]), half=request["scheme"] == "fp16")
    stage.write_text("writing the program", encoding="utf-8")
    for binary in _binaries(edge):
        _stamp(binary)
    delegation = _executorch.delegation(edge, reasons, "QNN's compiler for the HTP does not take it")
    written = _executorch.to_executorch(edge, fuse_quantised=False)
    _executorch.write(written, Path(request["out"]))
    return {"delegation": asdict(delegation), "planned": _executorch.planned_memory(written), "notes": notes}


def rounded(module: torch.fx.GraphModule, request: Mapping[str, Any]) -> tuple[torch.fx.GraphModule, tuple[str, ...]]:
    """``module`` in the integers that ``request`` asks for, and what reports say of them."""
    from edgebake_targets._qnn_quantizer import Schemes, quantized
    from edgebake_targets._qnn_wide import searched

    def calls() -> Iterator[tuple[torch.Tensor, ...]]:
        return calls_in(Path(request["calibration"]), request["inputs"])

    def integers(of: torch.fx.GraphModule, wide: Collection[str]) -> torch.fx.GraphModule:
        schemes = Schemes(scheme=request["scheme"], modules=request["schemes"], wide=frozenset(wide))
        return quantized(of, schemes, int(request["soc_model"]), calls(), request["activation_range"])

    if not request["search"]:
        return integers(module, request["wide"]), ()
    found = searched(integers(copy.deepcopy(module), request["wide"]), list(calls()), request["wide"])
    return integers(module, [*request["wide"], *found.modules]), found.notes


def calls_in(file: Path, inputs: list[str]) -> Iterator[tuple[torch.Tensor, ...]]:
    """The calls in ``file``, tensors in the order of ``inputs``."""
    import numpy as np
    import torch

    with np.load(file, allow_pickle=False) as stored:
        count = len(stored.files) // max(len(inputs), 1)
        for call in range(count):
            yield tuple(torch.from_numpy(stored[f"{call}.{name}"]) for name in inputs)


def compiled(module: torch.fx.GraphModule, example: tuple[Any, ...], soc_model: int, *, half: bool) -> Any:
    """An edge program whose parts for the NPU are compiled for ``soc_model``; ``half``: floats run in float16 there."""
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )

    backend = generate_htp_compiler_spec(use_fp16=half)
    spec = generate_qnn_executorch_compiler_spec(QcomChipset(soc_model), backend)
    return to_edge_transform_and_lower_to_qnn(module, example, spec, skip_node_op_set=_WithoutBuilder())


class _WithoutBuilder:
    """Holds the names of all operators that the backend has no builder for, at which its partitioner stumbles."""

    def __contains__(self, name: str) -> bool:
        from executorch.backends.qualcomm.builders import node_visitor_manager

        return name not in node_visitor_manager._node_visitor_dict


def _binaries(edge: EdgeProgramManager) -> Iterator[Any]:
    """What the backend compiled, of all methods."""
    for method in sorted(edge.methods):
        module = edge.exported_program(method).graph_module
        for node in module.graph.nodes:
            if _executorch.is_delegate_call(node):
                yield getattr(module, str(node.args[0].target))


def _stamp(lowered: Any) -> None:
    """Put the content's digest where the backend puts the time: the same inputs give the same bytes."""
    data = bytearray(lowered.processed_bytes)
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("this executorch lays its context binaries out in another way: install executorch==1.4.1")
    data[_STAMP] = bytes(_STAMP.stop - _STAMP.start)
    data[_STAMP] = sha256(data).digest()[: _STAMP.stop - _STAMP.start]
    lowered._processed_bytes = bytes(data)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["answer"]).write_text(json.dumps(main(asked)), encoding="utf-8")
