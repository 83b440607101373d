"""`edgebake inspect`: what an artifact file says of itself, whoever made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgebake.commands import _shared
from edgebake.errors import ArtifactDamaged, EdgebakeError, ToolchainMissing, UsageError
from edgebake.target import INSPECTORS
from edgebake.types import COMPILED

TIMEOUT_S = 120.0
MEMORY_MIB = 4096.0
_FOLDERS = {".mlpackage": "a Core ML package", ".aimodel": "a Core AI model"}  # formats that are folders
_SHOWN = 12
_LONGEST = 400


def run(*, path: Path, as_json: bool) -> int:
    """Inspect a file, a package or an artifact folder, in a process with limits on memory and time."""
    from edgebake.commands import _isolated

    _refuse(path)
    (found,) = _isolated.run("inspect", [{"path": str(path)}], timeout_s=TIMEOUT_S, memory_mib=MEMORY_MIB)
    if isinstance(found, EdgebakeError):
        raise type(found)([replace(p, fix=p.fix or "build or copy it again, whole") for p in found.problems])
    if as_json:
        _shared.print_json(found)
    else:
        _shared.say("\n".join(_lines(found)))
    return 0


def _refuse(path: Path) -> None:
    """What needs no process of its own to be refused."""
    from edgebake.delivery import MANIFEST

    kinds = "a .pte, .onnx, .ort, .mlpackage, .aimodel or an artifact folder"
    if not path.exists():
        raise UsageError(f"{path} does not exist", fix=f"give {kinds}")
    if path.is_dir() and (path / MANIFEST).is_file():
        _shared.artifact_folders([path])
        return
    package = _FOLDERS.get(path.suffix.lower())
    if package and path.is_file():
        raise UsageError(f"{path} is a file; {package} is a folder", fix="unpack or copy the whole folder")
    if path.is_dir() != bool(package) or not (path.is_dir() or path.is_file()):
        what = "a folder" if path.is_dir() else "a file" if path.is_file() else "neither a file nor a folder"
        raise UsageError(f"{path} is {what}, not {kinds}", fix=_below(path) if path.is_dir() else f"give {kinds}")
    _inspector(path)
    if path.is_file() and not path.stat().st_size:
        raise ArtifactDamaged("the file is empty", where=str(path), fix="build or copy the file again")


def _below(folder: Path) -> str:
    try:
        found = _shared.artifact_folders([folder])
    except UsageError:
        return "no artifact lies below it"
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return f"artifacts below it: {', '.join(str(f) for f in found[:4])}{more}"


def _inspector(path: Path) -> Any:
    known: list[str] = []
    for name in INSPECTORS.names():
        module = INSPECTORS.find(name)
        known += module.SUFFIXES
        if path.suffix.lower() in module.SUFFIXES:
            if missing := module.missing():
                raise ToolchainMissing(f"cannot read {path.suffix} files: {missing.reason}", fix=missing.remedy)
            return module
    raise UsageError(f"{path}: nothing here reads this kind of file", fix=f"known: {', '.join(known)}")


def isolated(path: str) -> dict[str, Any]:
    """In the worker: plain data of the inspection, with ``path`` and the manifest where there is one."""
    from dataclasses import asdict

    from edgebake.artifacts import manifest_of

    given = Path(path)
    manifest, names = None, {}
    if given.is_dir() and given.suffix.lower() not in _FOLDERS:
        manifest = manifest_of(given)
        given = given / manifest["entry"]
    else:
        manifest = _beside(given)
    if manifest is not None:
        names = _names(manifest)
    return {**asdict(_inspector(given).inspect(given)), "path": str(given), "manifest": manifest, "names": names}


def _beside(given: Path) -> dict[str, Any] | None:
    """The manifest beside the file ``given`` where it tells of that very content; what else lies there is not asked."""
    from edgebake.artifacts import manifest_of
    from edgebake.delivery import MANIFEST
    from edgebake.store_files import sha256_file

    if not given.is_file() or not (given.parent / MANIFEST).is_file():
        return None
    try:
        manifest = manifest_of(given.parent)
    except EdgebakeError:  # somebody else's, or damaged: the file can be read without it
        return None
    digests = [file["sha256"] for file in manifest["files"] if file["path"] == given.name == manifest["entry"]]
    return manifest if digests == [sha256_file(given)] else None


def _names(manifest: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the recipe calls inputs and outputs: a .pte knows them by position only."""
    methods = list(manifest["signature"]["methods"].values())
    if len(methods) != 1:
        return {}
    return {side: [str(spec["name"]) for spec in methods[0][side]] for side in ("inputs", "outputs")}


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    manifest = found["manifest"]
    yield f"{found['path']}: {found['format']}, {_shared.kib_or_mib(found['total_bytes'])}"
    if manifest:
        yield f"built as {manifest['unit']} by edgebake {manifest['edgebake']}"
        yield from (f"note: {note}" for note in manifest.get("notes", ()))
    for title in ("inputs", "outputs"):
        yield f"{title}:"
        named = found["names"].get(title, [])
        for number, spec in enumerate(found[title]):
            name = named[number] if len(named) == len(found[title]) else spec["name"]
            inside = "" if name == spec["name"] else f" ({spec['name']} in the file)"
            yield f"  {name}{inside} {spec['dtype']}[{', '.join(str(d) for d in spec['shape'])}]"
    for title in ("delegates", "operators"):
        if found[title]:
            yield f"{title}: {_counts(found[title])}"
    yield from _units(found)
    yield from _weights(found)
    for key, value in found["facts"].items():
        if value not in ({}, [], "", None):
            yield f"{key.replace('_', ' ')}: {_short(value)}"


def _units(found: Mapping[str, Any]) -> Iterator[str]:
    """What runs where: as the build counted it, which knew the graph, else as the file shows it."""
    from edgebake.reports._computing import unit_texts
    from edgebake.reports._text import plain

    counted = (found["manifest"] or {}).get("delegation") or {}
    told = counted if counted.get("units") else found
    if told["units"]:
        yield "units:"
        yield from (f"  {plain(line)}" for line in unit_texts(told["units"], told.get("border_bytes")))
        for left in told.get("left_out", ()):
            why = f", {left['reason']}" if left.get("reason") else ""
            yield f"  outside: {plain(left['op'])} x{left['count']}{plain(why)}"


def _weights(found: Mapping[str, Any]) -> Iterator[str]:
    totals: dict[str, list[int]] = {}
    for record in found["weights"]:
        row = totals.setdefault(record["dtype"], [0, 0, 0])
        row[0] += 1
        row[1] += record["bytes"]
        row[2] += record["scale_bytes"]
    yield "weights:" if totals else "weights: none"
    for dtype, (count, size, scales) in sorted(totals.items(), key=lambda item: -item[1][1]):
        share = size / max(found["total_bytes"], 1)
        more = f", and {_shared.kib_or_mib(scales)} of scales" if scales else ""
        what = "part" if dtype == COMPILED else "tensor"
        yield f"  {dtype}: {_shared.counted(count, what)}, {_shared.kib_or_mib(size)} ({share:.0%}){more}"


def _counts(counts: Mapping[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    rest = len(ranked) - _SHOWN
    shown = ", ".join(f"{name} x{n}" for name, n in ranked[:_SHOWN])
    return shown + (f" and {rest} more kinds" if rest > 0 else "")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    elif isinstance(value, list):
        text = ", ".join(_short(item) for item in value)
    else:
        text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
