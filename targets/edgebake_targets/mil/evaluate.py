"""The walk: evaluates the operations of a function in order and rounds each result as the mode says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from edgebake.errors import ArtifactDamaged
from edgebake_targets.mil import values
from edgebake_targets.mil.call import Call, Mode, TensorType, Unsupported
from edgebake_targets.mil.constants import Constants, Lazy
from edgebake_targets.mil.operators import operators
from edgebake_targets.mil.plan import Plan, Step, plan_of
from edgebake_targets.mil.program import AnyType, Function, Operation, Type

Watch = Callable[[Operation, str, Any], None]  # operation, name of the value, the value
Environment = dict[str, Any]

# What an operator raises when the package asks for something impossible (sizes that do not fit, a missing parameter).
_IMPOSSIBLE = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A function that can be called. Not for several threads at once: they would share states and constants."""

    function: Function
    mode: Mode
    plan: Plan
    constants: Constants = field(compare=False)

    @classmethod
    def of(cls, function: Function, mode: Mode = Mode.DECLARED) -> Evaluator:
        """Unsupported, naming them all, when the function has operators that cannot be evaluated."""
        decompress = partial(_decompressed, opset=function.opset, mode=mode)
        return cls(function=function, mode=mode, plan=plan_of(function), constants=Constants(decompress=decompress))

    def __call__(self, inputs: Mapping[str, Any], watch: Watch | None = None) -> dict[str, Any]:
        """Outputs by name. ``inputs``: tensors as they are held, and states. ``watch`` sees every computed value."""
        environment: Environment = {}
        with torch.inference_mode():
            for declared in self.function.inputs:
                value = inputs[declared.name]
                environment[declared.name] = self._settled(value, declared.type, f"input {declared.name}")
            results = self._block(self.plan, (), environment, watch)
        return dict(zip(self.function.block.outputs, results, strict=True))

    def _block(
        self, plan: Plan, given: tuple[Any, ...], environment: Environment, watch: Watch | None
    ) -> tuple[Any, ...]:
        if given:
            environment.update(zip(plan.inputs, given, strict=True))
        for step in plan.steps:
            self._step(step, environment, watch)
        return tuple(self._value(source, environment) for source in plan.outputs)

    def _step(self, step: Step, environment: Environment, watch: Watch | None) -> None:
        operation = step.operation
        inputs = {
            name: [self._value(s, environment) for s in source]
            if isinstance(source, tuple)
            else self._value(source, environment)
            for name, source in step.inputs
        }
        call = Call(
            operator=operation.operator,
            inputs=inputs,
            outputs=step.declared,
            name=operation.name,
            opset=self.function.opset,
            mode=self.mode,
            blocks=tuple(partial(self._nested, block, environment, watch) for block in step.blocks),
        )
        results = evaluated(call)
        if len(results) != len(step.declared):
            raise ArtifactDamaged(f"{_place(operation)} declares {len(step.declared)} outputs, not {len(results)}")
        for output, result in zip(operation.outputs, results, strict=True):
            settled = self._settled(result, _declared(operation, output.type), f"{_place(operation)}: {output.name}")
            environment[output.name] = settled
            if watch is not None:
                watch(operation, output.name, settled)
        for name in step.frees:
            environment.pop(name, None)

    def _nested(self, plan: Plan, environment: Environment, watch: Watch | None, *given: Any) -> tuple[Any, ...]:
        results = self._block(plan, given, environment, watch)
        for name in plan.inputs:
            environment.pop(name, None)
        return results

    def _value(self, source: str | Lazy, environment: Environment) -> Any:
        return environment[source] if isinstance(source, str) else self.constants.value(source)

    def _settled(self, value: Any, declared: Type, place: str) -> Any:
        return settled(value, declared, self.mode, place)


def evaluated(call: Call) -> tuple[Any, ...]:
    """The operator's results, one per output. ArtifactDamaged when what the package asks for cannot be."""
    try:
        result = operators()[call.operator](call)
    except Unsupported as error:
        raise Unsupported(f"{call.operator} {call.name}: {error}") from error
    except _IMPOSSIBLE as error:
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ArtifactDamaged(f"{call.operator} {call.name} cannot be evaluated: {said}") from error
    return result if isinstance(result, tuple) else (result,)


def settled(value: Any, declared: Type, mode: Mode, place: str) -> Any:
    """``value`` in its declared type, rounded as ``mode`` says; ArtifactDamaged when its shape is another one."""
    if not isinstance(value, torch.Tensor) or not isinstance(declared, TensorType | AnyType) or not declared.dtype:
        return value
    if isinstance(declared, TensorType) and not _fits(value.shape, declared.shape):
        raise ArtifactDamaged(f"{place} has the shape {tuple(value.shape)}, declared is {declared.shape}")
    held = values.to_held(value, declared.dtype)
    return held if mode is Mode.FP32 else values.rounded(held, declared.dtype)


def _declared(operation: Operation, declared: Type) -> Type:
    """coremltools declares a ``select`` between two scalars a scalar, whatever the shape of its condition."""
    if operation.operator == "select" and isinstance(declared, TensorType) and not declared.shape:
        return AnyType(kind="tensor", dtype=declared.dtype)
    return declared


def _fits(shape: torch.Size, declared: tuple[int | None, ...]) -> bool:
    return len(shape) == len(declared) and all(d is None or d == s for s, d in zip(shape, declared, strict=True))


def _decompressed(operation: Operation, parts: Mapping[str, Any], *, opset: str, mode: Mode) -> tuple[Any, ...]:
    types = tuple(output.type for output in operation.outputs)
    call = Call(operator=operation.operator, inputs=parts, outputs=types, name=operation.name, opset=opset, mode=mode)
    results = evaluated(call)
    if len(results) != len(types):
        raise ArtifactDamaged(f"{_place(operation)} declares {len(types)} outputs, not {len(results)}")
    exact = (settled(result, kind, Mode.FP32, _place(operation)) for result, kind in zip(results, types, strict=True))
    if mode is Mode.FP32:
        return tuple(exact)
    return tuple(_narrowed(result, kind) for result, kind in zip(exact, types, strict=True))


def _narrowed(value: Any, declared: Type) -> Any:
    """A decompressed value, which nobody else holds, rounded where it lies."""
    dtype = getattr(declared, "dtype", "")
    return values.rounded_in_place(value, dtype) if isinstance(value, torch.Tensor) and dtype else value


def _place(operation: Operation) -> str:
    return f"{operation.operator} {operation.name}"
