"""From exported programs to a Core AI asset: conversion, names, writing. Same inputs, same bytes."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, RecipeError, StageFailed
from edgebake.target import LowerRequest
from edgebake.types import MethodSignature, TensorSpec, Traced, canonical_module_name
from edgebake_targets import _coreai_compress
from edgebake_targets._coreai_asset import METADATA
from edgebake_targets._coreai_compress import Assigned
from edgebake_targets._coreai_constants import weights_of
from edgebake_targets._coreai_program import (
    Program,
    Stored,
    array_of,
    called_by,
    digest_of,
    function_of,
    is_private,
    open_program,
    packed,
    stored_of,
    text_of,
    walk,
)
from edgebake_targets._coremltools import quiet

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

MADE_FROM = "edgebake.made_from"
_NARROWED = {"int64": "int32", "float64": "float32"}  # Core AI has no wider types


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A Core AI program and the weights of the modules that it was assigned to compress or keep."""

    program: Any
    weights: tuple[Assigned, ...]


def lowered_specs(method: MethodSignature) -> MethodSignature:
    """``method`` with the dtypes of the asset, where they differ."""
    return replace(method, inputs=tuple(map(_lowered, method.inputs)), outputs=tuple(map(_lowered, method.outputs)))


def _lowered(spec: TensorSpec) -> TensorSpec:
    narrow = _NARROWED.get(spec.dtype)
    return replace(spec, lowered_dtype=narrow) if narrow else spec


def check_names(method: MethodSignature) -> None:
    """RecipeError for a name that two inputs or outputs have: Core AI finds them by name."""
    names = [spec.name for spec in (*method.inputs, *method.outputs)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(
            [
                Problem(what=f"{name!r} names two inputs or outputs; Core AI needs them to differ", fix="rename one")
                for name in twice
            ]
        )


def convert(traced: Traced, request: LowerRequest) -> Converted:
    """One function per method. StageFailed, in the converter's words, when it refuses the network."""
    with _silent():
        from coreai_torch import TorchConverter, get_decomp_table

        converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)  # without stack traces, which hold paths
        weights: list[Assigned] = []
        for method, program in traced.programs.items():
            specs = traced.signature.methods[method]
            decomposed = program.run_decompositions(get_decomp_table())
            _refuse_states(decomposed)
            decomposed._state_dict = dict(decomposed.state_dict)  # shared with the traced program
            assigned = _coreai_compress.assigned_weights(program, request.assignment)
            weights += _coreai_compress.compress(decomposed, assigned)
            with _refused(method):
                converter.add_exported_program(
                    decomposed,
                    input_names=[spec.name for spec in specs.inputs],
                    output_names=[spec.name for spec in specs.outputs],
                    entrypoint_name=function_of(method, traced.programs),
                )
        _coreai_compress.refuse_unused(request.assignment, weights)
        with _refused(", ".join(traced.programs)):
            return Converted(program=converter.to_coreai(), weights=tuple(weights))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without warnings about versions, and without the line that the converter prints for people."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _refused(method: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "no message")
        raise StageFailed(
            f"coreai-torch cannot convert {method} ({type(error).__name__}: {said})",
            fix="the stage's log names the operator",
        ) from error


def _refuse_states(program: torch.export.ExportedProgram) -> None:
    signature = program.graph_signature
    for what, names in (
        ("buffer", signature.buffers_to_mutate.values()),
        ("input", signature.user_inputs_to_mutate.values()),
    ):
        written = sorted(set(names))
        if written:
            raise StageFailed(
                f"the network writes to its {what} {canonical_module_name(written[0])}, which this target "
                "does not lower",
                fix="pass it as an input with role state and return its new value",
            )


def write(converted: Converted, request: LowerRequest, path: Path) -> Program:
    """Write the asset to ``path`` and return it opened.

    Written twice: Core AI names large constants by a hash that differs from process to process, and only a written
    program says what they hold. They get the names of their modules, so that other readers find them too.
    """
    with tempfile.TemporaryDirectory(prefix="edgebake-") as scratch, _silent():
        first = Path(scratch) / "first.aimodel"
        converted.program.save_asset(first)
        program = open_program(first, ours=True)
        _rename_functions(program)
        with program.module.context:
            _rename_constants(program, converted.weights)
        _save(program, request, path)
        shutil.rmtree(first, ignore_errors=True)
    return open_program(path, ours=True)


def _rename_functions(program: Program) -> None:
    """Private functions get numbers in place of random letters."""
    from coreai._compiler.ir import Attribute, StringAttr

    with program.module.context:
        names: dict[str, str] = {}
        for operation in walk(program.module.operation):
            if operation.name == "coreai.graph" and is_private(operation):
                old = text_of(operation, "sym_name")
                names[old] = f"{re.sub('_[a-z]{8}$', '', old)}_{len(names)}"
                operation.attributes["sym_name"] = StringAttr.get(names[old])
        for operation in walk(program.module.operation):
            if operation.name == "coreai.invoke" and (called := called_by(operation)) in names:
                reference = str(operation.attributes["callee"]).replace(f"@{called}", f"@{names[called]}")
                operation.attributes["callee"] = Attribute.parse(reference)


def _rename_constants(program: Program, weights: Iterable[Assigned]) -> None:
    """Large constants, and those that hold a known weight, get the weight's name; the others numbers in order."""
    from coreai._compiler.ir import DenseResourceElementsAttr

    known = _names(program, weights)
    made: dict[str, tuple[str, Any]] = {}
    taken = set(known.values())
    for value, stored in stored_of(program).items():
        if stored.blob is None and stored.name not in known:
            continue
        if stored.name not in made:
            name = known.get(stored.name, f"constant_{len(made)}")
            while stored.name not in known and name in taken:
                name += "_"
            payload = stored.blob if stored.blob is not None else _packed(stored)
            made[stored.name] = name, payload
        name, payload = made[stored.name]
        new = DenseResourceElementsAttr.get_from_buffer(payload, name, stored.attribute.type, alignment=16)
        value.owner.attributes["value"] = new


def _packed(stored: Stored) -> NDArray[np.uint8]:
    values = array_of(stored)
    assert values is not None  # or its values would not be known
    return packed(values, stored.bits)


def _names(program: Program, weights: Iterable[Assigned]) -> dict[str, str]:
    """Name of a constant as it is -> name of the weight that it holds an entry of per value, proven by its values."""
    held: dict[str, Assigned] = {}
    for weight in weights:
        for values in (weight.held, weight.held.T):  # linear layers may be kept transposed
            held.setdefault(digest_of(values), weight)
    found: dict[str, str] = {}
    for constant in weights_of(program):
        stored = array_of(constant.main)
        match = None if stored is None else held.get(digest_of(stored))
        if match is not None and match.name not in found.values():
            found[constant.main.name] = match.name
    return found


def _save(program: Program, request: LowerRequest, path: Path) -> None:
    from coreai.authoring import AIProgram
    from coreai.runtime import AIModelAssetMetadata

    options, about = request.options, request.about
    metadata = AIModelAssetMetadata()
    said = {
        "author": options["author"],
        "license": options["licence"] or about.licence,
        "model_description": options["description"] or about.description,
    }
    for name, text in said.items():
        if text:
            setattr(metadata, name, str(text))
    if about.digest:
        metadata.set_custom(MADE_FROM, about.digest)
    AIProgram._from_mlir_module(program.module).save_asset(path, metadata)
    kept = json.loads((path / METADATA).read_bytes())
    kept.pop("creationDate", None)
    (path / METADATA).write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
