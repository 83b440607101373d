"""Puts compressed weights into an exported program, as the operators of coreai-torch that unpack them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, StageFailed
from edgebake.scheme import parse
from edgebake.types import Assignment, rule_for
from edgebake_targets._coreml_compress import palettise_blocks, quantise
from edgebake_targets._coreml_schemes import counts_of, is_compressed, misfits
from edgebake_targets._coreml_weights import float_weights
from edgebake_targets._coremltools import quiet

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """The weight of ``modules`` in the exported program, and its scheme; ``axis`` is that of its output channels.

    ``held``: what the asset keeps an entry of per value: the values themselves, integers, or indices of a table.
    """

    modules: tuple[str, ...]
    scheme: str
    placeholder: str
    axis: int
    values: NDArray[np.floating[Any]]
    held: NDArray[Any]

    @property
    def name(self) -> str:
        """What the constant is called in the asset."""
        return f"{self.modules[0]}.weight"


def assigned_weights(program: torch.export.ExportedProgram, assignment: Assignment) -> tuple[Assigned, ...]:
    """Weights of the assigned modules that ``program`` uses, each once.

    StageFailed for modules that share a weight and not the scheme, and for groups that do not divide.
    """
    stored = {**program.constants, **program.state_dict}
    lifted = {spec.arg.name: stored.get(str(spec.target)) for spec in program.graph_signature.input_specs}
    found: dict[str, Assigned] = {}
    problems = []
    for weight in float_weights(program, assignment):
        tensor = lifted[weight.placeholder]
        assert tensor is not None
        earlier = found.get(weight.placeholder)
        if earlier is not None and earlier.scheme != weight.scheme:
            what = f"{earlier.modules[0]} ({earlier.scheme}) and {weight.module} ({weight.scheme}) share one weight"
            problems.append(Problem(what=what, fix="give both the same scheme"))
            continue
        found[weight.placeholder] = Assigned(
            modules=(*(earlier.modules if earlier else ()), weight.module),
            scheme=weight.scheme,
            placeholder=weight.placeholder,
            axis=weight.axis,
            values=tensor.detach().numpy(),
            held=tensor.detach().numpy(),
        )
    problems += misfits((w.modules[0], w.scheme, w.values.shape, w.axis) for w in found.values())
    if problems:
        raise StageFailed(problems)
    return tuple(found.values())


def refuse_unused(assignment: Assignment, weights: Iterable[Assigned]) -> None:
    """StageFailed naming the modules that are to be compressed and that no program uses."""
    seen = {module for weight in weights for module in weight.modules}
    lost = sorted({module for module, scheme in assignment.schemes.items() if is_compressed(scheme)} - seen)
    if lost:
        raise StageFailed(
            f"the program does not use the weight of {', '.join(lost)}, so it cannot be compressed",
            fix=f"leave it out of the compression: {rule_for(lost[0], 'fp32')}",
        )


def compress(program: torch.export.ExportedProgram, weights: Iterable[Assigned]) -> tuple[Assigned, ...]:
    """Replace the compressed ones among ``weights`` in ``program``, whose dictionary of tensors has to be its own.

    Returns ``weights`` with what the program holds of them now.
    """
    with quiet():
        import coreai_torch._compression.custom_layers  # noqa: F401  defines the operators that unpack

    done = tuple(_replaced(program, w) if is_compressed(w.scheme) else w for w in weights)
    program.graph_module.recompile()
    return done


def _replaced(program: torch.export.ExportedProgram, weight: Assigned) -> Assigned:
    graph = program.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    node = next(n for n in graph.nodes if n.op == "placeholder" and n.name == weight.placeholder)
    parts, unpack, rest = _packed(weight)
    taken = [_placeholder(program, node, name, tensor) for name, tensor in parts.items()]
    with graph.inserting_before(first):
        unpacked = graph.call_function(unpack, (*taken, *rest))
    unpacked.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(unpacked)
    _forget(program, node)
    return replace(weight, held=next(iter(parts.values())).numpy())


def _packed(weight: Assigned) -> tuple[Mapping[str, torch.Tensor], Any, Sequence[Any]]:
    """Tensors of a compressed weight, the operator that unpacks them, and its further arguments."""
    import numpy as np
    import torch

    scheme, counts = parse(weight.scheme), counts_of(weight.scheme, weight.values.shape, weight.axis)
    dtype = np.float16 if weight.values.dtype == np.float16 else np.float32
    values = weight.values.astype(np.float32)
    if scheme.family == "integer":
        q, scale = quantise(values, counts, scheme.weight_bits, dtype)
        parts = {"quantized_data": torch.from_numpy(q), "scale": torch.from_numpy(scale)}
        # no zero point and no smallest value: symmetric
        narrow = getattr(torch, f"int{scheme.weight_bits}")
        return parts, torch.ops.coreai.constexpr_blockwise_shift_scale.default, (None, None, narrow, None)
    with quiet():
        indices, tables = palettise_blocks(values, counts, scheme.weight_bits, dtype)
    parts = {"indices": torch.from_numpy(indices), "lut": torch.from_numpy(tables[..., None])}
    return parts, torch.ops.coreai.lut_to_dense.default, (0,)


def _placeholder(
    program: torch.export.ExportedProgram, beside: torch.fx.Node, part: str, tensor: torch.Tensor
) -> torch.fx.Node:
    """A new stored tensor of ``program``, lifted to an input in front of ``beside``."""
    from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

    specs = program.graph_signature.input_specs
    position = next(number for number, spec in enumerate(specs) if spec.arg.name == beside.name)
    target = f"{specs[position].target}.{part}"
    with program.graph.inserting_before(beside):
        # coreai-torch finds indices and tables by these words in their names
        node: torch.fx.Node = program.graph.placeholder(f"{beside.name}_{part}")
    mode = beside.meta["val"].fake_mode
    node.meta["val"] = mode.from_tensor(tensor)
    argument = TensorArgument(name=node.name)
    specs.insert(position, InputSpec(InputKind.BUFFER, argument, target, persistent=True))
    program.state_dict[target] = tensor
    return node


def _forget(program: torch.export.ExportedProgram, node: torch.fx.Node) -> None:
    specs = program.graph_signature.input_specs
    spec = next(spec for spec in specs if spec.arg.name == node.name)
    specs.remove(spec)
    program.graph.erase_node(node)
    if not any(other.target == spec.target for other in specs):
        program.state_dict.pop(str(spec.target), None)
