"""A decoder's weights as the writer of genai graphs asks for them: by name, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError, StageFailed
from edgebake.types import Tensors, canonical_module_name
from edgebake_targets._genai_graph import EMBEDDING, HEAD

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_CHUNK_BYTES = 8 << 20  # of rows at a time
_SHOWN = 3


class StateTensors:
    """What ``state``, an exported program's, holds under the network's own names."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = {canonical_module_name(name): value for name, value in state.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return tuple(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor ``name``."""
        return tuple(self._find(name).shape)

    def rows(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The matrix ``name``, some rows at a time."""
        value = self._find(name)
        step = max(1, _CHUNK_BYTES // (4 * value.shape[1]))
        for first in range(0, value.shape[0], step):
            yield _array(value[first : first + step])

    def whole(self, name: str) -> NDArray[np.float32]:
        """All of the tensor ``name``."""
        return _array(self._find(name))

    def _find(self, name: str) -> torch.Tensor:
        if name not in self._state:
            what = f"the network has no tensor {name!r}, which config.json makes the graph want"
            raise RecipeError(what, where="model.path", fix="config.json and weights must be of one model")
        return self._state[name]


class NotedTensors:
    """``tensors``, remembering which of them were asked for."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._read: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""
        return self._tensors.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor ``name``."""
        self._read.add(name)
        return self._tensors.shape(name)

    def rows(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The matrix ``name``, some rows at a time."""
        self._read.add(name)
        return self._tensors.rows(name)

    def whole(self, name: str) -> NDArray[np.float32]:
        """All of the tensor ``name``."""
        self._read.add(name)
        return self._tensors.whole(name)

    def refuse_unread(self, *, tied: bool) -> None:
        """StageFailed where the network has weights that the graph does not: it would compute something else.

        ``tied``: the head is the embedding, so that its own weight is no other.
        """
        left = sorted(name for name in set(self.names) - self._read if name.endswith((".weight", ".bias")))
        left = [name for name in left if not (tied and name == f"{HEAD}.weight")]
        if left:
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            raise StageFailed(
                f"the graph for onnxruntime-genai has no place for {', '.join(left[:_SHOWN])}{more}",
                where="lower",
                fix="use executorch-xnnpack, which lowers what was traced, or take out the step that added it",
            )


def tied(tensors: Tensors, *, without_head: bool = True) -> bool:
    """Whether the head multiplies by the embedding's weight: methods that merge matrices into weights part the two.

    ``without_head``: the answer where there is no weight of the head's own.
    """
    import numpy as np

    head, table = f"{HEAD}.weight", f"{EMBEDDING}.weight"
    if head not in tensors.names:
        return without_head
    if table not in tensors.names or tensors.shape(head) != tensors.shape(table):
        return False
    pairs = zip(tensors.rows(head), tensors.rows(table), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


def _array(value: torch.Tensor) -> NDArray[Any]:
    import torch

    array: NDArray[Any] = value.detach().to(torch.float32).numpy()
    return array
