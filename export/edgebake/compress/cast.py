"""Half precision: the whole network with float32 inputs and outputs, or single modules with casts around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgebake.target import ModuleRequest
from edgebake.types import ActsOn, Assignment, canonical_module_name

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
DISTRIBUTIONS = ("torch",)


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with its assigned modules in float16.

    When all linear, convolution and embedding modules are assigned fp16, everything but normalisations becomes half
    and float inputs and outputs are cast at the border; otherwise only the assigned modules compute in half. The
    original's parameters are never changed: they may be shared with the float reference.
    """
    weighty = {canonical_module_name(path): module for path, module in _weighty(request.module)}
    assigned = [name for name in request.assignment.of("fp16") if name in weighty]
    if not assigned:
        return request.module
    replaced: dict[int, torch.Tensor] = {}
    whole = _all_half(request.assignment, tuple(weighty))
    # Hooks are traced like code and, unlike a wrapper, keep module names and the signature of forward.
    for part in [request.module] if whole else [weighty[name] for name in assigned]:
        _to_half(part, replaced)
        part.register_forward_pre_hook(_inputs_to_half, with_kwargs=True)
        part.register_forward_hook(_outputs_to_float)
    for norm in _norms(request.module) if whole else ():
        norm.register_forward_pre_hook(_inputs_to_float, with_kwargs=True)
        norm.register_forward_hook(_outputs_to_half)
    return request.module


def _weighty(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    import torch

    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    return ((path, part) for path, part in module.named_modules() if isinstance(part, kinds))


def _norms(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Normalisations stay float32: ExecuTorch's own kernels lose the variance in half (MiniLM came out as NaN)."""
    import torch

    kinds = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, torch.nn.modules.instancenorm._InstanceNorm)
    return (part for part in module.modules() if isinstance(part, kinds))


def _all_half(assignment: Assignment, weighty: tuple[str, ...]) -> bool:
    names = {*weighty, *assignment.kinds}
    return all(assignment.schemes.get(name) == "fp16" for name in names)


def _to_half(module: torch.nn.Module, replaced: dict[int, torch.Tensor]) -> None:
    """Give ``module`` half copies of its float tensors; tensors that several modules share stay shared."""
    import torch

    kept = set(_norms(module))
    for part in (part for part in module.modules() if part not in kept):
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.is_floating_point():
                half = torch.nn.Parameter(parameter.detach().half(), requires_grad=False)
                part._parameters[name] = replaced.setdefault(id(parameter), half)  # type: ignore[assignment]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = replaced.setdefault(id(buffer), buffer.half())


def _cast(values: Any, dtype: torch.dtype) -> Any:
    import torch
    from torch.utils._pytree import tree_map

    def one(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floats else value

    return tree_map(one, values)


def _inputs_to_half(_module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    import torch

    return _cast(args, torch.float16), _cast(kwargs, torch.float16)


def _inputs_to_float(_module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    import torch

    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _outputs_to_half(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
    import torch

    return _cast(output, torch.float16)


def _outputs_to_float(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
    import torch

    return _cast(output, torch.float32)
