"""A .pte file opened in the ExecuTorch runtime of the executorch wheel: what its runners share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import Missing, Session
from edgebake.types import MethodSignature, Signature
from edgebake_targets._decoders import refuse_past_the_end

if TYPE_CHECKING:
    from numpy.typing import NDArray

DISTRIBUTIONS = ("executorch", "torch")


def missing() -> Missing | None:
    """None when the executorch wheel is installed."""
    if find_spec("executorch") is None:
        return Missing(
            reason="the Python package 'executorch' is not installed", remedy="pip install 'executorch>=1.4.1'"
        )
    return None


def warm_up() -> None:
    """Import the runtime and the torch whose tensors it takes."""
    _bindings()


@lru_cache
def _bindings() -> Any:
    """The C++ runtime, without ``executorch.runtime`` around it.

    That thin layer imports, for one class of warnings, the whole exporter: seconds of CPU and 130 MiB.
    """
    import executorch.kernels.quantized  # noqa: F401  registers the int8 embedding kernels
    import torch  # noqa: F401  the bindings link against its libraries

    name = "portable_lib" if sys.platform == "win32" else "_portable_lib"  # on Windows the layer finds the DLLs
    return import_module(f"executorch.extension.pybindings.{name}")


def opened(entry: Path, signature: Signature) -> Session:
    """Load the program at ``entry``; ArtifactDamaged when the runtime refuses it or it lacks one of the methods."""
    if signature.language is not None:
        _register_cache_operators()
    program = _program(entry)
    names = {program.get_method_name(index) for index in range(program.num_methods())}
    absent = sorted(set(signature.methods) - names)
    if absent:
        raise ArtifactDamaged(
            f"it has no method {absent[0]!r}; its methods: {', '.join(sorted(names))}", where=str(entry)
        )
    return _Session(program, signature, entry)


@lru_cache
def _register_cache_operators() -> None:
    """ExecuTorch's kernels for a decoder's cache: its library alone, without the compiler that its module imports."""
    import torch

    _bindings()
    found = find_spec("executorch")
    assert found is not None
    folders = [Path(root, "extension/llm/custom_ops") for root in found.submodule_search_locations or ()]
    (library,) = (file for folder in folders for file in folder.glob("*custom_ops_aot_lib.*"))
    load: Any = torch.ops.load_library
    load(library)


def _program(entry: Path) -> Any:
    bindings = _bindings()
    try:
        return bindings._load_program(
            str(entry),
            enable_etdump=False,
            debug_buffer_size=0,
            program_verification=bindings.Verification.InternalConsistency,
        )
    except RuntimeError as error:
        raise ArtifactDamaged(f"the ExecuTorch runtime refuses it: {error}", where=str(entry)) from error


class _Session:
    """Methods are loaded at their first call and kept: each holds its planned memory."""

    def __init__(self, program: Any, signature: Signature, entry: Path) -> None:
        self._program = program
        self._signature = signature
        self._entry = entry
        self._methods: dict[str, Any] = {}

    def begin(self) -> None:
        """A fresh program where the network keeps buffers: methods loaded again from the same one find their memory."""
        if self._methods and any(method.buffers for method in self._signature.methods.values()):
            self._methods.clear()
            self._program = _program(self._entry)

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run ``method`` once. Outputs are copies: the runtime writes the next call's over the same memory."""
        specs = self._signature.methods[method]
        loaded = self._load(method, specs)
        given = _tensors(method, specs, inputs)
        if self._signature.language is not None:
            refuse_past_the_end(self._signature.language.context, *given)
        try:
            outputs = loaded(given)
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
            raise StageFailed(
                f"the ExecuTorch runtime failed in {method} with {shapes}: {error}", where="validate"
            ) from error
        named = zip(specs.outputs, outputs, strict=True)
        return {spec.name: output.detach().clone().numpy() for spec, output in named}

    def _load(self, method: str, specs: MethodSignature) -> Any:
        if method not in self._methods:
            try:
                loaded = self._program.load_method(method)
            except RuntimeError as error:
                raise ArtifactDamaged(
                    f"the ExecuTorch runtime cannot load method {method!r}: {error}",
                    fix="it may need a backend or kernels that this machine's runtime lacks",
                ) from error
            described = loaded.method_meta()
            found = described.num_inputs(), described.num_outputs()
            if found != (len(specs.inputs), len(specs.outputs)):
                raise ArtifactDamaged(
                    f"method {method!r} takes {found[0]} inputs and returns {found[1]} outputs; its signature says "
                    f"{len(specs.inputs)} and {len(specs.outputs)}"
                )
            self._methods[method] = loaded
        return self._methods[method]


def _tensors(method: str, specs: MethodSignature, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    """Inputs in the order of the signature, in its dtypes."""
    import numpy as np
    import torch

    absent = [spec.name for spec in specs.inputs if spec.name not in inputs]
    if absent:
        raise StageFailed(f"method {method!r} was called without its input {absent[0]!r}", where="validate")
    arrays = (np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype) for spec in specs.inputs)
    # A copy where the array is read-only: torch cannot share memory that nobody may write.
    return [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in arrays]
