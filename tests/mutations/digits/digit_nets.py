"""Two small networks trained on scikit-learn's digits, the samples that judge them, and defects of their structure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgebake.target import SampleRequest
from edgebake.types import Call, Sample

TRAINED = 1000  # digits from here on are for calibration and evaluation
MASKED_SHARE = 0.15  # rows of an image that the attention network does not get to see


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) float32 in -1..1 and their labels, in a fixed random order (the file is sorted by writer)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order] / 8 - 1).astype(np.float32), found.target[order]


def masks(count: int, seed: int) -> np.ndarray:
    """(count, 8) float32: 1 for a row that is seen, at least four of them."""
    seen = np.random.default_rng(seed).random((count, 8)) >= MASKED_SHARE
    seen[:, 2:6] = True
    return seen.astype(np.float32)


class Layered(nn.Module):
    """Three layers of 64 with a residual sum: (1, 64) pixels to (1, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 10)
        self.activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu
        self.join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.add

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.activation(self.first(pixels))
        x = self.join(x, self.activation(self.second(x)))
        return self.head(self.activation(self.third(x)))


class Rows(nn.Module):
    """Convolutions, then attention among the rows of pixels that are seen; an early and a late head of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.settle = nn.LayerNorm(64)
        self.early, self.late = nn.Linear(64, 10), nn.Linear(64, 10)
        self.softmax_axis, self.masked, self.flipped = -1, True, False

    def forward(self, image: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, 1, 8, 8) pixels and (1, 8) rows seen, to early and late logits."""
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(self.depth(x))
        x = x.transpose(1, 2).flatten(2)  # (batch, row, channel and column)
        rows = torch.tanh(x)
        early = self.early(self._mean(rows, seen))
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8
        if self.masked:
            scores = scores + (seen - 1)[:, None, :] * 100
        x = self.settle(rows + self.out(scores.softmax(self.softmax_axis) @ self.value(x)))
        late = self.late(self._mean(x, seen))
        return (late, early) if self.flipped else (early, late)

    @staticmethod
    def _mean(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return (x * seen[:, :, None]).sum(1) / seen.sum(1, keepdim=True)


def fit(folder: Path) -> None:
    """Train both networks for a few seconds and write ``layered.safetensors`` and ``rows.safetensors``."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)  # so small that threads only wait for each other
    images, labels = digits()
    inputs = torch.from_numpy(images[:TRAINED, None])
    wanted = torch.from_numpy(labels[:TRAINED])
    seen = torch.from_numpy(masks(TRAINED, seed=1))
    losses: dict[str, tuple[type[nn.Module], Callable[[nn.Module, torch.Tensor], torch.Tensor], int]] = {
        "layered": (Layered, lambda net, i: _loss(net(inputs[i].flatten(1)), wanted[i]), 300),
        "rows": (Rows, lambda net, i: sum(_loss(o, wanted[i]) for o in net(inputs[i], seen[i])), 250),
    }
    for name, (network_class, loss, steps) in losses.items():
        torch.manual_seed(0)
        network = network_class()
        optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(network, torch.randint(0, TRAINED, (128,))).backward()
            optimizer.step()
        save_file(network.eval().state_dict(), folder / f"{name}.safetensors")


def _loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, wanted)


def _set(network: nn.Module, **values: Any) -> None:
    for name, value in values.items():
        setattr(network, name, value)


# What a converter could get wrong and no edit of weights can imitate; each changes how a network computes.
DEFECTS: dict[str, Callable[[Any], None]] = {
    "sigmoid": partial(_set, activation=torch.sigmoid),
    "subtract": partial(_set, join=torch.sub),
    "softmax-axis": partial(_set, softmax_axis=1),
    "no-mask": partial(_set, masked=False),
    "outputs-swapped": partial(_set, flipped=True),
}


def layered() -> nn.Module:
    """A ``Layered`` whose weights the recipe loads."""
    return Layered()


def rows() -> nn.Module:
    """A ``Rows`` whose weights the recipe loads."""
    return Rows()


def trained(name: str, folder: Path) -> nn.Module:
    """``layered`` or ``rows`` with the weights that ``fit`` left in ``folder``."""
    from safetensors.torch import load_file

    network = {"layered": Layered, "rows": Rows}[name]()
    network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return network.eval()


def flat_samples(request: SampleRequest) -> list[Sample]:
    """Digits for ``Layered``, none of which it was trained on."""
    return _samples(request, lambda image, _: {"pixels": image.reshape(1, 64)})


def row_samples(request: SampleRequest) -> list[Sample]:
    """Digits and rows seen for ``Rows``, none of which it was trained on."""
    return _samples(request, lambda image, seen: {"image": image[None, None], "seen": seen[None]})


def _samples(request: SampleRequest, inputs: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]) -> list[Sample]:
    images, labels = digits()
    first = TRAINED + request.skip
    seen = masks(len(images), seed=2)
    return [
        Sample(calls=(Call(inputs=inputs(images[i], seen[i])),), source=f"digit-{i}", label=int(labels[i]))
        for i in range(first, min(first + request.count, len(images)))
    ]
