"""Buffers that a network writes to: put back, so that every sequence of calls begins where it was loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebake.types import canonical_module_name

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class _Held:
    """A buffer of ``owner``: the tensor itself, what it held, and how often it had been written to."""

    owner: torch.nn.Module
    name: str
    path: str
    tensor: torch.Tensor
    value: torch.Tensor
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
        """All buffers of ``modules``; one that several share is copied once."""
        copies: dict[int, torch.Tensor] = {}
        held = []
        for module in modules:
            for path, owner in module.named_modules():
                for name, tensor in owner._buffers.items():
                    if tensor is not None:
                        value = copies.setdefault(id(tensor), tensor.detach().clone())
                        whole = canonical_module_name(f"{path}.{name}" if path else name)
                        version = tensor._version
                        held.append(
                            _Held(owner=owner, name=name, path=whole, tensor=tensor, value=value, version=version)
                        )
        return cls(held=tuple(held))

    def written(self) -> tuple[str, ...]:
        """Names of the buffers that were written to since."""
        return tuple(sorted({each.path for each in self.held if each.changed()}))

    def restore(self) -> None:
        """Put back what they held."""
        import torch

        with torch.no_grad():
            for each in self.held:
                if each.changed():
                    each.tensor.detach_().copy_(each.value)  # written with gradients on, it is part of their graph
                    each.owner._buffers[each.name] = each.tensor


@contextmanager
def untouched(*modules: torch.nn.Module) -> Iterator[Snapshot]:
    """What runs inside may write to buffers of ``modules``; afterwards they hold what they held."""
    snapshot = Snapshot.of(modules)
    try:
        yield snapshot
    finally:
        snapshot.restore()
