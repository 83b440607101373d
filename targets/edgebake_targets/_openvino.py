"""Intel's OpenVINO: its library for ExecuTorch's runtime, and its compiler, kept to a process of its own.

OpenVINO names the operators of a model by a counter of the whole process, and writes the names into what it exports:
only a process that does nothing else gives the same bytes for the same model.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from edgebake.errors import StageFailed
from edgebake.target import Missing

BACKEND = "OpenvinoBackend"
DEVICE = "CPU"  # of Intel's GPUs and NPUs OpenVINO compiles only for those that it finds in this machine
# ExecuTorch 1.4 wants OpenVINO below 2026. Its pin holds numpy below 2.4, which it also runs without.
VERSIONS = {"openvino": "2025.4.1", "openvino-telemetry": "2025.2.0"}
REMEDY = "pip install --no-deps " + " ".join(f"{name}=={version}" for name, version in VERSIONS.items())
_LIBRARY = "OPENVINO_LIB_PATH"  # where ExecuTorch's runtime looks first
_COMPILE = """
import sys
from openvino import Core
core, (source, device, written) = Core(), sys.argv[1:]
with open(written, "wb") as file:
    file.write(core.compile_model(core.read_model(source), device).export_model().getvalue())
"""


def missing() -> Missing | None:
    """None when OpenVINO is installed with the library that ExecuTorch's runtime loads; imports nothing of it."""
    if find_spec("openvino") is None:
        return Missing(reason="the Python package 'openvino' is not installed", remedy=REMEDY)
    if library() is None:
        return Missing(reason="the Python package 'openvino' has no libopenvino_c", remedy=REMEDY)
    return None


def library() -> Path | None:
    """OpenVINO's C library, None where it is not installed."""
    found = find_spec("openvino")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        for pattern in ("libopenvino_c.so*", "libopenvino_c.*dylib", "openvino_c.dll"):
            for file in sorted(Path(folder, "libs").glob(pattern)):
                return file
    return None


def environment() -> dict[str, str]:
    """What a process that runs such programs is started with."""
    found = library()
    return {} if found is None else {_LIBRARY: str(found)}


def _enter_package() -> None:
    """Make ExecuTorch's package for OpenVINO known without running its ``__init__``.

    That imports a quantizer, and with it NNCF, whose pins of networkx and others this environment does not meet; what
    is wanted of the package does not use it.
    """
    name = "executorch.backends.openvino"
    if name not in sys.modules:
        found = find_spec(name)
        assert found is not None  # missing() has seen executorch
        package = ModuleType(name)
        package.__spec__, package.__path__ = found, list(found.submodule_search_locations or ())
        sys.modules[name] = package


def partitioner() -> Any:
    """The backend's partitioner, for this machine's kind of CPU."""
    _enter_package()
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return OpenvinoPartitioner([CompileSpec("device", DEVICE.encode())])


@contextmanager
def compiled_apart() -> Iterator[Counter[tuple[str, int]]]:
    """Within it ExecuTorch's parts are compiled in processes of their own; yields the constants of all of them.

    How many of each (type, elements), as OpenVINO's compiler was given them.
    """
    from openvino._offline_transformations import compress_quantize_weights_transformation
    from openvino.frontend.pytorch.torchdynamo import compile as frontend

    held = Counter[tuple[str, int]]()

    class Apart:
        """In the place of OpenVINO's core."""

        def compile_model(self, model: Any, device: str, _config: Any) -> _Compiled:
            compress_quantize_weights_transformation(model)  # rounded weights become the integers that they are
            model.set_friendly_name("part")
            for number, operator in enumerate(model.get_ordered_ops()):
                operator.set_friendly_name(f"{operator.get_type_name()}{number}")
                if operator.get_type_name() == "Constant":
                    kind = {"i8": "int8", "u8": "uint8"}.get(operator.get_element_type().get_type_name(), "other")
                    held[kind, prod(operator.get_shape())] += 1
            return _Compiled(_compile(model, device))

    own = frontend.Core
    frontend.Core = Apart
    try:
        yield held
    finally:
        frontend.Core = own


class _Compiled:
    """As OpenVINO's own, as far as ExecuTorch uses it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def export_model(self) -> io.BytesIO:
        """What the runtime imports."""
        return io.BytesIO(self._data)


def _compile(model: Any, device: str) -> bytes:
    from openvino import serialize

    with tempfile.TemporaryDirectory(prefix="edgebake-openvino-") as folder:
        source, written = Path(folder) / "part.xml", Path(folder) / "part.blob"
        serialize(model, source, source.with_suffix(".bin"))
        done = subprocess.run(
            [sys.executable, "-c", _COMPILE, str(source), device, str(written)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if done.returncode or not written.is_file():
            said = (done.stdout + done.stderr).strip()[-1000:]
            raise StageFailed(
                f"OpenVINO did not compile a part of the network (exit code {done.returncode}): {said}",
                where="lower",
                fix="keep the operator that it names out of the network, or choose executorch-xnnpack",
            )
        return written.read_bytes()
