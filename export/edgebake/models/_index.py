"""The index of a model whose weights lie in several safetensors files."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath

from edgebake.errors import RecipeError

_INDEX = "*.safetensors.index.json"


def _root_of(folder: Path) -> Path:
    """The folder that links may point into: a hub snapshot's files are links into the repository's ``blobs``."""
    inside_hub_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent if inside_hub_cache else folder


def check_index(folder: Path) -> None:
    """Refuse a safetensors index that names files outside ``folder`` or files that do not exist."""
    root = _root_of(folder.resolve())
    for index in sorted(folder.glob(_INDEX)):
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise RecipeError(f"{index.name} is not a safetensors index", where=str(folder)) from None
        for shard in shards:
            _check_shard(folder, root, index.name, shard)


def _check_shard(folder: Path, root: Path, index: str, shard: object) -> None:
    name = shard if isinstance(shard, str) else ""
    windows = PureWindowsPath(name)
    leaves = not name or ".." in windows.parts or windows.is_absolute() or windows.drive or name.startswith(("/", "\\"))
    if leaves or not (folder / name).resolve().is_relative_to(root):
        raise RecipeError(
            f"{index} names {shard!r}, which lies outside the model's folder",
            where=str(folder),
            fix="a model's weights must lie beside its index; get the model from a source you trust",
        )
    if not (folder / name).is_file():
        raise RecipeError(f"{index} names {name!r}, which is missing", where=str(folder), fix="copy the model again")
