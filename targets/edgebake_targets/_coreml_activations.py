"""Activations of 8 bits (w8a8): their scales on the way into the package, and whether it really reads them quantised.

A converter that drops a quantize/dequantize pair gives a package that loads, predicts and is even closer to the float
model: nothing but a look at what each product reads shows that it computes in float. So each product of a package is
held against the program that it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, Problem, StageFailed
from edgebake.types import Assignment, Verdict, VerdictState, rule_for
from edgebake_targets._coreml_constants import Constant, constants, operations
from edgebake_targets._coreml_package import Package, array_of, payload_of, proto
from edgebake_targets._coreml_schemes import quantises_activations
from edgebake_targets._coreml_weights import Held, product_of

if TYPE_CHECKING:
    import torch

_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
# Operators of a package whose output has the values of their input (or zeros, which uint8 holds exactly).
_KEEPING = frozenset(
    ("cast", "expand_dims", "identity", "pad", "reshape", "slice_by_index", "slice_by_size", "squeeze", "transpose")
)
_WEIGHTS = ("weight", "x", "y")  # parameters that may name a product's weight; the others of x and y name its data


@dataclass(frozen=True, kw_only=True)
class Affine:
    """``scale * (q - zero_point)`` with ``q`` and ``zero_point`` counted from 0 to 255, whatever type holds them."""

    scale: float
    zero_point: int


def round_scales(program: torch.export.ExportedProgram) -> None:
    """Round the scales of activations up to float16, in place, as a package that computes in float16 stores them.

    Up, so that the observed range stays inside; by the converter's own rounding, half of the largest values would clip.
    """
    import numpy as np

    for node in program.graph.nodes:
        if str(node.target) in (_QUANTIZE, _DEQUANTIZE):
            exact = float(node.args[1])
            with np.errstate(over="ignore"):
                scale = np.float16(exact)
            if np.isfinite(scale):  # beyond float16 it is left to the converter, and ``record`` sees what became of it
                node.update_arg(1, float(scale if scale >= exact else np.nextafter(scale, np.float16(np.inf))))
    program.graph_module.recompile()


def promised(program: torch.export.ExportedProgram, assignment: Assignment) -> dict[str, tuple[Affine, ...]]:
    """How each module of ``assignment`` with static activations reads its input in ``program``, once for each call.

    A module that reads an input that is not quantised is absent.
    """
    found: dict[str, tuple[Affine, ...]] = {}
    missed = set()
    for node in program.graph.nodes:
        product = product_of(node)
        if product is None or not quantises_activations(assignment.schemes.get(product.module, "fp32")):
            continue
        source = node.args[product.data]
        if str(source.target) != _DEQUANTIZE:
            missed.add(product.module)
            continue
        affine = Affine(scale=float(source.args[1]), zero_point=int(source.args[2]))
        found[product.module] = (*found.get(product.module, ()), affine)
    return {module: affines for module, affines in found.items() if module not in missed}


def record(
    package: Package, named: Mapping[str, Held], wanted: Mapping[str, tuple[Affine, ...]]
) -> dict[str, dict[str, Any]]:
    """What each product with a weight of ``named`` reads, where the scheme has static activations.

    StageFailed names each module whose input the package does not quantise as ``wanted``, its program, did.
    """
    reader, problems, kept = _Reader(package), [], {}
    for name, held in sorted(named.items()):
        if not quantises_activations(held.scheme):
            continue
        expected = [affine for module in held.modules for affine in wanted.get(module, ())]
        inputs = list(reader.inputs(name))
        if wrong := _wrong(expected, inputs):
            module = held.modules[0]
            problems.append(
                Problem(
                    what=f"{', '.join(held.modules)}: {wrong}, so it would not compute as {held.scheme}",
                    where=package.path.name,
                    fix=f"give it a scheme with float activations: {rule_for(module, 'w8')}",
                )
            )
            continue
        read = sorted((affine.scale, affine.zero_point) for affine in inputs if affine is not None)
        kept[name] = {"modules": list(held.modules), "inputs": [list(pair) for pair in read]}
    if problems:
        raise StageFailed(problems)
    return kept


def _wrong(expected: list[Affine], inputs: list[Affine | None]) -> str:
    if len(inputs) < len(expected):
        return f"{len(inputs)} of {len(expected)} products read its weight"
    if not expected or None in inputs:
        return "its input is not quantised"
    strays = [found for found in inputs if found is not None and not any(_same(found, one) for one in expected)]
    if strays:
        return f"its input has the scale {strays[0].scale:.6g} and zero point {strays[0].zero_point}, not as calibrated"
    return ""


def _same(found: Affine, wanted: Affine) -> bool:
    """Equal up to float32's rounding of the scale; one that was chosen for float16 is exact there."""
    return found.zero_point == wanted.zero_point and abs(found.scale - wanted.scale) <= 2.0**-23 * wanted.scale


def verdicts(package: Package, kept: Mapping[str, Mapping[str, Any]]) -> tuple[Verdict, ...]:
    """``structure.activations`` where any were recorded: the products read them as when the package was built."""
    if not kept:
        return ()
    limit, subject = "structure.activations", package.path.name
    try:
        faults = list(_faults(package, kept))
    except (ArtifactDamaged, ValueError) as error:
        return (Verdict(limit=limit, state="fail", subject=subject, reason=str(error)),)
    state: VerdictState = "fail" if faults else "pass"
    reason = "; ".join(faults) if faults else f"the inputs of {len(kept)} weights are uint8"
    return (Verdict(limit=limit, state=state, subject=subject, reason=reason),)


def _faults(package: Package, kept: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    reader = _Reader(package)
    for name, entry in sorted(kept.items()):
        expected = [Affine(scale=scale, zero_point=zero) for scale, zero in entry["inputs"]]
        if wrong := _wrong(expected, list(reader.inputs(name))):
            yield f"{', '.join(entry['modules'])}: {wrong}"


class _Reader:
    """Finds what the products of a package read, by the names of their weights."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._constants = constants(package)
        self._operations = list(operations(package))
        self._made_by = {output.name: operation for operation in self._operations for output in operation.outputs}

    def inputs(self, weight: str) -> Iterator[Affine | None]:
        """How each operator that reads the constant ``weight`` gets its other operand; None where it is float."""
        for operation in self._operations:
            names = {parameter: _name(operation, parameter) for parameter in operation.inputs}
            if weight in (names.get(parameter) for parameter in _WEIGHTS):
                data = next((names[p] for p in ("x", "y") if p in names and names[p] != weight), None)
                yield self._affine(data)

    def _affine(self, value: str | None) -> Affine | None:
        dequantize = self._source(value)
        if dequantize is None or dequantize.type != "dequantize":
            return None
        quantize = self._source(_name(dequantize, "input"))
        if quantize is None or quantize.type != "quantize":
            return None
        scale, zero = self._number(dequantize, "scale"), self._number(dequantize, "zero_point")
        if (self._number(quantize, "scale"), self._number(quantize, "zero_point")) != (scale, zero):
            return None
        kind = proto("MIL_pb2").DataType.Name(quantize.outputs[0].type.tensorType.dataType)
        return Affine(scale=scale, zero_point=int(zero) + (128 if kind == "INT8" else 0))

    def _source(self, value: str | None) -> Any:
        """The operation that ``value`` comes from, past those that hand its values on; None for an input."""
        operation = self._made_by.get(value or "")
        while operation is not None and operation.type in _KEEPING:
            operation = self._made_by.get(_name(operation, "x") or "")
        return operation

    def _number(self, operation: Any, parameter: str) -> float:
        """A scale or zero point for the whole tensor; zero where there is none, nan where there are several."""
        if parameter not in operation.inputs:
            return 0.0
        argument = operation.inputs[parameter].arguments[0]
        constant: Constant | None = self._constants.get(argument.name)
        value = argument.value if argument.WhichOneof("binding") == "value" else constant and constant.parts.get("val")
        if value is None:
            return float("nan")
        values = array_of(payload_of(self._package, value))
        return float(values.reshape(-1)[0]) if values.size == 1 else float("nan")


def _name(operation: Any, parameter: str) -> str | None:
    if parameter not in operation.inputs or not operation.inputs[parameter].arguments:
        return None
    return str(operation.inputs[parameter].arguments[0].name)


def quantised(package: Package) -> dict[str, int]:
    """How many activations ``package`` quantises, by type."""
    names = proto("MIL_pb2").DataType
    counts: dict[str, int] = {}
    for operation in operations(package):
        if operation.type == "quantize":
            kind = str(names.Name(operation.outputs[0].type.tensorType.dataType)).lower()
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))
