"""Static integers for ExecuTorch's Qualcomm backend: its PT2E quantizer, told where a clamp follows a product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgebake_targets._executorch import innermost_module
from edgebake_targets._qnn_graph import MOVES, name_of
from edgebake_targets._wide import ITSELF

if TYPE_CHECKING:
    import torch

_TYPES = {"w8a8": "use_8a8w", "w8a16": "use_16a8w", "w4a16": "use_16a4w"}
_WIDER = {"w8a8": "w8a16"}
_PRODUCTS = ("conv1d", "conv2d", "conv3d", "linear")
_CLAMPS = ("relu", "relu_", "hardtanh", "hardtanh_")


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """Which operator of a network is rounded how: ``scheme`` but in ``modules`` that have their own.

    What operators of the modules ``wide`` make has 16 bits. An operator computes in one width: one that reads such a
    value is wide, too, and takes its other inputs converted.
    """

    scheme: str
    modules: Mapping[str, str] = field(default_factory=dict)
    wide: frozenset[str] = frozenset()

    def of(self, node: torch.fx.Node) -> str:
        """The scheme of ``node``."""
        own = self.modules.get(home(node), self.scheme)
        wide = any(home(maker) in self.wide for maker in (node, *_makers(node)))
        return _WIDER.get(own, own) if wide else own

    def all(self) -> list[str]:
        """Every scheme that an operator may have."""
        found = {self.scheme, *self.modules.values()}
        return sorted(found | ({_WIDER.get(scheme, scheme) for scheme in found} if self.wide else set()))


def home(node: torch.fx.Node) -> str:
    """The module that ``node`` belongs to; what the backend's passes put in is where its first input comes from."""
    while not node.meta.get("nn_module_stack"):
        before = [given for given in node.all_input_nodes if given.op == "call_function"]
        if not before:
            return ITSELF
        node = before[0]
    return innermost_module(node) or ITSELF


def _makers(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Where the values that ``node`` reads come from, past what only reshapes or moves them."""
    for given in node.all_input_nodes:
        if name_of(given) in MOVES:
            yield from _makers(given)
        yield given


def quantized(
    module: torch.fx.GraphModule,
    schemes: Schemes,
    soc_model: int,
    calibration: Iterable[tuple[torch.Tensor, ...]],
    kind: Any,
) -> torch.fx.GraphModule:
    """``module`` with quantise/dequantise pairs whose scales ``kind``, a class of observers, finds in ``calibration``.

    Numerics: torchao's PT2E flow, https://docs.pytorch.org/ao/stable/tutorials_source/pt2e_quant_ptq.html, with weights
    symmetric per output channel and activations affine per tensor, as the HTP has them.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with torch.no_grad():
        observed = prepare_pt2e(module, _quantizer(schemes, soc_model, kind))
        for inputs in calibration:
            observed(*inputs)
        converted: torch.fx.GraphModule = convert_pt2e(observed)
    return converted


def _quantizer(schemes: Schemes, soc_model: int, kind: Any) -> Any:
    from executorch.backends.qualcomm.quantizer.quantizer import ModuleQConfig, QnnQuantizer, QuantDtype
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset

    def config(scheme: str) -> Any:
        return ModuleQConfig(
            QuantDtype[_TYPES[scheme]],
            is_conv_per_channel=True,
            is_linear_per_channel=True,
            act_observer=kind,
        )

    made = QnnQuantizer(soc_model=QcomChipset(soc_model))
    made.default_quant_config = config(schemes.scheme)
    others = [scheme for scheme in schemes.all() if scheme != schemes.scheme]
    made.set_submodule_qconfig_list(
        [(lambda node, scheme=scheme: schemes.of(node) == scheme, config(scheme)) for scheme in others]
    )
    made.add_custom_quant_annotations([annotate_clamped, annotate_counts])
    return made


def annotate_clamped(module: torch.fx.GraphModule) -> None:
    """Products with a ReLU or ReLU6 behind them get the scale of the clamped output.

    Left alone, the product's scale covers values that the clamp then throws away, and most of its 256 levels with them.
    """
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, SharedQuantizationSpec
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    for clamp in [node for node in module.graph.nodes if name_of(node) in _CLAMPS]:
        product: Any = clamp.args[0]
        marked = product.meta.get(Q_ANNOTATION_KEY)
        if name_of(product) not in _PRODUCTS or len(product.users) > 1 or getattr(marked, "output_qspec", None) is None:
            continue
        low, high = (0.0, None) if name_of(clamp).startswith("relu") else (clamp.args[1], clamp.args[2])
        spec = marked.output_qspec
        marked.output_qspec = replace(spec, observer_or_fake_quant_ctr=_within(spec, low, high))
        shared = SharedQuantizationSpec(product)
        clamp.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map={product: shared}, output_qspec=shared, _annotated=True
        )


def _within(spec: Any, low: float, high: float | None) -> Any:
    """The observer of ``spec``, which sees no more of its values than a clamp lets through."""
    made = spec.observer_or_fake_quant_ctr.p

    class Within(made.func):  # type: ignore[misc,name-defined]  # torchao's observers are untyped
        """Observes clamped values and hands the whole ones on."""

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            super().forward(values.clamp(low, high))
            return values

    return Within.with_args(**made.keywords)


def annotate_counts(module: torch.fx.GraphModule) -> None:
    """Whole numbers that become floats, such as masks, get a scale of one.

    The HTP casts an integer to a quantised tensor by its bits and not by its value: with the scale of a mask of zeros
    and ones, 1/65535, a one becomes next to nothing, and what it multiplies is lost (0 dB in a sentence encoder).
    """
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, SharedQuantizationSpec
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    for node in [node for node in module.graph.nodes if _counts(node)]:
        users = [user for user in node.users if node in getattr(_mark(user), "input_qspec_map", {})]
        if not users:
            continue
        spec = _mark(users[0]).input_qspec_map[node]
        exact = replace(spec, observer_or_fake_quant_ctr=_exact(spec))
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=exact, _annotated=True)
        for user in users:
            _mark(user).input_qspec_map[node] = SharedQuantizationSpec(node)


def _mark(node: torch.fx.Node) -> Any:
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    return node.meta.get(Q_ANNOTATION_KEY)


def _counts(node: torch.fx.Node) -> bool:
    """Whether ``node`` makes floats of integers or truth values."""
    if name_of(node) not in ("to", "_to_copy"):
        return False
    given, made = (getattr(end.meta.get("val"), "dtype", None) for end in (node.args[0], node))  # type: ignore[union-attr]
    return given is not None and made is not None and not given.is_floating_point and made.is_floating_point


def _exact(spec: Any) -> Any:
    """An observer that takes whole numbers as they are; ValueError for those that ``spec`` has no room for."""
    import torch

    made = spec.observer_or_fake_quant_ctr.p
    highest = spec.quant_max

    class Exact(made.func):  # type: ignore[misc,name-defined]  # torchao's observers are untyped
        """Scale one, zero point zero."""

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            if values.numel() and not 0 <= float(values.min()) <= float(values.max()) <= highest:
                found = f"{float(values.min()):g} to {float(values.max()):g}"
                raise ValueError(
                    f"whole numbers from {found} become floats in the network, and this scheme holds 0 to {highest}: "
                    "hand them to it as floats"
                )
            return values

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ones(1), torch.zeros(1, dtype=torch.int32)

    return Exact.with_args(**made.keywords)
