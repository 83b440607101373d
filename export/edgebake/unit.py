"""The worker's program: takes one component and does its units in turn; everything it finds goes to the store."""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edgebake import devices, worker
from edgebake.errors import EXIT_INTERNAL, EdgebakeError, Problem, problem_to_json
from edgebake.recipe import Component
from edgebake.units import Pair, Unit

# Telemetry off, and bytes that do not depend on the run: set before the worker's Python starts.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning OpenMP threads of one runtime slow down the other
    "KMP_BLOCKTIME": "0",
}


def unit_to_json(unit: Unit) -> dict[str, Any]:
    """Plain data of ``unit``, for the worker's payload."""
    kept = {k: v for k, v in vars(unit).items() if k not in ("spec", "base", "options", "pair")}
    return {
        **kept,
        "spec": unit.spec.model_dump(mode="json"),
        "base": str(unit.base.absolute()),  # a model's code may change the folder that its process works in
        "options": dict(unit.options),
        "pair": unit.pair and {"unit": unit_to_json(unit.pair.unit), "tokens": unit.pair.tokens},
    }


def unit_from_json(data: Mapping[str, Any]) -> Unit:
    """The unit that :func:`unit_to_json` wrote."""
    pair = data["pair"] and Pair(unit=unit_from_json(data["pair"]["unit"]), tokens=data["pair"]["tokens"])
    spec = Component.model_validate(data["spec"])
    return Unit(**{**data, "spec": spec, "base": Path(data["base"]), "pair": pair})


def failure_of(error: BaseException) -> dict[str, Any]:
    """Plain data of a failure: a user's error with its exit code, anything else with the place it came from."""
    if isinstance(error, EdgebakeError):
        return {"problems": [problem_to_json(p) for p in error.problems], "exit_code": error.exit_code}
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(last.filename).name}:{last.lineno}"
    text = f"{type(error).__name__}: {error}".strip()
    fix = "the log says how it came there; what is not the recipe's own code is a defect of edgebake: please report it"
    return {"problems": [asdict(Problem(what=text[:2000], where=where, fix=fix))], "exit_code": None}


def _tell_waiting(channel: worker.Channel, unit: Unit) -> None:
    """Have the clock of --timeout start anew: waiting for another build is no stage that hangs."""
    for state in ("start", "end"):
        channel.send({"event": "waiting", "unit": unit.id, "stage": "wait", "state": state})


def _main() -> int:
    channel = worker.channel()
    payload = channel.payload
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.simplefilter("default")
    from edgebake.speculating import run_unit
    from edgebake.store import Store
    from edgebake.workbench import Bench

    bench = Bench(
        store=Store(Path(payload["store"])),
        emit=lambda kind, **what: channel.send({"event": kind, **what}),
        trust=payload["trust"],
        device=devices.row,
    )
    tempfile.tempdir = str(bench.store.scratch)  # what a killed worker leaves is swept with it
    for data in payload["units"]:
        unit = unit_from_json(data)
        channel.send({"event": "unit", "unit": unit.id, "state": "start"})
        try:
            with bench.store.lock(f"component-{payload['component']}", partial(_tell_waiting, channel, unit)):
                run_unit(bench, unit)
        except Exception as error:  # noqa: BLE001 - a unit's failure is reported; the component's other units go on
            channel.send({"event": "failed", "unit": unit.id, **failure_of(error)})
            with suppress(OSError):  # the log's disk is full: the event has said what matters
                traceback.print_exc()
            if payload["fail_fast"]:
                return EXIT_INTERNAL
        else:
            channel.send({"event": "done", "unit": unit.id})
        for damage in bench.store.damaged:
            channel.send({"event": "damaged", "what": str(damage)})
        bench.store.damaged.clear()
    return 0


if __name__ == "__main__":
    worker.leave(_main())
