"""Whether what Core AI's target, runners and inspector need is installed; imports none of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from edgebake.target import Missing

CORE = {"coreai": "coreai-core"}  # import name -> pip distribution


def missing(packages: Mapping[str, str]) -> Missing | None:
    """The first of ``packages`` (import name -> pip distribution) that is absent, or None."""
    for module, package in packages.items():
        if find_spec(module) is None:
            return Missing(
                reason=f"the Python package {package!r} is not installed", remedy="pip install 'edgebake[coreai]'"
            )
    return None
