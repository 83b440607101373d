"""Qualcomm's libraries for ExecuTorch: a QAIRT SDK of the user's, or a private folder made from a wheel.

ExecuTorch 1.4 works with QNN 2.49, which the wheel onnxruntime-qnn 2.5.0 carries; with the libraries of 2.3, 2.4, 2.6
and 2.7 device creation fails (error 14001). ONNX Runtime's own target wants 2.7.0, so that the two cannot share an
environment. The licence of the libraries allows their use and not their redistribution: they are installed, never
shipped.
"""

from __future__ import annotations

import os
import platform
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from edgebake import toolchains
from edgebake.errors import StageFailed
from edgebake.target import Missing

WHEEL, CPU_INFO = "onnxruntime-qnn==2.5.0", "py-cpuinfo==9.0.0"
NAME = "qnn-" + WHEEL.replace("==", "-")
VARIABLE = "QNN_SDK_ROOT"
HOST = "x86_64-linux-clang"  # the SDK's name for this system
_COMPILER = "libQnnHtp.so"  # and simulator
_RUNTIME_LIBS = "onnxruntime_qnn.libs"  # the C++ library, where the others look for it: $ORIGIN/../onnxruntime_qnn.libs
_LIBRARIES = ("libQnn*.so", "libHtpPrepare.so")
_NOT_NEEDED = ("libQnnGpu.so",)
_TEXTS = ("*LICENSE*", "ThirdPartyNotices.txt")
_TAIL = 6  # lines of pip's words that a message carries


def missing() -> Missing | None:
    """Whether ExecuTorch has its Qualcomm backend and there are libraries for it."""
    named = os.environ.get(VARIABLE)
    return _cannot() or (_missing_sdk(Path(named)) if named else _missing_private())


def _cannot() -> Missing | None:
    """What no libraries would mend."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        what = f"ExecuTorch compiles for Qualcomm on Linux x86-64, not on {platform.system()} {platform.machine()}"
        return Missing(reason=what, remedy="build on Linux x86-64 (glibc 2.35 or later)")
    if not _backend():
        what = "no executorch with a Qualcomm backend for this Python is installed"
        return Missing(reason=what, remedy="pip install --force-reinstall executorch==1.4.1")
    return None


def _backend() -> list[Path]:
    found = find_spec("executorch")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found is not None else []
    suffix = f"cpython-{sys.version_info.major}{sys.version_info.minor}-*.so"
    return [file for folder in folders for file in (folder / "backends/qualcomm/python").glob(f"Py*.{suffix}")]


def _missing_sdk(root: Path) -> Missing | None:
    library = root / "lib" / HOST / _COMPILER
    if not library.is_file():
        what = f"{VARIABLE} is {root}, and there is no {library}"
        return Missing(reason=what, remedy=f"point it at a QAIRT SDK 2.49, or: unset {VARIABLE}; {toolchains.REMEDY}")
    if find_spec("cpuinfo") is None:
        return Missing(reason="not installed: py-cpuinfo", remedy=f"pip install {CPU_INFO}")
    return None


def _missing_private() -> Missing | None:
    found = toolchains.fault(toolchains.place(NAME))
    if found is None:
        return None
    what = f"the private toolchain {NAME} cannot be used: {found}"
    return Missing(reason=what, remedy=f"{toolchains.REMEDY} (installs {WHEEL}, 200 MB), or set {VARIABLE}")


def fix(folder: Path) -> str:
    """Make the private toolchain in ``folder`` where it is missing or damaged and can serve; says what was done."""
    cannot = _cannot()
    if cannot is not None:
        return f"nothing made, {cannot.reason}"
    named = os.environ.get(VARIABLE)
    if named:
        return f"nothing made, {VARIABLE} names {named}"
    at = folder / NAME
    return f"{'made' if toolchains.make(at, _fill) else 'whole already:'} {at}"


def _fill(folder: Path) -> None:
    """``sdk/`` laid out as Qualcomm's own, ``python/`` with what ExecuTorch's backend imports, ``licences/``."""
    import shutil

    wheel, libraries = folder / "wheel", folder / "sdk" / "lib" / HOST
    _install(WHEEL, wheel)
    _install(CPU_INFO, folder / "python")
    libraries.mkdir(parents=True)
    (folder / "licences").mkdir()
    package = wheel / "onnxruntime_qnn"
    for pattern in _LIBRARIES:
        for library in sorted(package.glob(pattern)):
            if library.name not in _NOT_NEEDED:
                library.rename(libraries / library.name)
    for pattern in _TEXTS:
        for text in sorted(package.glob(pattern)):
            text.rename(folder / "licences" / text.name)
    (wheel / _RUNTIME_LIBS).rename(folder / "sdk" / "lib" / _RUNTIME_LIBS)
    shutil.rmtree(wheel)
    if (folder / "python" / "bin").is_dir():
        shutil.rmtree(folder / "python" / "bin")
    if not (libraries / _COMPILER).is_file():
        raise StageFailed(f"{WHEEL} brought no {_COMPILER}", fix=f"download a QAIRT SDK 2.49 and set {VARIABLE}")


def _install(requirement: str, to: Path) -> None:
    import subprocess

    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-input", "--no-compile", "--quiet"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--target", str(to), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not to.is_dir():
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_TAIL:])
        raise StageFailed(
            f"pip could not install {requirement} into a private folder",
            where="doctor --fix",
            fix=f"see that pip works here and reaches its index, or set {VARIABLE}; its last words:\n{said}",
        )


def environment() -> dict[str, str]:
    """What a process that uses the libraries is started with; read by the system's loader before Python starts.

    ToolchainMissing when the private folder is not as it was made.
    """
    named = os.environ.get(VARIABLE)
    at = toolchains.place(NAME)
    if not named:
        toolchains.verify(at)
    root = Path(named) if named else at / "sdk"
    found = {VARIABLE: str(root), "LD_LIBRARY_PATH": _joined(str(root / "lib" / HOST), "LD_LIBRARY_PATH")}
    return found if named else found | {"PYTHONPATH": _joined("", "PYTHONPATH", str(at / "python"))}


def _joined(first: str, variable: str, last: str = "") -> str:
    return os.pathsep.join(part for part in (first, os.environ.get(variable, ""), last) if part)


def versions() -> dict[str, str]:
    """For the store key: which libraries compile and simulate."""
    named = os.environ.get(VARIABLE)
    library = Path(named) / "lib" / HOST / _COMPILER if named else None
    if library is None:
        return {"qnn": NAME}
    if not library.is_file():
        return {"qnn": "absent"}
    status = library.stat()
    return {"qnn": f"{_COMPILER} {_digest(library, status.st_size, status.st_mtime_ns)}"}


@lru_cache
def _digest(library: Path, _size: int, _changed: int) -> str:
    import hashlib

    with library.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
