"""Runs one artifact: opened, fed from the recorded reference, timed and weighed; knows no torch model.

A program of its own for whoever is no worker (``verify``, ``bench``), for runners that ask for it and for systems that
never forget a process's peak memory. Requests come as JSON lines on standard input, answers go as JSON lines to the
original standard output; whatever libraries print is sent to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgebake import signatures, weighing
from edgebake.errors import EdgebakeError, problem_to_json
from edgebake.llm import digest, speculative
from edgebake.llm import judge as language
from edgebake.reference import Reference
from edgebake.target import RUNNERS, NotMeasured, Session
from edgebake.types import MethodSignature, Signature
from edgebake.worker_channel import leave

Arrays = dict[str, NDArray[Any]]
_WEIGHED_SAMPLES = 3  # the largest samples; more do not raise a static network's peak


def free_running_inputs(
    method: MethodSignature, given: Mapping[str, NDArray[Any]], latest: Mapping[str, NDArray[Any]]
) -> Arrays:
    """Inputs of a call with its states taken from the artifact's own ``latest`` outputs (zeros at first)."""
    inputs = dict(given)
    for spec in method.inputs:
        if spec.role == "state":
            source = latest.get(spec.state_from or "")
            inputs[spec.name] = np.zeros_like(given[spec.name]) if source is None else source
    return inputs


def recorded_calls(reference: Reference, index: int) -> Iterator[tuple[int, str, Arrays]]:
    """Call number, method and teacher-forced inputs of one recorded sample."""
    for number, call in enumerate(reference.sample(index).calls):
        yield number, call.method, dict(call.inputs)


def begin(session: Session) -> None:
    """A sequence of calls begins: states of the artifact become zero."""
    forget = getattr(session, "begin", None)
    if forget is not None:
        forget()


@dataclass(frozen=True, kw_only=True)
class Host:
    """One opened artifact and the reference it is fed from."""

    session: Session
    signature: Signature
    reference: Reference
    base_bytes: int
    peak_bytes: int

    def run(self, out: Path, *, free: bool) -> int:
        """Run every sample; outputs go to ``out`` (.npz) as ``<sample>.<call>.<name>``. Returns the number of calls."""
        outputs: Arrays = {}
        count = 0
        for index in range(len(self.reference)):
            reduce = language.reduced(self.reference, index) if self.signature.language else None
            for number, (at, found) in enumerate(self.sequence(index, self.session.call, free=free)):
                values = found if reduce is None else reduce(number, found)
                outputs.update({f"{at}.{name}": value for name, value in values.items()})
                count += 1
        np.savez(out, **outputs)  # type: ignore[arg-type]
        return count

    def sequence(
        self,
        index: int,
        call: Callable[[str, Arrays], Mapping[str, NDArray[Any]]],
        *,
        free: bool,
        most: int | None = None,
    ) -> Iterator[tuple[str, Mapping[str, NDArray[Any]]]]:
        """``<sample>.<call>`` and what ``call`` gives, from zero states, for up to ``most`` calls of a sample.

        ``free``: a state that is an input is the latest value of the output that feeds it, whichever method gave it.
        """
        latest: Arrays = {}
        begin(self.session)
        for number, method, given in islice(recorded_calls(self.reference, index), most):
            inputs = free_running_inputs(self.signature.methods[method], given, latest) if free else given
            outputs = call(method, inputs)
            latest.update(outputs)
            yield f"{index}.{number}", outputs

    def time(self, index: int, repetitions: int) -> list[float]:
        """Milliseconds of each of ``repetitions`` calls on the first call of sample ``index``."""
        _, method, inputs = next(recorded_calls(self.reference, index))
        return _timed(self.session, lambda: self.session.call(method, inputs), repetitions)


def _timed(session: Session, call: Callable[[], Any], repetitions: int) -> list[float]:
    took = []
    for _ in range(repetitions):
        begin(session)
        start = time.perf_counter()
        call()
        took.append((time.perf_counter() - start) * 1e3)
    return took


def _largest(reference: Reference) -> list[int]:
    return sorted(range(len(reference)), key=reference.input_bytes, reverse=True)[:_WEIGHED_SAMPLES]


def open_host(request: Mapping[str, Any]) -> Host:
    """Open the artifact and run its largest samples once, so that the peak is that of load and run alone."""
    runner = RUNNERS.find(request["runner"])
    reference = Reference(Path(request["reference"]))
    signature = signatures.from_json(request["signature"])
    calls = [call for index in _largest(reference) for call in recorded_calls(reference, index)]
    runner.warm_up()
    base = weighing.start()
    session = runner.open(Path(request["entry"]), signature)
    for number, method, inputs in calls:
        if number == 0:
            begin(session)
        session.call(method, inputs)
    return Host(
        session=session,
        signature=signature,
        reference=reference,
        base_bytes=base,
        peak_bytes=max(weighing.peak(), base),
    )


def _opened(host: Host) -> dict[str, Any]:
    return {
        "base_bytes": host.base_bytes,
        "peak_bytes": host.peak_bytes,
        "can_intermediates": hasattr(host.session, "intermediates"),
        "modes": list(getattr(host.session, "modes", ())),
        "units": list(getattr(host.session, "units", ())),
    }


def answer(host: Host, request: Mapping[str, Any]) -> dict[str, Any]:
    """Serve one request on an opened artifact."""
    match request["do"]:
        case "run":
            return {"calls": host.run(Path(request["out"]), free=request["free"])}
        case "time":
            return {"ms": host.time(request["sample"], request["repetitions"])}
        case "language":
            return language.run(host.signature, host.reference, _step(host))
        case "speculate":
            return _speculate(host, request)
        case "intermediates":
            return {"calls": _intermediates(host, request)}
        case "mode":
            return {"strange": _in_mode(host, request)}
        case "unit":
            return {"ms": _in_unit(host, request)}
        case "placement":
            return {"placement": host.session.placement()}  # type: ignore[attr-defined]
    raise ValueError(f"unknown request {request['do']!r}")


def _step(host: Host) -> language.Step:
    """One call of a decoder; a text begins anew at its first row, so nothing has to be forgotten between two."""
    (method,) = host.signature.methods
    tokens, position = (spec.name for spec in host.signature.methods[method].inputs)

    def step(words: NDArray[Any], start: NDArray[Any]) -> NDArray[Any]:
        (logits,) = host.session.call(method, {tokens: words, position: start}).values()
        return logits

    return step


def _speculate(host: Host, request: Mapping[str, Any]) -> dict[str, Any]:
    """The opened artifact's text with a draft's proposals against its own; the draft is opened beside it."""
    signature = signatures.from_json(request["signature"])
    session = RUNNERS.find(request["runner"]).open(Path(request["entry"]), signature)
    draft = replace(host, session=session, signature=signature)
    target, beside = (speculative.decoder(h.signature, _step(h)) for h in (host, draft))
    prompts = host.reference.facts[language.CONTINUED]["prompts"]
    return speculative.run(target, beside, prompts, request["tokens"])


def _intermediates(host: Host, request: Mapping[str, Any]) -> int:
    _, method, inputs = next(recorded_calls(host.reference, request["sample"]))
    begin(host.session)
    values = host.session.intermediates(method, inputs, request["modules"])  # type: ignore[attr-defined]
    np.savez(Path(request["out"]), **values)
    return len(values)


def _in_mode(host: Host, request: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """First calls of each sample in one of the session's modes; returns values inside that are not finite."""
    outputs: Arrays = {}
    strange: dict[str, dict[str, str]] = {}
    found: dict[str, str] = {}

    def call(method: str, inputs: Arrays) -> Mapping[str, NDArray[Any]]:
        nonlocal found
        values: Arrays
        values, found = host.session.call_mode(request["mode"], method, inputs)  # type: ignore[attr-defined]
        return values

    for index in request["samples"]:
        reduce = language.reduced(host.reference, index) if host.signature.language else None
        for number, (at, values) in enumerate(host.sequence(index, call, free=True, most=request["calls"])):
            kept = values if reduce is None else {digest.LOGITS: reduce(number, values)[digest.LOGITS]}
            outputs.update({f"{at}.{name}": value for name, value in kept.items()})
            strange[at] = dict(found)
    np.savez(Path(request["out"]), **outputs)  # type: ignore[arg-type]
    return strange


def _in_unit(host: Host, request: Mapping[str, Any]) -> list[float]:
    """First call of each sample on one compute unit; returns milliseconds of repeated calls on the sample to time."""

    def call(index: int) -> Mapping[str, NDArray[Any]]:
        _, method, inputs = next(recorded_calls(host.reference, index))
        begin(host.session)
        values: Arrays = host.session.call_unit(request["unit"], method, inputs)  # type: ignore[attr-defined]
        return values

    outputs = {f"{index}.0.{name}": value for index in request["samples"] for name, value in call(index).items()}
    np.savez(Path(request["out"]), **outputs)  # type: ignore[arg-type]
    return _timed(host.session, lambda: call(request["timed"]), request["repetitions"])


def serve(host: Host | None, request: Mapping[str, Any]) -> tuple[Host | None, dict[str, Any]]:
    """The opened artifact and the answer to ``request``; what its runner cannot measure is an answer, too."""
    try:
        if request["do"] == "open":
            host = open_host(request)
            return host, _opened(host)
        assert host is not None
        return host, answer(host, request)
    except NotMeasured as error:
        return host, {"not_measured": str(error)}


def _private_channel() -> IO[str]:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def main() -> None:
    """Serve requests until standard input ends."""
    channel = _private_channel()
    host: Host | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            host, reply = serve(host, request)
        except EdgebakeError as error:  # the runner's own words; anything else ends the process, and says so
            reply = {"failed": type(error).__name__, "problems": [problem_to_json(p) for p in error.problems]}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
    leave(0)
