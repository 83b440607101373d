"""ExecuTorch's MLX backend where its wheel is incomplete: the files that it generates from its schema are made here.

The wheels for Linux carry ``schema.fbs`` and ``generate.py`` without what comes of them. Nothing is written into the
installation: the files lie in a folder of this process and take their place among the imported modules.
"""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import types
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from edgebake.errors import ToolchainMissing

_PACKAGE = "executorch.backends.mlx.serialization"
_GENERATED = "mlx_graph_schema.py"
FIX = "pip install --force-reinstall executorch==1.4.1"


def installed() -> Path | None:
    """The folder of the backend's serialisation, found without importing executorch; None without the backend."""
    found = importlib.util.find_spec("executorch")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(folder) / "backends" / "mlx" / "serialization"
        if (path / "schema.fbs").is_file() and (path / "generate.py").is_file():
            return path
    return None


def is_whole(serialization: Path) -> bool:
    """Whether the wheel carries the generated files itself."""
    return (serialization / _GENERATED).is_file()


def compiler(serialization: Path) -> Path | None:
    """The flatbuffer compiler that executorch brings, or the one on the search path."""
    bundled = serialization.parents[2] / "data" / "bin"
    for name in ("flatc", "flatc.exe"):
        if (bundled / name).is_file():
            return bundled / name
    other = shutil.which("flatc")
    return None if other is None else Path(other)


def prepare() -> None:
    """Make ``executorch.backends.mlx`` importable. ToolchainMissing when the wheel lacks what it is made from."""
    serialization = installed()
    if serialization is None:
        raise ToolchainMissing("the executorch wheel holds no MLX backend", fix=FIX)
    if is_whole(serialization) or _PACKAGE in sys.modules:
        return
    flatc = compiler(serialization)
    if flatc is None:
        raise ToolchainMissing("the flatbuffer compiler flatc is neither in executorch nor on the path", fix=FIX)
    folder = Path(tempfile.mkdtemp(prefix="edgebake-mlx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generate(serialization, folder, flatc)
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[_PACKAGE] = package


def passes() -> list[Any]:
    """What the backend's authors run before it takes its parts; RMSNorm becomes one operator there."""
    from executorch.backends.mlx.passes import get_default_passes

    found: list[Any] = get_default_passes()
    return found


def generate(serialization: Path, folder: Path, flatc: Path) -> None:
    """Fill ``folder`` with the backend's serialisation, its generated files with it."""
    for name in ("schema.fbs", "generate.py", "mlx_graph_serialize.py"):
        shutil.copyfile(serialization / name, folder / name)
    (folder / "__init__.py").write_text("")
    generator = _loaded(folder / "generate.py")
    generated = folder / "_generated"
    # Not by the generator's own call, which writes C++ into a folder beside this one and takes failures for warnings.
    done = subprocess.run(
        [flatc, "--python", "-o", generated, folder / "schema.fbs"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ToolchainMissing(f"flatc cannot compile the MLX backend's schema: {done.stderr.strip()}", fix=FIX)
    with redirect_stdout(StringIO()):  # it tells how many files it mended
        generator._fixup_flatc_imports()
    schema = generator.parse_fbs(folder / "schema.fbs")
    (folder / _GENERATED).write_text(generator.generate_python_schema(schema))
    (folder / "_generated_serializers.py").write_text(generator.generate_python_serializers(schema))
    (generated / "__init__.py").touch()


def _loaded(path: Path) -> Any:
    """The generator as a module: it finds its schema beside itself, and writes there."""
    name = "_edgebake_mlx_generate"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ToolchainMissing(f"{path.name} of the MLX backend is no Python module", fix=FIX)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
