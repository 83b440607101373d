"""Integer weights by torchao before tracing: per row or in groups of input channels, of linear layers and embeddings.

Numerics: symmetric round-to-nearest, torchao's Int8DynamicActivationIntxWeightConfig (8da4w: activations 8 bits per
token, scales chosen at run time) and IntxWeightOnlyConfig. A group that already is integers times a scale keeps both
(``edgebake.lattice``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake import lattice, mapped
from edgebake.errors import Problem, RecipeError, StageFailed
from edgebake.rowwise import by_rows
from edgebake.scheme import Scheme, parse
from edgebake.target import ModuleRequest
from edgebake.types import ActsOn, canonical_module_name

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
DISTRIBUTIONS = ("torch", "torchao")
SOURCES = ("edgebake.lattice", "edgebake.mapped", "edgebake.rowwise")
OPS = ("torchao.quantization",)  # registers the operators that a stored program holds


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with the weights of the assigned linear and embedding modules replaced by torchao tensors.

    Acts on ``w<bits>g<group>a8d`` (linear) and ``w<bits>[g<group>]`` (linear, embedding) and leaves other schemes to
    other methods.
    RecipeError when a group does not divide a layer's input features: torchao would skip it, or pad.
    """
    import torch
    from torchao.quantization import quantize_

    chosen = _chosen(request)
    problems = [p for name, (module, scheme) in chosen.items() if (p := _problem(name, module, scheme))]
    if problems:
        raise RecipeError(problems)
    for module, scheme in chosen.values():
        if isinstance(module, torch.nn.Embedding):
            # It only concerns gradients, and with it ExecuTorch does not recognise its int8 embedding.
            module.padding_idx = None
        tied: Any = module.weight
        with by_rows():
            quantize_(module, _config(scheme), filter_fn=lambda _module, _name: True)
        if type(module.weight) is torch.nn.Parameter and module.weight is tied:
            raise StageFailed(
                f"torchao left the weights of {type(module).__name__} as they were under {scheme.name}",
                where="compress: quantize_weights",
                fix="give these modules another scheme",
            )
        _keep_integers(module.weight, tied.detach(), scheme)
        mapped.release(tied)
    return request.module


def _keep_integers(made: Any, given: torch.Tensor, scheme: Scheme) -> None:
    """Put the integers and scales back that ``given`` was made of, where it was (GPTQ's): torchao rounds once more."""
    import torch

    groups = given.reshape(-1, scheme.group or given.shape[-1])
    q, scale, found = (torch.from_numpy(part) for part in lattice.integers(groups.numpy(), scheme.weight_bits))
    if bool(found.any()):
        made.qdata.copy_(torch.where(found[:, None], q, made.qdata.reshape(q.shape)).reshape(made.qdata.shape))
        made.scale.copy_(torch.where(found, scale, made.scale.reshape(-1)).reshape(made.scale.shape))


def _chosen(request: ModuleRequest) -> dict[str, tuple[torch.nn.Module, Scheme]]:
    """Modules that this method compresses: ``{canonical name: (module, scheme)}``."""
    import torch

    chosen: dict[str, tuple[torch.nn.Module, Scheme]] = {}
    for path, module in request.module.named_modules():
        name = canonical_module_name(path)
        if name not in request.assignment.schemes:
            continue
        scheme = parse(request.assignment.schemes[name])
        grouped_linear = scheme.group is not None and scheme.dynamic and isinstance(module, torch.nn.Linear)
        weights_only = scheme.activation_bits is None and isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        if scheme.family == "integer" and (grouped_linear or weights_only):
            chosen[name] = (module, scheme)
    return chosen


def _problem(name: str, module: torch.nn.Module, scheme: Scheme) -> Problem | None:
    columns = int(module.weight.shape[-1])  # type: ignore[index]
    if scheme.group is None or columns % scheme.group == 0:
        return None
    return Problem(
        what=f"{scheme.name} needs input features divisible by {scheme.group}, but {name} has {columns}",
        where="compress",
        fix=f'give it another scheme, for example modules: {{"{name}": w8a8d}}',
    )


def _config(scheme: Scheme) -> object:
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    dtype = getattr(torch, f"int{scheme.weight_bits}")
    granularity = PerGroup(scheme.group) if scheme.group else PerAxis(0)
    if scheme.dynamic:
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
