"""Decoders for onnxruntime-genai: a folder with graph, weights, tokenizer and settings that it generates from.

The graph is written from the network's configuration and its weights, not from what was traced, so that neither has to
be loaded: attention over a
shared cache is one operator (GroupQueryAttention), a product with 4 or 8 bits another (MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edgebake.errors import RecipeError, StageFailed
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support
from edgebake.types import Delegation, Lowered, Signature, Streamed, Tensors, Traced, UnitWork
from edgebake_targets import _decoders
from edgebake_targets._genai_config import read_spec

if TYPE_CHECKING:
    from pathlib import Path

    from edgebake_targets._genai_config import Spec
    from edgebake_targets._genai_graph import GraphFacts

FORMAT = "onnx"
DISTRIBUTIONS = ("torch", "onnx", "numpy")
DECODES = True
STREAMS = True
SOURCES = tuple(
    f"edgebake_targets.{name}"
    for name in (
        "_decoders",
        "_genai_config",
        "_genai_graph",
        "_genai_journal",
        "_genai_state",
        "_genai_weights",
        "_onnx",
        "_onnx_graph",
        "_onnx_half",
        "_onnx_macs",
        "_onnx_quantize",
        "_onnx_units",
        "_units",
    )
)
SUPPORTS = (
    Support(scheme="fp32", kinds=("linear", "embedding")),
    Support(scheme="fp16", kinds=("linear", "embedding"), note="stored in half, computed in float32"),
    *(
        Support(scheme=f"w4g{n}{dynamic}", kinds=("linear",), note=f"MatMulNBits, {how}; input width a multiple of {n}")
        for dynamic, how in (("", "float products"), ("a8d", "accuracy level 4"))
        for n in (32, 64, 128)
    ),
    *(
        Support(
            scheme=f"w4g{n}z{dynamic}",
            kinds=("linear",),
            note=f"MatMulNBits, {how}, and a float32 offset for each group, times the sum of its inputs; input width a "
            f"multiple of {n}",
        )
        for dynamic, how in (("", "float products"), ("a8d", "accuracy level 4"))
        for n in (32, 64, 128)
    ),
    Support(
        scheme="w8a8d",
        kinds=("linear",),
        note="MatMulNBits, accuracy level 4, int8 in the widest groups of 16 to 256 that divide a row; a tied head "
        "reads the embedding's one copy where that is w8",
    ),
    Support(
        scheme="w8",
        kinds=("linear", "embedding"),
        note="int8 in the widest groups of 16 to 256 that divide a row. For fast linear layers use w8a8d: with float "
        "products ONNX Runtime 1.31 unpacks the whole matrix at every call (49152 rows of 576: 166 ms against 1.5)",
    ),
)
OPTIONS: tuple[Option, ...] = ()


def missing() -> Missing | None:
    """Whether onnx is installed."""
    if find_spec("onnx") is not None:
        return None
    return Missing(reason="not installed: onnx", remedy="pip install onnx")


def refusals(asked: Asked) -> Iterator[Refusal]:
    """A network that is no decoder with a cache, and matrices whose width no group of their scheme divides."""
    for inputs in asked.inputs.values():
        if tuple(taken.name for taken in inputs) != _decoders.INPUTS:
            yield _NO_DECODER
            return
    yield from _family(asked)
    yield from _widths(asked)


def _family(asked: Asked) -> Iterator[Refusal]:
    """What the graph has no nodes for; nothing where config.json is not here."""
    from edgebake_targets._genai_config import spec_of

    try:
        if asked.config:
            spec_of(asked.config)
    except RecipeError as error:
        yield from (Refusal(what=problem.what, fix=problem.fix, key="model") for problem in error.problems)


def _widths(asked: Asked) -> Iterator[Refusal]:
    """One refusal for all matrices of one width and scheme; the first is named."""
    from edgebake_targets._genai_graph import refusal_of

    firsts: dict[tuple[str, int], str] = {}
    for module, width in asked.widths.items():
        firsts.setdefault(width, module)
    for (scheme, columns), module in firsts.items():
        if wrong := refusal_of(module, scheme, columns):
            yield replace(wrong, key="scheme" if scheme == asked.scheme else "modules")


_NO_DECODER = Refusal(
    what="onnx-genai writes decoders that generate text with a key/value cache, and nothing else",
    fix="give model: {task: text-generation, context: 2048}, with inputs tokens and input_pos, or use onnx-cpu",
)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write graph, weights and genai_config.json; the tokenizer's files are put beside them."""
    from edgebake_targets import _genai_state

    beside = _beside(traced.signature, request)
    (program,) = traced.programs.values()
    tensors = _genai_state.StateTensors(program.state_dict)
    spec = replace(read_spec(beside), tied=_genai_state.tied(tensors))
    return _written(spec, tensors, traced.signature, request)


def stream(streamed: Streamed, request: LowerRequest) -> Lowered:
    """Like :func:`lower`, the weights read where they lie, some rows of one tensor at a time."""
    from edgebake_targets import _genai_state

    spec = read_spec(_beside(streamed.signature, request))
    spec = replace(spec, tied=_genai_state.tied(streamed.tensors, without_head=spec.tied))
    return _written(spec, streamed.tensors, streamed.signature, request)


def _beside(signature: Signature, request: LowerRequest) -> Path:
    """The folder with config.json; StageFailed where the network generates no text."""
    if signature.language is None or request.beside is None:
        raise StageFailed(_NO_DECODER.what, where="lower", fix=_NO_DECODER.fix)
    return request.beside


def _written(spec: Spec, tensors: Tensors, signature: Signature, request: LowerRequest) -> Lowered:
    from edgebake_targets import _genai_config, _genai_graph
    from edgebake_targets._genai_state import NotedTensors
    from edgebake_targets._genai_weights import DATA

    language, beside = signature.language, request.beside
    assert language is not None
    assert beside is not None
    schemes = request.assignment.schemes
    noted = NotedTensors(tensors)
    graph = _genai_graph.write_graph(
        spec, noted, request.folder, context=language.context, scheme_of=lambda module: schemes.get(module, "fp32")
    )
    noted.refuse_unread(tied=spec.tied)
    config = _genai_config.write_config(request.folder, spec, beside, language.context, language.stop)
    return Lowered(
        files=(_genai_config.GRAPH, DATA, config),
        entry=_genai_config.GRAPH,
        signature=_decoders.without_caches(signature),
        delegation=Delegation(share=1.0, partitions=1, units=(_work(graph, signature),), border_bytes=0),
        encodings={**request.assignment.counted(), "runtime": dict(_genai_config.RUNTIME)},
    )


def _work(graph: GraphFacts, signature: Signature) -> UnitWork:
    """Of a call with as many tokens as one takes, each attending over the whole context."""
    from edgebake_targets._units import ONNX_RUNTIME_KERNELS

    (method,) = signature.methods.values()
    size = method.inputs[0].shape[1]
    tokens = size if isinstance(size, int) else signature.dims[size].max
    macs = graph.macs_per_token * tokens
    return UnitWork(unit="CPU", by=ONNX_RUNTIME_KERNELS, operators=graph.operators, macs=macs, subgraphs=1)
