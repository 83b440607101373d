"""From the ONNX models of several methods to one context binary of Qualcomm's, and what it saves."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgebake.errors import StageFailed
from edgebake.types import Delegation, UnitWork
from edgebake_targets._onnx_qnn_compile import Compiled, answered, compile_context, operators, read_back, reasons_of
from edgebake_targets._qnn import ContextFacts
from edgebake_targets._qnn_shared import COMPILED_WITH, context_name, copy_plain

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A binary of several entry points."""

    files: tuple[str, ...]  # of the artifact: what leads to each entry point, and the binary
    binary: str
    bytes: int
    separate_bytes: int  # of a binary for each method
    facts: ContextFacts
    delegation: Delegation


def compile_shared(
    models: Mapping[str, onnx.ModelProto], folder: Path, provider: Mapping[str, str], device: str
) -> Shared:
    """One binary for all ``models``, by method, into ``folder``, where their plain files lie already.

    StageFailed where :func:`compile_context` fails, and when the compiler made several binaries.
    """
    separate = _separate(models, provider, device)
    with tempfile.TemporaryDirectory(prefix="edgebake-qnn-") as scratch:
        work = Path(scratch) / "work"
        work.mkdir()
        copy_plain(folder, work, models)
        request = {"folder": str(work), "methods": list(models), "provider": dict(provider)}
        kinds = " and ".join(operators(m.SerializeToString()) for m in models.values())
        answer = answered("_qnn_shared", request, Path(scratch), kinds)
        reasons = reasons_of(answer, device)
        made = {
            method: read_back(model, work / context_name(method), provider, reasons, device, answer["taken"][method])
            for method, model in models.items()
        }
        binary = _one_binary(made, device)
        for method in models:
            _sign(work / context_name(method), provider, list(models))
        files = (*(context_name(method) for method in models), binary)
        for name in files:
            shutil.copyfile(work / name, folder / name)
    size = (folder / binary).stat().st_size
    return Shared(
        files=files,
        binary=binary,
        bytes=size,
        separate_bytes=separate,
        facts=next(iter(made.values())).facts,
        delegation=_together([compiled.delegation for compiled in made.values()]),
    )


def _separate(models: Mapping[str, onnx.ModelProto], provider: Mapping[str, str], device: str) -> int:
    total = 0
    with tempfile.TemporaryDirectory(prefix="edgebake-qnn-") as scratch:
        for method, model in models.items():
            out = Path(scratch) / context_name(method)
            total += compile_context(model, out, provider, device, cpu_fallback=False).facts.embedded_bytes
    return total


def _one_binary(made: Mapping[str, Compiled], device: str) -> str:
    names = {name for compiled in made.values() for name in compiled.facts.files}
    if len(names) != 1 or not all(compiled.facts.files for compiled in made.values()):
        raise StageFailed(
            f"Qualcomm's compiler made {len(names)} binaries for {device} out of {', '.join(made)}, not one",
            fix="install the version that edgebake was made for: pip install onnxruntime-qnn==2.7.0, "
            "or make a component of each method",
        )
    return names.pop()


def _sign(path: Path, provider: Mapping[str, str], methods: Sequence[str]) -> None:
    """Write into ``path`` what its binary was compiled with: who simulates it compiles it again."""
    import onnx

    model = onnx.load_model(path)
    told = json.dumps({"methods": list(methods), "provider": dict(provider)}, sort_keys=True)
    model.metadata_props.add(key=COMPILED_WITH, value=told)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _together(each: Sequence[Delegation]) -> Delegation:
    """The methods as one: none has anything outside, since sharing leaves nothing to the CPU."""
    rows: list[UnitWork] = [row for delegation in each for row in delegation.units]
    macs = [row.macs for row in rows]
    npu = UnitWork(
        unit=rows[0].unit,
        by=rows[0].by,
        operators=dict(sorted(sum((Counter(row.operators) for row in rows), Counter[str]()).items())),
        macs=None if None in macs else sum(count for count in macs if count is not None),
        subgraphs=sum(row.subgraphs for row in rows),
    )
    return Delegation(
        share=1.0,
        partitions=npu.subgraphs,
        units=(npu,),
        border_bytes=sum(delegation.border_bytes or 0 for delegation in each),
    )
