"""From an exported network to a .pte with Qualcomm's context binary, through a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.scheme import parse
from edgebake.target import LowerRequest
from edgebake.types import Delegation, LeftOut, Traced, UnitWork
from edgebake_targets import _qnn_toolchain

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TAIL = 15  # lines of the process's log that a message carries
_LAST = re.compile(r"\[QnnPartitioner\] (\S+) \||Visiting: \S+, (\S+)")  # what the backend tells of each operator
_NOISE = ("[INFO] [Qnn ExecuTorch]", "Starting stage:", "Completed stage:")


def lowered(traced: Traced, request: LowerRequest, soc_model: int) -> tuple[Delegation, int]:
    """Write ``model.pte`` into ``request.folder``; what the NPU takes, and planned memory in bytes."""
    import torch

    ((method, program),) = traced.programs.items()
    with tempfile.TemporaryDirectory(prefix="edgebake-qnn-") as scratch:
        at = Path(scratch)
        torch.export.save(program, at / "program.pt2")
        asked = {
            "program": str(at / "program.pt2"),
            "calibration": str(_calibration(traced, request, method, at / "calibration.npz")),
            "inputs": [spec.name for spec in traced.signature.methods[method].inputs],
            "scheme": request.scheme,
            "soc_model": soc_model,
            "activation_range": range_of(request),
            "out": str(request.folder),
            "stage": str(at / "stage"),
            "answer": str(at / "answer.json"),
        }
        answer = _run(asked, at, request)
    return _delegation(answer["delegation"]), int(answer["planned"])


def _delegation(told: Mapping[str, Any]) -> Delegation:
    left = tuple(LeftOut(**row) for row in told["left_out"])
    units = tuple(UnitWork(**row) for row in told["units"])
    return Delegation(**{**told, "left_out": left, "units": units})


def range_of(request: LowerRequest) -> str:
    """What auto stands for: MiniLM in w8a16 has 30.7 dB with minmax and 21.3 with histogram."""
    asked = str(request.options["activation_range"])
    narrow = parse(request.scheme).activation_bits == 8
    return asked if asked != "auto" else "histogram" if narrow else "minmax"


def _calibration(traced: Traced, request: LowerRequest, method: str, file: Path) -> Path:
    import numpy as np

    if request.scheme != "fp16":
        calls = list(_calls(traced, request, method))
        if not calls:
            raise StageFailed("static integers need calibration samples", where="lower", fix="add samples.calibration")
        arrays = {f"{n}.{name}": value for n, call in enumerate(calls) for name, value in call.items()}
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return file


def _calls(traced: Traced, request: LowerRequest, method: str) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Inputs of every calibration call; states as the float network carries them on."""
    samples = request.calibration or ()
    if any(spec.role == "state" for spec in traced.signature.methods[method].inputs):
        yield from (call.inputs for calls in request.float_calls(samples) for call in calls)
    else:
        yield from (call.tensors() for sample in samples for call in sample.calls)


def _run(asked: Mapping[str, Any], scratch: Path, request: LowerRequest) -> dict[str, Any]:
    (scratch / "request.json").write_text(json.dumps(asked), encoding="utf-8")
    command = [sys.executable, "-m", "edgebake_targets._qnn_lowerer", str(scratch / "request.json")]
    environment = {**os.environ, **_qnn_toolchain.environment()}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env=environment,
        cwd=scratch,  # the vendor's compiler leaves files where it runs
    )
    sys.stderr.write(done.stdout)  # the stage's log
    answer = Path(asked["answer"])
    if done.returncode or not answer.is_file():
        raise _failure(done, Path(asked["stage"]), request)
    told: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return told


def _failure(done: subprocess.CompletedProcess[str], stage: Path, request: LowerRequest) -> StageFailed:
    code = done.returncode
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    doing = stage.read_text(encoding="utf-8") if stage.is_file() else "starting"
    lines = [line for line in re.split(r"[\r\n]+", done.stdout) if line.strip() and not line.startswith(_NOISE)]
    seen = [name for found in _LAST.findall(done.stdout) for name in found if name]
    last = f"; the last operator it looked at: {seen[-1]}" if seen else ""
    device = (request.device or {}).get("name", "")
    return StageFailed(
        f"ExecuTorch's Qualcomm backend ended with {how} while {doing} for {device} in {request.scheme}{last}",
        where="lower",
        fix="rewrite that part of the network, try another scheme, or build for onnx-qnn; its last words:\n"
        + "\n".join(lines[-_TAIL:]),
    )
