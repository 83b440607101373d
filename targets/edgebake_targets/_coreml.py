"""From an exported program to a Core ML package: conversion, compression, writing. Same inputs, same bytes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgebake.errors import StageFailed
from edgebake.target import LowerRequest
from edgebake.types import DimBounds, MethodSignature, TensorSpec, Traced
from edgebake_targets import (
    _coreml_activations,
    _coreml_biases,
    _coreml_images,
    _coreml_metadata,
    _coreml_modules,
    _coreml_operators,
    _coreml_precision,
    _coreml_rewrites,
    _coreml_sensitivity,
    _coreml_shapes,
    _coreml_states,
)
from edgebake_targets._coreml_options import precision_of
from edgebake_targets._coreml_package import write_package
from edgebake_targets._coreml_schemes import is_compressed, misfits
from edgebake_targets._coreml_weights import FloatWeight, Held, float_weights, folds_norms, locate

# Operators that Core ML has natively: decomposed, they cost speed, and the fused forms compute in higher precision.
_KEPT = frozenset(
    [
        "linear",
        "layer_norm",
        "scaled_dot_product_attention",
        "silu",
        "gelu",
        "group_norm",
        "instance_norm",
        "hardswish",
        "hardsigmoid",
        "matmul",
        "einsum",
        "rms_norm",
        "pixel_shuffle",
        "softmax",
        "conv1d",
        "conv2d",
        "conv_transpose1d",
        "conv_transpose2d",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A MIL program that still holds float weights, where they are, and how it came about.

    ``modules``: names under which each module's value may be found in it. ``states``: its states and their buffers.
    ``inside``: the module that computes each value. ``kept``: modules that compute in float32 on request.
    ``activations``: how modules with static activations read their inputs.
    """

    program: Any
    held: tuple[Held, ...]
    decomposition: str
    modules: Mapping[str, list[str]]
    states: Mapping[str, str]
    inside: Mapping[str, str]
    kept: tuple[str, ...]
    activations: Mapping[str, tuple[_coreml_activations.Affine, ...]]


def lowered_specs(method: MethodSignature, images: Iterable[str] = ()) -> MethodSignature:
    """``method`` with the dtypes of the package: float16, float32 and int32, and uint8 for ``images``."""
    inputs = (replace(s, lowered_dtype="uint8") if s.name in images else _lowered(s) for s in method.inputs)
    return replace(method, inputs=tuple(inputs), outputs=tuple(map(_lowered, method.outputs)))


def _lowered(spec: TensorSpec) -> TensorSpec:
    kept = spec.dtype in ("float32", "int32")
    dtype = spec.dtype if kept else "float32" if spec.dtype.startswith(("float", "bfloat")) else "int32"
    return spec if kept else replace(spec, lowered_dtype=dtype)


def convert(
    traced: Traced, name: str, method: MethodSignature, request: LowerRequest, images: Mapping[str, Any]
) -> Converted:
    """The MIL program of the method ``name`` after coremltools' passes; ``method``: its inputs and outputs in there.

    StageFailed when no decomposition table leads there.
    """
    import coremltools as ct

    program = traced.programs[name]
    weights = float_weights(program, request.assignment)
    if request.options["palettes"] == "sensitive_kmeans":
        weights = _coreml_sensitivity.weighed(weights, traced, name, request.calibration)
    if problems := list(misfits((w.module, w.scheme, w.values.shape, w.axis) for w in weights)):
        raise StageFailed(problems)
    biases = _coreml_biases.corrected(weights, traced, name, request)
    failures = []
    for tried, table in _tables():
        decomposed = program.run_decompositions(table)
        decomposed._state_dict = {**decomposed.state_dict, **biases}  # the dictionary is the traced program's own
        _coreml_images.scale_channels(decomposed, method, images)
        states = _coreml_states.states_of(decomposed, str(request.options["minimum_os"]))
        _coreml_rewrites.rewrite_attention(decomposed)
        _coreml_rewrites.state_sizes(decomposed)
        if precision_of(request) == "fp16":
            _coreml_activations.round_scales(decomposed)
        origins = _coreml_precision.mark(decomposed)
        kept = _coreml_precision.kept_modules(decomposed, request)
        chosen = _coreml_precision.precision(ct, decomposed, request, origins, kept)
        try:
            mil = _convert_once(decomposed, method, traced.signature.dims, request, chosen, images)
        except Exception as error:  # noqa: BLE001 - the converter raises whatever Python raises; reported below
            failures.append((tried, error))
            continue
        _coreml_states.name_writes(mil)
        modules = _coreml_modules.handed_on(decomposed, method)
        held = _located(mil, weights)
        inside = _coreml_precision.inside(mil, origins)
        return Converted(
            program=mil,
            held=held,
            decomposition=tried,
            modules=modules,
            states=states,
            inside=inside,
            kept=tuple(kept),
            activations=_coreml_activations.promised(decomposed, request.assignment),
        )
    reasons = "; ".join(f"{tried}: {type(error).__name__}: {_first_line(error)}" for tried, error in failures)
    raise StageFailed(
        f"coremltools cannot convert this network ({reasons})", fix="the stage's log names the operator"
    ) from failures[0][1]


def _located(mil: Any, weights: Iterable[FloatWeight]) -> tuple[Held, ...]:
    """Where the weights are. One that stays float may be gone (merged into another constant): nothing hangs on it."""
    operations = mil.functions["main"].operations
    compressed, problems = locate(operations, [w for w in weights if is_compressed(w.scheme)])
    if problems:
        raise StageFailed(list(problems))
    floats, _ = locate(operations, [w for w in weights if not is_compressed(w.scheme)])
    taken = {held.operation.name: held for held in compressed}
    for held in floats:
        other = taken.get(held.operation.name)
        if other is not None:
            raise StageFailed(
                f"{other.modules[0]} ({other.scheme}) and {held.modules[0]} ({held.scheme}) share one weight",
                fix="give both the same scheme",
            )
    return (*compressed, *floats)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _tables() -> Iterator[tuple[str, Any]]:
    """Decomposition tables in the order to try; the second one serves networks with operators like ``as_strided``."""
    import torch

    table = torch.export.default_decompositions()
    for operator in list(table):
        name = str(operator).removeprefix("aten.").split(".")[0]
        if name in _KEPT or name.startswith("upsample_"):
            del table[operator]
    yield "default", table
    yield "none", {}


def _convert_once(
    program: Any,
    method: MethodSignature,
    dims: Mapping[str, DimBounds],
    request: LowerRequest,
    precision: Any,
    images: Mapping[str, Any],
) -> Any:
    import coremltools as ct
    import numpy as np

    shapes = _coreml_shapes.shapes_of(ct, method, dims)
    inputs = [
        _coreml_images.image_type(ct, spec, images[spec.name])
        if spec.name in images
        else ct.TensorType(
            name=spec.name,
            shape=shapes[spec.name],
            dtype=np.dtype(spec.lowered_dtype or spec.dtype).type,
        )
        for spec in method.inputs
    ]
    outputs = [ct.TensorType(name=s.name, dtype=np.dtype(s.lowered_dtype or s.dtype).type) for s in method.outputs]
    pipeline = ct.PassPipeline.DEFAULT
    if not folds_norms(program):
        pipeline.remove_passes({"common::fuse_conv_batchnorm", "common::fuse_conv_scale"})
    with _coreml_rewrites.translations():
        return ct.convert(
            program,
            inputs=inputs,
            outputs=outputs,
            convert_to="milinternal",
            minimum_deployment_target=getattr(ct.target, request.options["minimum_os"]),
            compute_precision=precision,
            pass_pipeline=pipeline,
        )


def compress(converted: Converted) -> dict[str, Held]:
    """Compress the constants that are to be, and name all of them after their modules; returns them by that name."""
    from coremltools.converters.mil.mil.passes.helper import block_context_manager

    names = constant_names(converted.held)

    def within(_block: Any) -> None:
        for name, held in names.items():
            if is_compressed(held.scheme):
                _coreml_operators.replace(held, name)
            else:
                held.operation.name = held.operation.outputs[0].name = name

    block_context_manager(within)(converted.program.functions["main"])
    return names


def constant_names(held: Iterable[Held]) -> dict[str, Held]:
    """An identifier for each, after its module; ``0``, ``1.a`` and ``1_a`` stay apart."""
    names: dict[str, Held] = {}
    for each in held:
        name = re.sub(r"[^A-Za-z0-9_]", "_", f"{each.modules[0]}.weight.{each.scheme}")
        name = name if name[0].isalpha() else f"module_{name}"
        while name in names:
            name += "_"
        names[name] = each
    return names


def write(converted: Converted, request: LowerRequest, path: Path) -> None:
    """Serialise the program to the package ``path``."""
    import coremltools as ct

    with tempfile.TemporaryDirectory(prefix="edgebake-") as scratch:
        model = ct.convert(
            converted.program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, request.options["minimum_os"]),
            pass_pipeline=ct.PassPipeline.CLEANUP,
            skip_model_load=True,
            package_dir=str(Path(scratch) / "converted.mlpackage"),
        )
        spec = model.get_spec()
        _coreml_metadata.write(spec, request, str(ct.__version__))
        weights = Path(model.weights_dir) / "weight.bin"
        write_package(path, spec, weights if weights.exists() else None)  # none: every constant is small
