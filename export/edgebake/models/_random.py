"""Makes an untrained network behave like a trained one as far as exporters and quantizers can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgebake import trace
from edgebake.models import _shared
from edgebake.recipe import Component

if TYPE_CHECKING:
    import torch


def settle_norms(network: torch.nn.Module, component: Component, constants: Mapping[str, Any], seed: int) -> None:
    """Give every batch normalisation the statistics of seeded noise, in place; others networks stay as they are.

    Fresh ones (mean 0, variance 1) normalise nothing: from layer to layer the values shrink until no integer scale
    can hold them and every sample gets the same class.
    """
    import torch

    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over what it sees
        norm.train()
    with torch.no_grad():
        for method in component.all_methods:
            signature = _shared.inputs_alone(component, method)
            given = trace.example_inputs(signature, method, seed)
            network(**dict(zip((s.name for s in signature.methods[method].inputs), given, strict=True)), **constants)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.eval()
