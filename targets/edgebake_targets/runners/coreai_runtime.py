"""Runs .aimodel artifacts in the runtime inside coreai-core, on this machine's CPU."""

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
KIND: RunnerKind = "executed"
DISTRIBUTIONS = ("coreai-core",)
SOURCES = tuple(f"edgebake_targets._coreai_{part}" for part in ("asset", "packages", "program", "session"))


def warm_up() -> None:
    """Import what opening an asset needs."""
    from edgebake_targets import _coreai_session

    _coreai_session.warm_up()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001 - the contract's name
    """The asset at ``entry``, compiled and loaded; ArtifactDamaged when it is not whole or lacks a function."""
    from edgebake_targets import _coreai_session

    return _coreai_session.opened(entry, signature)


def missing() -> Missing | None:
    """None where coreai-core is installed and carries its own runtime."""
    absent = _coreai_packages.missing(_coreai_packages.CORE)
    if absent is None and platform.system() != "Linux":
        return Missing(
            reason="the runtime inside coreai-core is for Linux", remedy="use macOS 27, whose own framework runs it"
        )
    return absent
