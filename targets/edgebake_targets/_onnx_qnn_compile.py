"""From an ONNX model to Qualcomm's context binary, and what of it does not run on the NPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.types import Delegation, UnitWork
from edgebake_targets._onnx_macs import macs_of, shapes_of
from edgebake_targets._onnx_units import moved_bytes, note, outside
from edgebake_targets._qnn import PROVIDER, ContextFacts, facts_of
from edgebake_targets._units import ONNX_RUNTIME_KERNELS, UNIT_OF

if TYPE_CHECKING:
    import onnx

_TAIL = 15  # lines of the compiler's log that a message carries
_PACKING = frozenset({"QuantizeLinear", "DequantizeLinear"})  # named with the operator they belong to


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A context and what the NPU takes of the graph."""

    facts: ContextFacts
    delegation: Delegation


def compile_context(
    model: onnx.ModelProto,
    out: Path,
    provider: Mapping[str, str],
    device: str,
    *,
    cpu_fallback: bool,
    embed: bool = True,
) -> Compiled:
    """Write ``model`` compiled for the chip of ``provider`` to ``out``, the binary inside, or beside it.

    StageFailed when the compiler crashes, refuses operators that ``cpu_fallback`` does not allow on the CPU, knows an
    option no more, or writes a file without a binary or for another chip.
    """
    with tempfile.TemporaryDirectory(prefix="edgebake-qnn-") as scratch:
        how = {"provider": dict(provider), "cpu_fallback": cpu_fallback, "embed": embed}
        answer = _run(model.SerializeToString(deterministic=True), out, how, Path(scratch))
    reasons = reasons_of(answer, device)
    return read_back(model, out, provider, reasons, device, answer["taken"])


def _run(data: bytes, out: Path, how: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    source, trace = scratch / "model.onnx", scratch / "trace"
    source.write_bytes(data)
    trace.mkdir()
    request = {"model": str(source), "out": str(out), "trace": str(trace), **how}
    return answered("_qnn_compiler", request, scratch, operators(data))


def answered(module: str, request: Mapping[str, Any], scratch: Path, graph: str) -> dict[str, Any]:
    """What the process of ``module`` answers to ``request``; StageFailed when it crashed on a graph of ``graph``."""
    answer = scratch / "answer.json"
    (scratch / "request.json").write_text(json.dumps({**request, "answer": str(answer)}), encoding="utf-8")
    command = [sys.executable, "-m", f"edgebake_targets.{module}", str(scratch / "request.json")]
    where = request.get("folder")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, errors="replace", check=False)
    sys.stderr.write(done.stderr)  # the stage's log
    if done.returncode or not answer.is_file():
        code = done.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = "\n".join([*done.stdout.splitlines(), *done.stderr.splitlines()][-_TAIL:])
        raise StageFailed(
            f"Qualcomm's compiler ended with {how} on a graph of {graph}",
            fix="give parts of the network another scheme to find the operator (compress.modules); "
            f"its last words:\n{said}",
        )
    told: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return told


def operators(data: bytes) -> str:
    """The types of operators in the model ``data``, for a message."""
    import onnx

    names = sorted({node.op_type for node in onnx.ModelProto.FromString(data).graph.node} - _PACKING)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def reasons_of(answer: Mapping[str, Any], device: str) -> dict[str, Mapping[str, Any]]:
    """Why nodes stay outside, by name; StageFailed when the compiler's ``answer`` is no."""
    if answer["unknown"]:
        raise StageFailed(
            f"this onnxruntime-qnn knows no option {', '.join(answer['unknown'])}, and would ignore it",
            fix="install the version that edgebake was made for: pip install onnxruntime-qnn==2.7.0",
        )
    reasons = {told["node_name"]: told for told in answer["left_out"]}
    if answer["refused"]:
        raise _refusal(answer["refused"], reasons, device)
    return reasons


def _refusal(error: str, reasons: Mapping[str, Mapping[str, Any]], device: str) -> StageFailed:
    first = error.strip().splitlines()[0]
    names = [f"{t['op_type']} {name} ({_short(t['reason'])})" for name, t in reasons.items()]
    own = [text for text, told in zip(names, reasons.values(), strict=True) if told["op_type"] not in _PACKING] or names
    if not own:
        return StageFailed(
            f"Qualcomm's compiler refused the graph for {device}: {first}",
            fix="see the stage's log; a device that this onnxruntime-qnn does not know ends like this",
        )
    shown = "; ".join(own[:6]) + (f"; and {len(own) - 6} more" if len(own) > 6 else "")
    return StageFailed(
        f"{len(own)} operators do not run on the NPU of {device}: {shown}",
        fix="rewrite them, or let the CPU do them, options: {cpu_fallback: true}, "
        "and hold the share with limits: {delegated: 95%}",
    )


def _short(reason: str) -> str:
    return reason.strip().split(". ")[0].split(".", 1)[0].strip() or "no reason given"


def read_back(
    model: onnx.ModelProto,
    out: Path,
    provider: Mapping[str, str],
    reasons: Mapping[str, Mapping[str, Any]],
    device: str,
    taken: Sequence[str],
) -> Compiled:
    """What the compiler left at ``out``, and note there what it holds.

    StageFailed when that is not ``model`` compiled for the chip asked for.
    """
    import onnx

    if not out.is_file():
        raise StageFailed(f"Qualcomm's compiler wrote nothing for {device}", fix="see the stage's log")
    written = onnx.load_model(out)
    facts = facts_of(written)
    if facts is None:
        raise StageFailed(
            f"nothing was compiled for the NPU of {device}: the whole graph stayed on the CPU",
            fix="check the device's soc_model, and the stage's log for the vendor's words",
        )
    if facts.soc_model != provider["soc_model"]:
        chip = facts.soc_model or "unknown"
        raise StageFailed(
            f"the binary was compiled for QNN's chip {chip}, not {provider['soc_model']} ({device})",
            fix="install the version that edgebake was made for: pip install onnxruntime-qnn==2.7.0",
        )
    delegation = _delegation(model, written, facts, reasons, taken)
    note(written, delegation.units[0].operators, delegation.left_out)
    out.write_bytes(written.SerializeToString(deterministic=True))
    return Compiled(facts=facts, delegation=delegation)


def _delegation(
    model: onnx.ModelProto,
    written: onnx.ModelProto,
    facts: ContextFacts,
    reasons: Mapping[str, Mapping[str, Any]],
    taken: Sequence[str],
) -> Delegation:
    """Share by multiply-accumulates, and by operator what stayed outside, with the vendor's reason."""
    shapes = {**shapes_of(written), **shapes_of(model)}
    left = outside(written, shapes, {name: _short(told["reason"]) for name, told in reasons.items()})
    each = [macs_of(node, shapes) for node in model.graph.node]
    known = [count for count in each if count is not None]
    total = sum(known) if len(known) == len(each) and not left.uncounted else None
    share = 1 - left.macs.total() / total if total else 1.0 if not left.operators else None
    npu = UnitWork(
        unit=UNIT_OF[PROVIDER],
        by=PROVIDER,
        operators=dict(sorted(Counter(taken).items())),
        macs=None if total is None else total - left.macs.total(),
        subgraphs=facts.partitions,
    )
    return Delegation(
        share=share,
        partitions=npu.subgraphs,
        left_out=left.left_out(),
        reason="" if share is not None else "the network has no products of matrices to count",
        units=(npu, left.work(ONNX_RUNTIME_KERNELS)) if left.operators else (npu,),
        border_bytes=moved_bytes(written),
    )
