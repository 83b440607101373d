"""A decoder cut into packages that an app calls one after the other, where one would be larger than it should be.

A cut lies between two layers, where the residual stream, ``hidden`` (1, n, width), is all that goes on: the parts are
the embedding with the first layers, layers, and the last ones with norm and head. Each keeps the states of its own
layers, and computes for itself what depends on the position alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebake.errors import StageFailed
from edgebake.scheme import parse
from edgebake.types import canonical_module_name
from edgebake_targets._coreml_decoder import HIDDEN
from edgebake_targets._coreml_decoder_graph import put
from edgebake_targets._decoder_positions import unused_dropped
from edgebake_targets._decoders import INPUTS

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """``module``: (tokens or hidden, input_pos) -> hidden or logits; ``takes`` and ``gives``: the width of hidden."""

    module: torch.fx.GraphModule
    takes: int | None
    gives: int | None


def weigher(schemes: Mapping[str, str], default: str) -> Callable[[str, int], float]:
    """(name of a parameter, its number of values) -> bytes in its module's scheme; scales and tables are left out."""

    def weigh(name: str, values: int) -> float:
        scheme = parse(schemes.get(canonical_module_name(name.rpartition(".")[0]), default))
        return scheme.payload_bytes(values)

    return weigh


def cut(module: torch.fx.GraphModule, weigh: Callable[[str, int], float], most_mib: float) -> list[Part]:
    """``module`` of :func:`_coreml_decoder_graph.rewritten` in parts whose weights take at most ``most_mib`` each.

    StageFailed where a layer, or the head, is larger alone, and where more than one tensor goes from layer to layer.
    """
    tokens, position = module.graph.find_nodes(op="placeholder")
    beside = _beside(module.graph, tokens, position)
    stages = _stages(module.graph, beside)
    taken = _filled(_weights(module, stages, beside, weigh), most_mib * MIB)
    own = {node: taken[stage] for node, stage in stages.items()}
    count = max(own.values()) + 1
    if count == 1:
        return [Part(module=module, takes=None, gives=None)]
    edges = [_edge(own, number) for number in range(count - 1)]
    return [
        _part(module, own, beside, number, edges[number - 1] if number else None, edges[number : number + 1])
        for number in range(count)
    ]


def _beside(graph: torch.fx.Graph, tokens: torch.fx.Node, position: torch.fx.Node) -> set[torch.fx.Node]:
    """What every part can have for itself: constants, the number of tokens, and what the position tells."""
    import torch

    found = {position}
    for node in graph.nodes:
        sized = node.target is torch.ops.aten.sym_size.int and node.args[0] is tokens
        told = node.op == "call_function" and all(given in found for given in node.all_input_nodes)
        if node.op == "get_attr" or sized or told:
            found.add(node)
    return found - {position}


def _stages(graph: torch.fx.Graph, without: set[torch.fx.Node]) -> dict[torch.fx.Node, int]:
    """Place of each operator: 0 before the layers, 1 to N in them, N + 1 after them."""
    nodes = [node for node in graph.nodes if node.op == "call_function" and node not in without]
    layers = [_layer(node) for node in nodes]
    last = max((at for at, layer in enumerate(layers) if layer is not None), default=-1)
    found, stage = {}, 0
    for at, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
        stage = stage + 1 if at == last + 1 else stage if layer is None else max(stage, layer + 1)
        found[node] = stage
    return found


def _layer(node: torch.fx.Node) -> int | None:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    numbers = _LAYER.search(str(stack[-1][0])) if stack else None
    return int(numbers[1]) if numbers else None


def _weights(
    module: torch.fx.GraphModule,
    stages: Mapping[torch.fx.Node, int],
    beside: set[torch.fx.Node],
    weigh: Callable[[str, int], float],
) -> list[float]:
    """Bytes of the parameters that each stage reads; one that several read is in each of them."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names: dict[int, set[str]] = {stage: set() for stage in range(max(stages.values()) + 1)}
    for node, stage in stages.items():
        names[stage] |= _sources(node, beside) & parameters.keys()
    return [sum(weigh(name, parameters[name].numel()) for name in sorted(names[stage])) for stage in sorted(names)]


def _sources(node: torch.fx.Node, beside: set[torch.fx.Node]) -> set[str]:
    """Names of the stored tensors that ``node`` reads, also through what is made of them alone."""
    given = [source for source in node.all_input_nodes if source in beside]
    names = {str(source.target) for source in given if source.op == "get_attr"}
    return names.union(*(_sources(source, beside) for source in given if source.op == "call_function"))


def _filled(sizes: list[float], most: float) -> list[int]:
    """Part of each stage: as many in a row as ``most`` bytes hold."""
    parts, part, full = [], 0, 0.0
    for stage, size in enumerate(sizes):
        if size > most:
            what = "the embedding" if not stage else "the head" if stage == len(sizes) - 1 else f"layer {stage - 1}"
            raise StageFailed(
                f"{what} alone takes {size / MIB:.1f} MiB, and a package may take {most / MIB:g}",
                where="lower",
                fix=f"options: {{chunk_mib: {int(max(sizes) / MIB) + 1}}}, or fewer bits for it",
            )
        if full and full + size > most:
            part, full = part + 1, 0.0
        parts.append(part)
        full += size
    return parts


def _edge(own: Mapping[torch.fx.Node, int], number: int) -> torch.fx.Node:
    """The value that parts up to ``number`` hand to those after it."""
    live = [n for n, part in own.items() if part <= number and any(own.get(user, -1) > number for user in n.users)]
    if len(live) != 1:
        raise StageFailed(
            f"{len(live)} tensors go from one layer to the next, and packages are cut where one does",
            where="lower",
            fix="leave chunk_mib out",
        )
    return live[0]


def _part(
    module: torch.fx.GraphModule,
    own: Mapping[torch.fx.Node, int],
    beside: set[torch.fx.Node],
    number: int,
    before: torch.fx.Node | None,
    after: list[torch.fx.Node],
) -> Part:
    import torch

    made = torch.fx.Graph()
    entry = made.placeholder(HIDDEN if before is not None else INPUTS[0])
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    tokens, position = module.graph.find_nodes(op="placeholder")
    env[position] = made.placeholder(INPUTS[1])
    env[tokens if before is None else before] = entry
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and node.args[0] is tokens:
            env[node] = made.call_function(torch.ops.aten.sym_size.int, (entry, 1))
        elif node in beside or own.get(node) == number:
            env[node] = made.node_copy(node, env.__getitem__)
    (result,) = after or _results(module.graph)
    made.output((env[result],))
    unused_dropped(made, put)
    width = before.meta["val"].shape[-1] if before is not None else None
    return Part(
        module=torch.fx.GraphModule(module, made),
        takes=None if width is None else int(width),
        gives=int(after[0].meta["val"].shape[-1]) if after else None,
    )


def _results(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    (output,) = graph.find_nodes(op="output")
    return list(output.all_input_nodes)


def caches_of(module: torch.fx.GraphModule) -> tuple[str, ...]:
    """Names of the caches that ``module`` writes to."""
    nodes = module.graph.find_nodes(op="call_function", target=put)
    return tuple(sorted(canonical_module_name(str(node.args[0].target)) for node in nodes))
