"""What a build or a verification says of one unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgebake.errors import (
    EXIT_INTERNAL,
    EXIT_LIMIT,
    EXIT_NOT_MEASURED,
    EXIT_OK,
    EXIT_RECIPE,
    EXIT_STAGE,
    EXIT_TOOLCHAIN,
    Problem,
)
from edgebake.types import Verdict

STRUCTURE = "structure."  # what an artifact holds, looked at in the file: no limit of a recipe
AS_IT_IS = "as it is"  # in the place of a scheme: a file that edgebake did not make

State = Literal["pass", "fail", "not measured", "failed", "toolchain missing"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A stage that could not do its work."""

    stage: str
    problems: tuple[Problem, ...]
    exit_code: int
    log: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one unit; ``stages`` maps stage to ``ran``, ``stored`` or ``unchanged``."""

    unit: str
    recipe: str
    component: str
    target: str
    scheme: str
    device: str | None = None
    name: str | None = None
    folder: Path | None = None
    verdicts: tuple[Verdict, ...] = ()
    measurements: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    stages: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    optional: bool = False

    @property
    def state(self) -> State:
        """``pass`` needs no failed limit and at least one measured one; that a file loads is none."""
        if self.failure is not None:
            return "toolchain missing" if self.failure.exit_code == EXIT_TOOLCHAIN else "failed"
        if any(verdict.state == "fail" for verdict in self.verdicts):
            return "fail"
        return "pass" if any(verdict.state == "pass" for verdict in self.limited) else "not measured"

    @property
    def limited(self) -> tuple[Verdict, ...]:
        """The verdicts on limits: of :attr:`verdicts`, those that do not just say what the file holds."""
        return tuple(verdict for verdict in self.verdicts if not verdict.limit.startswith(STRUCTURE))

    @property
    def unmeasured(self) -> int:
        """How many limits could not be measured."""
        return sum(verdict.state == "not measured" for verdict in self.verdicts)


def exit_code(results: Iterable[Result], *, strict: bool = False) -> int:
    """The first that applies: 1 internal, 2 recipe, 4 stage, 3 toolchain (not optional), 5 limit, 6 unmeasured, 0."""
    done = list(results)
    codes = {r.failure.exit_code for r in done if r.failure and not (r.optional and r.state == "toolchain missing")}
    for code in (EXIT_INTERNAL, EXIT_RECIPE, EXIT_STAGE, EXIT_TOOLCHAIN):
        if code in codes:
            return code
    if any(r.state == "fail" for r in done):
        return EXIT_LIMIT
    if strict and any(r.unmeasured for r in done):
        return EXIT_NOT_MEASURED
    return EXIT_OK
