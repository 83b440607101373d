"""MediaTek's NeuroPilot packages: where they come from, and what their quantizer is held to.

``mtk_converter`` and ``mtk_neuron`` are on no package index; MediaTek gives them out in the NeuroPilot Express SDK.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.scheme import parse
from edgebake.target import Missing
from edgebake.types import Assignment
from edgebake_targets import _executorch

if TYPE_CHECKING:
    import torch
    from torchao.quantization.pt2e.quantizer import Quantizer

# The versions that ExecuTorch 1.4.1 was written for (backends/mediatek/README.md).
VERSIONS = {"mtk_converter": "8.13.0", "mtk_neuron": "8.2.23"}
SDK = "https://neuropilot.mediatek.com/resources/public/npexpress/en/docs/npexpress"
# Those of mt6989, mt6991 and mt6993, which ExecuTorch compiles for (preprocess.py: SUPPORTED_PLATFORM_CONFIGS).
NPUS = ("apu-790", "npu-890", "npu-990")
_PRECISIONS = {"w8a8": "A8W8", "w8a16": "A16W8", "w4a16": "A16W4"}


def missing() -> Missing | None:
    """None when MediaTek's converter and compiler are installed; imports neither."""
    absent = [name for name in VERSIONS if find_spec(name) is None]
    if not absent:
        return None
    asked = " and ".join(f"{name} {VERSIONS[name]}" for name in absent)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Missing(
        reason=f"MediaTek's {' and '.join(absent)} {'are' if len(absent) > 1 else 'is'} not installed",
        remedy=f"download the NeuroPilot Express SDK ({SDK}; a MediaTek account, Linux x86-64) and pip install its "
        f"wheels of {asked} or newer for Python {python}",
    )


def quantizer(assignment: Assignment) -> Quantizer:
    """NeuroPilot's PT2E quantizer in the one integer scheme of ``assignment``, kept from modules that stay float.

    It annotates the whole network (weights, results of operators, inputs): activations have one width.
    """
    precision = _PRECISIONS[integer_scheme(assignment)]
    from executorch.backends.mediatek.quantizer import NeuropilotQuantizer, Precision
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    inner = NeuropilotQuantizer()
    inner.setup_precision(Precision[precision])
    floats = {name for name in assignment.kinds if not _is_integer(assignment.schemes.get(name, "fp32"))}

    class HeldToModules(Quantizer):  # type: ignore[misc]  # torchao's classes are untyped
        """What is annotated already is left alone: so modules that stay float are, with nothing to quantise."""

        fold_quantize = False  # the converter takes float weights with their scales, as MediaTek's own flow gives them

        def transform_for_annotation(self, model: torch.fx.GraphModule) -> Any:
            return inner.transform_for_annotation(model)

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if node.op == "call_function" and _executorch.innermost_module(node) in floats:
                    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
            inner.annotate(model)
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            inner.validate(model)

    return HeldToModules()


def integer_scheme(assignment: Assignment) -> str:
    """The integer scheme of ``assignment``; StageFailed when there are several."""
    found = sorted({scheme for scheme in assignment.schemes.values() if _is_integer(scheme)})
    if len(found) != 1:
        raise StageFailed(
            f"NeuroPilot's quantizer takes one integer scheme for a network, not {' and '.join(found) or 'none'}",
            where="compress: pt2e",
            fix="give all quantised modules one of w8a8, w8a16 and w4a16; others may stay fp16",
        )
    return found[0]


def _is_integer(scheme: str) -> bool:
    return parse(scheme).family == "integer"


def partitioner(platform: str, options: dict[str, str]) -> Any:
    """The backend's partitioner for the chip ``platform``; ``options`` are handed to MediaTek's compiler."""
    from executorch.backends.mediatek import NeuropilotPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    given = {"platform-config": platform, **options}
    return NeuropilotPartitioner([CompileSpec(name, value.encode()) for name, value in given.items()])
