"""Model source ``python``: a callable ``module:function`` that returns the network. Its code runs in ``load`` only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.callables import import_module, own_code_failed, split_callable
from edgebake.errors import RecipeError
from edgebake.models import _paths, _shared
from edgebake.models._request import LoadRequest
from edgebake.recipe import Model
from edgebake.types import Loaded

if TYPE_CHECKING:
    import torch


def load(request: LoadRequest) -> Loaded:
    """The network that the recipe's callable returns for ``model.options``.

    Several methods: a mapping ``{method: module}``, or one module (then every method runs its ``forward``).
    Inputs go by name where ``forward`` has parameters of all those names, else by position.
    """
    import torch

    model = request.model
    made = _make(model, request.base)
    networks = dict(made) if isinstance(made, Mapping) else dict.fromkeys(request.component.all_methods, made)
    missing = [m for m in request.component.all_methods if not isinstance(networks.get(m), torch.nn.Module)]
    if missing:
        raise RecipeError(
            f"{model.path} returned {type(networks.get(missing[0])).__name__} for {missing[0]!r}, not a torch module",
            where="model.path",
            fix="return an nn.Module, or a mapping from method to nn.Module",
        )
    if model.state_dict is not None:
        _load_state(made, model, request.base)
    for network in networks.values():
        _shared.freeze(network)
    first = next(iter(networks.values()))
    facts = {
        "class": type(_innermost(first)).__name__,
        "parameters": sum(p.numel() for p in {id(p): p for n in networks.values() for p in n.parameters()}.values()),
        "weights": model.weights,
        "licence": model.licence,
        "revision": None,
    }
    return _shared.finish(request.component, networks, _invoke, facts)


def _invoke(network: torch.nn.Module, given: Mapping[str, torch.Tensor]) -> Any:
    parameters = inspect.signature(network.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return network(**given) if set(given) <= named else network(*given.values())


def _innermost(network: torch.nn.Module) -> torch.nn.Module:
    while "wrapped" in dict(network.named_children()):
        network = network.get_submodule("wrapped")
    return network


def _make(model: Model, base: Path) -> Any:
    import torch

    module_name, name = split_callable(model.path)
    module = import_module(module_name, base)
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"{module_name} has no callable {name!r}", where="model.path")
    try:
        inspect.signature(function).bind(**model.options)
    except TypeError as error:
        raise RecipeError(f"{model.path} does not take these options: {error}", where="model.options") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)  # a network that draws its weights draws the same ones every time
        try:
            return function(**model.options)
        except Exception as error:
            raise own_code_failed(model.path, error) from error


def _load_state(network: Any, model: Model, base: Path) -> None:
    import torch
    from safetensors.torch import load_file

    file = _paths.resolve(str(model.state_dict), base)
    if isinstance(file, _paths.HubId) or not file.is_file():
        raise RecipeError(f"there is no file {model.state_dict!r}", where="model.state_dict")
    if not isinstance(network, torch.nn.Module):
        raise RecipeError(
            "a state_dict needs one module, the callable returned several",
            where="model.state_dict",
            fix="load the weights in the callable",
        )
    if file.suffix == ".safetensors":
        state = load_file(file)
    elif model.pickles:
        state = torch.load(file, map_location="cpu", weights_only=True)
    else:
        raise RecipeError(
            f"{file.name} is a pickle",
            where="model.state_dict",
            fix="save it as safetensors, or set `pickles: true` (it is read with weights_only)",
        )
    target = _innermost(network)
    fit = target.load_state_dict(state, strict=False)
    wrong = [*(f"no weights for {k}" for k in fit.missing_keys), *(f"no module for {k}" for k in fit.unexpected_keys)]
    if wrong:
        raise RecipeError(
            f"{file.name} does not fit {type(target).__name__}: {'; '.join(wrong[:5])}", where="model.state_dict"
        )
