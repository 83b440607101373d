"""What targets and runners of decoders with a key/value cache share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.target import Asked
from edgebake.types import MethodSignature, Signature, TensorSpec, Traced

if TYPE_CHECKING:
    import torch

INPUTS = ("tokens", "input_pos")
CACHES = ("key_cache", "value_cache")


def decodes(asked: Asked) -> bool:
    """Whether a recipe asks for a decoder with a cache."""
    return any(tuple(spec.name for spec in inputs) == INPUTS for inputs in asked.inputs.values())


def without_caches(signature: Signature) -> Signature:
    """``signature`` whose caches are no buffers that a call begins with: a row is written before it is read."""
    methods = {
        name: replace(method, buffers=tuple(b for b in method.buffers if not b.endswith(CACHES)))
        for name, method in signature.methods.items()
    }
    return replace(signature, methods=methods)


def heads_first(module: torch.nn.Module) -> None:
    """Make the caches of ``module``, (1, context, heads, width), empty ones of (1, heads, context, width)."""
    import torch

    for path, cache in list(module.named_buffers()):
        if path.endswith(CACHES):
            owner, _, name = path.rpartition(".")
            _, context, heads, width = cache.shape
            module.get_submodule(owner).register_buffer(name, torch.zeros(1, heads, context, width), persistent=False)


def refuse_past_the_end(context: int, tokens: Any, position: Any) -> None:
    """StageFailed for ``tokens``, (1, n), that go past ``context``: runtimes give a number, the rest to their log."""
    start, count = int(position[0]), tokens.shape[-1]
    if start + count > context:
        raise StageFailed(
            f"{count} tokens from position {start} on do not fit the context of {context}",
            where="validate",
            fix="begin a new text, or build with a larger context",
        )


def fixed(method: MethodSignature, size: int) -> MethodSignature:
    """``method`` where ``size`` tokens are read at once."""

    def of(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(size if isinstance(given, str) else given for given in spec.shape))

    return replace(method, inputs=tuple(map(of, method.inputs)), outputs=tuple(map(of, method.outputs)))


def exported(
    module: torch.fx.GraphModule, method: MethodSignature, more: Sequence[torch.Tensor] = ()
) -> torch.export.ExportedProgram:
    """``module`` of fixed shapes as ``method`` calls it, with the inputs ``more`` behind its own."""
    import torch

    given = tuple(
        torch.zeros([int(size) for size in spec.shape], dtype=getattr(torch, spec.dtype)) for spec in method.inputs
    )
    with torch.no_grad():
        return torch.export.export(module, (*given, *more), strict=False)


def of_single_tokens(
    traced: Traced, export: Callable[[torch.export.ExportedProgram, MethodSignature], torch.export.ExportedProgram]
) -> Traced:
    """The decoder ``traced`` taking one token a call, its program as ``export`` makes it; weights are shared."""
    ((name, program),) = traced.programs.items()
    method = fixed(traced.signature.methods[name], 1)
    signature = replace(traced.signature, methods={name: method}, dims={})
    return Traced(programs={name: export(program, method)}, signature=without_caches(signature))
