"""Private toolchains: folders in the store for packages that cannot live in this environment, whole or not there.

``<store>/toolchains/<name>``; the name carries the version. A folder is filled beside its place, every file's size and
SHA-256 recorded, and renamed: what a killed process leaves has another name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgebake.errors import ToolchainMissing
from edgebake.jsonfile import check_signature, sign, write_json_atomic
from edgebake.store_files import files_below, remove_tree, sha256_file, storage_errors, sync_file
from edgebake.store_home import default_root, refuse_foreign

RECORD = "toolchain.json"
REMEDY = "edgebake doctor --fix"
_MAKING = ".making"


def place(name: str) -> Path:
    """Where the toolchain ``name`` lies, or would."""
    return default_root().absolute() / "toolchains" / name


def make(folder: Path, fill: Callable[[Path], None]) -> bool:
    """Have ``fill`` put plain files into a new folder that then takes the place of ``folder``.

    False, and nothing is done, when ``folder`` is whole. StoreError when the disk refuses.
    """
    from filelock import FileLock

    making, old = _beside(folder, _MAKING), _beside(folder, ".old")
    with storage_errors("make a toolchain's folder", folder):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(_beside(folder, ".lock")):
            for left in (making, old):
                remove_tree(left)
            if damage(folder) is None:
                return False
            making.mkdir(mode=0o700)
            fill(making)
            _record(making)
            if folder.exists():
                folder.rename(old)
            making.rename(folder)
            remove_tree(old)
    return True


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _record(folder: Path) -> None:
    files = {name: [(folder / name).stat().st_size, sha256_file(folder / name)] for name in files_below(folder)}
    for name in files:
        sync_file(folder / name)
    write_json_atomic(folder / RECORD, sign({"files": files}))


def fault(folder: Path) -> str | None:
    """Why ``folder`` cannot be used, from its record and the files' sizes; None when it looks whole."""
    if not folder.is_dir():
        left = _beside(folder, _MAKING)
        return f"making it was interrupted, {left} is what is left" if left.is_dir() else "it has not been made"
    files = _files(folder)
    if files is None:
        return f"{folder / RECORD} is missing or damaged"
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{path} is not there or has another size"
    return None


def damage(folder: Path) -> str | None:
    """Why ``folder`` cannot be used, every file read; None when it is as it was made."""
    found = fault(folder)
    for name, (_, digest) in ((_files(folder) or {}) if found is None else {}).items():
        if sha256_file(folder / name) != digest:
            return f"{folder / name} is not what was installed"
    return found


def verify(folder: Path) -> None:
    """ToolchainMissing unless ``folder`` belongs to this user and every file in it is as it was made."""
    found = damage(folder)
    if found is not None:
        raise ToolchainMissing(f"the private toolchain {folder.name} cannot be used: {found}", fix=REMEDY)
    refuse_foreign(folder)


def _files(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size and SHA-256 of each file of the record; None where no whole record is."""
    try:
        told: Any = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or not check_signature(told):
        return None
    return {name: (size, digest) for name, (size, digest) in told["files"].items()}
