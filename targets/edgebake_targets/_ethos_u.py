"""Arm's Ethos-U: accelerators and the memories around them, and Vela, the compiler of their command streams.

Vela takes the TOSA graph of a part. What it compiles for is in its own file Arm/vela.ini, ethos-u-vela 5.2.0: a system
configuration says which memories hang on the NPU's ports and how fast they are, a memory mode what lies in which.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.target import Missing
from edgebake.types import Assignment
from edgebake_targets import _arm

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

BACKEND = "EthosUBackend"
VERSIONS = {"tosa-tools": "2026.8.0", "ethos-u-vela": "5.2.0"}
# tosa-tools pins numpy below 2.2 and versions of other packages that it also runs without, so pip is to leave them.
REMEDY = (
    "pip install --no-deps " + " ".join(f"{name}=={version}" for name, version in VERSIONS.items()) + " && "
    "pip install flatbuffers ml-dtypes"
)
_MODULES = {"tosa_serializer": "tosa-tools", "tosa_reference_model": "tosa-tools", "ethosu": "ethos-u-vela"}

# Multiply-accumulates per cycle follow the family's name.
ACCELERATORS = (
    *(f"ethos-u55-{macs}" for macs in (32, 64, 128, 256)),
    *(f"ethos-u65-{macs}" for macs in (256, 512)),
    *(f"ethos-u85-{macs}" for macs in (128, 256, 512, 1024, 2048)),
)
# System configurations, and whether the second port leads to DRAM; of the others it leads to flash.
SYSTEMS: Mapping[str, bool] = {
    "Ethos_U55_Deep_Embedded": False,
    "Ethos_U55_High_End_Embedded": False,
    "Ethos_U65_Embedded": False,
    "Ethos_U65_Mid_End": True,
    "Ethos_U65_High_End": True,
    "Ethos_U65_Client_Server": True,
    "Ethos_U85_SYS_Flash_Low": False,
    "Ethos_U85_SYS_Flash_High": False,
    "Ethos_U85_SYS_DRAM_Low": True,
    "Ethos_U85_SYS_DRAM_Mid": True,
    "Ethos_U85_SYS_DRAM_High": True,
}
# Memory modes; the dedicated ones keep activations behind the second port, which flash cannot.
MODES = (
    "Sram_Only",
    "Shared_Sram",
    "Dedicated_Sram",
    "Dedicated_Sram_256KB",
    "Dedicated_Sram_384KB",
    "Dedicated_Sram_512KB",
)
# What ExecuTorch takes for a family where nothing is said (EthosUCompileSpec of 1.4).
_USUAL = {
    "u55": ("Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "u65": ("Ethos_U65_High_End", "Dedicated_Sram_384KB"),
    "u85": ("Ethos_U85_SYS_DRAM_Mid", "Sram_Only"),
}
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What Vela compiles for; ``optimise``: its word for what it spends memory on."""

    accelerator: str
    system: str
    memory: str
    optimise: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Chip:
        """The target's options with ``auto`` filled in."""
        system, memory = _USUAL[family(options["accelerator"])]
        return cls(
            accelerator=options["accelerator"],
            system=system if options["system_config"] == AUTO else options["system_config"],
            memory=memory if options["memory_mode"] == AUTO else options["memory_mode"],
            optimise=options["optimise"],
        )

    def compile_spec(self) -> Any:
        """For ExecuTorch; its flags travel in the .pte beside each part."""
        from executorch.backends.arm.ethosu import EthosUCompileSpec

        return EthosUCompileSpec(
            self.accelerator,
            system_config=self.system,
            memory_mode=self.memory,
            extra_flags=[f"--optimise={self.optimise}"],
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Vela's guess at one part: cycles of one call, the clock in Hz it counts them by, bytes of each memory by name."""

    cycles: int
    clock_hz: float
    bytes: Mapping[str, int]


def family(accelerator: str) -> str:
    """``u55`` of ``ethos-u55-128``."""
    return accelerator.split("-")[1]


def missing() -> Missing | None:
    """None when Arm's TOSA tools and Vela are installed; imports neither."""
    absent = {name for module, name in _MODULES.items() if find_spec(module) is None}
    if not absent:
        return None
    names = " and ".join(name for name in VERSIONS if name in absent)
    return Missing(reason=f"Arm's {names} {'are' if len(absent) > 1 else 'is'} not installed", remedy=REMEDY)


def compiled(tosa: bytes, flags: Sequence[str]) -> tuple[bytes, Estimate]:
    """What ExecuTorch's Ethos-U runtime loads, by Vela in a process of its own: same graph and flags, same bytes.

    StageFailed with Vela's own words. ExecuTorch packs Vela's arrays into its stream.
    """
    from executorch.backends.arm import arm_vela

    with tempfile.TemporaryDirectory(prefix="edgebake-vela-") as folder:
        own = arm_vela.vela
        # ExecuTorch joins and splits the arguments at spaces, which folders may have; only its packing is wanted.
        arm_vela.vela = SimpleNamespace(main=lambda _arguments: _run(flags, Path(folder)))
        try:
            stream: bytes = arm_vela.vela_compile(tosa, list(flags), intermediate_path=folder)
        finally:
            arm_vela.vela = own
        return stream, _estimate(Path(folder))


def _run(flags: Sequence[str], folder: Path) -> None:
    """Compile ``out.tosa`` in ``folder``, where ExecuTorch has put it, into ``output``, where it looks."""
    found = find_spec("ethosu")
    roots = [str(Path(place).parent) for place in (found.submodule_search_locations or ())] if found is not None else []
    command = [
        sys.executable,
        "-m",
        "ethosu.vela",
        *flags,
        f"--output-dir={folder / 'output'}",
        str(folder / "out.tosa"),
    ]
    paths = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}, cwd=folder
    )
    if done.returncode or not (folder / "output" / "out_vela.npz").is_file():
        said = (done.stdout + done.stderr).strip()[-1000:]
        raise StageFailed(
            f"Arm's Vela refused a part of the network (exit code {done.returncode}): {said}",
            where="lower",
            fix="keep the operator that it names out of the network, or give its modules fp32, which leaves them to "
            "ExecuTorch's kernels; where it names a memory, choose another memory_mode or system_config",
        )


def _estimate(folder: Path) -> Estimate:
    (summary,) = (folder / "output").glob("out_summary_*.csv")
    with summary.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    memories = ("sram", "dram", "on_chip_flash", "off_chip_flash")
    return Estimate(
        cycles=int(row["cycles_total"]),
        clock_hz=float(row["core_clock"]),
        bytes={name: round(float(row[f"{name}_memory_used"]) * 1024) for name in memories},  # Vela writes KiB
    )


@contextmanager
def kept_parts(folder: Path) -> Iterator[tuple[list[str], list[Estimate]]]:
    """Within it, each part that is lowered leaves its TOSA graph in ``folder``; yields names and estimates."""
    from executorch.backends.arm.ethosu import backend

    estimates: list[Estimate] = []

    def compile_part(tosa: bytes, flags: Sequence[str]) -> bytes:
        stream, estimate = compiled(tosa, flags)
        estimates.append(estimate)
        return stream

    with _arm.kept_parts(folder, backend, "vela_compile", compile_part) as names:
        yield names, estimates


def graph_of(part: bytes, options: Mapping[str, bytes], folder: Path) -> bytes:
    """The TOSA graph in ``folder`` that ``part`` was compiled from; ArtifactDamaged where there is none.

    ``options``: what the program says that its compiler was told.
    """
    flags = options.get("compile_flags", b"").decode().split()
    return _arm.graph_of(part, folder, lambda tosa: compiled(tosa, flags)[0])


def partitioner(chip: Chip) -> Any:
    """The backend's partitioner for ``chip``."""
    from executorch.backends.arm.ethosu import EthosUPartitioner

    return EthosUPartitioner(chip.compile_spec())


def misplaced(entry: Path) -> list[str]:
    """Of the program at ``entry``, which parts' commands are for another accelerator than they say, and for which."""
    from edgebake_targets.inspectors import _pte_file, _vela_stream

    program = _pte_file.opened(_pte_file.mapped(entry))
    wrong = []
    for plan in program.table.tables(1):
        for number, delegate in enumerate(plan.tables(7)):
            told = {spec.text(0): spec.text(1) for spec in delegate.tables(2)}.get("target", "")
            there = _vela_stream.read(_pte_file.blob_of(program, delegate)).accelerator
            if there != told:
                wrong.append(f"part {number} of {plan.text(0)} says {told or 'nothing'}, its commands are for {there}")
    return wrong


def quantizer(chip: Chip, assignment: Assignment) -> Quantizer:
    """Arm's PT2E quantizer, int8 per channel, kept from the modules that stay float."""
    from executorch.backends.arm.quantizer import EthosUQuantizer, get_symmetric_quantization_config

    configuration = get_symmetric_quantization_config(is_per_channel=True)
    return _arm.observing(EthosUQuantizer(chip.compile_spec()), configuration, assignment, "w8a8")
