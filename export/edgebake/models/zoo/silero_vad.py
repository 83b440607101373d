"""Silero VAD at 16 kHz, rebuilt as plain modules with the weights of the package's TorchScript file.

The architecture is read off that file's code (silero-vad 6, https://github.com/snakers4/silero-vad, MIT): magnitude
STFT as a convolution, four convolutions, an LSTM cell, a 1x1 convolution. The package's ``.safetensors`` file holds
other weights than the ``.jit`` and ``.onnx`` files that its own ``load_silero_vad`` uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgebake.errors import RecipeError

if TYPE_CHECKING:
    import torch

DISTRIBUTIONS = ("silero-vad",)

_FILTER, _HOP, _PAD = 256, 128, 64  # samples, at 16 kHz
_BINS = _FILTER // 2 + 1
# (channels in, channels out, stride) of each encoder convolution, kernel 3, padding 1
_ENCODER = ((_BINS, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
_WIDTH = 128


def model() -> torch.nn.Module:
    """``input`` (1, 576) float32: 64 samples of context, then 512 new ones; ``state`` (2, 1, 128) float32: h and c.

    Returns ``{"probability": (1, 1), "next_state": (2, 1, 128)}``.
    """
    network = _network()
    network.load_state_dict(_weights())
    return network.eval()


def _network() -> torch.nn.Module:
    import torch
    from torch import nn
    from torch.nn import functional as f

    class SileroVad(nn.Module):
        """One step of the detector: 32 ms of audio."""

        def __init__(self) -> None:
            super().__init__()
            self.stft = nn.Conv1d(1, 2 * _BINS, _FILTER, stride=_HOP, bias=False)
            self.encoder = nn.ModuleList(nn.Conv1d(i, o, 3, stride=s, padding=1) for i, o, s in _ENCODER)
            # The cell's two products as linear layers, so that backends see matrix products that they know.
            self.from_input = nn.Linear(_WIDTH, 4 * _WIDTH)
            self.from_state = nn.Linear(_WIDTH, 4 * _WIDTH)
            self.head = nn.Conv1d(_WIDTH, 1, 1)

        def forward(self, input: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: A002
            # Reflection of the last 64 samples without the very last one, written as a flip: every backend has it.
            mirrored = input[:, -_PAD - 1 : -1].flip(1)
            spectrum = self.stft(torch.cat([input, mirrored], dim=1)[:, None])
            real, imaginary = spectrum[:, :_BINS], spectrum[:, _BINS:]
            x = torch.sqrt(real * real + imaginary * imaginary)
            for convolution in self.encoder:
                x = f.relu(convolution(x))
            hidden, cell = self._step(x[:, :, 0], state[0], state[1])
            probability = torch.sigmoid(self.head(f.relu(hidden)[:, :, None]))
            return {"probability": probability[:, :, 0], "next_state": torch.stack([hidden, cell])}

        def _step(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """torch.lstm_cell written out: gates in the order input, forget, cell, output."""
            gates = self.from_input(x) + self.from_state(h)
            write, keep, new, read = gates.chunk(4, dim=1)
            cell = torch.sigmoid(keep) * c + torch.sigmoid(write) * torch.tanh(new)
            return torch.sigmoid(read) * torch.tanh(cell), cell

    return SileroVad()


def _weights() -> dict[str, torch.Tensor]:
    """The 16 kHz model's weights under the names of :func:`_network`."""
    from importlib.util import find_spec
    from pathlib import Path

    import torch

    # Not through the package: importing it sets torch to one thread for the whole process.
    package = find_spec("silero_vad")
    folders = list(package.submodule_search_locations or ()) if package else []
    if not folders:
        raise RecipeError("the package silero-vad is not installed", fix="pip install --no-deps silero-vad")
    state = torch.jit.load(Path(folders[0]) / "data" / "silero_vad.jit", map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    theirs = {k.removeprefix("_model."): v for k, v in state.items() if k.startswith("_model.")}
    renamed = {
        "stft.weight": theirs["stft.forward_basis_buffer"],
        "from_input.weight": theirs["decoder.rnn.weight_ih"],
        "from_input.bias": theirs["decoder.rnn.bias_ih"],
        "from_state.weight": theirs["decoder.rnn.weight_hh"],
        "from_state.bias": theirs["decoder.rnn.bias_hh"],
        "head.weight": theirs["decoder.decoder.2.weight"],
        "head.bias": theirs["decoder.decoder.2.bias"],
    }
    for place in range(len(_ENCODER)):
        for kind in ("weight", "bias"):
            renamed[f"encoder.{place}.{kind}"] = theirs[f"encoder.{place}.reparam_conv.{kind}"]
    return {name: tensor.detach().clone() for name, tensor in renamed.items()}
