"""Reads any ExecuTorch program (.pte): inputs, outputs, operators, delegates, and every weight it carries.

Needs neither torch nor executorch; what is inside a Core ML delegate takes coremltools' description of the format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake.target import Missing
from edgebake.types import COMPILED, Inspection, TensorSpec, WeightRecord
from edgebake_targets.inspectors import (
    _coreml_delegate,
    _mlx_graph,
    _qnn_delegate,
    _vela_stream,
    _vulkan_graph,
    _xnnpack_graph,
)
from edgebake_targets.inspectors._flatbuffers import Malformed, Table
from edgebake_targets.inspectors._pte_file import (
    BOOL,
    DELEGATE,
    DOUBLE,
    INT,
    KERNEL,
    SCALARS,
    STRING,
    TENSOR,
    Program,
    at,
    blob_of,
    instructions,
    mapped,
    opened,
    place_of,
    stored,
)
from edgebake_targets.inspectors._pte_units import moved_bytes, units_of
from edgebake_targets.inspectors._qnn_binary import INSIDE

SUFFIXES = (".pte",)

# Kernels that take a quantised table and, behind it, its scales and zero points.
_TABLE_KERNELS = ("quantized_decomposed::embedding_", "quantized_decomposed::dequantize_per_channel")


def missing() -> Missing | None:
    """Always usable."""
    return None


def inspect(path: Path) -> Inspection:
    """What ``path`` holds. Named dimensions of inputs appear at their upper bound; .pte files keep no names of inputs.

    ArtifactDamaged when it is no ExecuTorch program, is cut short, or contradicts itself.
    """
    try:
        data = mapped(path)
    except OSError as error:
        raise ArtifactDamaged(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    try:
        return _inspect(opened(data))
    except (Malformed, RecursionError) as error:
        raise ArtifactDamaged(
            f"this is no whole ExecuTorch program: {error}", where=str(path), fix="build or copy the file again"
        ) from error


def _inspect(program: Program) -> Inspection:
    plans = program.table.tables(1)
    methods = [plan for plan in plans if plan.count(3) or any(instructions(plan))]
    several = len(methods) > 1
    operators, delegates = Counter[str](), Counter[str]()
    weights: dict[str, WeightRecord] = {}
    known: frozenset[str] = frozenset()
    facts: dict[str, Any] = {"delegate_operators": {}, "delegate_bytes": {}}
    inside: dict[str, Counter[str]] = {}
    for plan in methods:
        operators.update(_operators(plan))
        for call in _delegate_calls(plan):
            delegates[at(plan.tables(7), call, "delegate").text(0)] += 1
        for number, delegate in enumerate(plan.tables(7)):
            found, scales = _inside(program, delegate, f"{plan.text(0)}.delegate{number}", facts, inside)
            weights, known = {**found, **weights}, known | scales
        weights = {**_constants(program, plan), **weights}
    for (backend, _), blob in _blobs(program, methods).items():
        facts["delegate_bytes"][backend] = facts["delegate_bytes"].get(backend, 0) + len(blob)
        if backend == _qnn_delegate.BACKEND:
            try:
                inside[backend] += _qnn_delegate.operators(blob)
            except Malformed as error:  # the program around it is whole
                facts[INSIDE] = f"not measured: {error}"
    facts["delegate_operators"] = dict(sorted(sum(inside.values(), Counter()).items()))
    weights = {**weights, **_others(program, {*weights, *known})}
    return Inspection(
        format="pte",
        inputs=tuple(spec for plan in methods for spec in _signature(plan, 3, "input", several)),
        outputs=tuple(spec for plan in methods for spec in _signature(plan, 4, "output", several)),
        operators=dict(sorted(operators.items())),
        delegates=dict(sorted(delegates.items())),
        weights=tuple(weights.values()),
        total_bytes=program.size,
        facts={
            "methods": [plan.text(0) for plan in methods],
            "constants": {plan.text(0): _constant_outputs(plan) for plan in plans if plan not in methods},
            "planned_bytes": {plan.text(0): sum(plan.wholes(8, "q")) for plan in methods},
            **facts,
        },
        units=units_of(delegates, inside, operators),
        border_bytes=moved_bytes(program, methods),
    )


def _blobs(program: Program, methods: Iterable[Table]) -> dict[tuple[str, str], memoryview]:
    """What backends compiled, each by its backend and place once: methods may share it."""
    delegates = [delegate for plan in methods for delegate in plan.tables(7)]
    return {(one.text(0), place_of(one)): blob_of(program, one) for one in delegates}


def _inside(
    program: Program, delegate: Table, label: str, facts: dict[str, Any], inside: dict[str, Counter[str]]
) -> tuple[Mapping[str, WeightRecord], frozenset[str]]:
    """Weights of a delegate and keys of shared data that are its scales.

    Adds its operators to ``inside``, by backend, and to ``facts`` what else is known.
    """
    backend, blob = delegate.text(0), blob_of(program, delegate)
    operators = inside.setdefault(backend, Counter())
    if backend == "XnnpackBackend":
        graph = _xnnpack_graph.read(blob, program.named, label)
        operators.update(graph.operators)
        return graph.weights, frozenset(graph.scale_keys)
    if backend == _coreml_delegate.BACKEND:
        package = _coreml_delegate.read(blob, program.named, label)
        operators.update(package.operators)
        facts.setdefault("coreml", {})[label] = package.facts
        return package.weights, package.shared
    if backend == _mlx_graph.BACKEND:
        mlx = _mlx_graph.read(blob, program.named)
        operators.update(mlx.operators)
        return {f"named:{key}": record for key, record in mlx.weights.items()}, mlx.keys
    if backend == _vulkan_graph.BACKEND:
        vulkan = _vulkan_graph.read(blob, program.named, label)
        operators.update(vulkan.operators)
        return {f"named:{key}": record for key, record in vulkan.weights.items()}, vulkan.keys
    if backend == _qnn_delegate.BACKEND:
        facts["soc_model"] = _qnn_delegate.chip(delegate)
        facts["shares_weights"] = _qnn_delegate.shares_weights(delegate)
    if backend == _vela_stream.BACKEND:
        facts.setdefault("ethos_u", {})[label] = asdict(_vela_stream.read(blob))
    if not len(blob):
        return {}, frozenset()
    digest = sha256(blob).hexdigest()
    record = WeightRecord(name=label, shape=(len(blob),), dtype=COMPILED, bytes=len(blob), digest=digest)
    return {f"compiled:{place_of(delegate)}": record}, frozenset()


def _kernel_calls(plan: Table) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name of the kernel and indices of its values, call by call."""
    kernels = plan.tables(6)
    for kind, call in instructions(plan):
        if kind == KERNEL:
            kernel = at(kernels, call.whole(0, "i"), "operator")
            yield kernel.text(0), call.wholes(1, "i")


def _operators(plan: Table) -> Counter[str]:
    return Counter(name for name, _ in _kernel_calls(plan))


def _delegate_calls(plan: Table) -> Iterator[int]:
    return (call.whole(0, "i") for kind, call in instructions(plan) if kind == DELEGATE)


def _tensor(plan_values: tuple[Table, ...], index: int) -> Table | None:
    value: Table = at(plan_values, index, "value")
    return value.table(1) if value.whole(0, "B") == TENSOR else None


def _signature(plan: Table, field: int, what: str, several: bool) -> Iterator[TensorSpec]:
    values = plan.tables(2)
    prefix = f"{plan.text(0)}." if several else ""
    for number, index in enumerate(plan.wholes(field, "i")):
        tensor = _tensor(values, index)
        shape = tensor.wholes(2, "i") if tensor is not None else ()
        kind = at(values, index, "value").whole(0, "B")
        dtype = {INT: "int64", BOOL: "bool", DOUBLE: "float64"}.get(kind, "none")
        if tensor is not None:
            dtype = SCALARS.get(tensor.whole(0, "b"), ("unknown", 0))[0]
        yield TensorSpec(name=f"{prefix}{what}_{number}", shape=shape, dtype=dtype)


def _constant_outputs(plan: Table) -> Any:
    """What a method without instructions returns: a number, a string, or a list of them."""
    found: list[Any] = []
    values = plan.tables(2)
    for index in plan.wholes(4, "i"):
        value: Table = at(values, index, "value")
        kind, held = value.whole(0, "B"), value.table(1)
        if held is None:
            continue
        if kind == INT:
            found.append(held.whole(0, "q"))
        elif kind == BOOL:
            found.append(bool(held.whole(0, "?")))
        elif kind == DOUBLE:
            found.append(held.real(0, "d"))
        elif kind == STRING:
            found.append(held.text(0))
    return found[0] if len(found) == 1 else found


def _constants(program: Program, plan: Table) -> dict[str, WeightRecord]:
    """Constants of the kernels outside delegates; scales of int8 tables are counted with their table."""
    values = plan.tables(2)
    records: dict[int, tuple[str, WeightRecord]] = {}
    for index in range(len(values)):
        tensor = _tensor(values, index)
        found = _constant(program, tensor, f"{plan.text(0)}.constant{index}") if tensor is not None else None
        if found is not None:
            records[index] = found
    for kernel, arguments in _kernel_calls(plan):
        if kernel.startswith(_TABLE_KERNELS) and arguments and arguments[0] in records:
            scales = [index for index in arguments[1:3] if index in records]
            key, table = records[arguments[0]]
            size = sum(records.pop(index)[1].bytes for index in scales)
            records[arguments[0]] = key, replace(table, scale_bytes=table.scale_bytes + size)
    return dict(records.values())


def _constant(program: Program, tensor: Table, label: str) -> tuple[str, WeightRecord] | None:
    """Key (equal for shared data) and record of a tensor whose data is in the file; None for activations."""
    found = stored(program, tensor, label)
    if found is None:
        return None
    dtype = SCALARS.get(tensor.whole(0, "b"), ("unknown", 0))[0]
    digest = sha256(found.data).hexdigest() if len(found.data) else ""
    record = WeightRecord(
        name=found.name or label, shape=tensor.wholes(2, "i"), dtype=dtype, bytes=len(found.data), digest=digest
    )
    return found.key, record


def _others(program: Program, known: set[str]) -> dict[str, WeightRecord]:
    """Shared data that no reader here understands (other backends' weights), at its size."""
    return {
        key: WeightRecord(
            name=key, shape=(len(data),), dtype="opaque", bytes=len(data), digest=sha256(data).hexdigest()
        )
        for key, data in program.named.items()
        if key not in known and f"named:{key}" not in known
    }
