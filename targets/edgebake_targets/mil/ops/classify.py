"""The last operator of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported


def classify(call: Call) -> tuple[Any, dict[Any, float]]:
    """The class of the highest probability, the first of several, and the probability of every class."""
    probabilities = call["probabilities"].reshape(-1)
    classes = [item.item() if isinstance(item, torch.Tensor) else item for item in call.inputs["classes"]]
    if len(classes) != len(probabilities):
        raise ValueError(f"classify of {len(probabilities)} probabilities with {len(classes)} classes")
    if not classes:
        raise Unsupported("classify without classes")
    return classes[int(probabilities.argmax())], dict(zip(classes, probabilities.tolist(), strict=True))


OPERATORS: Mapping[str, Operator] = {"classify": classify}
