"""Runs a Core AI model: by the framework of macOS 27, elsewhere by the runtime inside coreai-core.

Off the framework, coreai-core compiles the asset itself, to a temporary folder, and runs it on the CPU.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import NotMeasured, Session
from edgebake.types import Signature
from edgebake_targets._coreai_asset import open_asset
from edgebake_targets._coreai_program import function_of, refuse_unreadable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# CPU time of one call. coreai-core 1.0.0b3 on x86: 30 million float16 products a second, 2,900 million float32 ones.
SLOW_S = 2.0


def warm_up() -> None:
    """Import the runtime or the framework's bindings, and the compiler."""
    import coreai.authoring  # noqa: F401


def opened(entry: Path, signature: Signature) -> Session:
    """The asset at ``entry``, compiled and loaded; ArtifactDamaged when it is not whole or lacks a function."""
    import asyncio  # takes longer than all that a light verb reads of a target

    from coreai.authoring import AIModelAsset

    open_asset(entry)
    refuse_unreadable(entry)
    loop = asyncio.new_event_loop()
    context = AIModelAsset.load(entry).executable()
    try:
        model = loop.run_until_complete(context.__aenter__())
    except (RuntimeError, ValueError) as error:
        loop.close()
        raise ArtifactDamaged(f"Core AI cannot load it: {error}", where=str(entry)) from error
    close = partial(_close, loop, context)
    try:
        session = _Session(loop, _functions(model, entry, signature), signature)
    except ArtifactDamaged:
        close()
        raise
    weakref.finalize(session, close)
    return session


def _close(loop: Any, context: Any) -> None:
    loop.run_until_complete(context.__aexit__(None, None, None))
    loop.close()


def _functions(model: Any, entry: Path, signature: Signature) -> dict[str, Any]:
    """The loaded function of each method."""
    names = {method: function_of(method, signature.methods) for method in signature.methods}
    absent = sorted(set(names.values()) - set(model.function_names))
    if absent:
        there = ", ".join(sorted(model.function_names))
        raise ArtifactDamaged(f"it has no function {absent[0]!r}; its functions: {there}", where=str(entry))
    return {method: model.load_function(name) for method, name in names.items()}


class _Session:
    """One loaded function per method."""

    def __init__(self, loop: Any, functions: Mapping[str, Any], signature: Signature) -> None:
        self._loop = loop
        self._functions = functions
        self._signature = signature
        self._called = False

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; inputs go in as the asset declares them, outputs come back in the signature's dtypes."""
        import numpy as np
        from coreai.runtime import NDArray as Array

        specs = self._signature.methods[method]
        given = {
            spec.name: Array(np.array(inputs[spec.name], dtype=spec.lowered_dtype or spec.dtype, order="C"))
            for spec in specs.inputs
        }
        started = time.process_time()
        try:
            outputs = self._loop.run_until_complete(self._functions[method](given))
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
            raise StageFailed(f"Core AI failed in {method} with {shapes}: {error}", where="validate") from error
        self._refuse_slow(time.process_time() - started)
        return {spec.name: np.array(outputs[spec.name].numpy(), dtype=spec.dtype) for spec in specs.outputs}

    def _refuse_slow(self, seconds: float) -> None:
        """NotMeasured after a first call that promises hours."""
        if not self._called and seconds > SLOW_S:
            raise NotMeasured(
                f"the first call took {seconds:.1f} s of CPU time, more than {SLOW_S:g} s: the runtime inside "
                "coreai-core computes float16 a hundred times slower than float32; run `edgebake verify` on a Mac with "
                "macOS 27"
            )
        self._called = True
