"""From an exported network to a .pte with Qualcomm's context binary, through a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.scheme import parse
from edgebake.target import LowerRequest
from edgebake.types import Delegation, LeftOut, Traced, UnitWork
from edgebake_targets import _executorch_llm, _qnn_decoder, _qnn_toolchain
from edgebake_targets._executorch import innermost_module
from edgebake_targets._htp import sizes
from edgebake_targets._wide import ITSELF, SEARCH, named, words

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_TAIL = 15  # lines of the process's log that a message carries
_LAST = re.compile(r"\[QnnPartitioner\] (\S+) \||Visiting: \S+, (\S+)")  # what the backend tells of each operator
_NOISE = ("[INFO] [Qnn ExecuTorch]", "Starting stage:", "Completed stage:")


@dataclass(frozen=True, kw_only=True)
class Written:
    """What is said of a ``model.pte``."""

    delegation: Delegation
    planned: int  # bytes
    notes: tuple[str, ...]
    shared: Mapping[str, Any]  # methods, bytes, separate_bytes where weights are shared


def lowered(traced: Traced, request: LowerRequest, soc_model: int) -> Written:
    """Write ``model.pte`` into ``request.folder``."""
    with tempfile.TemporaryDirectory(prefix="edgebake-qnn-") as scratch:
        at = Path(scratch)
        answer = _run(asked(traced, request, soc_model, at), at, request)
    methods = list(traced.programs)
    if "uneven" in answer:
        raise _uneven(methods, answer["uneven"], request)
    notes, shared = list(answer["notes"]), {}
    if request.options["share_weights"]:
        shared = {"methods": methods, "bytes": answer["bytes"], "separate_bytes": answer["separate_bytes"]}
        notes.append(sizes(methods, answer["bytes"], answer["separate_bytes"], "without sharing"))
    return Written(
        delegation=_delegation(answer["delegation"]), planned=int(answer["planned"]), notes=tuple(notes), shared=shared
    )


def _uneven(methods: Collection[str], reasons: Mapping[str, str], request: LowerRequest) -> StageFailed:
    outside = "; ".join(f"{name} ({why})" for name, why in reasons.items()) or "nothing"
    return StageFailed(
        f"the NPU of {(request.device or {}).get('name', '')} takes {', '.join(methods)} in different numbers of "
        f"parts, which ExecuTorch cannot put into one binary; outside lie: {outside}",
        where="lower",
        fix="make a component of each method, or rewrite what lies outside",
    )


def asked(traced: Traced, request: LowerRequest, soc_model: int, at: Path) -> dict[str, Any]:
    """What the process is asked, its files in the folder ``at``."""
    import torch

    wide = named(
        request.options, sorted({name for program in traced.programs.values() for name in modules_of(program)})
    )
    methods = {}
    for number, (method, program) in enumerate(traced.programs.items()):
        torch.export.save(program, at / f"{number}.pt2")
        methods[method] = {
            "program": str(at / f"{number}.pt2"),
            "calibration": str(_calibration(traced, request, method, at / f"{number}.npz")),
            "inputs": [spec.name for spec in traced.signature.methods[method].inputs],
        }
    return {
        "methods": methods,
        "constants": _executorch_llm.metadata(traced.signature),
        "share": bool(request.options["share_weights"]),
        "scheme": request.scheme,
        "schemes": {name: own for name, own in request.assignment.schemes.items() if own != request.scheme},
        "wide": wide,
        "search": SEARCH in words(request.options),
        "soc_model": soc_model,
        "activation_range": range_of(request),
        "percentile": float(request.options["percentile"]),
        "out": str(request.folder),
        "stage": str(at / "stage"),
        "log": str(at / "log"),
        "answer": str(at / "answer.json"),
    }


def modules_of(program: torch.export.ExportedProgram) -> list[str]:
    """The modules that have operators in ``program``."""
    nodes = (node for node in program.graph_module.graph.nodes if node.op == "call_function")
    return sorted({innermost_module(node) or ITSELF for node in nodes})


def _delegation(told: Mapping[str, Any]) -> Delegation:
    left = tuple(LeftOut(**row) for row in told["left_out"])
    units = tuple(UnitWork(**row) for row in told["units"])
    return Delegation(**{**told, "left_out": left, "units": units})


def range_of(request: LowerRequest) -> str:
    """What auto stands for: MiniLM in w8a16 has 30.7 dB with minmax and 21.3 with histogram."""
    named_range = str(request.options["activation_range"])
    narrow = parse(request.scheme).activation_bits == 8
    return named_range if named_range != "auto" else "histogram" if narrow else "minmax"


def _calibration(traced: Traced, request: LowerRequest, method: str, file: Path) -> Path:
    import numpy as np

    if request.scheme != "fp16":
        calls = list(_calls(traced, request, method))
        if not calls:
            what = f"static integers need calibration samples, and none calls {method}"
            raise StageFailed(what, where="lower", fix="add samples.calibration")
        arrays = {f"{n}.{name}": value for n, call in enumerate(calls) for name, value in call.items()}
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return file


def _calls(traced: Traced, request: LowerRequest, method: str) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Inputs of every calibration call of ``method``; states as the float network carries them on, texts by token."""
    samples = request.calibration or ()
    if traced.signature.language is not None:
        for sample in samples:
            for call in sample.calls:
                yield from _qnn_decoder.calls(call.tensors())
    elif any(spec.role == "state" for spec in traced.signature.methods[method].inputs):
        yield from (call.inputs for calls in request.float_calls(samples) for call in calls if call.method == method)
    else:
        yield from (call.tensors() for sample in samples for call in sample.calls if call.method == method)


def _run(told: Mapping[str, Any], scratch: Path, request: LowerRequest) -> dict[str, Any]:
    (scratch / "request.json").write_text(json.dumps(told), encoding="utf-8")
    command = [sys.executable, "-m", "edgebake_targets._qnn_lowerer", str(scratch / "request.json")]
    environment = {**os.environ, **_qnn_toolchain.environment()}
    log, answer = Path(told["log"]), Path(told["answer"])
    with log.open("wb") as file:  # not a pipe: the process itself reads what was said of each operator
        # The vendor's compiler leaves files where it runs.
        done = subprocess.run(command, stdout=file, stderr=file, check=False, env=environment, cwd=scratch)
    printed = log.read_text(encoding="utf-8", errors="replace")
    sys.stderr.write(printed)  # the stage's log
    if done.returncode or not answer.is_file():
        raise _failure(done.returncode, printed, Path(told["stage"]), request)
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _failure(code: int, printed: str, stage: Path, request: LowerRequest) -> StageFailed:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    doing = stage.read_text(encoding="utf-8") if stage.is_file() else "starting"
    lines = [line for line in re.split(r"[\r\n]+", printed) if line.strip() and not line.startswith(_NOISE)]
    seen = [name for found in _LAST.findall(printed) for name in found if name]
    last = f"; the last operator it looked at: {seen[-1]}" if seen else ""
    device = (request.device or {}).get("name", "")
    return StageFailed(
        f"ExecuTorch's Qualcomm backend ended with {how} while {doing} for {device} in {request.scheme}{last}",
        where="lower",
        fix="rewrite that part of the network, try another scheme, or build for onnx-qnn; its last words:\n"
        + "\n".join(lines[-_TAIL:]),
    )
