"""A decoder whose functions have fixed shapes, as one that reads texts of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.target import Session
from edgebake.types import Signature
from edgebake_targets._decoders import INPUTS, refuse_past_the_end

if TYPE_CHECKING:
    from numpy.typing import NDArray

DECODE, PREFILL = "decode", "prefill"
Arrays = Mapping[str, "NDArray[Any]"]


def longest(signature: Signature) -> int:
    """Tokens that a call of the decoder takes at most."""
    (method,) = signature.methods.values()
    size = method.inputs[0].shape[1]
    return size if isinstance(size, int) else signature.dims[size].max


def of_single_tokens(inner: Session, signature: Signature) -> Session:
    """The open session ``inner``; of a decoder that takes one token a call one that takes texts."""
    if signature.language is None or longest(signature) > 1:
        return inner
    (name,) = signature.methods
    return DecoderSession(inner, signature, decode=name)


class DecoderSession:
    """A decoder's one method over an open session of its functions (``edgebake.target.Session``).

    ``decode``: the function that takes one token; without another one it reads every text.
    """

    def __init__(self, inner: Any, signature: Signature, decode: str = DECODE) -> None:
        assert signature.language is not None
        self._inner = inner
        self._decode = decode
        self._context = signature.language.context
        self._once = longest(signature)
        self.modes: tuple[str, ...] = getattr(inner, "modes", ())
        if hasattr(inner, "intermediates"):  # who has the method is asked
            self.intermediates = self._inside

    def begin(self) -> None:
        """Forget the text that was read."""
        self._inner.begin()

    def call(self, _method: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Logits of ``tokens`` (1, n), which stand at ``input_pos`` (1,) and after it; StageFailed past the context."""
        import numpy as np

        parts = [self._inner.call(name, given)["logits"][:, :count] for name, given, count in self._calls(inputs)]
        return {"logits": np.concatenate(parts, axis=1)}

    def call_mode(self, mode: str, _method: str, inputs: Arrays) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Like :func:`call` in one of ``modes``, with what is not finite inside."""
        import numpy as np

        strange: dict[str, str] = {}
        parts = []
        for name, given, count in self._calls(inputs):
            outputs, found = self._inner.call_mode(mode, name, given)
            parts.append(outputs["logits"][:, :count])
            strange |= found
        return {"logits": np.concatenate(parts, axis=1)}, strange

    def _inside(self, _method: str, inputs: Arrays, modules: Iterable[str]) -> dict[str, NDArray[Any]]:
        """Value that each of ``modules`` hands on for ``tokens``, (1, n, ...) float32; others are absent."""
        import numpy as np

        wanted = list(modules)
        found: dict[str, list[NDArray[Any]]] = {}
        for name, given, count in self._calls(inputs):
            size = given[INPUTS[0]].shape[1]
            for module, value in self._inner.intermediates(name, given, wanted).items():
                if value.ndim > 1 and value.shape[1] == size:
                    found.setdefault(module, []).append(value[:, :count])
        return {module: np.concatenate(parts, axis=1) for module, parts in found.items()}

    def _calls(self, inputs: Arrays) -> Iterator[tuple[str, dict[str, NDArray[Any]], int]]:
        """Function, its inputs, and how many of its tokens count."""
        import numpy as np

        tokens, position = (inputs[name] for name in INPUTS)
        refuse_past_the_end(self._context, tokens, position)
        start, count = int(position[0]), tokens.shape[1]
        if 1 < count and 1 < self._once and start + self._once <= self._context:
            filled = np.zeros((1, self._once), tokens.dtype)
            filled[:, :count] = tokens
            yield PREFILL, dict(zip(INPUTS, (filled, position), strict=True)), count
            return
        for number in range(count):
            one = tokens[:, number : number + 1]
            yield self._decode, dict(zip(INPUTS, (one, position + number), strict=True)), 1
