"""The tensors of a checkpoint as Meta publishes it: read without running code, checked, named as transformers does.

Layout, as ``llama_models`` and ExecuTorch's ``examples/models/llama`` read it: int8 tensors ``X.weight`` with
``X.scales`` in float, (rows, groups) of linear layers inside the decoder layers, whose integers are of 4 bits, and
(rows,) or (rows, 1) of ``tok_embeddings`` and ``output``; zero points are absent or zero; ``X.adaptor.A.weight``
(rank, columns) and ``X.adaptor.B.weight`` (rows, rank). A checkpoint without integers has float weights alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.models._meta_params import WEIGHTS, Params

if TYPE_CHECKING:
    import torch

_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_IGNORED = ("rope.freqs",)  # follows from the parameters
_PARTS = (".weight", ".scales", ".zeros", ".adaptor.A.weight", ".adaptor.B.weight")
_LINEAR_BITS, _OTHER_BITS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors by Meta's names, and what params.json says of them."""

    tensors: Mapping[str, torch.Tensor]
    params: Params

    @property
    def tied(self) -> bool:
        """Has the head no weights of its own?"""
        return "output.weight" not in self.tensors

    @property
    def integers(self) -> bool:
        """Are there weights of integers?"""
        return any(name.endswith(".scales") for name in self.tensors)

    @property
    def adapters(self) -> bool:
        """Are there low-rank adapters?"""
        return any(".adaptor." in name for name in self.tensors)

    def modules(self) -> dict[str, str]:
        """``{Meta's name: transformers' name}`` of every module that has weights."""
        found = {own: name for own, name in _OUTSIDE.items() if own != "output" or not self.tied}
        for layer in range(self.params.n_layers):
            found |= {f"layers.{layer}.{own}": f"model.layers.{layer}.{name}" for own, name in _LAYER.items()}
        return found

    def weight(self, own: str) -> torch.Tensor:
        """Float32 weight of the module ``own``: integers times their scales, each product rounded to float32 once.

        RecipeError where integers, scales and params.json do not go together.
        """
        stored, scales = self.tensors[f"{own}.weight"], self.tensors.get(f"{own}.scales")
        if scales is None:
            if not stored.is_floating_point():
                raise _wrong(f"{own}.weight holds {stored.dtype} and has no scales")
            return self.turned(own, stored.float())
        self._check_integers(own, stored, scales)
        rows = len(stored)
        groups = stored.float().reshape(rows, scales.numel() // rows, -1) * scales.float().reshape(rows, -1, 1)
        return self.turned(own, groups.reshape(stored.shape))

    def adapter(self, own: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``(a, b)`` in float32 with ``y += b a x``, the scale in b; None where the module has no adapter."""
        a, b = (self.tensors.get(f"{own}.adaptor.{part}.weight") for part in "AB")
        if a is None and b is None:
            return None
        lora, weight = self.params.lora_args, self.tensors[f"{own}.weight"]
        if lora is None:
            raise _wrong(f"{own} has an adapter, and params.json has no lora_args")
        shapes = {"A": (lora.rank, weight.shape[1]), "B": (weight.shape[0], lora.rank)}
        for part, tensor in (("A", a), ("B", b)):
            if tensor is None or tuple(tensor.shape) != shapes[part]:
                has = "absent" if tensor is None else f"{tuple(tensor.shape)}"
                raise _wrong(f"{own}.adaptor.{part}.weight is {has}, not {shapes[part]} as lora_args say")
        assert a is not None
        assert b is not None
        return a.float(), self.turned(own, b.float() * lora.scale)

    def turned(self, own: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of queries and keys in transformers' order.

        Meta turns neighbours (2i, 2i + 1) of a head by one angle, transformers i and i + half of it: rows of a head go
        from (half, 2) to (2, half). RoPE: Su et al. 2021 (arXiv:2104.09864), equation 15.
        """
        if not own.endswith(("attention.wq", "attention.wk")):
            return rows
        half = self.params.head // 2
        return rows.reshape(-1, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def _check_integers(self, own: str, stored: torch.Tensor, scales: torch.Tensor) -> None:
        linear = own.startswith("layers.")
        quantised = self.params.quantization_args
        if quantised is None:
            raise _wrong(f"{own} holds integers, and params.json has no quantization_args")
        size = quantised.group_size if linear else stored.shape[1]
        rows, columns = stored.shape
        if str(stored.dtype) != "torch.int8" or columns % size or scales.numel() != rows * (columns // size):
            raise _wrong(
                f"{own}.weight is {stored.dtype} {tuple(stored.shape)} with scales {tuple(scales.shape)}, which are no "
                f"groups of {size}"
            )
        bits = _LINEAR_BITS if linear else _OTHER_BITS
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if int(stored.min()) < least or int(stored.max()) > most:
            raise _wrong(f"{own}.weight holds integers beyond {least} .. {most}")
        zeros = self.tensors.get(f"{own}.zeros")
        if zeros is not None and bool(zeros.any()):
            raise _wrong(f"{own} has zero points that are not zero; only symmetric weights are read")


def read(folder: Path, params: Params) -> Checkpoint:
    """The checkpoint in ``folder``, its tensors mapped from the file.

    RecipeError: a file that is damaged or holds code, names or shapes that params.json does not explain.
    """
    tensors = _loaded(folder / WEIGHTS)
    made = Checkpoint(
        tensors={name: value for name, value in tensors.items() if name not in _IGNORED},
        params=params,
    )
    _check_names(made)
    _check_shapes(made)
    return made


def _loaded(file: Path) -> Mapping[str, torch.Tensor]:
    import pickle

    import torch

    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"{file.name} holds more than tensors, or is damaged: {next(iter(str(error).splitlines()), '')}",
            where="model.path",
            fix="only pickles of tensors are read (weights_only); copy the file again",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:  # the zip reader's own
        raise RecipeError(
            f"{file.name} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}",
            where="model.path",
            fix="copy the file again",
        ) from error
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise _wrong(f"{file.name} is no table of tensors")
    return found


def _check_names(checkpoint: Checkpoint) -> None:
    modules = checkpoint.modules()
    missing = [f"{own}.weight" for own in modules if f"{own}.weight" not in checkpoint.tensors]
    if missing:
        raise _wrong(f"the checkpoint has no {_some(missing)}")
    known = {own + part for own in modules for part in _PARTS}
    strange = sorted(name for name in checkpoint.tensors if name not in known)
    if strange:
        raise _wrong(f"the network has no place for {_some(strange)}")


def _check_shapes(checkpoint: Checkpoint) -> None:
    params = checkpoint.params
    kept = (params.n_kv_heads or params.n_heads) * params.head
    shapes = {
        "wk": (kept, params.dim),
        "wv": (kept, params.dim),
        "w1": (params.inner, params.dim),
        "w2": (params.dim, params.inner),
        "w3": (params.inner, params.dim),
        "tok_embeddings": (params.vocab_size, params.dim),
        "output": (params.vocab_size, params.dim),
    }
    for own in checkpoint.modules():
        kind = re.sub(r".*\.", "", own)
        wanted = (params.dim,) if kind.endswith("norm") else shapes.get(kind, (params.dim, params.dim))
        got = tuple(checkpoint.tensors[f"{own}.weight"].shape)
        if got != wanted:
            raise _wrong(f"{own}.weight is {got}, and params.json wants {wanted}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _wrong(what: str) -> RecipeError:
    return RecipeError(
        what, where="model.path", fix="give a checkpoint with the params.json that was published with it"
    )
