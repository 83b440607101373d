"""Runs .mlpackage artifacts with Apple's own Core ML, on a Mac."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import Missing, Session
from edgebake.types import RunnerKind, Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgebake_targets._coreml_package import Place

RUNS = ("coreml",)
KIND: RunnerKind = "device"
DISTRIBUTIONS = ("coremltools",)


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
    import coremltools as ct

    from edgebake_targets._coreml_package import places_of

    places = places_of(entry, signature.methods)
    models = {m: ct.models.MLModel(str(place.path), function_name=place.function) for m, place in places.items()}
    return _Session(models, places, signature)


class _Session:
    """One Core ML model per method."""

    def __init__(self, models: Mapping[str, Any], places: Mapping[str, Place], signature: Signature) -> None:
        from edgebake_targets import _coreml_checks

        self._models = models
        self._places = places
        self._images = {method: _coreml_checks.recorded(place, "images") for method, place in places.items()}
        self._signature = signature
        self.begin()

    def begin(self) -> None:
        """Fresh states, all zero, for models that have any; functions of one package take the same ones."""
        made: dict[Path, Any] = {}
        self._states = {}
        for method, model in self._models.items():
            path = self._places[method].path
            if _keeps(model):
                made[path] = made[path] if path in made else model.make_state()
                self._states[method] = made[path]

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Predict once; inputs go in as the package declares them, outputs come back in the signature's dtypes."""
        from edgebake_targets._coreml_images import lowered_inputs

        specs = self._signature.methods[method]
        given = lowered_inputs(self._images[method], specs, inputs)
        state = {"state": self._states[method]} if method in self._states else {}
        values = self._models[method].predict({name: _as_taken(array) for name, array in given.items()}, **state)
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
