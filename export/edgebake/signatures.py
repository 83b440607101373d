"""Signatures as plain data: what manifests, stored programs and the run host carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edgebake.types import DimBounds, Language, Lowered, MethodSignature, Signature, TensorSpec


def to_json(signature: Signature) -> dict[str, Any]:
    """Plain data of ``signature``."""
    return {
        "methods": {
            name: {
                "inputs": [_tensor_to_json(t) for t in method.inputs],
                "outputs": [_tensor_to_json(t) for t in method.outputs],
                **({"buffers": list(method.buffers)} if method.buffers else {}),
            }
            for name, method in signature.methods.items()
        },
        "dims": {name: _bounds_to_json(bounds) for name, bounds in signature.dims.items()},
        **({"language": _language_to_json(signature.language)} if signature.language else {}),
    }


def _bounds_to_json(bounds: DimBounds) -> dict[str, Any]:
    sizes = {"sizes": list(bounds.sizes)} if bounds.sizes else {}
    return {"min": bounds.min, "max": bounds.max, **sizes}


def _language_to_json(language: Language) -> dict[str, Any]:
    return {**asdict(language), "stop": list(language.stop)}


def _language_from_json(data: Mapping[str, Any] | None) -> Language | None:
    return None if data is None else Language(**{**data, "stop": tuple(data["stop"])})


def _tensor_to_json(spec: TensorSpec) -> dict[str, Any]:
    kept = {k: v for k, v in asdict(spec).items() if v is not None}
    return {**kept, "shape": list(spec.shape)}


def _tensor_from_json(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(**{**data, "shape": tuple(data["shape"])})


def lowered_to_json(lowered: Lowered) -> dict[str, Any]:
    """Plain data of ``lowered``; deterministic facts only."""
    return {**asdict(lowered), "signature": to_json(lowered.signature), "files": sorted(lowered.files)}


def from_json(data: Mapping[str, Any]) -> Signature:
    """The signature that :func:`to_json` wrote."""
    return Signature(
        methods={
            name: MethodSignature(
                inputs=tuple(_tensor_from_json(t) for t in method["inputs"]),
                outputs=tuple(_tensor_from_json(t) for t in method["outputs"]),
                buffers=tuple(method.get("buffers", ())),
            )
            for name, method in data["methods"].items()
        },
        dims={
            name: DimBounds(**{**bounds, "sizes": tuple(bounds.get("sizes", ()))})
            for name, bounds in data.get("dims", {}).items()
        },
        language=_language_from_json(data.get("language")),
    )
