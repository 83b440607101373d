"""Runs .aimodel artifacts in the runtime inside coreai-core, on this machine's CPU."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path

from edgebake.target import Missing, Session
from edgebake.types import RunnerKind, Signature

RUNS = ("coreai",)
KIND: RunnerKind = "executed"
DISTRIBUTIONS = ("coreai-core",)
SOURCES = ("edgebake_targets._coreai_session", "edgebake_targets._coreai_asset", "edgebake_targets._coreai_program")


def missing() -> Missing | None:
    """None where coreai-core is installed and carries its own runtime."""
    if find_spec("coreai") is None:
        return Missing(
            reason="the Python package 'coreai-core' is not installed", remedy="pip install 'edgebake[coreai]'"
        )
    if platform.system() != "Linux":
        return Missing(
            reason="the runtime inside coreai-core is for Linux", remedy="use macOS 27, whose own framework runs it"
        )
    return None


def warm_up() -> None:
    """Import the runtime and the compiler."""
    import coreai.authoring  # noqa: F401


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001 - the contract's name
    """Compile and load the asset at ``entry``."""
    from edgebake_targets._coreai_session import opened

    return opened(entry, signature)
