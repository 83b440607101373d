"""Attention masks that lower well: one additive 4-D mask instead of the index arithmetic of transformers.

transformers expands a 2-D ``attention_mask`` with boolean indexing, which edge backends do not take (aten.index,
GatherND: 16 operators beside XNNPACK on MiniLM), and detects packed sequences with ``diff``, which Core ML lacks.
A 4-D additive mask is taken as it is; used only where the outputs stay the same at the recipe's largest size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["own", "keys", "causal"]

# exp(-100) is 0 in float32 against any score of the same row that is not 84 lower, and unlike the largest negative
# number it survives half precision (no 0 * inf) and leaves a quantised score some resolution.
MASKED = -100.0
TOLERANCE = 1e-5


def additive(kind: Kind, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``inputs`` with ``attention_mask`` float32 (batch, 1, 1 or seq, seq): 0 where visible, else ``MASKED``."""
    import torch

    given = dict(inputs)
    keys = given.get("attention_mask")
    hidden = None if keys is None else (keys == 0)[:, None, None, :]
    if kind == "causal":
        place = torch.arange(given["input_ids"].shape[1])
        later = (place[None, :] > place[:, None])[None, None]
        hidden = later if hidden is None else hidden | later
    if hidden is not None:
        given["attention_mask"] = torch.where(hidden, MASKED, 0.0)
    return given


def choose(network: torch.nn.Module, examples: Mapping[str, torch.Tensor], constants: Mapping[str, Any]) -> Kind:
    """The mask to give ``network``: an additive one where the outputs stay the same on ``examples``, else its own."""
    mask = examples.get("attention_mask")
    ids = examples.get("input_ids")
    takes_two = mask is None or (mask.dim() == 2 and not mask.dtype.is_floating_point)
    if not takes_two or ids is None or ids.dim() != 2:
        return "own"
    kinds: tuple[Kind, ...] = ("causal",) if mask is None else ("keys", "causal")
    given = dict(examples)
    if mask is not None:  # some padding, so that the comparison sees masked keys
        given["attention_mask"] = mask.clone()
        given["attention_mask"][:, mask.shape[1] - mask.shape[1] // 3 :] = 0
    return next((kind for kind in kinds if _same(network, given, additive(kind, given), constants)), "own")


def _same(
    network: torch.nn.Module,
    own: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
    constants: Mapping[str, Any],
) -> bool:
    import torch

    from edgebake.models._shared import leaves

    with torch.no_grad():
        want = dict(leaves(network(**own, **constants)))
        try:
            got = dict(leaves(network(**other, **constants)))
        except (RuntimeError, ValueError, TypeError, IndexError):  # this network wants a 2-D mask
            return False
    if [(n, t.shape) for n, t in want.items()] != [(n, t.shape) for n, t in got.items()]:
        return False
    return all(
        bool(torch.linalg.vector_norm(got[n] - t) <= TOLERANCE * torch.linalg.vector_norm(t)) for n, t in want.items()
    )
