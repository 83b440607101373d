"""Static integers for ExecuTorch's Qualcomm backend: its PT2E quantizer, told where a clamp follows a product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebake_targets._qnn_graph import name_of

if TYPE_CHECKING:
    import torch

_TYPES = {"w8a8": "use_8a8w", "w8a16": "use_16a8w", "w4a16": "use_16a4w"}
_PRODUCTS = ("conv1d", "conv2d", "conv3d", "linear")
_CLAMPS = ("relu", "relu_", "hardtanh", "hardtanh_")


def quantized(
    module: torch.fx.GraphModule,
    scheme: str,
    soc_model: int,
    calibration: Iterable[tuple[torch.Tensor, ...]],
    activation_range: str,
) -> torch.fx.GraphModule:
    """``module`` with quantise/dequantise pairs whose scales come from ``calibration``.

    Numerics: torchao's PT2E flow, https://docs.pytorch.org/ao/stable/tutorials_source/pt2e_quant_ptq.html, with weights
    symmetric per output channel and activations affine per tensor, as the HTP has them.
    """
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with torch.no_grad():
        observed = prepare_pt2e(module, _quantizer(scheme, soc_model, activation_range))
        for inputs in calibration:
            observed(*inputs)
        converted: torch.fx.GraphModule = convert_pt2e(observed)
    return converted


def _quantizer(scheme: str, soc_model: int, activation_range: str) -> Any:
    from executorch.backends.qualcomm.quantizer.quantizer import QnnQuantizer, QuantDtype
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset

    made = QnnQuantizer(soc_model=QcomChipset(soc_model))
    made.set_default_quant_config(
        QuantDtype[_TYPES[scheme]],
        is_conv_per_channel=True,
        is_linear_per_channel=True,
        act_observer=_observer(activation_range),
    )
    made.add_custom_quant_annotations([annotate_clamped])
    return made


def _observer(activation_range: str) -> Any:
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver

    return HistogramObserver if activation_range == "histogram" else MinMaxObserver


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
