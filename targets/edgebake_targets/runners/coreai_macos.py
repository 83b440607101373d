"""Runs .aimodel artifacts with Apple's own Core AI, on a Mac with macOS 27."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from edgebake.target import Missing
from edgebake.types import RunnerKind
from edgebake_targets import _coreai_packages

if TYPE_CHECKING:
    from pathlib import Path

    from edgebake.target import Session
    from edgebake.types import Signature

RUNS = ("coreai",)
KIND: RunnerKind = "device"
DISTRIBUTIONS = ("coreai-core",)
SOURCES = tuple(f"edgebake_targets._coreai_{part}" for part in ("asset", "packages", "program", "session"))
_SINCE = 27  # the first macOS with the framework


def warm_up() -> None:
    """Import what opening an asset needs."""
    from edgebake_targets import _coreai_session

    _coreai_session.warm_up()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001 - the contract's name
    """The asset at ``entry``, compiled and loaded; ArtifactDamaged when it is not whole or lacks a function."""
    from edgebake_targets import _coreai_session

    return _coreai_session.opened(entry, signature)


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
    return _coreai_packages.missing(_coreai_packages.CORE)
