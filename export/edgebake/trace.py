"""trace: one exported program per method, proven to compute what the eager network computes at other sizes too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from edgebake.buffers import drop_overwritten, untouched
from edgebake.errors import EdgebakeError, RecipeError, StageFailed
from edgebake.rowwise import by_rows
from edgebake.types import (
    DimBounds,
    Loaded,
    MethodSignature,
    Module,
    ModuleKind,
    Signature,
    TensorSpec,
    Traced,
    canonical_module_name,
)

if TYPE_CHECKING:
    import torch

Size = Literal["small", "max"] | Mapping[str, int]

# The exported program runs the same kernels; only the order of a few sums may differ.
TOLERANCE = 1e-5
_TOKENS = 16  # ids below this exist in every vocabulary


def varying(method: MethodSignature, dims: Mapping[str, DimBounds]) -> tuple[str, ...]:
    """Names of the dimensions of ``method``'s inputs that have more than one size, in order of appearance."""
    names = dict.fromkeys(n for spec in method.inputs for n in spec.shape if isinstance(n, str))
    unknown = [n for n in names if n not in dims]
    if unknown:
        raise RecipeError(f"dimension {unknown[0]!r} has no bounds", where="dims", fix=f"{unknown[0]}: {{max: 128}}")
    return tuple(n for n in names if dims[n].min < dims[n].max)


def dynamic_shapes(method: MethodSignature, dims: Mapping[str, DimBounds]) -> tuple[dict[int, Any], ...] | None:
    """``dynamic_shapes`` for ``torch.export.export``: per input ``{axis: Dim}``; None when every size is fixed."""
    from torch.export import Dim

    made = {
        name: Dim(re.sub(r"\W", "_", name), min=dims[name].min, max=dims[name].max) for name in varying(method, dims)
    }
    if not made:
        return None
    return tuple(
        {axis: made[name] for axis, name in enumerate(spec.shape) if isinstance(name, str) and name in made}
        for spec in method.inputs
    )


def sizes(dims: Mapping[str, DimBounds], size: Size) -> dict[str, int]:
    """A size for every dimension. ``small`` avoids 1 (torch.export would specialise it) and keeps dimensions apart."""
    if not isinstance(size, str):
        return {name: size.get(name, bounds.max) for name, bounds in dims.items()}
    if size == "max":
        return {name: bounds.max for name, bounds in dims.items()}
    return {n: min(b.max, max(b.min, 2) + 1 + place) for place, (n, b) in enumerate(dims.items())}


def example_inputs(signature: Signature, method: str, seed: int, size: Size = "small") -> tuple[torch.Tensor, ...]:
    """Seeded inputs that every network accepts: token ids below 16, masks of ones, positions that count up."""
    import torch

    chosen = sizes(signature.dims, size)
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        _example(spec, [d if isinstance(d, int) else chosen[d] for d in spec.shape], generator)
        for spec in signature.methods[method].inputs
    )


def _example(spec: TensorSpec, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, spec.dtype)
    if "mask" in spec.name or dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if "position" in spec.name and not dtype.is_floating_point:
        return torch.arange(shape[-1], dtype=dtype).expand(shape).contiguous()
    if spec.name.endswith("_pos"):
        return torch.ones(shape, dtype=dtype)  # every cache has room for a call that begins at its second row
    if "type_ids" in spec.name:
        return torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point:
        scale = 0.1 if spec.role == "state" else 1.0
        return (torch.randn(shape, generator=generator) * scale).to(dtype)
    return torch.randint(0, 256 if dtype == torch.uint8 else _TOKENS, shape, generator=generator, dtype=dtype)


def trace(loaded: Loaded, seed: int = 0) -> Traced:
    """Export every method and hold it against eager at other sizes.

    StageFailed: a dimension turns out fixed, an output is not finite, or the program computes something else.
    """
    programs, methods = {}, {}
    for name, method in loaded.signature.methods.items():
        programs[name], written = _trace_method(loaded, name, seed)
        methods[name] = replace(method, buffers=written)
    return Traced(programs=programs, signature=replace(loaded.signature, methods=methods))


def _trace_method(loaded: Loaded, name: str, seed: int) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The program, and names of the buffers that the method writes to."""
    program, written, lost = _exported(loaded, name, seed, strict=False)
    if lost:
        told = StageFailed(
            f"{name}: the exported program loses what the network writes to its buffer {lost[0]}",
            fix="write to it as the attribute of its module, whenever it runs; or pass it as an input with role state "
            "and return its new value",
        )
        try:  # strict finds buffers that are reached by other roads, such as a list of caches
            program, written, lost = _exported(loaded, name, seed, strict=True)
        except StageFailed as error:
            raise told from error
        if lost:
            raise told
    return without_provenance(program), written


def _exported(
    loaded: Loaded, name: str, seed: int, *, strict: bool
) -> tuple[torch.export.ExportedProgram, tuple[str, ...], tuple[str, ...]]:
    """The program, names of the buffers that it writes to, and of those that only the network writes to."""
    program = _export(loaded, name, seed, strict=strict)
    dropped = drop_overwritten(program)
    return program, *_hold_against_eager(loaded, name, seed, program, dropped)


def _export(loaded: Loaded, name: str, seed: int, *, strict: bool) -> torch.export.ExportedProgram:
    import torch

    module, signature = loaded.methods[name].eval(), loaded.signature
    inputs = example_inputs(signature, name, seed)
    shapes = dynamic_shapes(signature.methods[name], signature.dims)
    with torch.no_grad(), untouched(module):  # what torch.export does not know for a buffer, it writes to
        try:
            return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
        except EdgebakeError:  # which tells what is wrong already
            raise
        except Exception as error:  # the network's code runs in there, and torch has a type for each of its layers
            raise _export_failed(signature, name, str(error)) from error


def _hold_against_eager(
    loaded: Loaded, name: str, seed: int, program: torch.export.ExportedProgram, dropped: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the buffers that ``program`` writes to, and of those that only the network does (``dropped`` aside)."""
    import torch

    module, signature, runnable = loaded.methods[name], loaded.signature, program.module()
    strays = _strays(program, module)
    versions = {path: tensor._version for path, tensor in strays.items()}
    written: tuple[str, ...] = ()
    with torch.no_grad(), by_rows():
        for size in _check_sizes(signature.methods[name], signature.dims):
            args = example_inputs(signature, name, seed + 1, size)
            with untouched(runnable) as buffers:
                exported = [value.clone() for value in runnable(*args)]  # an output may be a buffer itself
                _refuse_written(name, strays, versions)
                written = tuple(sorted(_read_as_buffers(program).intersection(buffers.written())))
            with untouched(module) as buffers:
                eager = module(*args)
                if lost := buffers.lost((*written, *dropped)):
                    return written, lost
                _compare(signature.methods[name], name, size, eager, exported)
    return written, ()


def _strays(program: torch.export.ExportedProgram, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that the network holds and that are none of its buffers, by name."""
    owned = {id(buffer) for buffer in module.buffers()}
    lifted = program.graph_signature.inputs_to_lifted_tensor_constants.values()
    return {path: program.constants[path] for path in lifted if id(program.constants[path]) not in owned}


def _refuse_written(name: str, strays: Mapping[str, torch.Tensor], versions: Mapping[str, int]) -> None:
    """StageFailed where one of ``strays`` was written to since it had its version."""
    for path, tensor in strays.items():
        if tensor._version != versions[path]:
            owner = canonical_module_name(path.rpartition(".")[0])
            raise StageFailed(
                f"{name}: {f'the module {owner}' if owner else 'the network'} writes to a tensor that is none of its "
                "buffers, so nothing can put it back where a sample begins",
                fix='keep it as a buffer: self.register_buffer("name", tensor, persistent=False)',
            )


def _read_as_buffers(program: torch.export.ExportedProgram) -> set[str]:
    """Buffers that ``program`` uses as such: one that the network reaches by another road is a constant in it, too."""
    buffers = program.graph_signature.inputs_to_buffers
    nodes = program.graph.find_nodes(op="placeholder")
    return {canonical_module_name(buffers[node.name]) for node in nodes if node.name in buffers and node.users}


def without_provenance(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Drop each node's history of the graphs it came from, in place; module paths stay.

    Lowering copies programs many times and this history deeply each time: without it MiniLM lowers to XNNPACK in two
    thirds of the CPU time, and stored programs are smaller.
    """
    for node in program.graph.nodes:
        node.meta.pop("from_node", None)
    return program


def _check_sizes(method: MethodSignature, dims: Mapping[str, DimBounds]) -> list[dict[str, int]]:
    """Sizes to check at: one that was not traced, and the smallest."""
    small = sizes(dims, "small")
    names = varying(method, dims)
    if not names:
        return [small]
    between = {n: small[n] + max(1, (dims[n].max - small[n]) // 3) for n in names}
    other = {n: min(dims[n].max, between[n]) if small[n] < dims[n].max else dims[n].min for n in names}
    smallest = {n: dims[n].min for n in names}
    return [{**small, **other}, {**small, **smallest}]


def _compare(method: MethodSignature, name: str, size: Mapping[str, int], eager: Any, exported: Any) -> None:
    import torch

    at = f" at {', '.join(f'{k}={v}' for k, v in size.items())}" if size else ""
    for spec, want, got in zip(method.outputs, eager, exported, strict=True):
        if want.shape != got.shape or want.dtype != got.dtype:
            raise StageFailed(
                f"{name}: output {spec.name!r} of the exported program is {got.dtype}{tuple(got.shape)}{at}, "
                f"eager gives {want.dtype}{tuple(want.shape)}",
                fix="the network's Python code depends on a size that torch.export fixed: give that dimension one size",
            )
        if not want.is_floating_point():
            equal = torch.equal(want, got)
        else:
            if not bool(torch.isfinite(want).all()):
                raise StageFailed(
                    f"{name}: output {spec.name!r} of the float model is not finite{at}",
                    fix="check the weights, and that shapes and dtypes are what the network was trained with",
                )
            error = torch.linalg.vector_norm(got.double() - want.double())
            equal = bool(error <= TOLERANCE * torch.linalg.vector_norm(want.double()).clamp(min=1e-6))
        if not equal:
            raise StageFailed(
                f"{name}: output {spec.name!r} of the exported program differs from eager{at}",
                fix="the network's Python code depends on its inputs' values or sizes in a way torch.export cannot see",
            )


def _export_failed(signature: Signature, method: str, text: str) -> StageFailed:
    """The error of torch.export in the recipe's words: which dimension of which input became what."""
    specs = signature.methods[method]
    names = varying(specs, signature.dims)
    about = [n for n in names if re.search(rf"(?<![A-Za-z_]){re.escape(n)}(?![A-Za-z])", text)]
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    if not about or not re.search(r"speciali[sz]ed|[Cc]onstraint|dynamic", text):
        return StageFailed(f"{method}: torch.export cannot trace the network: {first}", fix="see the stage's log")
    lines = (line.strip() for line in text.partition("Suggested fixes:")[2].splitlines())
    hints = [h for h in lines if re.fullmatch(rf"({'|'.join(map(re.escape, about))})\s*=\s*[^\d].*", h)]
    name = about[0]
    where = [f"{s.name}[{axis}]" for s in specs.inputs for axis, d in enumerate(s.shape) if d == name]
    bounds = signature.dims[name]
    fixed = "specialized it to be a constant" in text
    became = "the network's code fixes it at the size it is traced with" if fixed else "the network restricts it"
    return StageFailed(
        f"{method}: dimension {name!r} of {', '.join(where)} cannot vary from {bounds.min} to {bounds.max}: {became}",
        fix="give it one size in the recipe's inputs or narrow dims"
        + (f"; torch.export suggests {'; '.join(hints)}" if hints else ""),
    )


def module_inventory(module: torch.nn.Module) -> tuple[Module, ...]:
    """The modules that rules can name, in definition order, each once even where it is shared."""
    found = []
    for path, child in module.named_modules():
        kind = kind_of(child)
        if kind is not None:
            parameters = sum(p.numel() for p in child.parameters(recurse=False))
            found.append(Module(name=canonical_module_name(path), kind=kind, parameters=parameters))
    return tuple(found)


def float_bytes(networks: Iterable[torch.nn.Module], live: set[str], states: set[str]) -> int:
    """Bytes at float32 of all distinct parameters and buffers (integers at their own size).

    Idle modules are left out, and the buffers in ``states``, which the network writes to.
    """
    networks = list(networks)
    idle = {m.name for network in networks for m in module_inventory(network)} - live
    seen: dict[int, int] = {}
    for network in networks:
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if canonical_module_name(name.rpartition(".")[0]) not in idle and canonical_module_name(name) not in states:
                seen[id(tensor)] = tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())
    return sum(seen.values())


def kind_of(module: torch.nn.Module) -> ModuleKind | None:
    """``linear``, ``conv`` or ``embedding``; None for every other module.

    transformers' ``Conv1D`` (GPT-2) is a linear layer with its weight transposed, whatever its name says.
    """
    from torch import nn

    if isinstance(module, nn.Linear) or type(module).__module__ == "transformers.pytorch_utils":
        return "linear" if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" else None
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else None


def live_modules(loaded: Loaded, seed: int = 0) -> tuple[Module, ...]:
    """The inventory of all methods, without modules whose weights reach no output (a pooler that nobody reads).

    Live is what autograd's graph of the outputs ends at; where an output has none (class numbers), all count as live.
    No gradient is computed, and nothing is kept for one: that would cost the weights' size and the activations' again.
    """
    import torch

    live: dict[str, Module] = {}
    empty = torch.empty(0)
    for method, module in loaded.methods.items():
        inventory = {m.name: m for m in module_inventory(module)}
        named = module.named_parameters(remove_duplicate=False)  # tied weights are those of both modules
        weights = {n: w for n, w in named if canonical_module_name(n.rpartition(".")[0]) in inventory}
        nothing_saved = torch.autograd.graph.saved_tensors_hooks(lambda _: empty, lambda saved: saved)
        with torch.enable_grad():
            for weight in weights.values():
                weight.requires_grad_(True)
            try:
                with untouched(module), nothing_saved:
                    outputs = module(*example_inputs(loaded.signature, method, seed))
                    reached = _reached(outputs, weights)
            finally:
                for weight in weights.values():
                    weight.requires_grad_(False)
        live |= {name: row for name, row in inventory.items() if reached is None or name in reached}
    return tuple(live.values())


def _reached(outputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> set[str] | None:
    """Modules whose weights the outputs depend on; None when an output cannot tell."""
    if not all(output.requires_grad for output in outputs) or not weights:
        return None
    ends, seen, waiting = set(), set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        ends.add(id(getattr(node, "variable", None)))  # only the nodes of leaves have one
        waiting += [before for before, _ in node.next_functions]
    return {canonical_module_name(n.rpartition(".")[0]) for n, weight in weights.items() if id(weight) in ends}
