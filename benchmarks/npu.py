"""Recipes on Qualcomm's NPU, chip by chip: seconds to lower, bytes, what stays on the CPU, and three parities.

Each network is lowered for each chip through both runtimes and runs on the vendor's simulator, on calls spread over the
recipe's evaluation samples (states are the float network's): against the float network, and against the same rounded
graph on this machine's CPU (the plain ONNX file; the graph that ExecuTorch's backend compiles, in torch). What the
graph itself loses against float is the third number. Of each recipe and runtime the first rule is taken, whatever chip
it names. All that was done lies in the store: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake import devices, runclient, stages
from edgebake.check import check
from edgebake.errors import EdgebakeError
from edgebake.jsonfile import digest_of
from edgebake.keys import StageKey, stage_keys
from edgebake.recipe_yaml import RecipeFile, read
from edgebake.reference import Reference, write
from edgebake.store import Entry, Store
from edgebake.target import find_target
from edgebake.types import Call, ReferenceCall, Sample, SampleSet
from edgebake.unit import ENVIRONMENT
from edgebake.units import Unit
from edgebake.validate import choose_runner
from edgebake.workbench import Bench

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Outputs = Mapping[str, NDArray[Any]]

RECIPES = (
    "minilm-l6-qnn",
    "efficientnet-lite0-qnn",
    "mobilevit-xxs-random-qnn",
    "silero-vad-qnn",
    "llama-block-random-qnn",
)
CHIPS = ("sm8550", "sm8650", "sm8750")
TARGETS = ("onnx-qnn", "executorch-qnn")
_VERSION = 1  # of what a row holds


def rows(
    recipe: str, chips: Sequence[str], targets: Sequence[str], calls: int, bench: Bench
) -> Iterator[dict[str, Any]]:
    """A row for each chip and runtime of ``recipe``, made or read from the store."""
    units, _ = check([on_chips(read(recipe), chips, targets)], trust=False)
    for unit in units:
        missing = find_target(unit.target).missing()
        try:
            yield {"unit": unit.id, "missing": missing.reason} if missing else row(bench, unit, calls)
        except EdgebakeError as error:
            yield {"unit": unit.id, "failed": str(error)}


def on_chips(file: RecipeFile, chips: Sequence[str], targets: Sequence[str]) -> RecipeFile:
    """``file`` with the first rule of each of ``targets``, once for each of ``chips``."""
    components = {}
    for name, component in file.recipe.components.items():
        first = {rule.target: rule for rule in reversed(component.targets) if rule.target in targets}
        rules = [first[t].model_copy(update={"device": chip}) for chip in chips for t in targets if t in first]
        components[name] = component.model_copy(update={"targets": tuple(rules)})
    return replace(file, recipe=file.recipe.model_copy(update={"components": components}))


def row(bench: Bench, unit: Unit, calls: int) -> dict[str, Any]:
    """What there is to say of ``unit``."""
    keys = stage_keys(unit, bench.store.file_digest, bench.device(unit.device))
    asked = {"version": _VERSION, "lower": keys["lower"].key, "reference": keys["reference"].key, "calls": calls}

    def measure(_folder: Path) -> dict[str, Any]:
        recorded = stages.reference(bench, unit, keys)
        known = bench.store.find("lower", keys["lower"].key) is not None
        start = time.perf_counter()
        _, lowered = stages.lower(bench, unit, keys)
        took = None if known else time.perf_counter() - start
        chosen = spread(recorded, calls)
        npu = simulated(unit, lowered, chosen)
        cpu = on_cpu(bench, unit, keys, lowered, chosen)
        wanted = {f"{n}.0.{name}": value for n, call in enumerate(chosen) for name, value in call.outputs.items()}
        account = lowered.meta["lowered"]["delegation"]
        return {
            "unit": unit.id,
            "lower_s": took,
            "bytes": {f: (lowered.folder / f).stat().st_size for f in lowered.meta["lowered"]["files"]},
            "parts": account["partitions"],
            "on_cpu": {left["op"]: [left["count"], left["reason"]] for left in account["left_out"]},
            "border_bytes": account["border_bytes"],
            "calls": len(chosen),
            "npu_vs_float_db": decibels(wanted, npu),
            "npu_vs_cpu_db": decibels(cpu, npu),
            "cpu_vs_float_db": decibels(wanted, cpu),
        }

    made: dict[str, Any] = dict(bench.store.get_or_run("npu-row", digest_of(asked), measure)[0].meta)
    return made


def spread(recorded: Reference, count: int) -> list[ReferenceCall]:
    """So many of the recorded calls, over all of them."""
    every = [(index, number) for index, sample in recorded.samples() for number in range(len(sample.calls))]
    step = max(1, len(every) // count)
    return [recorded.sample(index).calls[number] for index, number in every[step // 2 :: step][:count]]


def simulated(unit: Unit, lowered: Entry, calls: Sequence[ReferenceCall]) -> Outputs:
    """What the vendor's simulator makes of ``calls``, each from its recorded states."""
    samples = SampleSet(
        samples=tuple(Sample(calls=(Call(method=c.method, inputs=c.inputs),), source="") for c in calls)
    )
    runner = choose_runner(unit.target)
    assert not isinstance(runner, str), runner
    with tempfile.TemporaryDirectory(prefix="edgebake-npu-") as scratch:
        write(Path(scratch), samples, [(call,) for call in calls], {})
        entry = lowered.folder / lowered.meta["lowered"]["entry"]
        signature = lowered.meta["lowered"]["signature"]
        with runclient.opened(runner[0], entry, signature, Path(scratch), inside=True) as client:
            return dict(client.outputs())


def on_cpu(
    bench: Bench, unit: Unit, keys: Mapping[str, StageKey], lowered: Entry, calls: Sequence[ReferenceCall]
) -> Outputs:
    """What the graph that was compiled for the NPU makes of ``calls`` on this machine's CPU."""
    if unit.target == "onnx-qnn":
        return plain_onnx(lowered, calls)
    return torch_graph(bench, unit, keys, calls)


def plain_onnx(lowered: Entry, calls: Sequence[ReferenceCall]) -> Outputs:
    """The plain file of ``onnx-qnn``, computed as it is written."""
    import onnx

    from edgebake_targets._onnx_wide import as_written

    session = as_written(onnx.load_model(lowered.folder / lowered.meta["lowered"]["encodings"]["files"]["plain"]))
    names = [output.name for output in session.get_outputs()]
    taken = [given.name for given in session.get_inputs()]
    made = [session.run(names, {name: call.inputs[name] for name in taken}) for call in calls]
    return {f"{n}.0.{name}": value for n, values in enumerate(made) for name, value in zip(names, values, strict=True)}


def torch_graph(bench: Bench, unit: Unit, keys: Mapping[str, StageKey], calls: Sequence[ReferenceCall]) -> Outputs:
    """The rounded graph of ``executorch-qnn`` in torch, from a process with the vendor's libraries."""
    import numpy as np

    from edgebake_targets import _qnn_lowering, _qnn_toolchain

    traced, assignment, _ = stages.trace(bench, unit, keys)
    soc_model = int((bench.device(unit.device) or {})["soc_model"])
    with tempfile.TemporaryDirectory(prefix="edgebake-npu-") as scratch:
        at = Path(scratch)
        request = stages._lower_request(bench, unit, assignment, at, traced)
        asked = _qnn_lowering.asked(traced, request, soc_model, at)
        inputs = {f"{n}.{name}": value for n, call in enumerate(calls) for name, value in call.inputs.items()}
        np.savez(at / "calls.npz", **inputs)  # type: ignore[arg-type]
        outputs = [spec.name for spec in traced.signature.methods["forward"].outputs]
        (at / "request.json").write_text(json.dumps({**asked, "calls": str(at / "calls.npz"), "outputs": outputs}))
        environment = {**os.environ, **_qnn_toolchain.environment()}
        command = [sys.executable, str(Path(__file__).resolve()), "--graph", str(at / "request.json")]
        done = subprocess.run(command, env=environment, cwd=at, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        with np.load(at / "made.npz") as made:
            return dict(made)


def run_graph(request: Mapping[str, Any]) -> None:
    """The process of :func:`torch_graph`: round the network as its lowering does, and run it."""
    import numpy as np
    import torch

    from edgebake_targets import _qnn_graph, _qnn_lowerer

    (given,) = request["methods"].values()
    module = torch.export.load(given["program"]).module(check_guards=False)
    _qnn_graph.rewrite(module)
    if request["scheme"] != "fp16":
        module, _ = _qnn_lowerer.rounded(module, request, given)
    made = {}
    with torch.no_grad():
        for number, inputs in enumerate(_qnn_lowerer.calls_in(Path(request["calls"]), given["inputs"])):
            values = torch.utils._pytree.tree_leaves(module(*inputs))
            for name, value in zip(request["outputs"], values, strict=True):
                made[f"{number}.0.{name}"] = value.numpy()
    np.savez(Path(request["calls"]).with_name("made.npz"), **made)


def decibels(wanted: Outputs, got: Outputs) -> dict[str, float | None]:
    """Signal to noise of each output over all calls; 200 where they are equal."""
    from edgebake.metrics import CAP_DB, ParityMeter, to_json

    meter = ParityMeter()
    for number in sorted({key.split(".")[0] for key in wanted}):
        mine = {key.split(".", 2)[2]: wanted[key] for key in wanted if key.startswith(f"{number}.")}
        meter.add(int(number), "", mine, {name: got[f"{number}.0.{name}"] for name in mine})
    return {name: to_json(found["sqnr_db"], CAP_DB) for name, found in meter.measurements().items()}


def line(found: Mapping[str, Any]) -> str:
    """A line of the table, in Markdown."""
    if "lower_s" not in found:
        return f"| {found['unit']} | {found.get('missing') or found.get('failed')} |"
    told = found["lower_s"]
    sizes = " + ".join(f"{size / 2**20:.2f}" for size in found["bytes"].values())
    left = ", ".join(f"{op} x{count} ({why})" for op, (count, why) in found["on_cpu"].items()) or "none"
    parities = (found[name] for name in ("npu_vs_float_db", "npu_vs_cpu_db", "cpu_vs_float_db"))
    shown = " | ".join(", ".join(f"{v:.1f}" for v in parity.values()) for parity in parities)
    return (
        f"| {found['unit']} | {'' if told is None else f'{told:.0f}'} | {sizes} | {shown} | {left} | {found['parts']} |"
    )


def main() -> int:
    """Print the table as it grows, then JSON; 1 when a row could not be made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--chips", nargs="*", default=CHIPS)
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--calls", type=int, default=8, help="how many calls of the network run on the simulator")
    parser.add_argument("--store", type=Path, default=None)
    parser.add_argument("--graph", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.graph is not None:
        run_graph(json.loads(options.graph.read_text(encoding="utf-8")))
        return 0
    os.environ.update(ENVIRONMENT)
    found = []
    print("| artifact | lower s | MiB | NPU to float dB | NPU to CPU dB | CPU to float dB | on the CPU | parts |")
    print("|---|---|---|---|---|---|---|---|")
    for recipe in options.recipes:
        silent = lambda *_, **__: None  # noqa: E731 - a bench tells its stages to whoever draws them
        bench = Bench(store=Store(options.store), emit=silent, trust=False, device=devices.row)
        for made in rows(recipe, options.chips, options.targets, options.calls, bench):
            found.append(made)
            print(line(made), flush=True)
    print(json.dumps({"load": os.getloadavg(), "rows": found}, indent=1))
    return 1 if any("failed" in made for made in found) else 0


if __name__ == "__main__":
    sys.exit(main())
