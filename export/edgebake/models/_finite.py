"""Weights that are no numbers: refused by name, before anything is computed with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebake.errors import RecipeError
from edgebake.llm.shards import INFINITE
from edgebake.wording import said

if TYPE_CHECKING:
    import torch

_SHOWN = 5


def refuse_infinite(network: torch.nn.Module) -> None:
    """RecipeError naming the parameters of ``network`` that hold NaN or infinity."""
    import torch

    # A sum is NaN or infinite where a value is; a sum that overflows without one is looked at again.
    wrong = [
        name
        for name, weight in network.named_parameters()
        if not torch.isfinite(weight.detach().sum()) and not torch.isfinite(weight.detach()).all()
    ]
    if wrong:
        raise RecipeError(
            f"{_listed(wrong)} of the checkpoint hold{'s' if len(wrong) == 1 else ''} values that are NaN or infinite",
            where="model.path",
            fix=INFINITE,
        )


def _listed(names: list[str]) -> str:
    return ", ".join(map(said, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
