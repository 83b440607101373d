"""ExecuTorch on Arm's Ethos-U: .pte files for the NPUs of microcontrollers, compiled by Arm's Vela."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support
from edgebake.types import Lowered, Signature, Traced, Verdict
from edgebake_targets import _arm, _ethos_u, _executorch

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

FORMAT = "pte"
DEVICES = {"npu": _ethos_u.ACCELERATORS}  # no phone has one
DISTRIBUTIONS = (*_executorch.DISTRIBUTIONS, *_ethos_u.VERSIONS)
SOURCES = (*_executorch.SOURCES, *(f"edgebake_targets.{name}" for name in ("_arm", "_ethos_u", "_tosa")))

SUPPORTS = (
    Support(
        scheme="w8a8",
        kinds=("linear", "conv"),
        method="pt2e",
        note="int8 per channel, activation ranges from calibration; the NPU computes integers alone: what stays float "
        "is left to ExecuTorch's kernels on the CPU",
    ),
)

OPTIONS = (
    Option(
        name="accelerator",
        default="ethos-u85-256",
        help="the NPU, with its multiply-accumulates per cycle: a command stream runs on that one only",
        choices=_ethos_u.ACCELERATORS,
    ),
    Option(
        name="system_config",
        default=_ethos_u.AUTO,
        help="which memories the NPU reads from and how fast they are, as Arm's vela.ini names it; it changes the "
        "schedule, not the results; auto: what ExecuTorch takes for the accelerator",
        choices=(_ethos_u.AUTO, *_ethos_u.SYSTEMS),
    ),
    Option(
        name="memory_mode",
        default=_ethos_u.AUTO,
        help="where weights and activations lie, as Arm's vela.ini names it; auto: what ExecuTorch takes for the "
        "accelerator",
        choices=(_ethos_u.AUTO, *_ethos_u.MODES),
    ),
    Option(
        name="optimise",
        default="Performance",
        help="whether Vela spends memory on fewer cycles or cycles on less memory",
        choices=("Performance", "Size"),
    ),
)

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}


def missing() -> Missing | None:
    """None when ExecuTorch and Arm's packages are installed."""
    return _executorch.missing_packages(_PACKAGES) or _ethos_u.missing()


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What no weight needs to be read for: fixed shapes, and memories that go together."""
    for name in asked.varying:
        fix = f"give it one size in this rule: dims: {{{name}: {{min: 64, max: 64}}}}"
        yield Refusal(what=f"Ethos-U takes fixed shapes only, and {name!r} varies", fix=fix, key="dims")
    yield from _unfit_memories(asked.options)


def _unfit_memories(options: Mapping[str, Any]) -> Iterator[Refusal]:
    chip = _ethos_u.Chip.of(options)
    prefix = f"Ethos_{_ethos_u.family(chip.accelerator).upper()}_"
    if not chip.system.startswith(prefix):
        fitting = ", ".join(name for name in _ethos_u.SYSTEMS if name.startswith(prefix))
        yield Refusal(
            what=f"{chip.system} is no system of {chip.accelerator}",
            fix=f"one of {fitting}",
            key="options.system_config",
        )
    elif chip.memory.startswith("Dedicated") and not _ethos_u.SYSTEMS[chip.system]:
        yield Refusal(
            what=f"{chip.memory} keeps activations outside of SRAM, where {chip.system} has flash",
            fix="memory_mode: Shared_Sram or Sram_Only",
            key="options.memory_mode",
        )


def quantizer(request: LowerRequest) -> Quantizer:
    """Arm's PT2E quantizer for ``request.assignment``."""
    return _ethos_u.quantizer(_ethos_u.Chip.of(request.options), request.assignment)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` with one method per program, and beside it the TOSA graph of each of its compiled parts.

    StageFailed when the NPU takes no operator, Vela refuses a part, or an assigned module's weights stayed float.
    """
    _executorch.refuse_writes(traced, "Ethos-U keeps nothing between calls")
    chip = _ethos_u.Chip.of(request.options)
    with _ethos_u.kept_parts(request.folder) as (graphs, estimates), _arm.told_reasons() as reasons:
        edge = _executorch.to_edge(traced.programs, (_ethos_u.partitioner(chip),))
    delegation = _executorch.delegation(
        edge, reasons, "Arm's TOSA backend does not take this operator, or it borders on the NPU"
    )
    if not delegation.partitions:
        names = ", ".join(row.op for row in delegation.left_out)
        raise StageFailed(
            f"{chip.accelerator} takes none of the network's operators: {names}",
            where="lower",
            fix="it computes integers only: give the modules w8a8, or build this network for executorch-xnnpack",
        )
    program = _executorch.to_executorch(edge, fuse_quantised=False)
    entry = _executorch.write(program, request.folder)
    _arm.refuse_lost_integers(traced, request, graphs)
    vela = _summed(chip, estimates)
    return Lowered(
        files=(entry, *sorted(set(graphs))),
        entry=entry,
        signature=traced.signature,
        delegation=delegation,
        planned_memory_bytes=_executorch.planned_memory(program),
        encodings={"schemes": request.assignment.by_scheme(), "tosa_graphs": len(set(graphs)), "vela": vela},
        notes=(_told(vela),),
    )


def _summed(chip: _ethos_u.Chip, estimates: Sequence[_ethos_u.Estimate]) -> dict[str, Any]:
    """Vela's estimates of all parts: cycles one after another, and of each memory what the largest part needs."""
    memories = {name: max(one.bytes[name] for one in estimates) for name in estimates[0].bytes}
    return {
        "version": _ethos_u.VERSIONS["ethos-u-vela"],
        "accelerator": chip.accelerator,
        "system_config": chip.system,
        "memory_mode": chip.memory,
        "cycles": sum(one.cycles for one in estimates),
        "clock_hz": estimates[0].clock_hz,
        "memory_bytes": {name: size for name, size in memories.items() if size},
    }


def _told(vela: Mapping[str, Any]) -> str:
    milliseconds = 1e3 * vela["cycles"] / vela["clock_hz"]
    memories = ", ".join(f"{size / 1024:.0f} KiB of {name}" for name, size in vela["memory_bytes"].items())
    return (
        f"Vela's estimate, not measured, of the compiled parts on {vela['accelerator']} ({vela['system_config']}, "
        f"{vela['memory_mode']}): {vela['cycles']} cycles, {milliseconds:.3g} ms at {vela['clock_hz'] / 1e6:.0f} MHz; "
        f"{memories}"
    )


def read_checks(_folder: Path) -> Mapping[str, Any]:
    """Nothing is recorded but the TOSA graphs, which the runner holds against the program's parts."""
    return {}


def structure(entry: Path, signature: Signature, _checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the program ``entry`` against the promised ``signature`` and its streams against the accelerator they name.

    It says nothing about what they compute. Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``
    and ``structure.accelerator``. Needs no board.
    """
    from edgebake_targets import _executorch_checks

    verdicts = _executorch_checks.structure(entry, signature)
    if verdicts[0].state != "pass":
        return (*verdicts, Verdict(limit="structure.accelerator", state="not measured", reason=verdicts[1].reason))
    wrong = _ethos_u.misplaced(entry)
    return (
        *verdicts,
        Verdict(limit="structure.accelerator", state="fail" if wrong else "pass", reason="; ".join(wrong)),
    )
