"""Runs .aimodel artifacts with Apple's own Core AI, on a Mac with macOS 27."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path

from edgebake.target import Missing, Session
from edgebake.types import RunnerKind, Signature

RUNS = ("coreai",)
KIND: RunnerKind = "device"
DISTRIBUTIONS = ("coreai-core",)
SOURCES = ("edgebake_targets._coreai_session", "edgebake_targets._coreai_asset", "edgebake_targets._coreai_program")
_SINCE = 27  # the first macOS with the framework


def missing() -> Missing | None:
    """None on a Mac whose system has the Core AI framework, with coreai-core."""
    if platform.system() != "Darwin":
        return Missing(
            reason="Core AI's own framework is part of macOS",
            remedy="copy the component's folder to a Mac and run `edgebake verify` there",
        )
    version = platform.mac_ver()[0]
    if int(version.split(".")[0] or 0) < _SINCE:
        return Missing(
            reason=f"Core AI's framework is part of macOS {_SINCE}, this is {version}",
            remedy=f"run `edgebake verify` on a Mac with macOS {_SINCE}",
        )
    if find_spec("coreai") is None:
        return Missing(
            reason="the Python package 'coreai-core' is not installed", remedy="pip install 'edgebake[coreai]'"
        )
    return None


def warm_up() -> None:
    """Import the bindings of the framework."""
    import coreai.authoring  # noqa: F401


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001 - the contract's name
    """Specialise and load the asset at ``entry`` for this Mac."""
    from edgebake_targets._coreai_session import opened

    return opened(entry, signature)
