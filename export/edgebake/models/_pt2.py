"""What a ``.pt2`` archive says of its inputs, read from its JSON: nothing of it is loaded or run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# torch._export.serde.schema.ScalarType, format 8 of torch.export.save; those a recipe can write.
_DTYPES = {1: "uint8", 2: "int8", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 12: "bool"}
_MAX_JSON = 64 << 20
_MOST = 65536  # a dimension without an upper bound is exported with the largest integer


@dataclass(frozen=True, kw_only=True)
class Declared:
    """Inputs by name as (shape, dtype), where dimensions of several sizes have a name, and the bounds of these."""

    inputs: Mapping[str, tuple[tuple[int | str, ...], str]]
    dims: Mapping[str, tuple[int, int]]


def declared(file: Path) -> Declared | None:
    """The inputs of the program in ``file``; None where it is no archive of torch.export or says it otherwise."""
    try:
        program = _program(file)
        graph = program["graph_module"]["graph"]
        named: dict[str, str] = {}  # the program's symbols -> our names
        inputs = {name: _tensor(graph["tensor_values"][name], named) for name in _names(program)}
        bounds = program["range_constraints"]
        dims = {
            ours: (max(1, int(bounds[symbol]["min_val"] or 1)), min(_MOST, int(bounds[symbol]["max_val"] or _MOST)))
            for symbol, ours in named.items()
        }
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Declared(inputs=inputs, dims=dims) if inputs else None


def _program(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        (entry,) = (e for e in archive.infolist() if e.filename.endswith("models/model.json"))
        if entry.file_size > _MAX_JSON:
            raise ValueError(f"{entry.filename} has {entry.file_size >> 20} MiB")
        return json.loads(archive.read(entry))


def _names(program: Any) -> Iterator[str]:
    for spec in program["graph_module"]["signature"]["input_specs"]:
        if "user_input" in spec:
            yield spec["user_input"]["arg"]["as_tensor"]["name"]


def _tensor(value: Any, named: dict[str, str]) -> tuple[tuple[int | str, ...], str]:
    return tuple(_size(size, named) for size in value["sizes"]), _DTYPES[value["dtype"]]


def _size(size: Any, named: dict[str, str]) -> int | str:
    if "as_int" in size:
        return int(size["as_int"])
    words = str(size["as_expr"]["expr_str"])
    if not words.startswith("Symbol('"):  # a derived dimension such as 2*n: recipes have no words for it
        raise ValueError(words)
    return named.setdefault(words.split("'")[1], f"dim{len(named)}")
