"""Which components are language models; light verbs ask this of every recipe."""

from __future__ import annotations

from edgebake.recipe import Model

TASKS = frozenset({"text-generation", "text-generation-with-past", "causal-lm", "causal-lm-with-past"})


def is_decoder(model: Model) -> bool:
    """Whether ``model`` is a transformers decoder that generates text."""
    return model.source == "transformers" and model.task in TASKS
