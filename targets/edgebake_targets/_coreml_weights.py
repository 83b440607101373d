"""Which constant of the converted program holds which module's weight, proven by its values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
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

    ``axis`` is that of the output channels, ``target`` the stored tensor's name and ``factor`` what it was multiplied
    with. ``sensitivity``: how much the outputs depend on each value, where that was asked for.
    """

    module: str
    scheme: str
    placeholder: str
    target: str
    axis: int
    values: NDArray[np.float32]
    factor: NDArray[np.float64] | None
    sensitivity: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class Held:
    """A constant operator of the MIL program and the float weight in its layout; ``axis`` is the output channel's."""

    operation: Any
    modules: tuple[str, ...]
    scheme: str
    values: NDArray[np.float32]
    axis: int
    sensitivity: NDArray[np.float32] | None = None


def float_weights(
    program: torch.export.ExportedProgram, assignment: Assignment, without: Container[str] = ()
) -> tuple[FloatWeight, ...]:
    """Weights of the assigned modules that ``program`` uses. StageFailed for a module whose weight is computed.

    ``without``: modules that may be without a stored weight, such as one that multiplies two activations.
    """
    weights = _Weights(program)
    found, problems = [], []
    for module, scheme in assignment.schemes.items():
        node = weights.consumer(module)
        if node is None:
            continue
        placeholder = weights.placeholder(node)
        if placeholder is None and module in without:
            continue
        if placeholder is None:
            problems.append(
                Problem(
                    what=f"the weight of {module} is computed, not stored",
                    fix=f"leave it out of the compression: {rule_for(module, 'fp16')}",
                )
            )
            continue
        factor = weights.factor(node, placeholder)
        found.append(
            FloatWeight(
                module=module,
                scheme=scheme,
                placeholder=placeholder,
                target=weights.targets[placeholder],
                axis=1 if (_convolution(node) or (False,))[0] else 0,
                values=weights.folded(placeholder, factor),
                factor=factor,
            )
        )
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
    normed = (node for node, kind in found if kind is not None and norm_after(node) is not None)
    grouped = any(kind is not None and kind[0] and kind[1] > 1 for _, kind in found)
    return not grouped and all(readers[node.args[1]] == 1 for node in normed)


def norm_after(node: torch.fx.Node) -> torch.fx.Node | None:
    """The batch normalisation that alone reads the result of ``node``."""
    following = next(iter(node.users)) if len(node.users) == 1 else None
    if following is not None and str(following.target) == "aten.alias.default":
        return norm_after(following)
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
        stored = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        self.targets = {spec.arg.name: str(spec.target) for spec in specs if spec.target in stored}
        self.lifted: Mapping[str, torch.Tensor] = {name: stored[target] for name, target in self.targets.items()}
        self.folds = folds_norms(program)
        self.consumers: dict[str, torch.fx.Node] = {}
        for node in program.graph.nodes:
            if node.op == "call_function" and _weight_position(node) is not None:
                self.consumers.setdefault(_module_of(node), node)

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

    def folded(self, placeholder: str, factor: NDArray[np.float64] | None) -> NDArray[np.float32]:
        """The stored weight times ``factor``."""
        import numpy as np

        weight = self._array(placeholder)
        return (weight if factor is None else weight * factor).astype(np.float32)

    def factor(self, node: torch.fx.Node, placeholder: str) -> NDArray[np.float64] | None:
        """``gamma / sqrt(variance + eps)`` of a batch normalisation that alone uses the output, None without one."""
        import numpy as np

        following = norm_after(node)
        if following is None or _convolution(node) is None or not self.folds:
            return None
        gamma, variance = following.args[1], following.args[4]
        factor = 1.0 / np.sqrt(self._array(str(variance)) + float(_epsilon(following)))
        if gamma is not None:
            factor = factor * self._array(str(gamma))
        channel, rank = 1 if _convolution(node) == (True, 1) else 0, self.lifted[placeholder].ndim
        return factor.reshape([-1 if a == channel else 1 for a in range(rank)])

    def _array(self, placeholder: str) -> NDArray[np.float64]:
        return self.lifted[placeholder].detach().double().numpy()


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
        operation, values, axis, sensitivity = match
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
            operation=operation,
            modules=modules,
            scheme=weight.scheme,
            values=values,
            axis=axis,
            sensitivity=sensitivity,
        )
    return tuple(found.values()), tuple(problems)


def _clash(module: str, scheme: str, weight: FloatWeight) -> str:
    return f"{module} ({scheme}) and {weight.module} ({weight.scheme}) share one weight"


def _match(
    constants: list[Any], weight: FloatWeight
) -> tuple[Any, NDArray[np.float32], int, NDArray[np.float32] | None] | None:
    """The constant, and values, axis of the output channels and sensitivity of ``weight`` in its layout."""
    # The converter keeps the placeholder's name where it can, so that constant is compared first.
    by_name = sorted(constants, key=lambda op: not op.name.startswith(weight.placeholder))
    for operation in by_name:
        value = operation.outputs[0].val
        if value.size != weight.values.size:
            continue
        for arranged, axis in _layouts(weight.values.shape, value.shape):
            values = arranged(weight.values)
            if _same(value, values):
                transposed = any(child.op_type == "conv_transpose" for child in operation.outputs[0].child_ops)
                sensitivity = None if weight.sensitivity is None else arranged(weight.sensitivity)
                return operation, values, 1 if transposed else axis, sensitivity
    return None


def _layouts(held: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[Callable[[NDArray[Any]], Any], int]]:
    """Ways to arrange an array of ``held`` to ``shape``, and the output channels' axis after each.

    As it is, up to axes of size 1, or transposed.
    """
    if [n for n in shape if n != 1] == [n for n in held if n != 1]:
        yield (lambda array: array.reshape(shape)), 0
    if len(held) == 2 and held[::-1] == shape:
        yield (lambda array: array.T), 1


def _same(constant: NDArray[Any], values: NDArray[np.float32]) -> bool:
    """Equal up to rounding to float16: 2**-11 relative or 2**-25, doubled for folding in float32."""
    import numpy as np

    return bool(np.allclose(constant.astype(np.float32), values, rtol=2.0**-10, atol=2.0**-24))
