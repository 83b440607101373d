"""Lists of tensors, which grow when something is written behind their end; each operator returns a new list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import bounded

_DTYPES = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
_LONGEST = 2**20

List = list[torch.Tensor | None]  # None: not written yet, and of a shape unknown until then


def make_list(call: Call) -> List:
    """``init_length`` zeros of ``elem_shape``; a name among the sizes is one that the first write decides."""
    kind, length = call.text("dtype", "fp32"), call.integer("init_length", 1)
    if kind not in _DTYPES:
        raise Unsupported(f"make_list of {kind}")
    if not 0 <= length <= _LONGEST:
        raise Unsupported(f"make_list of {length} elements")
    sizes = call.many("elem_shape") if "elem_shape" in call.inputs else []
    known = [size for size in sizes if isinstance(size, torch.Tensor)]
    if "elem_shape" not in call.inputs or len(known) < len(sizes):
        return [None] * length
    shape = bounded(call, [int(value) for size in known for value in size.reshape(-1)])
    return [torch.zeros(shape, dtype=_DTYPES[kind])] * length


def _list(call: Call) -> List:
    return list(call.inputs["ls"])


def _element(call: Call, index: int) -> torch.Tensor:
    values = _list(call)
    if not 0 <= index < len(values):
        raise Unsupported(f"{call.operator} at index {index} of a list of {len(values)}")
    value = values[index]
    if value is None:
        raise Unsupported(f"{call.operator} at index {index}, where nothing was written and the shape is unknown")
    return value


def _written(call: Call, indices: Sequence[int], values: Sequence[torch.Tensor]) -> List:
    result = _list(call)
    longest = max([len(result), *(index + 1 for index in indices)])
    if min(indices, default=0) < 0 or longest > _LONGEST:
        raise Unsupported(f"{call.operator} at the indices {list(indices)}")
    if values:
        gap = torch.zeros_like(values[0])
        result = [gap if value is None else value for value in result]
        result += [gap] * (longest - len(result))
    for index, value in zip(indices, values, strict=True):
        result[index] = value
    return result


def list_length(call: Call) -> torch.Tensor:
    """How many elements there are, unwritten ones included."""
    return torch.tensor(len(_list(call)), dtype=torch.int32)


def list_read(call: Call) -> torch.Tensor:
    """The element at ``index``."""
    return _element(call, call.integer("index"))


def list_write(call: Call) -> List:
    """Behind the end the list grows, and what lies between is zero."""
    return _written(call, [call.integer("index")], [call["value"]])


def list_gather(call: Call) -> torch.Tensor:
    """The elements at ``indices``, stacked."""
    indices = call.integers("indices")
    if not indices:
        values = [value for value in _list(call) if value is not None]
        if not values:
            raise Unsupported("list_gather of nothing from a list of unknown shape")
        return values[0].new_zeros((0, *values[0].shape))
    return torch.stack([_element(call, index) for index in indices])


def list_scatter(call: Call) -> List:
    """The slices of ``value`` at ``indices``, one after the other."""
    indices, values = call.integers("indices"), call["value"]
    if len(indices) != len(values):
        raise Unsupported(f"list_scatter of {len(values)} values to {len(indices)} indices")
    return _written(call, indices, list(values))


OPERATORS: Mapping[str, Operator] = {
    "list_gather": list_gather,
    "list_length": list_length,
    "list_read": list_read,
    "list_scatter": list_scatter,
    "list_write": list_write,
    "make_list": make_list,
}
