"""Which constant of the converted program holds which module's weight, proven by its values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, StageFailed
from edgebake.types import Assignment, canonical_module_name, rule_for

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


# Operators between a stored weight and its use that keep its values.
_VIEWS = ("aten.t.default", "aten.alias.default", "aten.detach.default", "aten.permute.default", "aten.transpose.int")


@dataclass(frozen=True, kw_only=True)
class Product:
    """A linear layer or convolution: its module and the positions of its input and weight among the arguments."""

    module: str
    data: int
    weight: int


@dataclass(frozen=True, kw_only=True)
class FloatWeight:
    """The float32 weight of ``module`` as the program uses it: batch normalisation that follows is folded in.

    ``axis`` is that of the output channels.
    """

    module: str
    scheme: str
    placeholder: str
    axis: int
    values: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Held:
    """A constant operator of the MIL program and the float weight in its layout; ``axis`` is the output channel's."""

    operation: Any
    modules: tuple[str, ...]
    scheme: str
    values: NDArray[np.float32]
    axis: int


def float_weights(program: torch.export.ExportedProgram, assignment: Assignment) -> tuple[FloatWeight, ...]:
    """Weights of the assigned modules that ``program`` uses. StageFailed for a module whose weight is computed."""
    weights = _Weights(program)
    found, problems = [], []
    for module, scheme in assignment.schemes.items():
        node = weights.consumer(module)
        if node is None:
            continue
        placeholder = weights.placeholder(node)
        if placeholder is None:
            problems.append(
                Problem(
                    what=f"the weight of {module} is computed, not stored",
                    fix=f"leave it out of the compression: {rule_for(module, 'fp16')}",
                )
            )
            continue
        values = weights.folded(node, placeholder)
        axis = 1 if (_convolution(node) or (False,))[0] else 0
        weight = FloatWeight(module=module, scheme=scheme, placeholder=placeholder, axis=axis, values=values)
        found.append(weight)
    if problems:
        raise StageFailed(problems)
    return tuple(found)


def folds_norms(program: torch.export.ExportedProgram) -> bool:
    """Whether the converter may fold normalisation and scales into convolutions of ``program``.

    For a transposed convolution in groups coremltools 9.0 multiplies the wrong channels, and in silence:
    ``fuse_conv_batchnorm`` and ``fuse_conv_scale`` read (channels per group, groups) as (groups, channels per group).
    A weight that several convolutions read would become several, of which the scheme of its module reaches one.
    """
    found = [(node, _convolution(node)) for node in program.graph.nodes if node.op == "call_function"]
    readers: Counter[Any] = Counter(node.args[1] for node, kind in found if kind is not None)
    normed = (node for node, kind in found if kind is not None and _norm_after(node) is not None)
    grouped = any(kind is not None and kind[0] and kind[1] > 1 for _, kind in found)
    return not grouped and all(readers[node.args[1]] == 1 for node in normed)


def _norm_after(node: torch.fx.Node) -> torch.fx.Node | None:
    """The batch normalisation that alone reads the result of ``node``."""
    following = next(iter(node.users)) if len(node.users) == 1 else None
    if following is not None and str(following.target) == "aten.alias.default":
        return _norm_after(following)
    return following if following is not None and "batch_norm" in str(following.target) else None


def _convolution(node: torch.fx.Node) -> tuple[bool, int] | None:
    """(transposed, groups) of a convolution, None for other operators; positions are those of ATen's schemas."""
    name = str(node.target).removeprefix("aten.").split(".")[0]
    if name == "convolution":
        return bool(node.args[6]), int(str(node.args[8]))
    if not name.startswith("conv"):
        return None
    return "transpose" in name, int(str(node.args[6])) if len(node.args) > 6 else 1


class _Weights:
    """Looks up tensors that ``torch.export`` lifted to inputs, and the operators of named modules."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.lifted = self._lifted(program)
        self.folds = folds_norms(program)
        self.consumers: dict[str, torch.fx.Node] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and _weight_position(node) is not None:
                self.consumers.setdefault(_module_of(node), node)

    @staticmethod
    def _lifted(program: torch.export.ExportedProgram) -> Mapping[str, torch.Tensor]:
        stored = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        return {spec.arg.name: stored[spec.target] for spec in specs if spec.target in stored}

    def consumer(self, module: str) -> torch.fx.Node | None:
        """The operator that ``module`` is, or None when this program does not call it."""
        return self.consumers.get(module)

    def placeholder(self, node: torch.fx.Node) -> str | None:
        """Name of the stored tensor that is the operator's weight."""
        import torch.fx

        position = _weight_position(node)
        weight = node.args[position] if position is not None else None
        while isinstance(weight, torch.fx.Node) and weight.op == "call_function" and len(weight.all_input_nodes) == 1:
            if str(weight.target) not in _VIEWS:
                break
            weight = weight.all_input_nodes[0]
        return weight.name if isinstance(weight, torch.fx.Node) and weight.name in self.lifted else None

    def folded(self, node: torch.fx.Node, placeholder: str) -> NDArray[np.float32]:
        """The weight times ``gamma / sqrt(variance + eps)`` of a batch normalisation that alone uses the output."""
        import numpy as np

        weight = np.asarray(self.lifted[placeholder].detach().float().numpy(), np.float64)
        following = _norm_after(node)
        if following is None or _convolution(node) is None or not self.folds:
            return weight.astype(np.float32)
        gamma, variance = following.args[1], following.args[4]
        factor = 1.0 / np.sqrt(self._array(variance) + float(_epsilon(following)))
        if gamma is not None:
            factor = factor * self._array(gamma)
        channel = 1 if _convolution(node) == (True, 1) else 0
        return (weight * factor.reshape([-1 if a == channel else 1 for a in range(weight.ndim)])).astype(np.float32)

    def _array(self, node: Any) -> NDArray[np.float64]:
        return self.lifted[node.name].detach().double().numpy()


def product_of(node: torch.fx.Node) -> Product | None:
    """What ``node`` multiplies; None where it is no product of an input with a weight."""
    weight = _weight_position(node) if node.op == "call_function" else None
    if weight is None or weight == 0:  # 0: a table that is looked up in
        return None
    return Product(module=_module_of(node), data=weight - 1, weight=weight)


def _module_of(node: torch.fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return canonical_module_name(path.removeprefix("L['self']").removeprefix("."))


def _weight_position(node: torch.fx.Node) -> int | None:
    name = str(node.target).removeprefix("aten.").split(".")[0]
    if name == "embedding":
        return 0
    if name == "linear" or name.startswith("conv") or name in ("mm", "matmul"):
        return 1
    return 2 if name == "addmm" else None


def _epsilon(node: torch.fx.Node) -> Any:
    return node.args[7] if str(node.target).startswith("aten.batch_norm") else node.args[6]


def locate(operations: Iterable[Any], weights: Iterable[FloatWeight]) -> tuple[tuple[Held, ...], tuple[Problem, ...]]:
    """The constants among ``operations`` that hold ``weights``, and a problem for each module that has none.

    Names alone are not trusted: a constant is taken when its values are the weight's up to half-precision rounding.
    Modules that share a weight share the constant and have to share the scheme.
    """
    constants = [op for op in operations if op.op_type == "const" and getattr(op.outputs[0].val, "ndim", 0) > 1]
    found: dict[str, Held] = {}
    problems = []
    for weight in weights:
        match = _match(constants, weight)
        if match is None:
            problems.append(
                Problem(
                    what=f"no constant of the Core ML program holds the weight of {weight.module}",
                    fix=f"leave it out of the compression: {rule_for(weight.module, 'fp16')}",
                )
            )
            continue
        operation, values, axis = match
        earlier = found.get(operation.name)
        if earlier is not None and earlier.scheme != weight.scheme:
            problems.append(
                Problem(
                    what=_clash(earlier.modules[0], earlier.scheme, weight),
                    fix="give both the same scheme",
                )
            )
            continue
        modules = (*(earlier.modules if earlier else ()), weight.module)
        found[operation.name] = Held(
            operation=operation, modules=modules, scheme=weight.scheme, values=values, axis=axis
        )
    return tuple(found.values()), tuple(problems)


def _clash(module: str, scheme: str, weight: FloatWeight) -> str:
    return f"{module} ({scheme}) and {weight.module} ({weight.scheme}) share one weight"


def _match(constants: list[Any], weight: FloatWeight) -> tuple[Any, NDArray[np.float32], int] | None:
    # The converter keeps the placeholder's name where it can, so that constant is compared first.
    by_name = sorted(constants, key=lambda op: not op.name.startswith(weight.placeholder))
    for operation in by_name:
        value = operation.outputs[0].val
        if value.size != weight.values.size:
            continue
        for values, axis in _layouts(weight.values, value.shape):
            if _same(value, values):
                transposed = any(child.op_type == "conv_transpose" for child in operation.outputs[0].child_ops)
                return operation, values, 1 if transposed else axis
    return None


def _layouts(values: NDArray[np.float32], shape: tuple[int, ...]) -> list[tuple[NDArray[np.float32], int]]:
    """``values`` arranged to ``shape`` (as they are up to axes of size 1, or transposed) and the channel's axis."""
    if [n for n in shape if n != 1] == [n for n in values.shape if n != 1]:
        straight = [(values.reshape(shape), 0)]
    else:
        straight = []
    return [*straight, *([(values.T, 1)] if values.ndim == 2 and values.T.shape == shape else [])]


def _same(constant: NDArray[Any], values: NDArray[np.float32]) -> bool:
    """Equal up to rounding to float16: 2**-11 relative or 2**-25, doubled for folding in float32."""
    import numpy as np

    return bool(np.allclose(constant.astype(np.float32), values, rtol=2.0**-10, atol=2.0**-24))
