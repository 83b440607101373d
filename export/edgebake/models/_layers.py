"""The linear, convolution and embedding layers of an exported program as modules again.

An exported program keeps the folders its weights lay in and calls operators with them. Schemes and rules speak of
modules: without these a ``.pt2`` could be built in float32 only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_CONVOLUTIONS = {"aten::conv1d": "Conv1d", "aten::conv2d": "Conv2d", "aten::conv3d": "Conv3d"}
_TRANSPOSED = {
    "aten::conv_transpose1d": "ConvTranspose1d",
    "aten::conv_transpose2d": "ConvTranspose2d",
    "aten::conv_transpose3d": "ConvTranspose3d",
}


def restore(network: torch.fx.GraphModule) -> None:
    """Put modules in the place of the operators that ``network`` calls with a layer's ``weight`` and ``bias``.

    Left as it is: a layer whose weight has another place too, or that is called with other options than before.
    """
    places: dict[str, list[torch.fx.Node]] = {}
    for node in network.graph.nodes:
        path = _path(_arguments(node)) if hasattr(node.target, "_schema") else None
        if path is not None:
            places.setdefault(path, []).append(node)
    for path, calling in places.items():
        layers = [_layer(node, network) for node in calling]
        first = layers[0]
        alike = all(repr(layer) == repr(first) for layer in layers)
        if first is None or not alike or not _free(path, network, calling):
            continue
        network.set_submodule(path, first)
        for node in calling:
            read = _arguments(node)  # anew: another layer may have taken the place of what it reads
            with network.graph.inserting_before(node):
                called = network.graph.call_module(path, (read["input" if "input" in read else "indices"],))
            called.meta = node.meta
            node.replace_all_uses_with(called)
            network.graph.erase_node(node)
    for node in reversed(network.graph.nodes):
        if node.op == "get_attr" and not node.users:
            network.graph.erase_node(node)
    network.recompile()


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """What ``node`` calls its operator with, by name, defaults included."""
    operator: Any = node.target
    arguments = operator._schema.arguments
    by_place = dict(zip((a.name for a in arguments), node.args, strict=False))
    return {**{a.name: a.default_value for a in arguments}, **by_place, **node.kwargs}


def _path(given: Mapping[str, Any]) -> str | None:
    """The folder that weight and bias share; None where they have none."""
    import torch.fx

    paths = []
    for name in ("weight", "bias"):
        value = given.get(name)
        if value is not None:
            if not isinstance(value, torch.fx.Node) or value.op != "get_attr":
                return None
            folder, _, leaf = str(value.target).rpartition(".")
            if leaf != name or not folder:
                return None
            paths.append(folder)
    return paths[0] if paths and len(set(paths)) == 1 else None


def _free(path: str, network: torch.fx.GraphModule, calling: Sequence[torch.fx.Node]) -> bool:
    """Whether ``path`` holds a layer's parameters and nothing else, and only ``calling`` reads them."""
    import torch

    module = network.get_submodule(path)
    held = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    readers = {u for n in network.graph.nodes if str(n.target) in (f"{path}.weight", f"{path}.bias") for u in n.users}
    return type(module) is torch.nn.Module and held <= {"weight", "bias"} and readers <= set(calling)


def _layer(node: torch.fx.Node, network: torch.fx.GraphModule) -> torch.nn.Module | None:
    """The layer that computes ``node``, with the network's own parameters; None for other operators."""
    given = _arguments(node)
    owned = {name: _parameter(given[name], network) for name in ("weight", "bias") if given.get(name) is not None}
    weight = owned["weight"]
    if weight is None or None in owned.values():
        return None
    operator: Any = node.target
    made = _made(operator._schema.name, given, weight, "bias" in owned)
    if made is not None:
        for name, parameter in owned.items():
            made.register_parameter(name, parameter)
    return made


def _parameter(node: torch.fx.Node, network: torch.fx.GraphModule) -> torch.nn.Parameter | None:
    folder, _, leaf = str(node.target).rpartition(".")
    return network.get_submodule(folder)._parameters.get(leaf)


def _made(operator: str, given: Mapping[str, Any], weight: torch.Tensor, biased: bool) -> torch.nn.Module | None:
    """Allocates nothing: weights are set by the caller."""
    import torch

    where: Any = {"device": "meta"}
    if operator == "aten::linear" and weight.dim() == 2:
        return torch.nn.Linear(weight.shape[1], weight.shape[0], bias=biased, **where)
    if operator == "aten::embedding":
        padding = given["padding_idx"] if given["padding_idx"] >= 0 else None
        return torch.nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding, **where)
    shared = {"stride", "padding", "dilation", "groups", "output_padding"}
    options = {name: _plain(value) for name, value in given.items() if name in shared}
    options |= {"kernel_size": tuple(weight.shape[2:]), "bias": biased, **where}
    made: torch.nn.Module | None = None
    if operator in _CONVOLUTIONS:
        made = getattr(torch.nn, _CONVOLUTIONS[operator])(weight.shape[1] * given["groups"], weight.shape[0], **options)
    elif operator in _TRANSPOSED:
        made = getattr(torch.nn, _TRANSPOSED[operator])(weight.shape[0], weight.shape[1] * given["groups"], **options)
    return made


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
