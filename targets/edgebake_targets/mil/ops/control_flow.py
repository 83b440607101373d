"""Control flow: choices and loops over nested blocks, and the choice between two tensors value by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported

MOST_ROUNDS = 100_000  # of a loop; more is taken for one that never ends


def cond(call: Call) -> tuple[Any, ...]:
    """The values of the first block where ``pred`` holds, else those of the second."""
    return call.blocks[0 if call.flag("pred") else 1]()


def while_loop(call: Call) -> tuple[Any, ...]:
    """Carry ``loop_vars`` through the second block as long as the first one, given them, says so."""
    held = tuple(call.many("loop_vars"))
    goes_on, body = call.blocks
    for _ in range(MOST_ROUNDS):
        (more,) = goes_on(*held)
        if not bool(more):
            return held
        held = body(*held)
    raise Unsupported(f"a loop of more than {MOST_ROUNDS} rounds")


def select(call: Call) -> torch.Tensor:
    """``a`` where ``cond`` holds, else ``b``; the three are broadcast."""
    return torch.where(call["cond"].bool(), call["a"], call["b"])


OPERATORS: Mapping[str, Operator] = {"cond": cond, "while_loop": while_loop, "select": select}
