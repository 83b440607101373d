"""Large weights are quantised and dequantised some rows at a time.

torchao's and torch's operators make up to three float32 copies of a whole weight on the way, which for the embedding of
a language model are gigabytes. Rows do not depend on each other where each has scales of its own, so that the result is
the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LEAST = 1 << 24  # elements: smaller weights cost little as they are
_PART = 1 << 22  # elements of the rows that are taken at a time

_BLOCKS = ("torchao::quantize_affine", "torchao::dequantize_affine")  # (weight, block size, scales, zero points, ...)
_CHANNELS = ("quantized_decomposed::quantize_per_channel", "quantized_decomposed::dequantize_per_channel")


@contextmanager
def by_rows() -> Iterator[None]:
    """What runs inside takes large weights by rows."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    class ByRows(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func is torch.nn.functional.embedding and is_traceable_wrapper_subclass(args[1]):
                table: Any = type(args[1])
                with self:  # torchao dequantises the whole table in there
                    return table.__torch_function__(func, types, args, given)
            at = _scales_at(func, args)
            return func(*args, **given) if at is None else _each_part(func, args, given, at)

    with ByRows():
        yield


def _scales_at(func: Any, args: tuple[Any, ...]) -> int | None:
    """Where in ``args`` scales and, behind them, zero points of the rows are; None for what is left as it is."""
    import torch

    packet = getattr(func, "overloadpacket", func)
    name = getattr(packet, "_qualified_op_name", "")
    if name not in (*_BLOCKS, *_CHANNELS):
        return None
    weight = args[0]
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dim() < 2 or weight.numel() < LEAST:
        return None
    if name in _CHANNELS:
        return 1 if len(args) > 3 and args[3] == 0 and args[2] is not None else None
    return 2 if args[1][0] == 1 and args[2].shape[:1] == weight.shape[:1] and args[3] is not None else None


def _each_part(
    func: Callable[..., torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], at: int
) -> torch.Tensor:
    weight = args[0]
    rows = max(1, _PART // weight[0].numel())
    made: torch.Tensor | None = None
    for start in range(0, len(weight), rows):
        these = slice(start, start + rows)
        part = func(weight[these], *args[1:at], args[at][these], args[at + 1][these], *args[at + 2 :], **kwargs)
        if made is None:
            made = part.new_empty(weight.shape)
        made[these] = part
    assert made is not None  # a large weight has rows
    return made
