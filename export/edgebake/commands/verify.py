"""`edgebake verify`: judge existing artifacts again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared

if TYPE_CHECKING:
    from edgebake.result import Result

TIMEOUT_S = 3600.0


def run(
    *,
    folders: Sequence[Path],
    timeout: float,
    memory: float | None,
    strict: bool,
    against: Path | None,
    limits: Sequence[str],
    reports: Sequence[Path],
    as_json: bool,
) -> int:
    """Verify every artifact at or below ``folders``, and model files that edgebake did not make; the exit code."""
    from edgebake.result import exit_code

    _shared.check_report_paths(reports)
    files = [path for path in folders if _is_model(path)]
    jobs = _file_jobs(files, against, limits)
    artifacts = _shared.artifact_folders([path for path in folders if path not in files])
    jobs += [{"folder": str(folder)} for folder in artifacts]
    results = _judged(jobs, timeout_s=timeout, memory_mib=memory)
    _shared.write_reports(results, reports, "verify")
    _shared.show(results, "verify", as_json=as_json)
    return exit_code(results, strict=strict)


def verified(folders: Sequence[Path], *, timeout_s: float = TIMEOUT_S, memory_mib: float | None = None) -> list[Result]:
    """A result per artifact at or below ``folders``, each judged in a process with limits on memory and time."""
    jobs = [{"folder": str(folder)} for folder in _shared.artifact_folders(folders)]
    return _judged(jobs, timeout_s=timeout_s, memory_mib=memory_mib)


def _judged(jobs: Sequence[Mapping[str, Any]], *, timeout_s: float, memory_mib: float | None) -> list[Result]:
    import psutil

    from edgebake.commands import _isolated
    from edgebake.commands._results import from_json, unreadable
    from edgebake.errors import EdgebakeError

    limit = memory_mib or 0.75 * psutil.virtual_memory().total / 2**20
    answers = _isolated.run("verify", jobs, timeout_s=timeout_s, memory_mib=limit)
    return [
        unreadable(Path(job["folder"]), "verify", answer) if isinstance(answer, EdgebakeError) else from_json(answer)
        for job, answer in zip(jobs, answers, strict=True)
    ]


def _is_model(path: Path) -> bool:
    """A model file or package by itself, and no folder that `edgebake build` wrote."""
    from edgebake.foreign import TARGETS

    return path.suffix.lower() in TARGETS and path.exists() and not (path / "manifest.json").is_file()


def _file_jobs(files: Sequence[Path], against: Path | None, limits: Sequence[str]) -> list[dict[str, Any]]:
    """A job per model file. UsageError for options that only files take, or that are wrong."""
    from edgebake.errors import UsageError

    if not files and (against is not None or limits):
        option = "--against" if against is not None else "--limit"
        raise UsageError(
            f"{option} is for model files that edgebake did not make", fix="artifact folders know their own limits"
        )
    if against is not None and (against.suffix not in (".npz", ".safetensors") or not against.is_file()):
        what = "is no .npz or .safetensors file" if against.exists() else "does not exist"
        raise UsageError(f"--against {against} {what}", fix="one array per input and per output, first axis = samples")
    parity = dict(_limit(text) for text in limits)
    given = None if against is None else str(against)
    return [{"folder": str(path), "against": given, "parity": parity} for path in files]


def _limit(text: str) -> tuple[str, float]:
    from edgebake.errors import UsageError
    from edgebake.limits import PARITY
    from edgebake.wording import did_you_mean, said

    name, _, number = text.partition("=")
    name = name.strip().removeprefix("parity.")
    if name not in PARITY:
        raise UsageError(f"--limit {said(text)}: no limit {said(name)}", fix=did_you_mean(name, PARITY))
    try:
        return name, float(number)
    except ValueError:
        raise UsageError(f"--limit {said(text)}: {said(number)} is not a number", fix=f"such as {name}=0.99") from None


def isolated(folder: str, against: str | None = None, parity: Mapping[str, float] | None = None) -> dict[str, Any]:
    """In the worker: judge one artifact, or one model file where ``parity`` is given."""
    from edgebake.commands._results import to_json
    from edgebake.verify import verify

    if parity is None:
        return to_json(verify(Path(folder)))
    from edgebake.foreign import judged
    from edgebake.recipe import Limits

    limits = Limits.model_validate({"parity": dict(parity)})
    return to_json(judged(Path(folder), None if against is None else Path(against), limits))
