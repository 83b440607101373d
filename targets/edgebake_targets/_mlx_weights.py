"""Weights of a program for MLX, held value by value against those it was lowered from: off a Mac nothing executes it.

The backend names each constant after the parameter it was made from, with what it did to it behind the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, StageFailed
from edgebake.types import Traced, canonical_module_name
from edgebake_targets.inspectors import pte
from edgebake_targets.inspectors._pte_file import mapped, opened

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_INNER = re.compile(r"(?P<module>.*)\.parametrizations\.(?P<name>\w+)\.original(?P<part>\d+)")
_FIX = "give the module another scheme; the file is not to be trusted"
_PACKED, _REGROUPED = "_to_packed", "_regrouped"


def refuse_changed(path: Path, traced: Traced) -> int:
    """StageFailed naming the weights of the program at ``path`` that hold other values than those of ``traced``.

    Returns how many were held against theirs. Constants that the backend computed (scalars, dummies) are left out.
    """
    named = opened(mapped(path)).named
    bits = {r.name: int(r.dtype[3:]) for r in pte.inspect(path).weights if r.name.endswith(_PACKED)}
    tensors = {k: v for program in traced.programs.values() for k, v in program.state_dict.items()}
    wrong, held = [], 0
    for key, data in named.items():
        name = key.partition("/")[2]
        source = name.removesuffix(_PACKED).removesuffix(_REGROUPED)
        tensor = _tensor(tensors, source)
        if tensor is None or tensor.dim() < 2:
            continue
        held += 1
        if not _same(bytes(data), tensor.detach(), bits.get(key, 0), name.endswith(_REGROUPED)):
            module = source.partition(".parametrizations.")[0].removesuffix(".weight")
            wrong.append(canonical_module_name(module))
    if wrong:
        what = "MLX's backend stored other values than the network's for {}"
        raise StageFailed([Problem(what=what.format(name), where="lower", fix=_FIX) for name in dict.fromkeys(wrong)])
    return held


def _tensor(tensors: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """The parameter ``name``, or the part of a torchao tensor that the name stands for."""
    found = _INNER.fullmatch(name)
    if found is None:
        return tensors.get(name)
    whole = tensors.get(f"{found['module']}.{found['name']}")
    if whole is None:
        return None
    parts, _ = whole.__tensor_flatten__()
    part: torch.Tensor = getattr(whole, parts[int(found["part"])])
    return part


def _same(data: bytes, tensor: torch.Tensor, bits: int, repeated: bool) -> bool:
    """Whether ``data`` holds ``tensor``: in words, its columns repeated, as it is, or with channels last."""
    import numpy as np

    if bits:
        return bool(np.array_equal(unpacked(data, bits), tensor.reshape(-1).numpy()))
    if repeated:
        times = len(data) // tensor.nbytes
        return _raw(tensor.repeat_interleave(times, dim=-1)) == data
    forms = (tensor, *((tensor.movedim(1, -1), tensor.movedim(0, -1)) if tensor.dim() > 2 else ()))
    return any(_raw(form) == data for form in forms)


def _raw(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def unpacked(data: bytes, bits: int) -> NDArray[np.int16]:
    """Integers of ``bits``, least significant bit first, around zero: MLX keeps them with half their range added."""
    import numpy as np

    planes = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, bits)
    weights = (1 << np.arange(bits)).astype(np.int16)
    return (planes @ weights - (1 << (bits - 1))).astype(np.int16)
