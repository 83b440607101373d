"""Packages with deterministic damage, each opened and run in a forked process with limits on memory and time.

As a program: ``python hostile_packages.py FOLDER FIRST COUNT`` reads the seeds (packages) in FOLDER and writes one JSON
line per case: how it ended, and what was said.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = 2**31  # bytes beyond what the process holds when it is forked
SECONDS = 30  # of processor time, which neighbours on the machine do not lengthen
HANG_SECONDS = 300  # of real time, for what waits instead of working
EXTREMES = (0, 1, -1, 2, 3, 7, 255, 65536, 2**20, 2**31 - 1, -(2**31))
SIZES = (0, 1, 2, 3, 1000, 2**16, 2**20, 2**31, 2**32 + 1, 2**62, 2**64 - 1)
NAMES = (
    "",
    "@model_path/../../../../../../../etc/passwd",
    "/etc/passwd",
    "@model_path/weights/none.bin",
    "@model_path",
)
ENDINGS = ("result", "ArtifactDamaged", "Unsupported", "UsageError")
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"

Random = np.random.Generator


def mutate(package: Path, random: Random) -> str:
    """Damage the package in one to three ways; returns their names."""
    kinds = [list(MUTATIONS)[i] for i in random.integers(0, len(MUTATIONS), int(random.integers(1, 4)))]
    for kind in sorted(kinds, key=lambda k: k in ("flip", "cut model", "cut weights", "no weights")):  # bytes last
        MUTATIONS[kind](package, random)
    return ", ".join(kinds)


def _flip(package: Path, random: Random) -> None:
    file = package / MODEL
    data = bytearray(file.read_bytes())
    for place in random.integers(0, max(len(data), 1), int(random.integers(1, 9))):
        if data:
            data[place] ^= 1 << int(random.integers(0, 8))
    file.write_bytes(data)


def _flip_weights(package: Path, random: Random) -> None:
    file = package / WEIGHTS
    data = bytearray(file.read_bytes()) if file.exists() else bytearray()
    for _ in range(8):
        if data:  # the headers of the entries lie at multiples of 64
            place = int(random.integers(0, len(data) // 64 + 1)) * 64 + int(random.integers(0, 32))
            data[min(place, len(data) - 1)] ^= 1 << int(random.integers(0, 8))
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)


def _cut(name: str) -> Callable[[Path, Random], None]:
    def cut(package: Path, random: Random) -> None:
        file = package / name
        if file.exists():
            os.truncate(file, int(random.integers(0, file.stat().st_size + 1)))

    return cut


def _no_weights(package: Path, _random: Random) -> None:
    shutil.rmtree((package / WEIGHTS).parent, ignore_errors=True)


def _edit(change: Callable[[Any, list[Any], Random], None]) -> Callable[[Path, Random], None]:
    """An edit of the specification: ``change`` gets the program and all its operations."""

    def edit(package: Path, random: Random) -> None:
        from edgebake_targets._coreml_package import proto

        spec = proto("Model_pb2").Model()
        spec.ParseFromString((package / MODEL).read_bytes())
        operations = list(_operations(spec))
        if operations:
            change(spec, operations, random)
        (package / MODEL).write_bytes(spec.SerializeToString())

    return edit


def _operations(spec: Any) -> Iterator[Any]:
    stack = [b for f in spec.mlProgram.functions.values() for b in f.block_specializations.values()]
    while stack:
        block = stack.pop()
        for operation in block.operations:
            yield operation
            stack.extend(operation.blocks)


def _pick(items: Any, random: Random) -> Any:
    return items[int(random.integers(0, len(items)))]


def _dimension(spec: Any, operations: list[Any], random: Random) -> None:
    types = [o.type.tensorType for op in operations for o in op.outputs]
    types += [v.type.tensorType for op in operations for v in op.attributes.values()]
    types += [i.type.tensorType for f in spec.mlProgram.functions.values() for i in f.inputs]
    dimensions = [d for t in types for d in t.dimensions]
    if dimensions:
        _pick(dimensions, random).constant.size = _pick(SIZES, random)


def _described_size(spec: Any, _operations: list[Any], random: Random) -> None:
    features = [*spec.description.input, *spec.description.output, *spec.description.state]
    array = _pick(features, random).type.multiArrayType
    if array.shape:
        array.shape[int(random.integers(0, len(array.shape)))] = int(_pick(SIZES, random) % 2**63)


def _offset(_spec: Any, operations: list[Any], random: Random) -> None:
    files = [v.blobFileValue for op in operations for v in op.attributes.values() if v.HasField("blobFileValue")]
    if files:
        file = _pick(files, random)
        if random.random() < 0.5:
            file.offset = int(_pick((*SIZES, file.offset + 1, file.offset + 64, file.offset - 64), random)) % 2**64
        else:
            file.fileName = _pick(NAMES, random)


def _rebind(_spec: Any, operations: list[Any], random: Random) -> None:
    """Another value, often one that comes later: a cycle."""
    names = [o.name for op in operations for o in op.outputs] + ["nobody"]
    bindings = [b for op in operations for a in op.inputs.values() for b in a.arguments]
    if bindings:
        _pick(bindings, random).name = _pick(names, random)


def _retype(_spec: Any, operations: list[Any], random: Random) -> None:
    from edgebake_targets.mil.operators import operators

    kinds = [*sorted(operators()), "warp", ""]
    _pick(operations, random).type = _pick(kinds, random)


def _datatype(_spec: Any, operations: list[Any], random: Random) -> None:
    outputs = [o.type.tensorType for op in operations for o in op.outputs]
    _pick(outputs, random).dataType = int(_pick((0, 1, 2, 10, 11, 12, 13, 21, 23, 24, 25, 31, 35, 39, 40, 99), random))


def _number(_spec: Any, operations: list[Any], random: Random) -> None:
    values = [v for op in operations for v in op.attributes.values()]
    values += [b.value for op in operations for a in op.inputs.values() for b in a.arguments if b.HasField("value")]
    integers = [v.immediateValue.tensor.ints.values for v in values if v.immediateValue.tensor.ints.values]
    floats = [v.immediateValue.tensor.floats.values for v in values if v.immediateValue.tensor.floats.values]
    if integers and (random.random() < 0.8 or not floats):
        chosen = _pick(integers, random)
        chosen[int(random.integers(0, len(chosen)))] = _pick(EXTREMES, random)
    elif floats:
        chosen = _pick(floats, random)
        chosen[int(random.integers(0, len(chosen)))] = _pick((0.0, -1.0, 1e30, float("inf"), float("nan")), random)


def _drop(_spec: Any, operations: list[Any], random: Random) -> None:
    operation = _pick(operations, random)
    if operation.inputs and random.random() < 0.7:
        del operation.inputs[_pick(sorted(operation.inputs), random)]
    elif operation.attributes:
        del operation.attributes[_pick(sorted(operation.attributes), random)]
    else:
        operation.ClearField("outputs")


def _shuffle(spec: Any, _operations: list[Any], random: Random) -> None:
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            order = random.permutation(len(block.operations))
            copies = [block.operations[int(i)] for i in order]
            kept = [type(c).FromString(c.SerializeToString()) for c in copies]
            del block.operations[:]
            block.operations.extend(kept)


def _deepen(spec: Any, operations: list[Any], random: Random) -> None:
    """Blocks in blocks, each with the whole program again."""
    operation = _pick(operations, random)
    for function in spec.mlProgram.functions.values():
        for block in list(function.block_specializations.values()):
            operation.blocks.add().CopyFrom(type(block).FromString(block.SerializeToString()))


def _opset(spec: Any, _operations: list[Any], random: Random) -> None:
    for function in spec.mlProgram.functions.values():
        function.opset = _pick(("CoreML5", "CoreML9", "", "iOS18"), random)


MUTATIONS: dict[str, Callable[[Path, Random], None]] = {
    "flip": _flip,
    "flip weights": _flip_weights,
    "cut model": _cut(MODEL),
    "cut weights": _cut(WEIGHTS),
    "no weights": _no_weights,
    "dimension": _edit(_dimension),
    "described size": _edit(_described_size),
    "offset": _edit(_offset),
    "rebind": _edit(_rebind),
    "operator": _edit(_retype),
    "data type": _edit(_datatype),
    "number": _edit(_number),
    "drop": _edit(_drop),
    "order": _edit(_shuffle),
    "deepen": _edit(_deepen),
    "op set": _edit(_opset),
}


def judge(package: Path) -> None:
    """Open and run the package as a user would, on inputs of the smallest allowed sizes."""
    from edgebake_targets.mil import MilModel

    model = MilModel(package)
    inputs = {}
    for name, feature in model.interface.inputs.items():
        shape = [max(low, 1) for low, _ in feature.sizes[0]] if feature.sizes else [1]
        if np.prod(np.asarray(shape, float)) > 1e6:
            return
        inputs[name] = np.ones(shape, feature.dtype)
    model.predict(inputs, state=model.make_state())


def _case(seeds: list[Path], number: int, folder: Path) -> dict[str, Any]:
    """One case, in this process: mutate, judge, say how it ended."""
    from edgebake.errors import EdgebakeError
    from edgebake_targets.mil import Unsupported

    random = np.random.default_rng(number)
    seed = seeds[number % len(seeds)]
    package = folder / "m.mlpackage"
    shutil.copytree(seed, package)
    told: dict[str, Any] = {"case": number, "seed": seed.stem, "mutations": mutate(package, random)}
    try:
        judge(package)
    except (EdgebakeError, Unsupported) as error:
        return {**told, "ending": type(error).__name__, "said": str(error)[:300]}
    except BaseException:  # noqa: BLE001 - the test shows it and fails
        return {**told, "ending": "exception", "said": traceback.format_exc()[-1500:]}
    return {**told, "ending": "result", "said": ""}


def _limited(seeds: list[Path], number: int, folder: Path, answer: int) -> None:
    """The forked child: limits, the case, its answer."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    signal.alarm(HANG_SECONDS)
    os.write(answer, json.dumps(_case(seeds, number, folder)).encode())
    os._exit(0)


def serve(seeds: list[Path], first: int, count: int) -> Iterator[dict[str, Any]]:
    """Outcomes of ``count`` cases, each in a fork of this process, which has torch loaded."""
    import torch

    from edgebake_targets._coreml_package import proto
    from edgebake_targets.mil import model  # noqa: F401
    from edgebake_targets.mil.operators import operators

    torch.set_num_threads(1)
    operators()
    proto("Model_pb2")
    for number in range(first, first + count):
        with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
            read, write = os.pipe()
            child = os.fork()
            if not child:
                os.close(read)
                _limited(seeds, number, Path(scratch), write)
            os.close(write)
            with os.fdopen(read, "rb") as pipe:
                told = pipe.read()
            _, status = os.waitpid(child, 0)
        yield json.loads(told) if told else {"case": number, "ending": f"status {status}", "said": "", "mutations": "?"}


if __name__ == "__main__":
    found = sorted(Path(sys.argv[1]).glob("*.mlpackage"))
    for outcome in serve(found, int(sys.argv[2]), int(sys.argv[3])):
        print(json.dumps(outcome), flush=True)
