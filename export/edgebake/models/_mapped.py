"""A large decoder's trained weights in mapped files, read from its safetensors some rows at a time, never all at once.

The values are those that transformers would load: float32, made of the checkpoint's own float32, float16 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake import mapped
from edgebake.llm.shards import Shards

if TYPE_CHECKING:
    import torch


def trained(auto: Any, config: Any, folder: Path, more: Mapping[str, Any]) -> torch.nn.Module | None:
    """The network of ``config`` with the weights of ``folder``, let go of after use; None where transformers must read.

    That is a network that fits in memory, a folder without safetensors, and a checkpoint whose tensors are not the
    network's own by name and shape: which become which, transformers alone knows. RecipeError for damaged files.
    """
    import torch
    from transformers.initialization import no_init_weights

    if not any(folder.glob("*.safetensors")) or not mapped.is_large(auto, config, more):
        return None
    shards = Shards(folder)
    with torch.device("meta"):
        wanted = {n: tuple(p.shape) for n, p in auto.from_config(config, **more).named_parameters()}
    if {name: shards.shape(name) for name in shards.names} != wanted:
        return None
    with mapped.weights_in_files(large=True):
        with no_init_weights():
            made: Any = auto.from_config(config, **more)
        made.tie_weights()  # part of what is left out with the first values
        _fill(made, shards)
    mapped.release_after_use(made)
    network: torch.nn.Module = made
    return network


def _fill(network: torch.nn.Module, shards: Shards) -> None:
    """The values of ``shards`` into all parameters, each of which goes back to its file when some rows are written."""
    import torch

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            first = 0
            for some in shards.rows(name):
                parameter[first : first + len(some)] = torch.from_numpy(some)
                first += len(some)
