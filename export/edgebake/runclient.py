"""Opens artifacts for whoever measures them: in a process of their own, or in this one when it is a worker.

A worker may crash, is weighed by its parent and holds the runtime's libraries already: a second process there would
cost seconds and hundreds of MiB. Elsewhere the process is the run host's, and its death becomes one clear failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgebake import weighing
from edgebake.errors import BY_NAME, Problem, StageFailed
from edgebake.target import RUNNERS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TAIL = 12  # lines of the host's own words shown when it dies


@dataclass(frozen=True, kw_only=True)
class Client:
    """One opened artifact: ``send`` takes a request to wherever it runs."""

    send: Callable[[Mapping[str, Any]], dict[str, Any]]
    opened: Mapping[str, Any]
    scratch: Path

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer. StageFailed when the runner cannot do what it could with other inputs."""
        answer = self.send(request)
        if "not_measured" in answer:
            raise StageFailed(f"the artifact ran on other inputs, and not on these: {answer['not_measured']}")
        return answer

    def outputs(self, *, free: bool = False) -> Mapping[str, NDArray[Any]]:
        """All outputs by ``<sample>.<call>.<name>``, read lazily."""
        out = self.scratch / ("free.npz" if free else "forced.npz")
        self.ask(do="run", out=str(out), free=free)
        return _load(out)

    def language(self) -> Mapping[str, Any]:
        """What a decoder goes on with after the reference's prompts (``edgebake.llm.judge.run``)."""
        return self.ask(do="language")

    def speculate(self, runner: str, entry: Path, signature: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """The artifact's text with the proposals of the draft at ``entry`` (``edgebake.llm.speculative.run``)."""
        return self.ask(do="speculate", runner=runner, entry=str(entry), signature=signature, tokens=tokens)

    def time(self, sample: int, repetitions: int) -> list[float]:
        """Milliseconds of each call."""
        return list(self.ask(do="time", sample=sample, repetitions=repetitions)["ms"])

    def intermediates(self, sample: int, modules: list[str]) -> Mapping[str, NDArray[np.float32]]:
        """Values inside the artifact by module name, where its runtime can give them."""
        out = self.scratch / "inside.npz"
        self.ask(do="intermediates", sample=sample, modules=modules, out=str(out))
        return _load(out)

    def in_mode(
        self, mode: str, samples: list[int], calls: int
    ) -> tuple[Mapping[str, NDArray[Any]], Mapping[str, Mapping[str, str]]]:
        """Outputs by ``<sample>.<call>.<name>`` in one of the runner's modes, of so many calls of each sample; values
        not finite by ``<sample>.<call>``: name, operator."""
        out = self.scratch / f"{mode}.npz"
        answer = self.ask(do="mode", mode=mode, samples=samples, calls=calls, out=str(out))
        return _load(out), answer["strange"]

    def in_unit(
        self, unit: str, samples: list[int], timed: int, repetitions: int
    ) -> tuple[Mapping[str, NDArray[Any]], list[float]] | str:
        """Outputs by ``<sample>.0.<name>`` on one compute unit and milliseconds of each call, or why there are none."""
        out = self.scratch / f"{unit}.npz"
        request = {"do": "unit", "unit": unit, "samples": samples, "timed": timed, "repetitions": repetitions}
        answer = self.send({**request, "out": str(out)})
        return str(answer["not_measured"]) if "not_measured" in answer else (_load(out), list(answer["ms"]))

    def placement(self) -> Mapping[str, Any]:
        """Which operators the runtime places where (``edgebake.target.Session``)."""
        placed: Mapping[str, Any] = self.ask(do="placement")["placement"]
        return placed


def _load(path: Path) -> Mapping[str, NDArray[Any]]:
    import numpy as np

    loaded: Mapping[str, NDArray[Any]] = np.load(path, allow_pickle=False)
    return loaded


def _exchange(process: subprocess.Popen[str], log: IO[str], request: Mapping[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    line = ""
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        pass  # the empty answer below says it with the host's own words
    if not line:
        process.wait()
        log.seek(0)
        said = "".join(log.readlines()[-_TAIL:]).strip()
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise StageFailed(
            f"the process that ran the artifact ended with {how} while asked to {request['do']}",
            fix=f"its last words:\n{said}" if said else "it left no message",
        )
    answer: dict[str, Any] = json.loads(line)
    if "failed" in answer:
        raise BY_NAME[answer["failed"]]([Problem(**problem) for problem in answer["problems"]])
    return answer


@contextmanager
def opened(
    runner: str, entry: Path, signature: Mapping[str, Any], reference: Path, *, inside: bool = False
) -> Iterator[Client]:
    """Open the artifact at ``entry`` with ``runner``; ``inside`` allows this process where runner and system do too.

    StageFailed when a process of its own dies.
    """
    request = {
        "do": "open",
        "runner": runner,
        "entry": str(entry),
        "signature": signature,
        "reference": str(reference),
    }
    apart = not inside or getattr(RUNNERS.find(runner), "APART", False) or not weighing.forgets()
    with tempfile.TemporaryDirectory(prefix="edgebake-run-") as scratch, (_apart if apart else _inside)(request) as at:
        send, answer = at
        yield Client(send=send, opened=answer, scratch=Path(scratch))


@contextmanager
def _inside(request: Mapping[str, Any]) -> Iterator[tuple[Callable[..., dict[str, Any]], Mapping[str, Any]]]:
    from edgebake import runhost

    host, told = runhost.serve(None, request)
    yield lambda asked: runhost.serve(host, asked)[1], told


@contextmanager
def _apart(request: Mapping[str, Any]) -> Iterator[tuple[Callable[..., dict[str, Any]], Mapping[str, Any]]]:
    command = [sys.executable, "-m", "edgebake.runhost"]
    environment = {**os.environ, **getattr(RUNNERS.find(request["runner"]), "environment", dict)()}
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        try:
            answer = _exchange(process, log, request)
            yield lambda asked: _exchange(process, log, asked), answer
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
