"""Which values PT2E observes for Core ML under w8a8: the input of each assigned linear layer and convolution.

Only inputs: what lies between two products (normalisation, softmax, residual sums) reads values that were not rounded.
coremltools' own pass for activations (``insert_prefix_quantize_dequantize_pair``) writes the same pattern. Weights are
not observed: ``_coreml_compress`` rounds them where they end up, as it does under w8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebake.types import Assignment
from edgebake_targets._coreml_schemes import quantises_activations
from edgebake_targets._coreml_weights import product_of

if TYPE_CHECKING:
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer

# float16's smallest normal number: scales are float16 in the package, and hardware may take smaller ones for zero.
SMALLEST_SCALE = 2.0**-14


def build(assignment: Assignment, activation_range: str, percentile: float = 99.99) -> Quantizer:
    """A quantizer for the modules of ``assignment`` whose scheme has static activations; see ``_uint8``."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    observed = _uint8(activation_range, percentile)

    class InputsOfProducts(Quantizer):  # type: ignore[misc]  # torchao's classes are untyped
        """Annotates one input of each product; several products that read one value share its scale."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                found = product_of(node)
                if found is not None and quantises_activations(assignment.schemes.get(found.module, "fp32")):
                    specs = {node.args[found.data]: observed}
                    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            """Nothing to refuse here: what stayed float is named when the package is written."""

    return InputsOfProducts()


def _uint8(activation_range: str, percentile: float) -> QuantizationSpec:
    """uint8 with a zero point, one scale per tensor; ``activation_range`` names how its range is chosen.

    ``histogram``: the range with the least squared error over the histogram of all calls (torchao's HistogramObserver).
    ``percentile`` (that share of the values, in percent), ``entropy`` and ``mse``: as ``_ranges`` chooses.
    """
    import torch
    from torchao.quantization.pt2e.quantizer import QuantizationSpec

    from edgebake_targets._observers import observer

    return QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=observer(activation_range, percentile).with_args(eps=SMALLEST_SCALE),
    )
