"""Every failure that a user can cause: what, where, what to do, and the exit code it ends with."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_RECIPE = 2
EXIT_TOOLCHAIN = 3
EXIT_STAGE = 4
EXIT_LIMIT = 5
EXIT_NOT_MEASURED = 6
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: ``what`` happened, ``where`` (``file:line:key``), what to do (``fix``)."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n    -> {self.fix}" if self.fix else text


class EdgebakeError(Exception):
    """A failure with one or several problems to show; the command line prints them and exits with ``exit_code``."""

    exit_code = EXIT_INTERNAL

    def __init__(self, what: str | list[Problem], *, where: str = "", fix: str = "") -> None:
        self.problems = list(what) if isinstance(what, list) else [Problem(what=what, where=where, fix=fix)]
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(EdgebakeError):
    """The recipe is malformed, contradictory, or asks for what a target cannot do."""

    exit_code = EXIT_RECIPE


class UsageError(EdgebakeError):
    """An argument or option of the command line does not make sense."""

    exit_code = EXIT_RECIPE


class TrustError(EdgebakeError):
    """Something would run code that the user has not agreed to run."""

    exit_code = EXIT_RECIPE


class ToolchainMissing(EdgebakeError):
    """A package or SDK that a target needs is not installed."""

    exit_code = EXIT_TOOLCHAIN


class HubUnreachable(EdgebakeError):
    """A model has to be fetched and cannot be now: nothing is wrong with the recipe."""

    exit_code = EXIT_STAGE


class StageFailed(EdgebakeError):
    """A stage could not do its work; the message names the stage and its log."""

    exit_code = EXIT_STAGE


class ArtifactDamaged(EdgebakeError):
    """A delivered or stored file is not what its manifest says."""

    exit_code = EXIT_STAGE


class StoreError(EdgebakeError):
    """The store or the output folder cannot be read or written (disk full, no permission)."""

    exit_code = EXIT_STAGE


class LimitNotMet(EdgebakeError):
    """An artifact that is about to be packed fails its limits."""

    exit_code = EXIT_LIMIT


def problem_to_json(problem: Problem) -> dict[str, str]:
    """Plain data of ``problem``, for worker messages and ``--json``."""
    return {"what": problem.what, "where": problem.where, "fix": problem.fix}


BY_NAME = {
    cls.__name__: cls
    for cls in (
        EdgebakeError,
        RecipeError,
        UsageError,
        TrustError,
        ToolchainMissing,
        HubUnreachable,
        StageFailed,
        ArtifactDamaged,
        StoreError,
        LimitNotMet,
    )
}
