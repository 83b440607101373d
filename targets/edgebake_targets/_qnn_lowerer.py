"""The process that lowers the methods of one component for one chip with ExecuTorch's Qualcomm backend, and ends.

``python -m edgebake_targets._qnn_lowerer REQUEST`` in the environment of ``_qnn_toolchain``. REQUEST is a JSON file
with ``methods`` (of each ``program``, a .pt2; ``calibration``, an .npz of ``<call>.<input>``, or none; ``inputs``,
names in the program's order), ``scheme``, ``schemes`` (of modules that have their own), ``wide`` (modules with 16-bit
activations), ``search`` (whether to find more of them), ``share`` (weights among methods), ``constants`` (of a decoder:
methods without inputs, name to value), ``soc_model``, ``activation_range``, ``percentile``, ``out`` (a folder),
``stage`` (a file that names what is being done), ``log`` (the file that takes what this process prints) and ``answer``
(where the JSON answer goes).
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

from edgebake_targets import _executorch, _qnn_decoder, _qnn_graph, _qnn_reasons

if TYPE_CHECKING:
    import torch
    from executorch.exir import EdgeProgramManager

    Method = tuple[torch.nn.Module, tuple[Any, ...]]  # with an example of its inputs

# Of what the backend puts around a context binary: magic number, then the time of the build in nanoseconds, by which
# some of its releases tell binaries in one process apart.
_MAGIC, _STAMP = b"\xcd\xab\x78\x56", slice(4, 12)
_UNEVEN = "same number of partitions"  # of an assertion in qnn_preprocess.py


def main(request: Mapping[str, Any]) -> dict[str, Any]:
    """Lower and write ``model.pte``; delegation, planned memory, sizes and what reports say, as plain data.

    ``uneven`` instead, with what lies outside and why, when the methods do not have as many parts as each other.
    """
    stage = Path(request["stage"])
    methods, notes = _read(request, stage)
    stage.write_text("compiling", encoding="utf-8")
    with _qnn_reasons.told(Path(request["log"])) as reasons:
        try:
            edge = compiled(methods, request, share=request["share"])
        except AssertionError as error:
            if _UNEVEN not in str(error):
                raise
            return {"uneven": reasons}
    answer = {"bytes": _bytes(edge), "notes": notes}
    if request["share"]:
        stage.write_text("compiling without sharing", encoding="utf-8")
        answer["separate_bytes"] = _bytes(compiled(methods, request, share=False))
    stage.write_text("writing the program", encoding="utf-8")
    for binary in _binaries(edge):
        _stamp(binary)
    delegation = _executorch.delegation(edge, reasons, "QNN's compiler for the HTP does not take it")
    written = _executorch.to_executorch(edge, fuse_quantised=False)
    _executorch.write(written, Path(request["out"]))
    return {**answer, "delegation": asdict(delegation), "planned": _executorch.planned_memory(written)}


def _read(request: Mapping[str, Any], stage: Path) -> tuple[dict[str, Method], list[str]]:
    """What to compile, by method, and what reports say of it."""
    import torch

    methods: dict[str, Method] = {}
    notes: list[str] = []
    for method, given in request["methods"].items():
        stage.write_text("reading the network", encoding="utf-8")
        program = torch.export.load(given["program"])
        module = program.module(check_guards=False)
        _qnn_graph.rewrite(module)
        count = len(given["inputs"])
        example, empty = program.example_inputs[0][:count], program.example_inputs[0][count:]
        if request["scheme"] != "fp16":
            stage.write_text("quantising", encoding="utf-8")
            module, said = rounded(module, request, given, empty)
            notes += [f"{method}: {line}" if len(request["methods"]) > 1 else line for line in said]
        methods[method] = _qnn_decoder.keeping(module, empty) if empty else module, tuple(example)
    return methods, notes


def rounded(
    module: torch.fx.GraphModule,
    request: Mapping[str, Any],
    given: Mapping[str, Any],
    empty: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.fx.GraphModule, tuple[str, ...]]:
    """The method ``module`` in the integers that ``request`` asks for, and what reports say of them.

    ``empty``: the caches of a decoder, which it takes behind what ``given`` names.
    """
    from edgebake_targets._observers import observer
    from edgebake_targets._qnn_quantizer import Schemes, quantized
    from edgebake_targets._qnn_wide import searched

    kind = observer(request["activation_range"], request["percentile"])

    def calls() -> Iterator[tuple[torch.Tensor, ...]]:
        found = calls_in(Path(given["calibration"]), given["inputs"])
        return _qnn_decoder.carried(module, found, empty) if empty else found

    def integers(of: torch.fx.GraphModule, wide: Collection[str]) -> torch.fx.GraphModule:
        schemes = Schemes(scheme=request["scheme"], modules=request["schemes"], wide=frozenset(wide))
        return quantized(of, schemes, int(request["soc_model"]), calls(), kind)

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


def compiled(methods: Mapping[str, Method], request: Mapping[str, Any], *, share: bool) -> Any:
    """An edge program whose parts for the NPU are compiled for the chip of ``request``, in one binary.

    AssertionError when the methods do not have as many parts as each other.
    """
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )

    backend = generate_htp_compiler_spec(use_fp16=request["scheme"] == "fp16", use_weight_sharing=share)
    spec = generate_qnn_executorch_compiler_spec(QcomChipset(int(request["soc_model"])), backend)
    modules = {method: module for method, (module, _) in methods.items()}
    examples = {method: example for method, (_, example) in methods.items()}
    specs = dict.fromkeys(methods, spec)
    with _qnn_decoder.written_outside():
        return to_edge_transform_and_lower_to_qnn(
            modules,
            examples,
            specs,
            constant_methods=request["constants"],
            skip_node_op_set=_WithoutBuilder(),
            skip_mutable_buffer=True,
        )


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


def _bytes(edge: EdgeProgramManager) -> int:
    """Size of the binaries; methods whose graphs lie in the same one hand out the same bytes."""
    return sum(map(len, {lowered.processed_bytes for lowered in _binaries(edge)}))


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
