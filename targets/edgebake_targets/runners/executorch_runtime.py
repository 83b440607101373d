"""Runs .pte files in the ExecuTorch runtime of the executorch wheel, on this machine's CPU."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import Missing, Session
from edgebake.types import MethodSignature, RunnerKind, Signature

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNS = ("executorch-xnnpack",)
KIND: RunnerKind = "executed"
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
    import executorch.kernels.quantized  # noqa: F401  registers the int8 embedding kernels
    from executorch.runtime import Runtime

    Runtime.get()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Load the program at ``entry``; ArtifactDamaged when the runtime refuses it or it lacks one of the methods."""
    from executorch.runtime import Runtime, Verification

    warm_up()
    try:
        program = Runtime.get().load_program(entry, verification=Verification.InternalConsistency)
    except RuntimeError as error:
        raise ArtifactDamaged(f"the ExecuTorch runtime refuses it: {error}", where=str(entry)) from error
    absent = sorted(set(signature.methods) - set(program.method_names))
    if absent:
        raise ArtifactDamaged(
            f"it has no method {absent[0]!r}; its methods: {', '.join(sorted(program.method_names))}", where=str(entry)
        )
    return _Session(program, signature)


class _Session:
    """Methods are loaded at their first call and kept: each holds its planned memory."""

    def __init__(self, program: Any, signature: Signature) -> None:
        self._program = program
        self._signature = signature
        self._methods: dict[str, Any] = {}

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run ``method`` once. Outputs are copies: the runtime writes the next call's over the same memory."""
        specs = self._signature.methods[method]
        loaded = self._load(method, specs)
        try:
            outputs = loaded.execute(_tensors(method, specs, inputs))
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
            found = loaded.metadata.num_inputs(), loaded.metadata.num_outputs()
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
