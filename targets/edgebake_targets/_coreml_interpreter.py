"""What runners that judge with the reference interpreter share: what they need, and what their measurements hang on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from edgebake.target import Missing

DISTRIBUTIONS = ("coremltools", "torch", "protobuf", "numpy")
_FOLDER = Path(__file__).parent
SOURCES = tuple(
    sorted(
        ".".join(("edgebake_targets", *file.relative_to(_FOLDER).with_suffix("").parts))
        for pattern in ("mil/**/*.py", "_coreml*.py", "_decoder*.py", "_weight_record.py")
        for file in _FOLDER.glob(pattern)
    )
)


def missing() -> Missing | None:
    """None with torch, protobuf and coremltools, of which the format's description alone is used."""
    absent = [name for name in ("torch", "google.protobuf", "coremltools") if not _there(name)]
    if not absent:
        return None
    return Missing(reason=f"not installed: {', '.join(absent)}", remedy="pip install 'edgebake[coreml]'")


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module lies in
        return False


def warm_up() -> None:
    """Import torch and the operators."""
    from edgebake_targets.mil.operators import operators

    operators()
