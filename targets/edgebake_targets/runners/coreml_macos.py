"""Runs .mlpackage artifacts with Apple's own Core ML, on a Mac."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import Missing, NotMeasured, Session
from edgebake.types import RunnerKind, Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._coreml_package import Place

RUNS = ("coreml",)
KIND: RunnerKind = "device"
DISTRIBUTIONS = ("coremltools",)
SOURCES = tuple(
    f"edgebake_targets.{name}"
    for name in (
        "_coreml_decoder",
        "_coreml_images",
        "_coreml_options",
        "_coreml_package",
        "_coreml_placement",
        "_decoders",
    )
)
ALL = "all"
UNITS = ("cpu_only", "cpu_and_gpu", "cpu_and_ne")


def missing() -> Missing | None:
    """None on a Mac with coremltools."""
    if platform.system() != "Darwin":
        return Missing(
            reason="Core ML executes on macOS only",
            remedy="copy the component's folder to a Mac and run `edgebake verify` there",
        )
    if find_spec("coremltools") is None:
        return Missing(
            reason="the Python package 'coremltools' is not installed", remedy="pip install 'edgebake[coreml]'"
        )
    return None


def warm_up() -> None:
    """Import coremltools."""
    import coremltools  # noqa: F401


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001 - the contract's name
    """Compile and load the package at ``entry``, or one package per method beside it."""
    if signature.language is not None:
        from edgebake_targets import _coreml_decoder

        return _coreml_decoder.session(entry, signature, _opened)
    return _opened(entry, signature)


def _opened(entry: Path, signature: Signature) -> _Session:
    from edgebake_targets._coreml_package import places_of

    return _Session(places_of(entry, signature.methods), signature)


class _Session:
    """One Core ML model per method and compute unit, loaded when first asked."""

    def __init__(self, places: Mapping[str, Place], signature: Signature) -> None:
        from edgebake_targets import _coreml_checks

        self._places = places
        self._images = {method: _coreml_checks.recorded(place, "images") for method, place in places.items()}
        self._signature = signature
        self._loaded: dict[tuple[str, str], Any] = {}
        self._states: dict[tuple[Path, str], Any] = {}
        self.units = UNITS
        for method in places:
            self._model(method, ALL)

    def begin(self) -> None:
        """Fresh states, all zero, for models that have any."""
        self._states = {}

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Predict once where Core ML chooses; outputs come back in the signature's dtypes."""
        return self._predict(method, ALL, inputs)

    def call_unit(self, unit: str, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Predict once on one of ``UNITS``; NotMeasured where Core ML cannot load or run the package there."""
        try:
            return self._predict(method, unit, inputs)
        except RuntimeError as error:  # what coremltools makes of an NSError
            raise NotMeasured(f"Core ML cannot run it there: {error}") from error

    def placement(self) -> dict[str, dict[str, Any]]:
        """Operators by the unit that Core ML prefers for them; needs macOS 14.4."""
        from coremltools.models.compute_plan import MLComputePlan

        from edgebake_targets import _coreml_placement

        compiled = {method: self._model(method, ALL).get_compiled_model_path() for method in self._places}
        plans = {method: MLComputePlan.load_from_path(path) for method, path in compiled.items()}
        return _coreml_placement.by_method(plans)

    def _model(self, method: str, unit: str) -> Any:
        import coremltools as ct

        if (method, unit) not in self._loaded:
            units = ct.ComputeUnit[unit.upper()]
            place = self._places[method]
            model = ct.models.MLModel(str(place.path), compute_units=units, function_name=place.function)
            self._loaded[method, unit] = model
        return self._loaded[method, unit]

    def _predict(self, method: str, unit: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        from edgebake_targets._coreml_images import lowered_inputs

        specs = self._signature.methods[method]
        given = lowered_inputs(self._images[method], specs, inputs)
        model = self._model(method, unit)
        at = (self._places[method].path, unit)  # functions of one package take the same states
        if at not in self._states and _keeps(model):
            self._states[at] = model.make_state()
        state = {"state": self._states[at]} if _keeps(model) else {}
        values = model.predict({name: _as_taken(array) for name, array in given.items()}, **state)
        return {s.name: values[s.name].astype(s.dtype) for s in specs.outputs}


def _keeps(model: Any) -> bool:
    description = model.get_spec().description
    return any(function.state for function in (description, *description.functions))


def _as_taken(array: NDArray[Any]) -> Any:
    """An array, or the picture that Core ML takes for 8-bit pixels (height, width, channels)."""
    if array.dtype != "uint8":
        return array
    from PIL import Image

    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
