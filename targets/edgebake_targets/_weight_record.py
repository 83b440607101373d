"""The record beside a package of what its weights were: written at the build, read when they are held against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged


def write(path: Path, checks: Mapping[str, Any]) -> None:
    """Write ``checks``, which names its ``version``."""
    path.write_text(json.dumps(checks, sort_keys=True, indent=1) + "\n")


def read(path: Path, version: int) -> Mapping[str, Any]:
    """The record at ``path``; ArtifactDamaged when it is missing or not of ``version``."""
    try:
        checks = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactDamaged(
            f"the record of the weights cannot be read ({error})", where=str(path), fix="build again"
        ) from error
    if not isinstance(checks, dict) or checks.get("version") != version:
        raise ArtifactDamaged("the record of the weights has another version", where=str(path), fix="build again")
    return checks
