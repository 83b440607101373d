"""Which components are language models; light verbs ask this of every recipe."""

from __future__ import annotations

from edgebake.recipe import Model

TASKS = frozenset({"text-generation", "text-generation-with-past", "causal-lm", "causal-lm-with-past"})


def is_decoder(model: Model) -> bool:
    """Whether ``model`` generates text: a transformers decoder, or what holds nothing else."""
    if model.source in ("gguf", "meta"):
        return model.task is None or model.task in TASKS
    return model.source == "transformers" and (model.context is not None or model.task in TASKS)
