"""A Core ML model that predicts on any system, in the manner of ``coremltools.models.MLModel``.

::

    from edgebake_targets.mil import MilModel

    model = MilModel("model.mlpackage")
    outputs = model.predict({"input_ids": ids, "attention_mask": mask})

    state = model.make_state()  # of a model with states: memory that predictions carry on
    for token in tokens:
        outputs = model.predict({"token": token}, state=state)

It evaluates the program itself, with torch on the CPU; it is no model of Apple's runtime, whose own faults and choices
of kernels it cannot show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgebake.errors import ArtifactDamaged, UsageError
from edgebake_targets._coreml_package import Package, open_package
from edgebake_targets.mil import features
from edgebake_targets.mil.call import Mode, State
from edgebake_targets.mil.evaluate import Evaluator, Watch
from edgebake_targets.mil.program import Function, StateType, program_of
from edgebake_targets.mil.values import held_type


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """The states of a model between predictions, zeros at first."""

    held: Mapping[str, State]
    dtypes: Mapping[str, str]

    def read_state(self, name: str) -> NDArray[Any]:
        """What the state ``name`` holds."""
        return np.array(self._found(name).value.numpy(), dtype=self.dtypes[name])

    def write_state(self, name: str, value: NDArray[Any]) -> None:
        """Replace what the state ``name`` holds."""
        state = self._found(name)
        if value.shape != tuple(state.value.shape):
            raise UsageError(f"the state {name} is of the shape {tuple(state.value.shape)}, not {value.shape}")
        state.value = torch.from_numpy(np.array(value)).to(state.value.dtype)

    def _found(self, name: str) -> State:
        if name not in self.held:
            raise UsageError(f"there is no state {name!r}", fix=f"states: {', '.join(self.held)}")
        return self.held[name]


class MilModel:
    """One function of a package, ready to predict. Not for several threads at once."""

    def __init__(
        self, path: str | PathLike[str] | Package, function: str | None = None, mode: Mode | str = Mode.DECLARED
    ) -> None:
        """Open the package (.mlpackage, or .mlmodel without weights) at ``path``, whoever made it; or one that is open.

        ``function``: default the package's own default. ``mode``: ``declared`` rounds every value to its declared type,
        ``fp16-worst`` also the sums inside operators, ``fp32`` rounds nothing.
        ArtifactDamaged: it is no whole package. Unsupported: it holds what cannot be interpreted; all of it is named.
        """
        package = path if isinstance(path, Package) else open_package(Path(path))
        program = program_of(package)
        name = function or _default_function(package)
        if name not in program.functions:
            raise UsageError(f"there is no function {name!r}", fix=f"functions: {', '.join(program.functions)}")
        self.functions = tuple(program.functions)
        self.interface = features.interface_of(package, name)
        self._function = program.functions[name]
        self.path = package.path
        _check_interface(package, self._function, self.interface)
        self._evaluators: dict[Mode, Evaluator] = {}
        self.mode = Mode(mode)
        self._evaluator(self.mode)

    def make_state(self) -> ModelState:
        """Fresh states, to be passed to ``predict``."""
        held, dtypes = {}, {}
        for declared in self._function.inputs:
            if isinstance(declared.type, StateType):
                wrapped = declared.type.wrapped
                value = torch.zeros([int(size or 0) for size in wrapped.shape], dtype=held_type(wrapped.dtype))
                held[declared.name] = State(name=declared.name, value=value)
                dtypes[declared.name] = wrapped.dtype
        return ModelState(held=held, dtypes=dtypes)

    def predict(
        self,
        inputs: Mapping[str, Any],
        state: ModelState | None = None,
        *,
        mode: Mode | str | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Any]:
        """Outputs by name. UsageError names the input that is missing, unknown or of another type or shape.

        ``inputs``: numpy arrays or torch tensors; images as PIL images or uint8 arrays (height, width, channels).
        ``mode``: another one than the model's, for this call. ``watch`` is called with every computed value.
        """
        given = self._given(inputs, state)
        results = self._evaluator(Mode(mode or self.mode))(given, watch)
        return {name: features.given(feature, results[name]) for name, feature in self.interface.outputs.items()}

    def intermediates(
        self,
        inputs: Mapping[str, Any],
        names: Iterable[str],
        state: ModelState | None = None,
        *,
        mode: Mode | str | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Values inside the program by their names in it; one that is computed again and again: the last. Constants
        and names that the program lacks are absent."""
        wanted, found = set(names), {}

        def watch(_operation: Any, name: str, value: Any) -> None:
            if name in wanted and isinstance(value, torch.Tensor):
                found[name] = value.numpy().copy()

        self.predict(inputs, state, mode=mode, watch=watch)
        return found

    def holds(self, dtype: str) -> bool:
        """Whether any value of the function is declared as ``dtype``."""
        values = (output.type for operation in self._function.block.walk() for output in operation.outputs)
        return any(getattr(declared, "dtype", "") == dtype for declared in values)

    def random_operators(self) -> set[str]:
        """Operators of the function whose results are drawn: on a device they are others."""
        from edgebake_targets.mil.ops.randomness import RANDOM

        return {operation.operator for operation in self._function.block.walk()} & RANDOM

    def _evaluator(self, mode: Mode) -> Evaluator:
        if mode not in self._evaluators:
            self._evaluators[mode] = Evaluator.of(self._function, mode)
        return self._evaluators[mode]

    def _given(self, inputs: Mapping[str, Any], state: ModelState | None) -> dict[str, Any]:
        known = self.interface.inputs
        strangers = sorted(set(inputs) - set(known))
        if strangers:
            raise UsageError(f"the model has no input {strangers[0]!r}", fix=f"its inputs: {', '.join(known)}")
        if self.interface.states and state is None:
            raise UsageError("the model has states", fix="pass state=model.make_state(), the same for calls in a row")
        taken = {
            name: features.taken(feature, inputs[name]) if name in inputs else features.missing(feature)
            for name, feature in known.items()
        }
        shaped = {d.name: _shaped(taken[d.name], d.type) for d in self._function.inputs if d.name in taken}
        return {**shaped, **(state.held if state else {})}


def _default_function(package: Package) -> str:
    return str(package.spec.description.defaultFunctionName) or "main"


def _shaped(value: torch.Tensor, declared: Any) -> torch.Tensor:
    """An image of rank 4 or a vector of one, where the program takes rank 3 or a scalar."""
    shape = getattr(declared, "shape", None)
    if shape is None or len(shape) == value.dim() or value.dim() - len(shape) != 1 or value.shape[0] != 1:
        return value
    return value[0]


def _check_interface(package: Package, function: Function, interface: features.Interface) -> None:
    """ArtifactDamaged unless description and program name the same inputs, states and outputs."""
    states = {value.name for value in function.inputs if isinstance(value.type, StateType)}
    inputs = {value.name for value in function.inputs} - states
    outputs = set(function.block.outputs)
    sides = (
        ("inputs", inputs, set(interface.inputs)),
        ("states", states, set(interface.states)),
        ("outputs", outputs, set(interface.outputs)),
    )
    for what, program, description in sides:
        if program != description:
            wrong = ", ".join(sorted(program ^ description))
            raise ArtifactDamaged(
                f"its program and its description disagree on its {what}: {wrong}", where=str(package.path)
            )
