"""Buffers that a network writes to: put back, so that every sequence of calls begins where it was loaded.

And what becomes of the writes in an exported program: none may get lost, and one that nothing reads is no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.mapped import clear
from edgebake.types import canonical_module_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A buffer of ``owner``: the tensor itself, what it held (None: zeros), and how often it had been written to."""

    owner: torch.nn.Module
    name: str
    path: str
    tensor: torch.Tensor
    value: torch.Tensor | None
    version: int

    def changed(self) -> bool:
        """Was it written to, or another tensor put in its place?"""
        return self.owner._buffers.get(self.name) is not self.tensor or self.tensor._version != self.version


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What the buffers of some modules held when it was taken."""

    held: tuple[_Held, ...]

    @classmethod
    def of(cls, modules: Iterable[torch.nn.Module]) -> Snapshot:
        """All buffers of ``modules``; one that several share is copied once, zeros (an empty cache) not at all."""
        copies: dict[int, torch.Tensor | None] = {}
        held = []
        for module in modules:
            for path, owner in module.named_modules():
                for name, tensor in owner._buffers.items():
                    if tensor is not None:
                        if id(tensor) not in copies:
                            copies[id(tensor)] = _copied(tensor)
                        value = copies[id(tensor)]
                        whole = canonical_module_name(f"{path}.{name}" if path else name)
                        version = tensor._version
                        held.append(
                            _Held(owner=owner, name=name, path=whole, tensor=tensor, value=value, version=version)
                        )
        return cls(held=tuple(held))

    def only(self, tensors: Iterable[torch.Tensor]) -> Snapshot:
        """What it says of ``tensors``."""
        known = {id(tensor) for tensor in tensors}
        return Snapshot(held=tuple(each for each in self.held if id(each.tensor) in known))

    def written(self) -> tuple[str, ...]:
        """Names of the buffers that were written to since."""
        return tuple(sorted({each.path for each in self.held if each.changed()}))

    def lost(self, kept: Iterable[str]) -> tuple[str, ...]:
        """Names of buffers that were written to since and that are not ``kept`` under any of their names."""
        names: dict[int, set[str]] = {}
        for each in self.held:
            names.setdefault(id(each.tensor), set()).add(each.path)
        known = set(kept)
        return tuple(sorted({e.path for e in self.held if e.changed() and not names[id(e.tensor)] & known}))

    def restore(self) -> None:
        """Put back what they held."""
        import torch

        with torch.no_grad():
            for each in self.held:
                if each.changed():
                    if each.tensor.requires_grad:  # written with gradients on, it is part of their graph
                        each.tensor.detach_()
                    clear(each.tensor) if each.value is None else each.tensor.copy_(each.value)
                    each.owner._buffers[each.name] = each.tensor


def _copied(tensor: torch.Tensor) -> torch.Tensor | None:
    held = tensor.detach()
    return held.clone() if bool(held.any()) else None


@contextmanager
def untouched(*modules: torch.nn.Module) -> Iterator[Snapshot]:
    """What runs inside may write to buffers of ``modules``; afterwards they hold what they held."""
    snapshot = Snapshot.of(modules)
    try:
        yield snapshot
    finally:
        snapshot.restore()


def drop_overwritten(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Make plain values of the buffers that every call overwrites whole before it reads them; their names.

    No call sees what an earlier one left there, so no target needs to keep it (transformers' ``cumulative_length`` of
    a static cache). ``program`` is changed in place, as torch.export returned it: not functional yet.
    """
    signature, graph = program.graph_signature, program.graph_module.graph
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    buffers = dict(signature.inputs_to_buffers)
    dropped = []
    for spec in [spec for spec in signature.input_specs if spec.arg.name in buffers]:
        name, node = buffers[spec.arg.name], nodes[spec.arg.name]
        write = _only_write(node)
        if write is None:
            continue
        write.replace_all_uses_with(_as_written(graph, write, node.meta["val"]))
        graph.erase_node(write)
        graph.erase_node(node)
        signature.input_specs.remove(spec)
        program.state_dict.pop(name, None)
        program.constants.pop(name, None)
        dropped.append(canonical_module_name(name))
    program.graph_module.recompile()
    return tuple(dropped)


def _only_write(node: torch.fx.Node) -> torch.fx.Node | None:
    """The ``copy_`` into all of ``node`` that is all that ever touches it."""
    import torch

    users = list(node.users)
    if len(users) != 1 or users[0].target is not torch.ops.aten.copy_.default:
        return None
    return users[0] if users[0].args[0] is node and users[0].args[1] is not node else None


def _as_written(graph: torch.fx.Graph, write: torch.fx.Node, held: torch.Tensor) -> torch.fx.Node:
    """What ``write`` leaves in a buffer like ``held``, as a value of its own: what follows may write to it."""
    import torch

    aten = torch.ops.aten
    value: Any = write.args[1]
    with graph.inserting_before(write):
        for target, arguments in (
            (aten.to.dtype, (held.dtype,)),
            (aten.expand.default, (list(held.shape),)),
            (aten.clone.default, ()),
        ):
            made = graph.call_function(target, (value, *arguments))
            made.meta = {**write.meta, "val": target(value.meta["val"], *arguments)}
            value = made
    found: torch.fx.Node = value
    return found
