"""`edgebake inspect`: what an artifact file says of itself, whoever made it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared
from edgebake.errors import ToolchainMissing, UsageError
from edgebake.target import INSPECTORS
from edgebake.wording import visible

if TYPE_CHECKING:
    from edgebake.types import Inspection, TensorSpec

_SHOWN = 12


def run(*, path: Path, as_json: bool) -> int:
    """Inspect a file, a package or an artifact folder."""
    manifest, entry = _entry(path)
    inspection = _inspector(entry).inspect(entry)
    if as_json:
        _shared.print_json({**asdict(inspection), "manifest": manifest})
    else:
        _print(inspection, entry, manifest)
    return 0


def _entry(path: Path) -> tuple[dict[str, Any] | None, Path]:
    from edgebake import delivery

    if not path.exists():
        raise UsageError(f"{path} does not exist", fix="give a .pte, .onnx, .mlpackage or an artifact folder")
    if path.is_dir() and (path / delivery.MANIFEST).is_file():
        manifest = delivery.read_manifest(path)
        return manifest, path / str(manifest["entry"])
    return None, path


def _inspector(path: Path) -> Any:
    known: list[str] = []
    for name in INSPECTORS.names():
        module = INSPECTORS.find(name)
        known += module.SUFFIXES
        if path.suffix in module.SUFFIXES:
            if missing := module.missing():
                raise ToolchainMissing(f"cannot read {path.suffix} files: {missing.reason}", fix=missing.remedy)
            return module
    raise UsageError(f"{path}: no inspector reads this kind of file", fix=f"known: {', '.join(known)}")


def _tensor(spec: TensorSpec) -> str:
    return f"{visible(spec.name)} {spec.dtype}[{', '.join(visible(str(d)) for d in spec.shape)}]"


def _print(inspection: Inspection, path: Path, manifest: dict[str, Any] | None) -> None:
    out = _shared.console()
    out.print(f"{path}: {inspection.format}, {inspection.total_bytes / 2**20:.2f} MiB")
    if manifest:
        out.print(f"built as {manifest['unit']} by edgebake {manifest['edgebake']}")
    for title, specs in (("inputs", inspection.inputs), ("outputs", inspection.outputs)):
        out.print(f"{title}:")
        for spec in specs:
            out.print(f"  {_tensor(spec)}")
    _print_counts(out, "delegates", inspection.delegates)
    _print_counts(out, "operators", inspection.operators)
    out.print("weights:")
    totals: dict[str, list[int]] = {}
    for record in inspection.weights:
        row = totals.setdefault(record.dtype, [0, 0, 0])
        row[0] += 1
        row[1] += record.bytes
        row[2] += record.scale_bytes
    for dtype, (count, size, scales) in sorted(totals.items(), key=lambda item: -item[1][1]):
        share = size / max(inspection.total_bytes, 1)
        out.print(f"  {dtype}: {count} tensors, {size / 2**20:.2f} MiB ({share:.0%}), scales {scales / 2**10:.1f} KiB")
    for key, value in inspection.facts.items():
        out.print(f"{key}: {visible(str(value))[:400]}")


def _print_counts(out: Any, title: str, counts: Any) -> None:
    if not counts:
        return
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    rest = len(ranked) - _SHOWN
    shown = ", ".join(f"{visible(name)} x{n}" for name, n in ranked[:_SHOWN])
    out.print(f"{title}: {shown}" + (f" and {rest} more kinds" if rest > 0 else ""))
