"""The folder that a Core ML delegate of ExecuTorch is made of, flattened to bytes: read without unpacking, and written.

Layout (``backends/apple/coreml/runtime/inmemoryfs`` of ExecuTorch): the files' bytes one after the other, then JSON
with its bytes in reverse order, so that it can be read from the end: ``{"nodes": [{"name", "kind": 0 file, 1 folder,
"dataRegion": {"offset", "size"}, "children": {name: index}}]}``, the last node being the root.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreml_package import Package, proto

ROOT = "lowered_module"
PACKAGE = "model.mlpackage"
METADATA = "metadata.json"  # names of inputs and outputs in the order of the delegate's arguments, an identifier
DEBUG = "debug_info.json"  # from which torch operator each operator was made
_FILE, _FOLDER = 0, 1
_INDEX_LIMIT = 2**20  # bytes of JSON; a package has six files
_MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
_WEIGHTS = f"{PACKAGE}/Data/com.apple.CoreML/weights/"


def read(blob: memoryview, where: str) -> dict[str, memoryview]:
    """The files by their path below the root; ArtifactDamaged when the bytes are no flattened folder."""
    try:
        nodes = _index(blob)["nodes"]
        return dict(_walk(blob, nodes, len(nodes) - 1, "", len(nodes)))
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ArtifactDamaged(f"the Core ML delegate holds no flattened folder ({error})", where=where) from error


def _index(blob: memoryview) -> Any:
    size = min(len(blob), 2**12)
    while True:
        text = bytes(blob[-size:])[::-1].decode("utf-8", "replace")
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            if size >= min(len(blob), _INDEX_LIMIT):
                raise
            size = min(len(blob), 4 * size)


def _walk(blob: memoryview, nodes: Any, number: int, path: str, depth: int) -> Iterator[tuple[str, memoryview]]:
    if depth < 0 or number < 0:
        raise ValueError("a folder that contains itself")
    node = nodes[number]
    if node["kind"] == _FILE:
        start, size = int(node["dataRegion"]["offset"]), int(node["dataRegion"]["size"])
        if start < 0 or size < 0 or start + size > len(blob):
            raise ValueError(f"{path} reaches beyond its {len(blob)} bytes")
        yield path, blob[start : start + size]
        return
    for name, child in node["children"].items():
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"a file named {name!r}")
        yield from _walk(blob, nodes, int(child), f"{path}/{name}" if path else name, depth - 1)


def write(files: Mapping[str, bytes]) -> bytes:
    """``files`` (path below the root -> bytes) as ExecuTorch's runtime reads them; the same files give the same bytes.

    ExecuTorch's own ``flatten_directory_contents`` takes them in the order in which the file system lists them.
    """
    data, nodes = bytearray(), []
    top: dict[str, Any] = {}
    # Weights first: their own alignment then holds within the file as well, and readers can use them in place.
    for path in sorted(files, key=lambda path: (not path.startswith(_WEIGHTS), path)):
        *folders, name = path.split("/")
        place = top
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = (len(data), len(files[path]))
        data += files[path]

    def add(name: str, content: Any) -> int:
        """Children come before their folder, as ExecuTorch writes them."""
        folder = isinstance(content, dict)
        offset, size = (0, 0) if folder else content
        children = {child: add(child, content[child]) for child in sorted(content)} if folder else {}
        region = {"offset": offset, "size": size}
        kind = _FOLDER if folder else _FILE
        nodes.append({"name": name, "kind": kind, "dataRegion": region, "children": children})
        return len(nodes) - 1

    add(ROOT, top)
    return bytes(data) + json.dumps({"nodes": nodes}, separators=(",", ":"), sort_keys=True).encode()[::-1]


def package_of(files: Mapping[str, memoryview], where: str) -> Package:
    """The Core ML package among ``files``, its weights where they are; ArtifactDamaged when there is none."""
    if _MODEL not in files:
        what = "compiled model (.mlmodelc)" if any(".mlmodelc/" in path for path in files) else "folder without a model"
        raise ArtifactDamaged(f"the Core ML delegate holds a {what}, not a package", where=where)
    spec = proto("Model_pb2").Model()
    decode_error = importlib.import_module("google.protobuf.message").DecodeError
    try:
        spec.ParseFromString(bytes(files[_MODEL]))
    except decode_error as error:
        raise ArtifactDamaged("the Core ML delegate's model is no specification", where=where) from error
    blobs = {
        f"@model_path/weights/{path.removeprefix(_WEIGHTS)}": data
        for path, data in files.items()
        if path.startswith(_WEIGHTS)
    }
    total = sum(len(data) for path, data in files.items() if path.startswith(f"{PACKAGE}/"))
    return Package(path=Path(where), spec=spec, blobs=blobs, total_bytes=total)


def names_of(files: Mapping[str, memoryview], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The package's inputs and outputs in the order in which the delegate is called with them."""
    try:
        metadata = _metadata(files, where)
        return tuple(map(str, metadata["inputNames"])), tuple(map(str, metadata["outputNames"]))
    except (KeyError, TypeError) as error:
        raise ArtifactDamaged(f"the Core ML delegate's {METADATA} lacks names ({error})", where=where) from error


def identifier_of(files: Mapping[str, memoryview], where: str) -> str:
    """The name under which ExecuTorch's runtime keeps what it compiles of the package."""
    return str(_metadata(files, where).get("identifier", ""))


def _metadata(files: Mapping[str, memoryview], where: str) -> Any:
    try:
        content = json.loads(bytes(files[METADATA]))
    except (ValueError, KeyError) as error:
        raise ArtifactDamaged(f"the Core ML delegate's {METADATA} cannot be read ({error})", where=where) from error
    if not isinstance(content, dict):
        raise ArtifactDamaged(f"the Core ML delegate's {METADATA} is not an object", where=where)
    return content
