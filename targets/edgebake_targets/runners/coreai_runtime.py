"""Runs .aimodel artifacts in the runtime inside coreai-core, on this machine's CPU."""

from __future__ import annotations

import platform

from edgebake.target import Missing
from edgebake.types import RunnerKind
from edgebake_targets import _coreai_packages, _coreai_session

RUNS = ("coreai",)
KIND: RunnerKind = "executed"
DISTRIBUTIONS = ("coreai-core",)
SOURCES = tuple(f"edgebake_targets._coreai_{part}" for part in ("asset", "packages", "program", "session"))


warm_up = _coreai_session.warm_up
open = _coreai_session.opened  # noqa: A001 - the contract's name


def missing() -> Missing | None:
    """None where coreai-core is installed and carries its own runtime."""
    absent = _coreai_packages.missing(_coreai_packages.CORE)
    if absent is None and platform.system() != "Linux":
        return Missing(
            reason="the runtime inside coreai-core is for Linux", remedy="use macOS 27, whose own framework runs it"
        )
    return absent
