"""Arm's VGF: packages that it takes, and the model converter that writes it.

The converter turns a TOSA graph into the SPIR-V and constants of a VGF file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.target import Missing
from edgebake.types import Assignment
from edgebake_targets import _arm

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

BACKEND = "VgfBackend"
VERSIONS = {"tosa-tools": "2026.8.0", "ai-ml-sdk-model-converter": "0.11.0"}
_MODULES = {"tosa_serializer": "tosa-tools", "tosa_reference_model": "tosa-tools"}
_CONVERTER = "ai-ml-sdk-model-converter"
# tosa-tools pins numpy below 2.2 and versions of other packages that it also runs without, so pip is to leave them.
REMEDY = (
    "pip install --no-deps " + " ".join(f"{name}=={version}" for name, version in VERSIONS.items()) + " && "
    "pip install flatbuffers ml-dtypes"
)


def missing() -> Missing | None:
    """None when Arm's TOSA tools and model converter are installed; imports neither."""
    absent = {name for module, name in _MODULES.items() if find_spec(module) is None}
    if converter() is None:
        absent.add(_CONVERTER)
    if not absent:
        return None
    names = " and ".join(name for name in VERSIONS if name in absent)
    return Missing(reason=f"Arm's {names} {'are' if len(absent) > 1 else 'is'} not installed", remedy=REMEDY)


def converter() -> Path | None:
    """The program of the package ai-ml-sdk-model-converter, None where it is not installed."""
    found = find_spec("model_converter")
    name = "model-converter.exe" if sys.platform == "win32" else "model-converter"
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        program = Path(folder) / "binaries" / "bin" / name
        if program.is_file():
            return program
    return None


def convert(tosa: bytes) -> bytes:
    """The VGF file of a TOSA graph: same graph, same bytes. StageFailed with the converter's own words."""
    program = converter()
    if program is None:
        raise StageFailed(f"Arm's {_CONVERTER} is not installed", where="lower", fix=REMEDY)
    with tempfile.TemporaryDirectory(prefix="edgebake-vgf-") as folder:
        source, written = Path(folder) / "part.tosa", Path(folder) / "part.vgf"
        source.write_bytes(tosa)
        done = subprocess.run(
            [str(program), "-i", str(source), "-o", str(written)], capture_output=True, text=True, check=False
        )
        if done.returncode or not written.is_file():
            said = (done.stderr + done.stdout).strip()[-1000:]
            raise StageFailed(
                f"Arm's model converter refused a part of the network (exit code {done.returncode}): {said}",
                where="lower",
                fix="keep the operator that it names out of the network, or choose executorch-vulkan",
            )
        return written.read_bytes()


@contextmanager
def kept_parts(folder: Path) -> Iterator[list[str]]:
    """Within it, each part that is lowered leaves its TOSA graph in ``folder``; yields their names from there.

    ExecuTorch's own call of the converter looks for it on the search path alone, and throws the graph away.
    """
    from executorch.backends.arm.vgf import backend

    with _arm.kept_parts(folder, backend, "vgf_compile", lambda tosa, _flags: convert(tosa)) as names:
        yield names


def graph_of(part: bytes, _options: Mapping[str, bytes], folder: Path) -> bytes:
    """The TOSA graph in ``folder`` that ``part`` was made from; ArtifactDamaged where there is none."""
    return _arm.graph_of(part, folder, convert)


def partitioner() -> Any:
    """The backend's partitioner for TOSA 1.0 with floats and integers."""
    from executorch.backends.arm.vgf import VgfCompileSpec, VgfPartitioner

    return VgfPartitioner(VgfCompileSpec())


def quantizer(assignment: Assignment) -> Quantizer:
    """Arm's PT2E quantizer, int8 per channel, kept from the modules that stay float."""
    from executorch.backends.arm.quantizer import VgfQuantizer, get_symmetric_quantization_config
    from executorch.backends.arm.vgf import VgfCompileSpec

    configuration = get_symmetric_quantization_config(is_per_channel=True)
    return _arm.observing(VgfQuantizer(VgfCompileSpec()), configuration, assignment, "w8a8")
