"""Judges .pte files with Core ML parts on any system: their packages in the reference interpreter, the rest in torch.

The execution plan is walked as it stands in the file (``_pte_plan``). What is left to Core ML is taken out and run by
``edgebake_targets.mil``; operators that ExecuTorch's portable kernels would run are torch's of the same schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import NotMeasured, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _coreml_interpreter, _decoder_session, _executorch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._executorch_coreml_checks import Part
    from edgebake_targets._pte_plan import Plan
    from edgebake_targets.mil.evaluate import Watch
    from edgebake_targets.mil.model import MilModel

RUNS = ("executorch-coreml",)
KIND: RunnerKind = "interpreted"
DISTRIBUTIONS = _coreml_interpreter.DISTRIBUTIONS
SOURCES = tuple(dict.fromkeys((*_coreml_interpreter.SOURCES, *_executorch.SOURCES, "edgebake_targets._pte_plan")))

missing = _coreml_interpreter.missing
warm_up = _coreml_interpreter.warm_up


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001 - the contract's name
    """Read the program at ``entry``. NotMeasured names operators and backends that nothing here computes."""
    from edgebake_targets import _executorch_coreml_checks, _pte_plan
    from edgebake_targets.inspectors._coreml_delegate import BACKEND

    plans = _pte_plan.open_plans(entry, list(signature.methods))
    parts: dict[str, dict[int, _Runnable]] = {}
    others = sorted({one.backend for plan in plans.values() for one in plan.delegates} - {BACKEND})
    if others:
        raise NotMeasured(f"nothing here computes the parts for {', '.join(others)}")
    recorded = _executorch_coreml_checks.recorded(entry)
    for method, plan in plans.items():
        parts[method] = {}
        for number, one in enumerate(plan.delegates):
            part = _executorch_coreml_checks.part_of(one.blob, plan.named, f"{entry}: {method}.delegate{number}")
            parts[method][number] = _Runnable(part, recorded.get(part.identifier, {}))
    return _decoder_session.of_single_tokens(InterpreterSession(plans, parts, signature), signature)


class _Runnable:
    """A part, ready to predict. NotMeasured names what the interpreter lacks."""

    def __init__(self, part: Part, recorded: Mapping[str, Any]) -> None:
        from edgebake_targets.mil.call import Unsupported
        from edgebake_targets.mil.model import MilModel

        try:
            self.model: MilModel = MilModel(part.package)
        except Unsupported as error:
            raise NotMeasured(str(error)) from error
        random = sorted(self.model.random_operators())
        if random:
            raise NotMeasured(f"the program draws random numbers ({', '.join(random)}), others on every system")
        self.part = part
        self.recorded = recorded
        self.begin()

    def begin(self) -> None:
        """Fresh states, all zero: ExecuTorch makes them for each part that it loads, none are shared."""
        self.state = self.model.make_state()

    def given(self, values: list[Any]) -> dict[str, Any]:
        """The delegate's inputs as ExecuTorch's runtime copies them into those of the package: type and rank."""
        from edgebake_targets.mil.features import Feature

        def as_taken(feature: Feature, value: Any) -> Any:
            array = value.detach().numpy().astype(feature.dtype)
            return array.reshape(1) if array.ndim == 0 else array

        inputs = self.model.interface.inputs
        return {name: as_taken(inputs[name], value) for name, value in zip(self.part.inputs, values, strict=True)}


class InterpreterSession:
    """One plan per method."""

    def __init__(
        self, plans: Mapping[str, Plan], parts: Mapping[str, Mapping[int, _Runnable]], signature: Signature
    ) -> None:
        self._plans = plans
        self._parts = parts
        self._signature = signature
        half = any(one.model.holds("float16") for held in parts.values() for one in held.values())
        self.modes = ("fp32", "declared", "fp16-worst") if half else ()
        self.begin()

    def begin(self) -> None:
        """A sequence of calls begins: the states of all parts and those outside them are zero."""
        self._outside = {method: plan.states() for method, plan in self._plans.items()}
        for held in self._parts.values():
            for one in held.values():
                one.begin()

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once, every value inside the Core ML parts rounded to its declared type."""
        return self._run(method, inputs, "declared", {})

    def call_mode(
        self, mode: str, method: str, inputs: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Outputs in one of ``modes``; and values inside that are not finite, in order, with operator and module."""
        from edgebake_targets.mil.overflow import not_finite

        strange: dict[int, dict[str, str]] = {number: {} for number in self._parts[method]}
        watches = {number: not_finite(found) for number, found in strange.items()}
        outputs = self._run(method, inputs, mode, watches)
        said = {}
        for number, found in strange.items():
            inside = self._parts[method][number].recorded.get("inside", {})
            said.update({name: f"{op} of {inside[name]}" if name in inside else op for name, op in found.items()})
        return outputs, said

    def intermediates(
        self, method: str, inputs: Mapping[str, NDArray[Any]], modules: Iterable[str]
    ) -> dict[str, NDArray[Any]]:
        """Value that each of ``modules`` hands on, float32; modules that the parts no longer show are absent."""
        found: dict[str, Any] = {}
        wanted = set(modules)
        watches = {
            number: _keeper({v: m for m, v in one.recorded.get("modules", {}).items() if m in wanted}, found)
            for number, one in self._parts[method].items()
        }
        self._run(method, inputs, "declared", watches)
        return found

    def _run(
        self, method: str, inputs: Mapping[str, NDArray[Any]], mode: str, watches: Mapping[int, Watch]
    ) -> dict[str, NDArray[Any]]:
        """Outputs by name; ``watches`` see the values inside the parts, by the part's number."""
        from edgebake_targets import _pte_plan
        from edgebake_targets.mil.call import Unsupported

        plan, specs = self._plans[method], self._signature.methods[method]

        def delegate(number: int, values: list[Any]) -> dict[int, Any]:
            one = self._parts[method][number]
            count = len(one.part.inputs)
            results = one.model.predict(one.given(values[:count]), one.state, mode=mode, watch=watches.get(number))
            places = enumerate(one.part.outputs, start=count)
            return {place: _pte_plan.as_declared(results[name], values[place]) for place, name in places}

        try:
            return _pte_plan.call(plan, specs, inputs, delegate, self._outside[method])
        except Unsupported as error:
            raise NotMeasured(str(error)) from error


def _keeper(modules: Mapping[str, str], found: dict[str, Any]) -> Watch:
    """Keeps in ``found`` the value of each module; ``modules`` by the value's name."""
    import numpy as np
    import torch

    def watch(_operation: Any, name: str, value: Any) -> None:
        if name in modules and isinstance(value, torch.Tensor):
            found[modules[name]] = np.array(value.numpy(), np.float32)

    return watch
