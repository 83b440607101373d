"""`edgebake init`: a commented recipe for a model; also what a build without a recipe writes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from edgebake.commands import _shared
from edgebake.errors import UsageError

DEFAULT_TARGETS = ("executorch-xnnpack", "onnx-cpu", "coreml")


def run(*, model: str, output: Path | None, force: bool, as_json: bool) -> int:
    """Write the recipe; refuses to overwrite one without ``force``."""
    from edgebake.drafting import draft, write_out
    from edgebake.store_files import replace_bytes

    found = draft(model, Path.cwd())
    path = output or Path(f"{found.name}.yaml")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", fix=f"name a file in it: --output {path / found.name}.yaml")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", fix="choose another --output, or --force to overwrite it")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", fix="create it, or choose another --output")
    text = write_out(found, DEFAULT_TARGETS, "fp32", path.parent)
    replace_bytes(path, text.encode())
    if as_json:
        _shared.print_json(
            {"recipe": path, "name": found.name, "source": found.source, "task": found.task, "notes": found.notes}
        )
        return 0
    typed = shlex.quote(str(path))
    _shared.say(f"wrote {path}; next: edgebake check {typed}, then edgebake build {typed}")
    for note in found.notes:
        _shared.say(f"note: {note}")
    return 0


def one_shot(model: str, targets: Sequence[str], scheme: str | None) -> Path:
    """The recipe that ``edgebake build MODEL --target T --scheme S`` stands for, written beside the caller."""
    from edgebake.drafting import draft, write_out
    from edgebake.scheme import canonical
    from edgebake.store_files import replace_bytes

    try:
        wanted = canonical(scheme or "fp32")
    except ValueError as error:
        raise UsageError(f"--scheme: {error}", fix="edgebake targets lists what each target supports") from None
    _refuse_unsupported(targets, wanted)
    found = draft(model, Path.cwd())
    path = Path(f"{found.name}.yaml")
    text = write_out(found, targets or DEFAULT_TARGETS[:1], wanted, Path())
    if path.exists() and path.read_text("utf-8", "replace") != text:
        path = Path(f"{found.name}-{wanted}.yaml")
        if path.exists() and path.read_text("utf-8", "replace") != text:
            raise UsageError(
                f"{path} exists and is not what would be written",
                fix=f"build it: edgebake build {shlex.quote(str(path))}; or remove it",
            )
    replace_bytes(path, text.encode())
    _shared.say_aside(f"wrote {path}, the recipe of this build")
    return path


def _refuse_unsupported(targets: Sequence[str], scheme: str) -> None:
    """Before a recipe is written that could not be built."""
    from edgebake.target import find_target, support_of

    for name in targets:
        target = find_target(name)
        row = support_of(target, scheme)
        if row is None or row.override_only:
            able = ", ".join(row.scheme for row in target.SUPPORTS if not row.override_only)
            raise UsageError(f"{name} does not support the scheme {scheme}", fix=f"it supports {able}")
