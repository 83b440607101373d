"""How much the outputs depend on each weight: squared gradients over the calibration samples, for sensitive palettes.

Numerics: the diagonal of the Gauss-Newton matrix ``J^T J`` of all float outputs, which takes the place of the Fisher
diagonal of a loss in SqueezeLLM (Kim et al., 2023, arXiv:2306.07629, section 4.1), since a recipe has no labels to
train on. For signs ``v`` drawn independently the square of ``J^T v`` has that diagonal as its mean (Hutchinson, Commun.
Stat. Simul. Comput. 18(3), 1989), so that one backward pass per call is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, StageFailed
from edgebake.scheme import parse
from edgebake.types import Call, SampleSet, Signature, Traced
from edgebake_targets._coreml_weights import FloatWeight

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_SEED = 1989
# Of the mean: what no sample touched (rows of an embedding, channels that stay off) is not for that reason of no use.
_FLOOR = 0.1


def weighed(
    weights: Sequence[FloatWeight], traced: Traced, method: str, samples: SampleSet | None
) -> tuple[FloatWeight, ...]:
    """``weights`` of ``method``, those that get a palette with the sensitivity of each value.

    Holds one tensor of squares per weight besides what one call's backward pass takes. StageFailed without a call of
    ``method`` among ``samples``, and for a weight on which no float output depends smoothly.
    """
    palettes = {weight.target for weight in weights if parse(weight.scheme).palette}
    if not palettes:
        return tuple(weights)
    calls = [c for sample in samples or () for c in sample.calls if c.method == method]
    if samples is None or not calls:
        raise StageFailed(
            f"sensitive palettes need calibration samples for every method, and there is none for {method}",
            fix="add samples: {calibration: ...}, or options: {palettes: kmeans}",
        )
    squares = _squares(traced, method, samples, sorted(palettes))
    if problems := [_flat(w) for w in weights if w.target in squares and not _usable(squares[w.target])]:
        raise StageFailed(problems)
    return tuple(
        replace(w, sensitivity=_of_folded(squares[w.target], w.factor)) if w.target in palettes else w for w in weights
    )


def _usable(squares: torch.Tensor) -> bool:
    import torch

    return bool(torch.isfinite(squares).all()) and bool(squares.any())


def _flat(weight: FloatWeight) -> Problem:
    return Problem(
        what=f"no output has a finite gradient other than 0 by the weight of {weight.module} on calibration samples",
        fix="options: {palettes: kmeans}",
    )


def _of_folded(squares: torch.Tensor, factor: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """The sensitivities of the weight as it is stored: the chain rule divides by the factor that was folded in."""
    import numpy as np

    found = squares.numpy().astype(np.float64)
    if factor is not None:
        found /= np.where(factor == 0, np.inf, factor) ** 2  # a channel times 0: as if no sample touched it
    found += _FLOOR * found.mean()
    return np.asarray(found / found.mean(), np.float32)


def _squares(traced: Traced, method: str, samples: SampleSet, targets: Sequence[str]) -> dict[str, torch.Tensor]:
    """Sums of squared gradients by the parameter's name."""
    import torch

    weights = {name: traced.programs[method].state_dict[name].detach().requires_grad_() for name in targets}
    sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
    random = torch.Generator().manual_seed(_SEED)
    for outputs in outputs_of(traced, method, samples, weights):
        found = torch.autograd.grad(_projected(outputs, random), list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                sums[name] += gradient.square_()
    return sums


def outputs_of(
    traced: Traced,
    method: str,
    samples: SampleSet,
    weights: Mapping[str, torch.Tensor],
    watched: torch.nn.Module | None = None,
) -> Iterator[Sequence[torch.Tensor]]:
    """Of every call of ``method``, each sample from its start, with gradients by ``weights`` within the call.

    ``watched`` takes the place of the method's program.
    """
    import torch

    modules: dict[str, Any] = {name: program.module(check_guards=False) for name, program in traced.programs.items()}
    modules[method] = watched or modules[method]
    stateful = any(spec.role == "state" for signature in traced.signature.methods.values() for spec in signature.inputs)
    for sample in samples:
        carried: dict[str, torch.Tensor] = {}
        # A call may write to buffers: each sample starts from the stored ones, and none of it stays in the program.
        buffers = {name: _buffers(program) for name, program in traced.programs.items()}
        for call in sample.calls if stateful else [c for c in sample.calls if c.method == method]:
            asked, inputs = call.method == method, _inputs(traced.signature, call, carried)
            replaced = {**(weights if asked else {}), **buffers[call.method]}
            with torch.set_grad_enabled(asked and bool(weights)):
                outputs = torch.func.functional_call(modules[call.method], replaced, inputs)
            if asked:
                yield outputs
            names = [spec.name for spec in traced.signature.methods[call.method].outputs]
            carried |= {name: output.detach() for name, output in zip(names, outputs, strict=True)}
            buffers[call.method] = {name: buffer.detach() for name, buffer in buffers[call.method].items()}


def _buffers(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    stored = {**program.state_dict, **program.constants}
    return {name: stored[name].clone() for name in program.graph_signature.buffers}


def _inputs(signature: Signature, call: Call, carried: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """In the network's order; a state is what the network handed on, or zeros at the start."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in call.tensors().items()}
    specs = [spec for spec in signature.methods[call.method].inputs if spec.role != "constant"]
    sizes = {
        dim: size
        for spec in specs
        if spec.name in given
        for dim, size in zip(spec.shape, given[spec.name].shape, strict=True)
    }
    for spec in specs:
        if spec.role == "state":
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
            start = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
            given[spec.name] = carried.get(spec.state_from or "", start)
    return tuple(given[spec.name] for spec in specs)


def _projected(outputs: Any, random: torch.Generator) -> torch.Tensor:
    """The sum of all float outputs under random signs."""
    import torch
    from torch.utils._pytree import tree_leaves

    total = torch.zeros((), requires_grad=True)
    for output in tree_leaves(outputs):
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            signs = torch.randint(0, 2, output.shape, generator=random) * 2 - 1
            total = total + (output * signs.to(output.dtype)).sum().float()
    return total
