"""Runs decoders written for onnxruntime-genai in ONNX Runtime itself, which gives every token's logits.

Keys and values stay in one buffer per layer that each call reads and writes in place, as onnxruntime-genai holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.types import RunnerKind, Signature
from edgebake_targets import _onnxruntime
from edgebake_targets._decoders import INPUTS, refuse_past_the_end

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNS = ("onnx-genai",)
KIND: RunnerKind = "executed"
DISTRIBUTIONS = _onnxruntime.DISTRIBUTIONS
SOURCES = ("edgebake_targets._decoders", "edgebake_targets._onnxruntime")

missing = _onnxruntime.missing
warm_up = _onnxruntime.warm_up


def open(entry: Path, signature: Signature) -> DecoderSession:  # noqa: A001 - the contract's name
    """Open the graph at ``entry``; ArtifactDamaged when ONNX Runtime refuses it, or a file is not there."""
    return DecoderSession(entry, signature)


class DecoderSession:
    """An open decoder and its cache of ``signature.language.context`` rows."""

    def __init__(self, entry: Path, signature: Signature) -> None:
        assert signature.language is not None
        self._context = signature.language.context
        with _onnxruntime.loading(entry):
            self._session = _onnxruntime.opened(entry)
        self._caches = self._empty()

    def begin(self) -> None:
        """Forget the text that was read."""
        self._caches = self._empty()

    def call(self, _method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Logits of ``tokens`` (1, n), which stand at ``input_pos`` (1,) and after it; StageFailed past the context."""
        import numpy as np

        tokens, position = (np.ascontiguousarray(inputs[name], np.int64) for name in INPUTS)
        refuse_past_the_end(self._context, tokens, position)
        seen = np.ones((1, int(position[0]) + tokens.shape[1]), np.int64)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", seen)
        binding.bind_output("logits")
        for past, (present, cache) in self._caches.items():
            binding.bind_ortvalue_input(past, cache)
            binding.bind_ortvalue_output(present, cache)
        self._session.run_with_iobinding(binding)
        return {"logits": binding.get_outputs()[0].numpy()}

    def _empty(self) -> dict[str, tuple[str, Any]]:
        """Past's name -> present's, and the buffer of both."""
        import numpy as np
        from onnxruntime import OrtValue

        made = {}
        for taken in self._session.get_inputs():
            if taken.name.startswith("past_key_values."):
                rows = np.zeros((1, taken.shape[1], self._context, taken.shape[3]), np.float32)
                present = taken.name.replace("past_key_values", "present")
                made[taken.name] = (present, OrtValue.ortvalue_from_numpy(rows))
        return made
