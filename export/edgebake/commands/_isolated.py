"""Foreign files are read in a process of their own, with limits on memory and time: here and in that process."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebake.errors import BY_NAME, EdgebakeError, Problem, StageFailed, problem_to_json

MIB = 1 << 20


def run(verb: str, jobs: Sequence[Mapping[str, Any]], *, timeout_s: float, memory_mib: float) -> list[Any]:
    """``commands.<verb>.isolated(**job)`` of every job, in order: what it returned, or the EdgebakeError it ended with.

    One worker does all; one that dies, hangs or grows too large costs the job it was at, the rest get a new one.
    """
    done: dict[int, Any] = {}
    while len(done) < len(jobs):
        left = [(number, dict(job)) for number, job in enumerate(jobs) if number not in done]
        before = len(done)
        _one_worker(verb, left, done, timeout_s, memory_mib)
        assert len(done) > before
    return [done[number] for number in range(len(jobs))]


def _one_worker(
    verb: str, jobs: Sequence[tuple[int, dict[str, Any]]], done: dict[int, Any], timeout_s: float, memory_mib: float
) -> None:
    from edgebake import worker
    from edgebake.unit import ENVIRONMENT

    at = [jobs[0][0]]

    def event(told: Mapping[str, Any]) -> None:
        if told.get("state") == "start":
            at[0] = told["job"]
        elif told.get("event") == "answer":
            done[told["job"]] = told["answer"]
        elif told.get("event") == "failed":
            done[told["job"]] = _error(told, log)

    handle, name = tempfile.mkstemp(prefix=f"edgebake-{verb}-", suffix=".log")
    os.close(handle)
    log = Path(name)
    try:
        ended = worker.supervise(
            worker.command("edgebake.commands._isolated"),
            payload={"verb": verb, "jobs": jobs, "memory_mib": memory_mib},
            log=log,
            limits=worker.Limits(timeout_s=timeout_s, memory_mib=memory_mib),
            env={**os.environ, **ENVIRONMENT},
            on_event=event,
        )
        if ended.reason != "finished":
            done[at[0]] = _death(verb, ended, timeout_s, memory_mib)
    finally:
        if not any(isinstance(found, EdgebakeError) and str(log) in str(found) for found in done.values()):
            log.unlink(missing_ok=True)


def _death(verb: str, ended: Any, timeout_s: float, memory_mib: float) -> EdgebakeError:
    from edgebake import worker

    keep_away = "the file may be damaged or made to do harm"
    if ended.reason == "timeout":
        return StageFailed(f"{verb} took longer than {timeout_s:g} s and was stopped", fix=keep_away)
    if ended.reason == "memory":
        return StageFailed(f"{verb} took more than {memory_mib:g} MiB and was stopped", fix=keep_away)
    return StageFailed([worker.describe(ended)])


def _error(told: Mapping[str, Any], log: Path) -> EdgebakeError:
    problems = [Problem(**problem) for problem in told["problems"]]
    if told["class"] in BY_NAME:
        return BY_NAME[told["class"]](problems)
    what = f"it is not what edgebake can read: {problems[0].what}"
    return StageFailed(
        what, where=str(log), fix="the file may be damaged or made by another version; the log says more"
    )


def _work() -> int:
    import importlib

    from edgebake import worker
    from edgebake.store_files import remedy

    channel = worker.channel()
    payload = channel.payload
    _limit_memory(payload["memory_mib"])
    module = importlib.import_module(f"edgebake.commands.{payload['verb']}")
    for number, job in payload["jobs"]:
        with channel.stage(payload["verb"], job=number):
            try:
                answer = module.isolated(**job)
            except EdgebakeError as error:
                problems = [problem_to_json(problem) for problem in error.problems]
                channel.send({"event": "failed", "job": number, "class": type(error).__name__, "problems": problems})
            except PermissionError as error:  # says nothing of the file's content, and needs no log
                refused = {"what": f"cannot be read: {error.strerror}", "where": str(error.filename or "")}
                problems = [{**refused, "fix": remedy(error)}]
                channel.send({"event": "failed", "job": number, "class": "StageFailed", "problems": problems})
            except Exception as error:  # noqa: BLE001 - whatever a foreign file makes a parser do is that file's fault
                traceback.print_exc()
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                channel.send({"event": "failed", "job": number, "class": "", "problems": [{"what": said}]})
            else:
                channel.send({"event": "answer", "job": number, "answer": answer})
    return 0


def _limit_memory(mib: float) -> None:
    """Refuse at once what one huge length field asks for; samples of resident memory come too late for that."""
    if sys.platform == "win32":
        return
    import resource

    limit = int(mib * MIB)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    sys.exit(_work())
