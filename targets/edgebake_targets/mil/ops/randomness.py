"""Random numbers: shapes and distributions are Core ML's, the numbers are torch's, so no parity can be measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import bounded


def _generator(call: Call) -> torch.Generator | None:
    """A seed makes every evaluation draw the same numbers; -1 is none."""
    seed = call.integer("seed", -1)
    return None if seed < 0 else torch.Generator().manual_seed(seed)


def _shape(call: Call) -> list[int]:
    return bounded(call, call.integers("shape"))


def random_bernoulli(call: Call) -> torch.Tensor:
    """1 with the probability ``prob``, else 0."""
    return (torch.rand(_shape(call), generator=_generator(call)) < call.number("prob", 0.5)).float()


def random_normal(call: Call) -> torch.Tensor:
    """Around ``mean``, as wide as ``stddev``."""
    normal = torch.randn(_shape(call), generator=_generator(call))
    return normal * call.number("stddev", 1.0) + call.number("mean", 0.0)


def random_uniform(call: Call) -> torch.Tensor:
    """From ``low`` on, below ``high``."""
    low, high = call.number("low", 0.0), call.number("high", 1.0)
    return torch.rand(_shape(call), generator=_generator(call)) * (high - low) + low


def random_categorical(call: Call) -> torch.Tensor:
    """``size`` draws with replacement from each distribution in the last axis, as floats."""
    x, size, mode = call["x"].float(), call.integer("size", 1), call.text("mode", "logits")
    if mode not in ("logits", "probs"):
        raise Unsupported(f"random_categorical in the mode {mode!r}")
    bounded(call, [*x.shape[:-1], size])
    weights = x.softmax(-1) if mode == "logits" else x
    drawn = weights.reshape(-1, x.shape[-1]).multinomial(size, replacement=True, generator=_generator(call))
    return drawn.reshape(*x.shape[:-1], size).float()


OPERATORS: Mapping[str, Operator] = {
    "random_bernoulli": random_bernoulli,
    "random_categorical": random_categorical,
    "random_normal": random_normal,
    "random_uniform": random_uniform,
}
RANDOM = frozenset(OPERATORS)  # a program with one of these gives other numbers on a device
