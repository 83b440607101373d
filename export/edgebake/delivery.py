"""The output folder: artifacts with their manifest and measurements, put in place whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgebake import __version__
from edgebake.errors import ArtifactDamaged, StoreError, UsageError
from edgebake.jsonfile import check_signature, digest_of, read_json, sign, write_json_atomic
from edgebake.keys import StageKey
from edgebake.reference import Reference
from edgebake.scheme import aliases_of
from edgebake.store import Entry, Store
from edgebake.store_files import sha256_file
from edgebake.target import find_target
from edgebake.units import Pair, Unit

MANIFEST = "manifest.json"
MEASUREMENTS = "measurements.json"
MANIFEST_VERSION = 1
_STATE = ".edgebake.json"  # size, mtime and inode of what was delivered, and the keys it came from
_NEW, _OLD = ".part", ".old"  # endings of folders that are about to take a place, or have lost it


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A unit's results in the store, about to be put into the output folder."""

    unit: Unit
    keys: Mapping[str, StageKey]
    trace: Entry
    lower: Entry
    reference: Entry
    measurements: Mapping[str, Any]  # without stages and host, which belong to this build


def reference_folder(out: Path, unit: Unit, key: str) -> Path:
    """Where the reference of ``unit`` lies: beside the artifacts of its component."""
    return out / unit.recipe / unit.component / "reference" / key[:12]


def manifest(done: Delivered, reference_path: str, reference_digest: str) -> dict[str, Any]:
    """Deterministic facts of an artifact, signed with its own digest."""
    unit = done.unit
    lowered = done.lower.meta["lowered"]
    model = done.trace.meta["facts"]
    speculative = {} if unit.pair is None else {"speculative": _proposes_to(unit, unit.pair)}
    spec = unit.spec.model_dump(mode="json")
    return sign(
        {
            "version": MANIFEST_VERSION,
            "edgebake": __version__,
            "unit": unit.id,
            "recipe": unit.recipe,
            "component": unit.component,
            "target": unit.target,
            "device": unit.device,
            "scheme": unit.scheme,
            "aliases": list(aliases_of(unit.scheme)),
            "name": unit.name,
            "format": find_target(unit.target).FORMAT,
            "entry": lowered["entry"],
            "files": _file_facts(done.lower, lowered["files"]),
            "signature": lowered["signature"],
            "encodings": lowered["encodings"],
            "notes": list(lowered["notes"]),
            "assignment": done.lower.meta["assignment"],
            "delegation": lowered["delegation"],
            "planned_memory_bytes": lowered["planned_memory_bytes"],
            "model": {**model, "modules": done.trace.meta["modules"], "float_bytes": done.trace.meta["float_bytes"]},
            "recipe_digest": digest_of(spec),
            "limits": spec["limits"],
            "reference": {"path": reference_path, "digest": reference_digest},
            "toolchain": done.keys["lower"].parts["versions"],
            **speculative,
        }
    )


def _proposes_to(draft: Unit, pair: Pair) -> dict[str, Any]:
    """Of a draft: the artifact that it proposes tokens to, and how many at a time."""
    relative = Path(os.path.relpath(pair.unit.folder, draft.folder)).as_posix()
    return {"target": pair.unit.id, "path": relative, "tokens": pair.tokens}


def _file_facts(entry: Entry, files: list[str]) -> list[dict[str, Any]]:
    known = entry.files
    wanted = [n for n in known if any(n == f or n.startswith(f.rstrip("/") + "/") for f in files)]
    return [{"path": n, "sha256": known[n], "bytes": (entry.folder / n).stat().st_size} for n in sorted(wanted)]


def lock_name(out: Path, unit: Unit) -> str:
    """What builds that deliver into the same component of the same output folder wait for each other by."""
    return f"deliver-{(out / unit.recipe / unit.component).resolve()}"


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` only when the block ends well."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=_NEW, dir=folder.parent))
    except OSError as error:
        raise StoreError(f"cannot write to {folder.parent}: {error.strerror}", fix="choose another --out") from error
    try:
        yield made
        made.chmod(0o755)
        _swap(made, folder)
    except OSError as error:
        raise StoreError(
            f"cannot write {folder}: {error.strerror or error}", fix="free some disk space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _swap(made: Path, folder: Path) -> None:
    old = made.with_suffix(_OLD)
    if folder.exists():
        folder.rename(old)
    try:
        made.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(component: Path) -> None:
    """Remove what killed builds left; whoever calls holds the lock, so nobody is at these folders."""
    for leftover in [*component.rglob(f".*{_NEW}"), *component.rglob(f".*{_OLD}")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _stat_facts(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _state(folder: Path, marks: Mapping[str, str]) -> dict[str, Any]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _STATE)
    return sign({"marks": dict(marks), "files": {p.relative_to(folder).as_posix(): _stat_facts(p) for p in files}})


def marks_of(unit: Unit, keys: Mapping[str, StageKey]) -> dict[str, str]:
    """What an output folder must have come from to be up to date."""
    return {
        "lower": keys["lower"].key,
        "validate": keys["validate"].key,
        "recipe": digest_of([unit.id, unit.spec.model_dump(mode="json"), __version__]),
        **({"speculate": keys["speculate"].key} if "speculate" in keys else {}),
    }


def up_to_date(folder: Path, marks: Mapping[str, str]) -> bool:
    """Is ``folder`` what was delivered for ``marks``, by size, mtime and inode?"""
    if not (folder / _STATE).is_file():
        return False
    try:
        state = read_json(folder / _STATE)
        return bool(
            state["marks"] == dict(marks)
            and all(_stat_facts(folder / name) == facts for name, facts in state["files"].items())
        )
    except (OSError, KeyError, TypeError, ArtifactDamaged):  # touched by somebody: delivered again
        return False


def current(out: Path, unit: Unit, keys: Mapping[str, StageKey]) -> bool:
    """Are the artifact of ``unit`` and its reference what was delivered, by size, mtime and inode?"""
    kept = reference_folder(out, unit, keys["reference"].key)
    return up_to_date(kept, _reference_marks(keys)) and up_to_date(out / unit.folder, marks_of(unit, keys))


def _reference_marks(keys: Mapping[str, StageKey]) -> dict[str, str]:
    return {"reference": keys["reference"].key}


def deliver(
    store: Store, done: Delivered, out: Path, measurements: Mapping[str, Any], *, renew_reference: bool = False
) -> Path:
    """Put artifact, manifest, measurements and reference in place; returns the artifact's folder.

    Whoever calls holds the lock ``lock_name``. ``renew_reference``: replace the reference whatever it looks like.
    """
    folder = out / done.unit.folder
    kept = reference_folder(out, done.unit, done.keys["reference"].key)
    _clear_leftovers(out / done.unit.recipe / done.unit.component)
    if renew_reference or not up_to_date(kept, _reference_marks(done.keys)):
        with whole(kept) as made:
            store.deliver(done.reference, made, done.reference.files)
            write_json_atomic(made / _STATE, _state(made, _reference_marks(done.keys)))
    reference_digest = read_json(kept / MANIFEST)["digest"]
    with whole(folder) as made:
        store.deliver(done.lower, made, done.lower.files)
        relative = Path(os.path.relpath(kept, folder)).as_posix()
        write_json_atomic(made / MANIFEST, manifest(done, relative, reference_digest))
        write_json_atomic(made / MEASUREMENTS, sign(dict(measurements)))
        write_json_atomic(made / _STATE, _state(made, marks_of(done.unit, done.keys)))
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact folder; UsageError when there is none, ArtifactDamaged when it was changed."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{folder} is not an artifact folder: it has no {MANIFEST}",
            fix="give a folder that `edgebake build` wrote, such as dist/<recipe>/<component>/<target>/any/<scheme>",
        )
    return _read_signed(path)


def _read_signed(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactDamaged(f"cannot read it: {error}", where=str(path), fix="build the artifact again") from error
    if not isinstance(found, dict) or not check_signature(found):
        raise ArtifactDamaged("its digest does not match its content", where=str(path), fix="build the artifact again")
    if found.get("version", 0) > MANIFEST_VERSION:
        raise ArtifactDamaged(
            f"it has version {found['version']}, this edgebake reads up to {MANIFEST_VERSION}",
            where=str(path),
            fix="install a newer edgebake",
        )
    return found


def damages(folder: Path) -> list[Path]:
    """Delivered files in ``folder``, which exists, that are missing or not what was delivered."""
    signed = [folder / name for name in (MANIFEST, MEASUREMENTS, _STATE)]
    wrong = [path for path in signed if not _is_signed(path)]
    if folder / MANIFEST not in wrong:
        files = {f["path"]: f["sha256"] for f in read_json(folder / MANIFEST)["files"]}
        wrong += [folder / name for name, digest in files.items() if not _is(folder / name, digest)]
    return wrong


def reference_damages(out: Path, unit: Unit, keys: Mapping[str, StageKey]) -> list[Path]:
    """Delivered files of the reference of ``unit`` that are missing or not what was delivered."""
    kept = reference_folder(out, unit, keys["reference"].key)
    wrong = [kept / name for name in (MANIFEST, _STATE) if not _is_signed(kept / name)]
    if kept.exists() and kept / MANIFEST not in wrong:
        files = Reference(kept).manifest["files"]
        wrong += [kept / name for name, facts in files.items() if not _is(kept / name, facts["sha256"])]
    return wrong if kept.exists() else []


def _is_signed(path: Path) -> bool:
    try:
        found = read_json(path)
    except ArtifactDamaged:
        return False
    return isinstance(found, dict) and check_signature(found)


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


def read_measurements(folder: Path) -> dict[str, Any]:
    """What was measured on the artifact in ``folder`` when it was built."""
    return _read_signed(folder / MEASUREMENTS)


def prune_references(store: Store, out: Path, units: Iterable[Unit]) -> None:
    """Remove references that no artifact of the components of ``units`` points to, and what killed builds left."""
    for unit in {(unit.recipe, unit.component): unit for unit in units}.values():
        component = out / unit.recipe / unit.component
        with store.lock(lock_name(out, unit)):
            _clear_leftovers(component)
            manifests = [p for p in component.rglob(MANIFEST) if "reference" not in p.relative_to(component).parts]
            if not all(map(_is_signed, manifests)):  # of a scheme no longer built, say: `verify` names it
                continue
            kept = {(path.parent / read_json(path)["reference"]["path"]).resolve() for path in manifests}
            for folder in (component / "reference").glob("*"):
                if folder.resolve() not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
