"""Language models in a .pte: ExecuTorch's operators for a key/value cache, and what its own runner asks a model.

The runner (``extension/llm/runner`` of ExecuTorch) calls ``forward(tokens, input_pos)`` and reads a model's facts from
methods without inputs; those of ``llm_runner_helper.cpp`` and ``constants.h`` there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgebake.types import Signature, Traced
from edgebake_targets._decoders import without_caches
from edgebake_targets._executorch_cache import in_int8

if TYPE_CHECKING:
    import torch


def with_own_operators(traced: Traced, cache: str = "fp32") -> Traced:
    """``traced`` with ExecuTorch's operators in the place of ``edgebake``'s; itself where it is no decoder.

    Keys and values are kept in ``cache``: fp32 or int8.

    Its caches are no buffers that a call begins with: a row is written before it is read, whatever was there.
    """
    if traced.signature.language is None:
        return traced
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama

    programs = {name: _rewritten(program, cache) for name, program in traced.programs.items()}
    return Traced(programs=programs, signature=without_caches(traced.signature))


def _rewritten(program: torch.export.ExportedProgram, cache: str) -> torch.export.ExportedProgram:
    """A program of its own around a graph with ExecuTorch's operators; tensors are shared."""
    import torch

    graph = copy.deepcopy(program.graph)
    signature, constants = program.graph_signature, program.constants
    if cache == "int8":
        signature, constants = in_int8(program, graph)
    for node in graph.nodes:
        if node.target is torch.ops.edgebake.update_cache.default:
            node.target = torch.ops.llama.update_cache.default
        elif node.target is torch.ops.edgebake.cached_attention.default:
            *tensors_and_start, scale = node.args
            node.target = torch.ops.llama.custom_sdpa.default
            node.args = (*tensors_and_start, None, 0.0, True, scale)  # no mask, no dropout, causal
    return with_graph(program, graph, signature, constants)


def with_graph(
    program: torch.export.ExportedProgram,
    graph: torch.fx.Graph,
    signature: torch.export.ExportGraphSignature | None = None,
    constants: Mapping[str, Any] | None = None,
) -> torch.export.ExportedProgram:
    """A program of its own around ``graph``, a changed copy of that of ``program``; tensors are shared.

    ``signature``, ``constants``: those of ``program`` where they did not change with the graph.
    """
    from torch.export import ExportedProgram

    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=signature or program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=dict(program.constants if constants is None else constants),
        verifiers=program.verifiers,
    )


def metadata(signature: Signature) -> dict[str, Any] | None:
    """Methods without inputs, name to value, that ExecuTorch's runner reads; None where it is no decoder."""
    language = signature.language
    if language is None:
        return None
    (method,) = signature.methods.values()
    size = method.inputs[0].shape[1]
    once = size if isinstance(size, int) else signature.dims[size].max
    return {
        "get_max_context_len": language.context,
        "get_max_seq_len": once,  # of a call: the runner cuts a longer prompt
        "get_vocab_size": language.vocabulary,
        "get_eos_ids": list(language.stop),
        "enable_dynamic_shape": isinstance(size, str),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        **({} if language.bos is None else {"get_bos_id": language.bos}),
    }
