"""Calibration of a deep network block by block, in the memory of one block's statistics.

A network whose longest list of alike blocks is a chain (each takes what the one before it gives) is run once on the
calibration samples; from then on every block is called by itself with what it was called with, so that a network of
any depth is computed twice in all: once for the statistics, once with the block as it then is. Layers outside the
chain, and all layers of a network without one, cost a run of the whole network each.

What was found for a block is kept in the store as it ends: a killed build takes it from there and finds nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from edgebake.buffers import untouched
from edgebake.compress import _parts

if TYPE_CHECKING:
    import torch

    from edgebake.target import ModuleRequest
    from edgebake.types import Keep

    # Second moments of layers' inputs by layer name (columns, columns): the mean of x x^T over positions; None: unused.
    Moments = Mapping[str, "torch.Tensor | None"]
    Found = dict[str, torch.Tensor]

_FOUND = "found.safetensors"


@dataclass
class _Call:
    """One call of the chain: what the first block was given, and what else each block was."""

    hidden: Any
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@dataclass
class _Recorder:
    """Hooks on the blocks of a chain."""

    calls: list[_Call] = field(default_factory=list)
    last: Any = None
    broken: bool = False

    def before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of block ``index``."""
        hidden = args[0] if args else None
        if index == 0:
            self.calls.append(_Call(hidden=hidden))
        elif not self.calls or hidden is None or hidden is not self.last or len(self.calls[-1].rest) != index:
            self.broken = True
            return
        self.calls[-1].rest.append((args[1:], dict(kwargs)))

    def after(self, output: Any) -> None:
        """A hook behind each block."""
        self.last = first_of(output)


@dataclass
class _Moment:
    """The sum of x x^T over all positions that layers with the same input were given."""

    total: torch.Tensor
    count: int = 0
    seen: Any = None  # the input that was added last: layers that share it add it once

    def add(self, x: torch.Tensor) -> None:
        """Add all positions of ``x`` (..., columns)."""
        flat = x.detach().reshape(-1, x.shape[-1])
        self.total.addmm_(flat.T, flat)
        self.count += len(flat)
        self.seen = x


def first_of(output: Any) -> Any:
    """The hidden state that a block returns, by itself or first in a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def chain_of(module: torch.nn.Module) -> torch.nn.ModuleList | None:
    """The list of at least two blocks of one class that holds most parameters; None without one."""
    import torch

    lists = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    alike = [m for m in lists if len({type(block) for block in m}) == 1]
    return max(alike, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)


def walk(
    request: ModuleRequest,
    layers: Mapping[str, torch.nn.Linear],
    find: Callable[[Moments], Found],
    use: Callable[[Found], object],
) -> None:
    """Have ``find`` look at the moments of ``layers`` part by part, and ``use`` put what it found into the network.

    What was changed is in what later parts are given. ``use`` is also given what an earlier build kept, to the bit.
    """
    import torch

    with torch.no_grad(), untouched(request.module), _parts.keeping(request) as keep:
        blocks, calls = _recorded(request)
        inside = [{n: m for n, m in layers.items() if any(m is part for part in b.modules())} for b in blocks]
        hidden = [call.hidden for call in calls]
        for index, (block, chosen) in enumerate(zip(blocks, inside, strict=True)):
            if chosen:
                statistics = partial(_moments, chosen, partial(_replayed, block, index, calls, hidden))
                use(_kept(keep, f"block {index}", find, statistics))
            hidden = _replayed(block, index, calls, hidden)
        placed = {name for chosen in inside for name in chosen}
        for name, layer in layers.items():
            if name not in placed:
                statistics = partial(_moments, {name: layer}, lambda: request.run_calibration(request.module))
                use(_kept(keep, f"layer {name}", find, statistics))


def _kept(keep: Keep, part: str, find: Callable[[Moments], Found], statistics: Callable[[], Moments]) -> Found:
    """What ``find`` gives, from the store where an earlier build found it."""
    from safetensors.torch import load_file, save_file

    folder = keep(part, lambda folder: save_file(find(statistics()), folder / _FOUND))
    found: Found = load_file(folder / _FOUND)
    return found


def _replayed(block: torch.nn.Module, index: int, calls: list[_Call], hidden: list[Any]) -> list[Any]:
    """What ``block``, number ``index``, makes of the ``hidden`` states of all calls."""
    made = []
    for value, call in zip(hidden, calls, strict=True):
        args, kwargs = call.rest[index]
        made.append(first_of(block(value, *args, **kwargs)))
    return made


def _recorded(request: ModuleRequest) -> tuple[list[torch.nn.Module], list[_Call]]:
    """The blocks of the chain and their calls on the calibration samples; none where there is no chain."""
    chain = chain_of(request.module)
    if chain is None:
        return [], []
    recorder, hooks = _Recorder(), []
    for index, block in enumerate(chain):
        hooks.append(
            block.register_forward_pre_hook(
                lambda _m, args, kwargs, index=index: recorder.before(index, args, kwargs), with_kwargs=True
            )
        )
        hooks.append(block.register_forward_hook(lambda _m, _args, output: recorder.after(output)))
    request.run_calibration(request.module)
    for hook in hooks:
        hook.remove()
    whole = not recorder.broken and all(len(call.rest) == len(chain) for call in recorder.calls)
    return (list(chain), recorder.calls) if whole and recorder.calls else ([], [])


def _moments(layers: Mapping[str, torch.nn.Linear], run: Callable[[], object]) -> Moments:
    """The moments of ``layers`` in ``run``; layers with the same input share one tensor."""
    import torch

    found: dict[str, _Moment] = {}

    def watch(name: str, x: torch.Tensor) -> None:
        if name not in found:
            shared = next((m for m in found.values() if m.seen is x), None)
            found[name] = shared or _Moment(total=torch.zeros(x.shape[-1], x.shape[-1]))
        if found[name].seen is not x:
            found[name].add(x)

    hooks = [
        layer.register_forward_pre_hook(lambda _m, args, name=name: watch(name, args[0]))
        for name, layer in layers.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    means: dict[int, torch.Tensor] = {id(m): m.total.div_(m.count) for m in _distinct(found.values())}
    return {name: means[id(found[name])] if name in found else None for name in layers}


def _distinct(moments: Iterable[_Moment]) -> list[_Moment]:
    return list({id(moment): moment for moment in moments}.values())
