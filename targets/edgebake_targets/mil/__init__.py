"""Reference interpreter for Core ML programs: evaluates a .mlpackage with torch on the CPU, on any system.

``MilModel(path).predict({...})``; see :mod:`edgebake_targets.mil.model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgebake_targets.mil.call import Mode, Unsupported
    from edgebake_targets.mil.model import MilModel, ModelState

__all__ = ["MilModel", "Mode", "ModelState", "Unsupported"]
_HOMES = {"MilModel": "model", "ModelState": "model", "Mode": "call", "Unsupported": "call"}


def __getattr__(name: str) -> Any:
    """The public names, imported when asked for: they bring torch, which who only lists targets does not need."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
