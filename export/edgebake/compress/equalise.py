"""Cross-layer equalisation: channels between two layers are scaled so that none leaves the others too few levels.

Numerics: ``f(s x) = s f(x)`` for s > 0 lets a channel be divided by s in one layer and multiplied by s in the next one,
Nagel, van Baalen, Blankevoort, Welling 2019 (arXiv:1906.04721), section 4.1. Their s equalises rows of the first
weights with columns of the second (equation 11). All targets here give each row a scale of its own, for which the first
weights do not matter; what shares a scale is the value between the layers, so that its largest magnitude ``a`` on
calibration samples stands in their place: ``s = sqrt(a / max |w|)``, as in Xiao et al. 2023 (SmoothQuant,
arXiv:2211.10438), equation 4. Behind ReLU6 a channel that comes near 6 keeps its scale, and no other one is brought
nearer than half of it: exact on what the samples show, and on what is up to twice as large, not beyond.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.target import ModuleRequest
from edgebake.types import ActsOn

if TYPE_CHECKING:
    import torch

ACTS_ON: ActsOn = "module"
CALIBRATED = True
DISTRIBUTIONS = ("torch",)
_LARGEST = 64.0  # times that a channel is scaled up or down at most: what is hardly ever used would grow without bound
_HEADROOM = 2.0  # of a clamp's ceiling over what calibration samples show
# Operators that give f(s x) = s f(x) for each channel, and keep channels where they are.
_HOMOGENEOUS = frozenset(
    f"aten.{name}"
    for name in ("relu", "relu_", "leaky_relu", "dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
)
_CLAMPS = frozenset(("aten.hardtanh", "aten.hardtanh_", "aten.relu6", "aten.relu6_"))
_PRODUCTS = frozenset(("aten.linear", "aten.conv1d", "aten.conv2d"))
_NORMS = frozenset(("aten.batch_norm", "aten._native_batch_norm_legit_no_training"))


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two layers by name, the normalisation behind the first (or none), and where what is between them is cut."""

    first: str
    norm: str
    second: str
    ceiling: float


@dataclass
class _Watch:
    """What calibration shows: one call of the network, and the largest magnitude of each input channel of layers."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    largest: dict[torch.nn.Module, torch.Tensor] = field(default_factory=dict)

    def call(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the network."""
        self.args, self.kwargs = self.args or args, self.kwargs or kwargs

    def layer(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """A hook before a layer."""
        import torch

        axis = -1 if isinstance(module, torch.nn.Linear) else 1
        peak = args[0].abs().movedim(axis, -1).reshape(-1, args[0].shape[axis]).amax(0)
        seen = self.largest.get(module)
        self.largest[module] = peak if seen is None else torch.maximum(seen, peak)


def apply(request: ModuleRequest) -> torch.nn.Module:
    """``request.module`` with equalised channels wherever one layer alone feeds another one.

    RecipeError where there are no two such layers. What is not exact is told.
    """
    import torch

    module, watch = request.module, _Watch()
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(watch.call, with_kwargs=True)]
    hooks += [layer.register_forward_pre_hook(watch.layer) for layer in layers]
    with torch.no_grad():
        request.run_calibration(module)
    for hook in hooks:
        hook.remove()
    pairs = list(_pairs(module, torch.export.export(module, watch.args, watch.kwargs, strict=False)))
    if not pairs:
        raise RecipeError(
            "equalise: no layer of this network feeds another one through activations that scale with their input",
            where="compress.steps",
            fix="take the step out",
        )
    for pair in pairs:
        _equalise(module, pair, watch)
    clamped = sum(pair.ceiling < float("inf") for pair in pairs)
    if clamped:
        request.tell(
            f"equalise: of {len(pairs)} pairs of layers {clamped} have a ReLU6 between them, through which scaling is "
            f"exact up to {_HEADROOM:g} times what the calibration samples show"
        )
    return module


def _pairs(module: torch.nn.Module, program: torch.export.ExportedProgram) -> Iterator[_Pair]:
    names = program.graph_signature.inputs_to_parameters
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    owned = {name for name, p in module.named_parameters(remove_duplicate=False) if uses[id(p)] == 1}

    def owner(node: Any, position: int) -> str:
        """The module whose own weight ``node`` reads, and nobody else."""
        weight = node.args[position] if len(node.args) > position else None
        name = names.get(getattr(weight, "name", ""), "")
        alone = weight is not None and name in owned and name.endswith(".weight") and len(weight.users) == 1
        return name.removesuffix(".weight") if alone else ""

    for node in program.graph.nodes:
        first = owner(node, 1) if _operator(node) in _PRODUCTS else ""
        if not first:
            continue
        user, norm, ceiling = _only_user(node), "", float("inf")
        if user is not None and _operator(user) in _NORMS:
            norm = owner(user, 1)
            user = _only_user(user) if norm else None
        while user is not None and _operator(user) in _HOMOGENEOUS | _CLAMPS:
            ceiling = min(ceiling, _ceiling(user))
            user = _only_user(user) if ceiling > 0 else None
        second = owner(user, 1) if user is not None and _operator(user) in _PRODUCTS else ""
        if second and ("linear" in _operator(node)) == ("linear" in _operator(user)):
            yield _Pair(first=first, norm=norm, second=second, ceiling=ceiling)


def _operator(node: Any) -> str:
    return str(node.target).rpartition(".")[0]


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _ceiling(node: Any) -> float:
    """Where ``node`` cuts; 0 for a clamp that does not begin at zero."""
    if _operator(node) not in _CLAMPS:
        return float("inf")
    if "relu6" in _operator(node):
        return 6.0
    low, high = (*node.args[1:3], -1.0, 1.0)[:2] if len(node.args) >= 3 else (-1.0, 1.0)
    return float(high) if low == 0 else 0.0


def _equalise(module: torch.nn.Module, pair: _Pair, watch: _Watch) -> None:
    import torch

    first, second = module.get_submodule(pair.first), module.get_submodule(pair.second)
    weight = second.get_parameter("weight").detach()
    groups = int(getattr(second, "groups", 1))
    parted = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    columns = parted.abs().amax(dim=(1, 3)).reshape(-1)  # (input channels,)
    values = watch.largest[second]
    scale = torch.sqrt(values / columns)
    usable = (values > 0) & (columns > 0)
    if not bool(usable.any()):
        return
    scale = scale / torch.exp(torch.log(scale[usable]).mean())
    scale = torch.clamp(scale, 1 / _LARGEST, _LARGEST)
    scale = torch.maximum(scale, values / (pair.ceiling / _HEADROOM))
    scale = torch.where(usable & (values < pair.ceiling / _HEADROOM), scale, torch.ones_like(scale))
    _multiply(module.get_submodule(pair.norm) if pair.norm else first, 1 / scale)
    made = parted * scale.reshape(groups, 1, -1, 1)
    second.weight = torch.nn.Parameter(made.reshape(weight.shape), requires_grad=False)
    watch.largest[second] = values / scale


def _multiply(layer: torch.nn.Module, factors: torch.Tensor) -> None:
    """Multiply each output channel of ``layer`` in new tensors; the old ones may belong to the float reference, too."""
    import torch

    for name, parameter in list(layer.named_parameters(recurse=False)):
        shape = (-1, *[1] * (parameter.ndim - 1))
        made = torch.nn.Parameter(parameter.detach() * factors.reshape(shape), requires_grad=False)
        setattr(layer, name, made)
