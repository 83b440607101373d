"""`edgebake init`: a commented recipe for a model; also what a build without a recipe writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgebake.commands import _shared
from edgebake.errors import UsageError

DEFAULT_TARGETS = ("executorch-xnnpack", "onnx-cpu", "coreml")


def _refuse_missing_folder(output: Path) -> None:
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", fix="create it, or choose another --output")


def run(*, model: str, output: Path | None, force: bool) -> int:
    """Write the recipe; refuses to overwrite one without ``force``."""
    from edgebake.drafting import draft, write_out
    from edgebake.store_files import replace_bytes

    found = draft(model, Path.cwd())
    path = output or Path(f"{found.name}.yaml")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", fix="choose another --output, or --force to overwrite it")
    _refuse_missing_folder(path)
    replace_bytes(path, write_out(found, DEFAULT_TARGETS, "fp32").encode())
    _shared.console().print(f"wrote {path}; next: edgebake check {path}, then edgebake build {path}")
    return 0


def one_shot(model: str, targets: Sequence[str], scheme: str | None) -> Path:
    """The recipe that ``edgebake build MODEL --target T --scheme S`` stands for, written beside the caller."""
    from edgebake.drafting import draft, write_out
    from edgebake.scheme import canonical
    from edgebake.store_files import replace_bytes

    found = draft(model, Path.cwd())
    path = Path(f"{found.name}.yaml")
    text = write_out(found, targets or DEFAULT_TARGETS[:1], canonical(scheme or "fp32"))
    if path.exists() and path.read_text("utf-8") != text:
        path = Path(f"{found.name}-{canonical(scheme or 'fp32')}.yaml")
        if path.exists() and path.read_text("utf-8") != text:
            raise UsageError(f"{path} exists and differs", fix=f"build it: edgebake build {path}; or remove it")
    replace_bytes(path, text.encode())
    _shared.console(stderr=True).print(f"wrote {path}, the recipe of this build")
    return path
