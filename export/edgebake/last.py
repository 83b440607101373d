"""What each artifact's stages last ran with, so that `edgebake explain` can say what changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake.jsonfile import digest_of, read_json, write_json_atomic
from edgebake.keys import StageKey, model_part
from edgebake.store import Store
from edgebake.units import Unit

MODEL = "model"


def _path(store: Store, unit: Unit, out: Path) -> Path:
    name = digest_of([str(out.resolve()), unit.target, unit.name, str(unit.folder)])[:32]
    return store.root / "last" / f"{name}.json"


def remember(store: Store, unit: Unit, out: Path, keys: Mapping[str, StageKey]) -> None:
    """Note the parts of every stage key of a build that went into ``out``, and of the model's digest in them."""
    path = _path(store, unit, out)
    path.parent.mkdir(exist_ok=True)
    model = model_part(unit, store.file_digest)
    write_json_atomic(path, {MODEL: model, **{stage: key.parts for stage, key in keys.items()}})


def last_parts(store: Store, unit: Unit, out: Path) -> dict[str, Any]:
    """Parts by stage of the last build into ``out``; empty when there was none, or its note is damaged."""
    path = _path(store, unit, out)
    try:
        parts = read_json(path) if path.exists() else {}
    except ArtifactDamaged:  # nothing is built from it; an explanation can do without
        return {}
    return parts if isinstance(parts, dict) else {}
