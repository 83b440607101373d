"""edgebake: trained models onto phones and Macs, verified. See :mod:`edgebake.api` for the Python API."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Recipe", "Result", "__version__", "api", "build"]

_WHERE = {"build": "edgebake.api", "Recipe": "edgebake.recipe", "Result": "edgebake.result"}


def __getattr__(name: str) -> Any:
    """The API, imported when first asked for: ``import edgebake`` costs nothing."""
    from importlib import import_module

    if name == "api":
        return import_module("edgebake.api")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'edgebake' has no attribute {name!r}")
