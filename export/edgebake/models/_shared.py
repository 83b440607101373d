"""What every model source does: wrap the network, name its outputs, find their shapes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from edgebake import trace
from edgebake.buffers import untouched
from edgebake.errors import RecipeError, StageFailed
from edgebake.recipe import Component, Input
from edgebake.types import DimBounds, Loaded, MethodSignature, Signature, TensorSpec

if TYPE_CHECKING:
    import torch

Invoke = Callable[["torch.nn.Module", Mapping[str, "torch.Tensor"]], Any]


def input_specs(inputs: Mapping[str, Input]) -> tuple[TensorSpec, ...]:
    """The recipe's inputs as tensor specs, in the recipe's order."""
    if not inputs:
        raise RecipeError("no inputs are given", where="inputs", fix="name every input with its shape and dtype")
    return tuple(
        TensorSpec(name=name, shape=i.shape, dtype=i.dtype, role=i.role, state_from=i.state_from)
        for name, i in inputs.items()
    )


def inputs_alone(component: Component, method: str) -> Signature:
    """What goes into ``method``, before anybody knows what comes out."""
    dims = {name: DimBounds(min=d.min, max=d.max, sizes=d.sizes) for name, d in component.dims.items()}
    specs = input_specs(component.all_methods[method])
    return Signature(methods={method: MethodSignature(inputs=specs, outputs=())}, dims=dims)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Named tensors of a network's output: ModelOutput and dict keys, nested by path (``past.0.key``).

    None, numbers and strings are constants and dropped. A bare tensor is called ``output``.
    """
    import torch

    if isinstance(value, torch.Tensor):
        yield path or "output", value
    elif value is None or isinstance(value, (bool, int, float, str)):
        return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif hasattr(value, "_fields"):
        yield from leaves(dict(zip(value._fields, value, strict=True)), path)
    elif isinstance(value, (tuple, list)):
        for place, inner in enumerate(value):
            yield from leaves(inner, f"{path or 'output'}.{place}")
    elif hasattr(value, "layers"):  # a transformers Cache
        pairs = [{"key": layer.keys, "value": layer.values} for layer in value.layers]
        yield from leaves(pairs, path)
    elif is_dataclass(value):
        yield from leaves({f.name: getattr(value, f.name) for f in fields(value)}, path)
    else:
        raise RecipeError(
            f"output {path or 'output'!r} of the network is a {type(value).__name__}, not tensors",
            where="model",
            fix="let the network return tensors, dicts or tuples of tensors",
        )


def positional(network: torch.nn.Module, names: Sequence[str], invoke: Invoke) -> torch.nn.Module:
    """A module that takes ``names`` by position and returns ``network``'s tensors as a flat tuple.

    Its ``forward`` states one parameter per input, so that exported placeholders carry the inputs' names.
    """
    import torch

    class Positional(torch.nn.Module):
        """Flat tensors in, flat tensors out; the network itself is ``wrapped``."""

        def __init__(self) -> None:
            super().__init__()
            self.wrapped = network

        def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = dict(zip(names, args, strict=True))
            return tuple(tensor for _, tensor in leaves(invoke(self.wrapped, given)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *(re.sub(r"\W", "_", n) for n in names))]
    Positional.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Positional().eval()


def by_name(forward: Callable[..., Any], names: Sequence[str], what: str) -> None:
    """Refuse inputs that ``forward`` has no parameter for."""
    parameters = inspect.signature(forward).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise RecipeError(
                f"{what} takes no input {name!r}",
                where=f"inputs.{name}",
                fix=(f"did you mean {near[0]!r}? " if near else "") + f"it takes: {', '.join(known)}",
            )


def freeze(network: torch.nn.Module) -> torch.nn.Module:
    """``network`` in eval mode, every floating weight and buffer float32, no gradients."""
    return network.float().eval().requires_grad_(False)


def parameters_of(network: torch.nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in network.parameters())


def finish(
    component: Component, networks: Mapping[str, torch.nn.Module], invoke: Invoke, facts: Mapping[str, Any]
) -> Loaded:
    """Wrap ``networks`` (one per method, the same object where they share it) and describe their interface.

    ``invoke(network, inputs)`` calls the network with the inputs by name.
    """
    methods, signatures = {}, {}
    dims: Mapping[str, DimBounds] = {}
    for method in component.all_methods:
        alone = inputs_alone(component, method)
        specs, dims = alone.methods[method].inputs, alone.dims
        module = positional(networks[method], [s.name for s in specs], invoke)
        methods[method] = module
        signatures[method] = MethodSignature(inputs=specs, outputs=_outputs(module, invoke, method, alone))
        _check_states(signatures[method])
    return Loaded(methods=methods, signature=Signature(methods=signatures, dims=dims), facts=facts)


def _outputs(module: torch.nn.Module, invoke: Invoke, method: str, alone: Signature) -> tuple[TensorSpec, ...]:
    """Run at two sizes of every dimension and name the axes that follow it."""
    specs, dims = alone.methods[method].inputs, alone.dims
    base = trace.sizes(dims, "small")
    first = _run(module, invoke, method, alone, base)
    shapes: dict[str, list[int | str]] = {name: list(t.shape) for name, t in first.items()}
    for dim in trace.varying(alone.methods[method], dims):
        other = base[dim] + 1 if base[dim] < dims[dim].max else base[dim] - 1
        second = _run(module, invoke, method, alone, {**base, dim: other})
        if [(n, t.dim()) for n, t in second.items()] != [(n, t.dim()) for n, t in first.items()]:
            raise StageFailed(f"{method}: the network's outputs change with {dim!r}", fix=f"give {dim!r} one size")
        for name, tensor in second.items():
            for axis, grown in enumerate(zip(first[name].shape, tensor.shape, strict=True)):
                if grown == (base[dim], other):
                    shapes[name][axis] = dim
                elif grown[0] != grown[1]:
                    raise StageFailed(
                        f"{method}: axis {axis} of output {name!r} is {grown[0]} at {dim}={base[dim]} "
                        f"and {grown[1]} at {dim}={other}",
                        fix=f"an output's axis must be {dim!r} itself or not depend on it: give {dim!r} one size",
                    )
    clash = sorted({s.name for s in specs} & set(shapes))
    if clash:
        raise RecipeError(f"{clash[0]!r} is both an input and an output", where="inputs", fix="rename the output")
    return tuple(
        TensorSpec(name=name, shape=tuple(shapes[name]), dtype=str(t.dtype).removeprefix("torch."))
        for name, t in first.items()
    )


def _run(
    module: torch.nn.Module, invoke: Invoke, method: str, signature: Signature, size: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    import torch

    args = trace.example_inputs(signature, method, 0, size)
    given = dict(zip((s.name for s in signature.methods[method].inputs), args, strict=True))
    shown = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
    try:
        with torch.no_grad(), untouched(module):
            found = [(n, t.clone()) for n, t in leaves(invoke(module.get_submodule("wrapped"), given))]
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        first = str(error).strip().splitlines()
        raise StageFailed(
            f"{method}: the network refuses {shown}: {first[0] if first else type(error).__name__}",
            fix="check the shapes, dtypes and order of the recipe's inputs",
        ) from error
    if not found:
        raise StageFailed(f"{method}: the network returns no tensor", fix="let it return at least one")
    return dict(found)


def _check_states(method: MethodSignature) -> None:
    outputs = {spec.name: spec for spec in method.outputs}
    for spec in method.inputs:
        if spec.state_from is None:
            continue
        source = outputs.get(spec.state_from)
        where = f"inputs.{spec.name}.state_from"
        if source is None:
            raise RecipeError(
                f"the network has no output {spec.state_from!r}", where=where, fix=f"outputs: {', '.join(outputs)}"
            )
        if (source.shape, source.dtype) != (spec.shape, spec.dtype):
            raise RecipeError(
                f"state {spec.name!r} is {spec.dtype}{list(spec.shape)}, but output {source.name!r} that feeds it is "
                f"{source.dtype}{list(source.shape)}",
                where=where,
            )
