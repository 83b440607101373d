"""Decoders on Qualcomm's NPU by ExecuTorch: a token a call, whose keys and values the CPU writes behind the NPU.

The NPU takes fixed shapes and keeps nothing between calls. So a layer's caches, (1, context, heads, width), are inputs
of its part; it hands on the row of the new token, which ExecuTorch's ``update_cache`` writes into buffers of the
program. The new token attends to its own row beside those of the caches, so that nothing in the part waits for a write.
ExecuTorch's own language models for QNN divide the work so (``examples/qualcomm/oss_scripts/llama``), with the caches
in the hands of a runner of their own; here the program keeps them, and the common runner can call it.

Caches are inputs while activations are measured, too: as buffers, their scales would be folded into what calibration
left in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgebake.types import MethodSignature, Traced
from edgebake_targets._decoder_positions import tabulated, unused_dropped
from edgebake_targets._decoders import CACHES, INPUTS, exported, of_single_tokens
from edgebake_targets._qnn_graph import MASKED

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Call = tuple[torch.Tensor, ...]


def stepwise(traced: Traced) -> Traced:
    """``traced`` taking one token a call; itself where it is no decoder. Weights are shared.

    Its program takes the caches behind the inputs of the signature and hands on a row for each behind the outputs.
    """
    if traced.signature.language is None:
        return traced
    return of_single_tokens(traced, _exported)


def calls(whole: Mapping[str, NDArray[Any]]) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The calls of one token each that a call of several stands for."""
    tokens, position = (whole[name] for name in INPUTS)
    for number in range(tokens.shape[1]):
        yield dict(zip(INPUTS, (tokens[:, number : number + 1], position + number), strict=True))


def carried(module: torch.nn.Module, texts: Iterable[Call], empty: Call) -> Iterator[Call]:
    """The calls of ``texts`` with caches behind them, as ``module`` itself fills those that begin ``empty``."""
    import torch

    caches = tuple(cache.clone() for cache in empty)
    for tokens, position in texts:
        yield tokens, position, *caches
        with torch.no_grad():
            _, *rows = module(tokens, position, *caches)
        start = int(position[0])
        for cache, row in zip(caches, rows, strict=True):
            cache[:, start : start + 1] = row


def keeping(module: torch.nn.Module, empty: Call) -> torch.nn.Module:
    """``module`` with its caches in buffers, shaped as ``empty``, into which ExecuTorch's operator writes."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama
    import torch

    class Keeping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            for number, cache in enumerate(empty):
                self.register_buffer(f"cache_{number}", cache, persistent=False)

        def forward(self, tokens: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor]:
            caches = [getattr(self, f"cache_{number}") for number in range(len(empty))]
            logits, *rows = self.inner(tokens, position, *caches)
            start = position.item()
            for cache, row in zip(caches, rows, strict=True):
                torch.ops.llama.update_cache(row, cache, start)
            return (logits,)

    return Keeping()


@contextmanager
def written_outside() -> Iterator[None]:
    """Buffers that a part reads and the CPU writes stay outside the parts.

    ExecuTorch 1.4 takes them for constants of the part, since what writes them is no operator of its own but one that
    is wrapped, and then refuses to lower them.
    """
    from executorch.backends.qualcomm.partition import qnn_partitioner

    tag = qnn_partitioner.tag_constant_data

    def tag_unwritten(program: torch.export.ExportedProgram) -> None:
        tag(program)
        signature = program.graph_signature
        written = set(signature.buffers_to_mutate.values())
        for node in program.graph.find_nodes(op="placeholder"):
            if signature.inputs_to_buffers.get(node.name) in written:
                node.meta.pop("delegation_tag", None)

    qnn_partitioner.tag_constant_data = tag_unwritten
    try:
        yield
    finally:
        qnn_partitioner.tag_constant_data = tag


def _exported(program: torch.export.ExportedProgram, method: MethodSignature) -> torch.export.ExportedProgram:
    """``(tokens (1, 1), input_pos (1,), caches...) -> (logits (1, 1, words), rows...)``."""
    import torch

    module, position, _ = tabulated(program)
    empty = [torch.zeros_like(buffer) for buffer in _caches(module).values()]
    graph, own = module.graph, torch.ops.edgebake
    graph.set_codegen(torch.fx.graph.CodeGen())  # plain arguments, to which some can be added
    given = _given(graph, position, list(_caches(module)))
    rows: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is own.update_cache.default:
            rows[given[node.args[1].target]] = node.args[0]
        elif node.target is own.cached_attention.default:
            query, keys, values, _, scale = node.args
            held = [given[cache.target] for cache in (keys, values)]
            node.target, node.args = _attend, (query, *(rows[cache] for cache in held), *held, position, scale)
    (end,) = graph.find_nodes(op="output")
    end.args = ((*end.args[0], *(rows[cache] for cache in given.values())),)
    unused_dropped(graph, None)
    graph.lint()
    # A module anew: the old one checks that it is given what it was traced with.
    return exported(torch.fx.GraphModule(module, graph), method, empty)


def _caches(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if name.endswith(CACHES)}


def _given(graph: torch.fx.Graph, behind: torch.fx.Node, names: Sequence[str]) -> dict[str, torch.fx.Node]:
    """A new input for each of ``names``, in that order."""
    found = {}
    for name in names:
        with graph.inserting_after(behind):
            behind = found[name] = graph.placeholder(name.replace(".", "_"))
    return found


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one token, (1, 1, heads, width), over the rows of the caches before ``position`` and its own.

    ``key`` and ``value``: (1, 1, shared heads, width), its own row; ``keys`` and ``values``: (1, context, shared heads,
    width). Heads that share a row of the caches are rows of one product (grouped-query attention, Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245).
    """
    import torch

    _, _, heads, width = query.shape
    context, shared = keys.shape[1:3]
    grouped = query.reshape(1, shared, heads // shared, width) * scale
    hidden = torch.where(torch.arange(context) >= position, MASKED, 0.0)
    before = grouped @ keys.permute(0, 2, 3, 1) + hidden
    shares = torch.cat([before, grouped @ key.permute(0, 2, 3, 1)], -1).softmax(-1)
    found = shares[..., :-1] @ values.permute(0, 2, 1, 3) + shares[..., -1:] * value.reshape(1, shared, 1, width)
    return found.reshape(1, 1, heads, width)
