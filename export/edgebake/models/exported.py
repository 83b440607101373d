"""Model source ``exported``: a ``.pt2`` file of torch.export. It counts as code: only with ``--trust``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError, TrustError
from edgebake.models import _paths, _shared
from edgebake.models._request import LoadRequest
from edgebake.types import Loaded

if TYPE_CHECKING:
    import torch


def load(request: LoadRequest) -> Loaded:
    """The program in ``request``'s file as a module; the recipe's inputs go by position.

    TrustError without ``--trust``: loading a .pt2 can run code. RecipeError: not an exported program.
    """
    file = _paths.resolve_file(request.model.path, request.base, ".pt2")
    if not request.trust:
        raise TrustError(
            f"{file.name} is an exported program, and loading one can run code",
            where="model.path",
            fix="build with --trust if you know where it comes from",
        )
    import torch

    from edgebake.models import _layers

    try:
        program = torch.export.load(file)
    except Exception as error:  # torch, zipfile and json each raise their own on a damaged file
        raise RecipeError(
            f"{file.name} cannot be loaded: {next(iter(str(error).splitlines()), type(error).__name__)}",
            where="model.path",
            fix="export it again with torch.export.save of this torch version",
        ) from error
    network = _float32(program.module(check_guards=False))
    _layers.restore(network)
    facts = {
        "class": "ExportedProgram",
        "parameters": _shared.parameters_of(network),
        "weights": request.model.weights,
        "licence": request.model.licence,
        "revision": None,
    }
    methods = request.component.all_methods
    return _shared.finish(request.component, dict.fromkeys(methods, network), _invoking(program), facts)


def _invoking(program: torch.export.ExportedProgram) -> Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], Any]:
    """Inputs in the recipe's order, put into the tuples, dicts and keywords that the program was exported with."""
    from torch.utils._pytree import tree_unflatten

    spec = program.call_spec.in_spec

    def invoke(network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> Any:
        if spec is None or spec.num_leaves != len(given):
            return network(*given.values())
        args, kwargs = tree_unflatten(list(given.values()), spec)
        return network(*args, **kwargs)

    return invoke


def _float32(network: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """``network`` as a plain frozen module; RecipeError where its operators were recorded in another float type."""
    import torch

    half = sorted({str(p.dtype) for p in network.parameters() if p.is_floating_point() and p.dtype != torch.float32})
    if half:
        raise RecipeError(
            f"the exported program computes in {', '.join(half)}, not float32",
            where="model.path",
            fix="export the model after .float()",
        )
    # torch.export forbids eval() on its modules; the mode is baked into the operators, so the plain one does no harm.
    for name in ("train", "eval"):
        vars(network).pop(name, None)
    network.eval().requires_grad_(False)
    return network
