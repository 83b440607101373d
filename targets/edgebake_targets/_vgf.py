"""Arm's VGF: packages that it takes, the model converter that writes it, the TOSA graphs that are kept beside a .pte.

ExecuTorch lowers a part to a TOSA graph, and the converter turns that into the SPIR-V and constants of a VGF file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import Missing
from edgebake.types import Assignment
from edgebake_targets import _executorch

if TYPE_CHECKING:
    import torch
    from torchao.quantization.pt2e.quantizer import Quantizer

BACKEND = "VgfBackend"
FOLDER = "tosa"  # beside the program
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

    names: list[str] = []

    def compiled(tosa: bytes, _flags: Sequence[str], *_where: Any) -> bytes:
        vgf = convert(tosa)
        path = _path(folder, vgf)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tosa)
        names.append(str(path.relative_to(folder).as_posix()))
        return vgf

    own = backend.vgf_compile
    backend.vgf_compile = compiled
    try:
        yield names
    finally:
        backend.vgf_compile = own


def graph_of(vgf: bytes, folder: Path) -> bytes:
    """The TOSA graph in ``folder`` that ``vgf`` was made from, by making it again; ArtifactDamaged if it was not."""
    path = _path(folder, vgf)
    rebuild = "build it again: a program is judged with the TOSA graphs that were written beside it"
    if not path.is_file():
        raise ArtifactDamaged(
            f"no TOSA graph lies beside the program for its part {path.stem}", where=str(folder), fix=rebuild
        )
    tosa = path.read_bytes()
    try:
        again = convert(tosa)
    except StageFailed as error:
        raise ArtifactDamaged(f"this TOSA graph cannot be converted: {error}", where=str(path), fix=rebuild) from error
    if again != vgf:
        raise ArtifactDamaged(
            "the program's VGF part is not what this TOSA graph converts to", where=str(path), fix=rebuild
        )
    return tosa


def _path(folder: Path, vgf: bytes) -> Path:
    """A part's graph is found by the digest of what it was converted to."""
    return folder / FOLDER / f"{sha256(vgf).hexdigest()[:16]}.tosa"


def partitioner() -> Any:
    """The backend's partitioner for TOSA 1.0 with floats and integers."""
    from executorch.backends.arm.vgf import VgfCompileSpec, VgfPartitioner

    return VgfPartitioner(VgfCompileSpec())


def quantizer(assignment: Assignment) -> Quantizer:
    """Arm's PT2E quantizer, int8 per channel, kept from the modules that stay float."""
    from executorch.backends.arm.quantizer import VgfQuantizer, get_symmetric_quantization_config
    from executorch.backends.arm.quantizer.arm_quantizer_utils import NodeFinder
    from executorch.backends.arm.vgf import VgfCompileSpec

    floats = set(assignment.kinds) - set(assignment.of("w8a8"))

    class OfFloatModules(NodeFinder):  # type: ignore[misc]  # ExecuTorch's classes are untyped
        """The operators of modules that the rules leave float."""

        def find_nodes(self, model: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
            return (
                n for n in model.graph.nodes if n.op == "call_function" and _executorch.innermost_module(n) in floats
            )

        def __repr__(self) -> str:
            return f"modules that stay float: {', '.join(sorted(floats))}"

    made = VgfQuantizer(VgfCompileSpec())
    made.set_global(get_symmetric_quantization_config(is_per_channel=True))
    if floats:
        made.quantizer.set_node_finder(None, OfFloatModules())
    return made
