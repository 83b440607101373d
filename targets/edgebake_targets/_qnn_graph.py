"""Rewrites of an exported network that ExecuTorch's Qualcomm backend would otherwise compute wrongly or coarsely."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# exp(-100) is 0 in float32 against any score of the same row that is not 84 lower.
MASKED = -100.0
_LOWEST = -1000.0  # no score is this low: what is lower hides a key
MOVES = ("alias", "clone", "contiguous", "detach", "expand", "lift_fresh_copy", "permute", "reshape", "slice",
         "squeeze", "to", "_to_copy", "transpose", "unsqueeze", "view")  # fmt: skip
_CARRY = frozenset({*MOVES, "add", "masked_fill", "mul", "where"})
_MASKED_BY = ("scaled_dot_product_attention", "softmax", "_softmax", "_safe_softmax")


def rewrite(module: torch.fx.GraphModule) -> None:
    """All rewrites, in place; what the network computes stays the same but for rounding."""
    from edgebake_targets._qnn_norms import fuse_rms_norms

    clamp_relu6(module)
    fold_norms(module)
    fuse_rms_norms(module)
    bound_masks(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def name_of(node: torch.fx.Node) -> str:
    """``conv2d`` of a torch operator, whatever its overload; empty for what is none."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).partition("::")[2]


def value_of(module: torch.fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The constant that ``node`` reads; None for anything else."""
    import torch

    if getattr(node, "op", "") != "get_attr":
        return None
    found = operator.attrgetter(str(node.target))(module)
    return found if isinstance(found, torch.Tensor) else None


def constant(module: torch.fx.GraphModule, value: torch.Tensor, before: torch.fx.Node, name: str) -> torch.fx.Node:
    """A new constant of ``module``, read right before ``before``."""
    taken = f"_edgebake_{name}_{sum(key.startswith('_edgebake_') for key in dict(module.named_buffers()))}"
    value = value.detach().clone()
    module.register_buffer(taken, value)
    with module.graph.inserting_before(before):
        made: torch.fx.Node = module.graph.get_attr(taken)
    fake = next((node.meta["val"].fake_mode for node in module.graph.nodes if hasattr(_val(node), "fake_mode")), None)
    if fake is not None:
        made.meta["val"] = fake.from_tensor(value, static_shapes=True)
    return made


def _val(node: torch.fx.Node) -> Any:
    return node.meta.get("val")


# --- ReLU6 ------------------------------------------------------------------------------------------------------------


def clamp_relu6(module: torch.fx.GraphModule) -> None:
    """ReLU6 becomes the hardtanh that it is: the backend's quantizer has no rule for it and leaves its output float."""
    import torch

    for node in module.graph.nodes:
        if name_of(node) in ("relu6", "relu6_"):
            node.target = torch.ops.aten.hardtanh.default
            node.args = (node.args[0], 0.0, 6.0)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def fold_norms(module: torch.fx.GraphModule) -> None:
    """Fold every BatchNorm into the convolution before it; one that stands alone gets its epsilon into its variance.

    ``gamma (x - mean) / sqrt(var + eps) + beta`` (Ioffe, Szegedy 2015, algorithm 2). ExecuTorch 1.4's builder for QNN
    takes 1e-9 for every network's eps: MobileNetV2 in fp16 comes out at -14 dB.
    """
    for node in [node for node in module.graph.nodes if name_of(node) == "batch_norm"]:
        _fold(module, node) if _foldable(module, node) else _move_epsilon(module, node)


def _foldable(module: torch.fx.GraphModule, norm: torch.fx.Node) -> bool:
    """Whether the norm's input is a plain convolution that nothing else reads, with a weight of its own."""
    import torch

    convolution = norm.args[0]
    if not isinstance(convolution, torch.fx.Node) or len(convolution.users) > 1:
        return False
    plain = name_of(convolution) in ("conv1d", "conv2d", "conv3d")
    return plain and value_of(module, convolution.args[1]) is not None


def _fold(module: torch.fx.GraphModule, norm: torch.fx.Node) -> None:
    import torch

    convolution: Any = norm.args[0]
    gamma, beta, mean, variance = (value_of(module, argument) for argument in norm.args[1:5])
    weight = value_of(module, convolution.args[1])
    assert weight is not None
    assert mean is not None
    assert variance is not None
    bias = value_of(module, convolution.args[2]) if len(convolution.args) > 2 else None
    scale = torch.rsqrt(variance + float(norm.args[7])) * (1.0 if gamma is None else gamma)  # type: ignore[arg-type]
    shift = ((0.0 if bias is None else bias) - mean) * scale + (0.0 if beta is None else beta)
    scaled = constant(module, weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), convolution, "weight")
    shifted = constant(module, shift, convolution, "bias")
    convolution.args = (convolution.args[0], scaled, shifted, *convolution.args[3:])
    norm.replace_all_uses_with(convolution)
    module.graph.erase_node(norm)


def _move_epsilon(module: torch.fx.GraphModule, norm: torch.fx.Node) -> None:
    variance = value_of(module, norm.args[4])
    if variance is None:
        return
    moved = constant(module, variance + float(norm.args[7]), norm, "variance")  # type: ignore[arg-type]
    norm.args = (*norm.args[:4], moved, *norm.args[5:7], 0.0, *norm.args[8:])


# --- masks ------------------------------------------------------------------------------------------------------------


def bound_masks(module: torch.fx.GraphModule) -> None:
    """Raise numbers that hide keys from a softmax (-inf, the lowest float, -1e4) to -100, which hides them as well.

    Only numbers whose every way through the graph ends in a softmax. The backend's quantizer takes -65535 for
    infinities; a range of scores that reaches so far has little left for them in 16 bits (18 dB on an attention layer).
    """
    for node in list(module.graph.nodes):
        lowest = [place for place, value in enumerate(node.args) if type(value) in (int, float) and value < _LOWEST]
        held = value_of(module, node)
        hides = held is not None and held.is_floating_point() and bool((held < _LOWEST).any())
        if not (lowest or hides) or not _only_masks(node):
            continue
        for place in lowest:
            node.update_arg(place, MASKED)
        if held is not None and hides:
            node.replace_all_uses_with(constant(module, held.clamp(min=MASKED), node, "mask"))


def _only_masks(node: torch.fx.Node) -> bool:
    pending, seen, ends = [node], {node}, 0
    while pending:
        for user in pending.pop().users:
            if name_of(user) in _MASKED_BY:
                ends += 1
            elif name_of(user) == "_assert_tensor_metadata":
                continue
            elif name_of(user).rstrip("_") not in _CARRY:
                return False
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return ends > 0
