"""Runs .mlpackage artifacts in the reference interpreter (edgebake_targets.mil): on any system, not Apple's runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import NotMeasured, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _coreml_interpreter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._coreml_package import Place
    from edgebake_targets.mil.call import State
    from edgebake_targets.mil.evaluate import Watch
    from edgebake_targets.mil.model import MilModel

RUNS = ("coreml",)
KIND: RunnerKind = "interpreted"
DISTRIBUTIONS = _coreml_interpreter.DISTRIBUTIONS
SOURCES = _coreml_interpreter.SOURCES

missing = _coreml_interpreter.missing
warm_up = _coreml_interpreter.warm_up


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001 - the contract's name
    """Read the package at ``entry``, or one per method beside it. NotMeasured names operators that it lacks."""
    if signature.language is not None:
        from edgebake_targets import _coreml_decoder

        return _coreml_decoder.session(entry, signature, _opened)
    return _opened(entry, signature)


def _opened(entry: Path, signature: Signature) -> InterpreterSession:
    from edgebake_targets._coreml_package import places_of
    from edgebake_targets.mil.call import Unsupported
    from edgebake_targets.mil.model import MilModel

    try:
        places = places_of(entry, signature.methods)
        models = {method: MilModel(place.path, place.function) for method, place in places.items()}
    except Unsupported as error:
        raise NotMeasured(str(error)) from error
    random = sorted({name for model in models.values() for name in model.random_operators()})
    if random:
        raise NotMeasured(f"the program draws random numbers ({', '.join(random)}), others on every system")
    return InterpreterSession(models, places, signature)


class InterpreterSession:
    """One model per method."""

    def __init__(self, models: Mapping[str, MilModel], places: Mapping[str, Place], signature: Signature) -> None:
        from edgebake_targets import _coreml_checks

        self._models = models
        self._places = places
        self._signature = signature
        self._images = {name: _coreml_checks.recorded(place, "images") for name, place in places.items()}
        half = any(model.holds("float16") for model in models.values())
        self.modes = ("fp32", "declared", "fp16-worst") if half else ()
        self.begin()

    def begin(self) -> None:
        """Fresh states, all zero; functions of one package write to the same ones."""
        shared: dict[Path, dict[str, State]] = {}
        self._states = {}
        for method, model in self._models.items():
            fresh, known = model.make_state(), shared.setdefault(self._places[method].path, {})
            held = {name: known.setdefault(name, state) for name, state in fresh.held.items()}
            self._states[method] = replace(fresh, held=held)

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Predict once, every value rounded to its declared type."""
        return self._predict(method, inputs, "declared", None)

    def call_mode(
        self, mode: str, method: str, inputs: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Outputs in one of ``modes``; and values inside that are not finite, in order, with operator and module."""
        from edgebake_targets import _coreml_checks
        from edgebake_targets.mil.overflow import not_finite

        found: dict[str, str] = {}
        outputs = self._predict(method, inputs, mode, not_finite(found))
        inside = _coreml_checks.recorded(self._places[method], "inside")
        return outputs, {name: f"{what} of {inside[name]}" if name in inside else what for name, what in found.items()}

    def intermediates(
        self, method: str, inputs: Mapping[str, NDArray[Any]], modules: Iterable[str]
    ) -> dict[str, NDArray[Any]]:
        """Value that each of ``modules`` hands on, float32; modules that the program no longer shows are absent."""
        from edgebake_targets._coreml_images import lowered_inputs

        model = self._models[method]
        names = modules_of(self._places[method])
        wanted = {module: names[module] for module in modules if module in names}
        values = model.intermediates(
            lowered_inputs(self._images[method], self._signature.methods[method], inputs),
            wanted.values(),
            self._states[method],
        )
        return {module: values[name] for module, name in wanted.items() if name in values}

    def _predict(
        self, method: str, inputs: Mapping[str, NDArray[Any]], mode: str, watch: Watch | None
    ) -> dict[str, NDArray[Any]]:
        from edgebake_targets._coreml_images import lowered_inputs
        from edgebake_targets.mil.call import Unsupported

        specs = self._signature.methods[method]
        try:
            given = lowered_inputs(self._images[method], specs, inputs)
            values = self._models[method].predict(given, self._states[method], mode=mode, watch=watch)
        except Unsupported as error:
            raise NotMeasured(str(error)) from error
        shaped = {s.name: values[s.name].reshape(()) if not s.shape else values[s.name] for s in specs.outputs}
        return {s.name: shaped[s.name].astype(s.dtype) for s in specs.outputs}


def modules_of(place: Place) -> Mapping[str, str]:
    """The value that each module hands on, from the record beside the package; empty where there is none."""
    from edgebake_targets import _coreml_checks

    return _coreml_checks.recorded(place, "modules")
