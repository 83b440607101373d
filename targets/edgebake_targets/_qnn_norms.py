"""Root mean square norms that a network writes out, as the operator that Qualcomm's NPU has for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake_targets._qnn_graph import constant, name_of, value_of

if TYPE_CHECKING:
    import torch


def fuse_rms_norms(module: torch.fx.GraphModule) -> None:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang, Sennrich 2019, eq. 4) becomes ``rms_norm``.

    Written out, the squares overflow in half precision, and in integers they leave small values no resolution.
    ExecuTorch's own pass knows ``mul(rsqrt)`` with a weight alone; this takes division, reciprocals and norms without
    a weight, too.

    At w8a8 the HTP's operator is 1.7 dB coarser than its own rounded graph (33.0 against 34.6, written out 34.6), where
    rows are of one size. Where they differ by a factor of 160, it has 7.8 dB and the norm written out -4.4.
    """
    import torch

    for check in [node for node in module.graph.nodes if name_of(node) == "_assert_tensor_metadata"]:
        module.graph.erase_node(check)  # export's, before casts: it would keep alive what it checks
    for mean in [node for node in module.graph.nodes if name_of(node) == "mean"]:
        found = _norm(module, mean)
        if found is None:
            continue
        width = int(found.data.meta["val"].shape[-1])
        weight = found.weight or constant(module, torch.ones(width), found.last, "ones")
        with module.graph.inserting_before(found.last):
            fused = module.graph.call_function(
                torch.ops.aten.rms_norm.default, (found.data, [width], weight, found.epsilon)
            )
        fused.meta = dict(found.last.meta)
        found.last.replace_all_uses_with(fused)
        module.graph.eliminate_dead_code()


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """``data`` normed over its last axis comes out of ``last``, times ``weight`` where there is one."""

    data: torch.fx.Node
    weight: torch.fx.Node | None
    epsilon: float
    last: torch.fx.Node


def _norm(module: torch.fx.GraphModule, mean: torch.fx.Node) -> _Norm | None:
    data = _squared(mean.args[0])
    if data is None or not _over_last_axis(mean, data):
        return None
    added = _only_reader(mean)
    epsilon = _added(module, added, mean)
    root = _only_reader(added) if epsilon is not None else None
    scaled = next(_scalings(data, root), None) if root is not None else None
    if scaled is None or epsilon is None:
        return None
    weighted, weight = _weighted(module, scaled)
    return _Norm(data=data, weight=weight, epsilon=epsilon, last=weighted or scaled)


def _squared(node: Any) -> torch.fx.Node | None:
    """What ``node`` squares."""
    kind = name_of(node)
    twice = kind == "mul" and _same(node.args[0]) is _same(node.args[1])
    if twice or kind == "square" or (kind == "pow" and node.args[1] == 2):
        squared: torch.fx.Node = _same(node.args[0])
        return squared
    return None


def _over_last_axis(mean: torch.fx.Node, data: torch.fx.Node) -> bool:
    axes, keeps = (*mean.args, None, None)[1:3]
    last = data.meta["val"].dim() - 1
    return keeps is True and isinstance(axes, list | tuple) and list(axes) in ([-1], [last])


def _added(module: torch.fx.GraphModule, node: torch.fx.Node | None, to: torch.fx.Node) -> float | None:
    """The one number that ``node`` adds to ``to``."""
    if node is None or name_of(node) != "add" or node.kwargs:
        return None
    (other,) = [given for given in node.args if given is not to] or [None]
    value = value_of(module, other)
    if value is not None and value.numel() == 1:
        return float(value)
    return float(other) if isinstance(other, int | float) else None


def _scalings(data: torch.fx.Node, root: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """``data * rsqrt``, ``data / sqrt`` or ``data * (1 / sqrt)``."""
    inverse = root if name_of(root) == "rsqrt" else None
    if name_of(root) == "sqrt":
        yield from (
            user for user in root.users if name_of(user) == "div" and user.args[1] is root and _is(user.args[0], data)
        )
        inverse = next((user for user in root.users if name_of(user) == "reciprocal"), None)
    if inverse is not None:
        yield from (
            user for user in inverse.users if name_of(user) == "mul" and any(_is(given, data) for given in user.args)
        )


def _weighted(
    module: torch.fx.GraphModule, scaled: torch.fx.Node
) -> tuple[torch.fx.Node, torch.fx.Node] | tuple[None, None]:
    """The product of ``scaled`` with a weight for its last axis, and the weight; nothing where others read it."""
    after = _only_reader(scaled)
    while after is not None and _keeps_type(after):
        scaled, after = after, _only_reader(after)
    if after is None or name_of(after) != "mul":
        return None, None
    (weight,) = [given for given in after.args if given is not scaled] or [None]
    value = value_of(module, weight)
    width = after.meta["val"].shape[-1]
    return (after, weight) if value is not None and tuple(value.shape) == (width,) else (None, None)  # type: ignore[return-value]


def _only_reader(node: torch.fx.Node | None) -> torch.fx.Node | None:
    """The one reader of ``node``."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _is(node: Any, data: torch.fx.Node) -> bool:
    return _same(node) is data


def _same(node: Any) -> Any:
    """``node`` before casts to the type that it has."""
    while _keeps_type(node):
        node = node.args[0]
    return node


def _keeps_type(node: Any) -> bool:
    if not hasattr(node, "target") or name_of(node) not in ("to", "_to_copy"):
        return False
    given, made = (end.meta.get("val") for end in (node.args[0], node))
    return given is not None and made is not None and given.dtype == made.dtype
