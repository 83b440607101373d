"""What a Core AI program takes, does and holds, as Core AI's own reader of its bytecode gives it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.types import Role, TensorSpec
from edgebake_targets._coreai_asset import METADATA, PROGRAM, Asset, open_asset
from edgebake_targets._coremltools import quiet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SILENT = frozenset({"coreai.constant", "coreai.output", "coreai.yield"})
# Where a dense constant turns into an array; Core AI 1.0.0b3 ends the process over any other type (ui6, si4 ...).
_ARRAYS = {
    **{f"{sign}{bits}": f"{name}{bits}" for sign, name in (("si", "int"), ("ui", "uint")) for bits in (8, 16, 32, 64)},
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_ELEMENT = re.compile(r"(si|ui|i|bf|f)(\d+)")
_WORDS = {"si": "int", "ui": "uint", "i": "int", "f": "float", "bf": "bfloat"}
_READ = "import sys; from coreai.authoring import AIModelAsset; AIModelAsset.load(sys.argv[1]).program"
_PATIENCE_S = 100
_SPLAT = re.compile(r"dense<(-?[\d.eE+-]+)>")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One constant. ``bits`` of a value; ``data``: its packed bytes where ``blob``, else None and ``attribute``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bits: int
    bytes: int
    blob: memoryview | None
    attribute: Any

    @property
    def is_splat(self) -> bool:
        """One value stands for all."""
        return self.blob is None and _SPLAT.match(str(self.attribute)) is not None


@dataclass(frozen=True, kw_only=True)
class Program:
    """An opened asset with its program. ``graphs``: public functions by name."""

    asset: Asset
    module: Any
    graphs: Mapping[str, Any]


def function_of(method: str, methods: Iterable[str]) -> str:
    """The function of the asset that ``method`` is: ``main``, as Core AI has it, when it is the only one."""
    return "main" if len(list(methods)) == 1 else method


def open_program(path: Path, *, ours: bool = False) -> Program:
    """Read the asset at ``path`` and its program; ArtifactDamaged when either is not whole.

    ``ours``: it was written a moment ago, so that nobody else can have touched it.
    """
    asset = open_asset(path)
    if not ours:
        refuse_unreadable(path)
    with quiet():
        from coreai.authoring import AIModelAsset

        # What holds the module is not public, nor is any other way to its operators.
        module = AIModelAsset.load(path).program._module._mlir_module
    found = Program(asset=asset, module=module, graphs=dict(_public(module)))
    if not found.graphs:
        raise _unreadable(path, "it has no function")
    return found


def refuse_unreadable(path: Path) -> None:
    """ArtifactDamaged unless Core AI reads the program of the asset at ``path``.

    Tried in a process of its own: over a damaged program, coreai-core 1.0.0b3 ends the process (SIGABRT).
    """
    _refuse_unreadable(path, *(sha256((path / name).read_bytes()).hexdigest() for name in (PROGRAM, METADATA)))


@lru_cache
def _refuse_unreadable(path: Path, *_digests: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _READ, str(path.resolve())]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _unreadable(path, f"it took longer than {_PATIENCE_S} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its reader ended with {done.returncode}"]
        # MLIR's own words, or the last line of a traceback
        said = [line.split("error: ")[1] for line in lines if "error: " in line] or lines[-1:]
        raise _unreadable(path, said[0][:200])


def _unreadable(path: Path, said: str) -> ArtifactDamaged:
    return ArtifactDamaged(
        f"Core AI cannot read it: {said}", where=str(path), fix="build or copy the whole folder again"
    )


def _public(module: Any) -> Iterator[tuple[str, Any]]:
    for graph in _graphs(module):
        if not is_private(graph):
            yield text_of(graph, "sym_name"), graph


def _graphs(module: Any) -> Iterator[Any]:
    return (op for op in walk(module.operation) if op.name == "coreai.graph")


def walk(operation: Any) -> Iterator[Any]:
    """Every operation below ``operation``; not what a decomposable one would be decomposed to."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                if not inner.operation.name.startswith("coreai.decomposable."):
                    yield from walk(inner.operation)


def _attribute(operation: Any, name: str) -> Any:
    return operation.attributes[name] if name in operation.attributes else None  # noqa: SIM401 - it has no get


def text_of(operation: Any, name: str) -> str:
    """The attribute ``name``, a string or a symbol's name; empty where there is none."""
    found = _attribute(operation, name)
    return "" if found is None else str(found).strip('@"')


def is_private(graph: Any) -> bool:
    """Whether only other functions can call it."""
    return "priv" in graph.attributes


def called_by(invoke: Any) -> str:
    """The function that an invocation names: ``#param.constant<@relu_0> : !param.symbol``."""
    found = re.search(r"@([\w.$-]+)", str(_attribute(invoke, "callee") or ""))
    return found[1] if found else ""


def composites(module: Any) -> dict[str, str]:
    """What the private functions stand for, by name: ``{"layer_norm_0": "layer_norm"}``."""
    found = {}
    for graph in _graphs(module):
        declared = re.search(r'"([^"]+)"', str(_attribute(graph, "composite_decl") or ""))
        if declared:
            found[text_of(graph, "sym_name")] = declared[1]
    return found


def operators(program: Program) -> dict[str, int]:
    """How often each operator is there; a composite (``layer_norm``) counts as one where it is called."""
    named = composites(program.module)
    counts: Counter[str] = Counter()
    for graph in _graphs(program.module):
        if text_of(graph, "sym_name") in named:
            continue
        for operation in walk(graph):
            if operation.name == "coreai.invoke":
                called = called_by(operation)
                counts[named.get(called, called)] += 1
            elif operation.name not in _SILENT:
                counts[operation.name.removeprefix("coreai.").removeprefix("decomposable.")] += 1
    return dict(sorted(counts.items()))


def inputs_of(graph: Any) -> tuple[TensorSpec, ...]:
    """Inputs of a function; those that it writes to have the role ``state``."""
    types = list(_attribute(graph, "function_type").value.inputs)
    return _specs(types, _attribute(graph, "arg_attrs"))


def outputs_of(graph: Any) -> tuple[TensorSpec, ...]:
    """Outputs of a function."""
    types = list(_attribute(graph, "function_type").value.results)
    return _specs(types, _attribute(graph, "res_attrs"))


def _specs(types: Sequence[Any], attributes: Any) -> tuple[TensorSpec, ...]:
    found = []
    for number, type_ in enumerate(types):
        named = attributes[number] if attributes is not None else {}
        name = named["coreai.name"].value if "coreai.name" in named else f"value_{number}"
        state = "MutableBuffers.buffer_mutation" in named or "handle" in str(type_)
        role: Role = "state" if state else "input"
        shape, dtype = _tensor(type_)
        found.append(TensorSpec(name=name, shape=shape, dtype=dtype, role=role))
    return tuple(found)


def _tensor(type_: Any) -> tuple[tuple[int | str, ...], str]:
    """Shape, ``?`` where it is open, and dtype of ``tensor<1x?xf16>``, also inside a handle."""
    inside = re.search(r"tensor<([^<>,]*)", str(type_))
    if inside is None:
        return (), str(type_)
    *sizes, element = inside[1].split("x")
    return tuple(size if size == "?" else int(size) for size in sizes), dtype_of(element)


def dtype_of(element: str) -> str:
    """numpy's name of an MLIR type: ``si4`` is ``int4``, ``bf16`` ``bfloat16``, ``i1`` ``bool``."""
    match = _ELEMENT.fullmatch(element)
    if match is None:
        return element
    return "bool" if element == "i1" else f"{_WORDS[match[1]]}{match[2]}"


def stored_of(program: Program) -> dict[Any, Stored]:
    """Every constant, by the value that it gives, in the order in which they stand."""
    found: dict[Any, Stored] = {}
    for graph in _graphs(program.module):
        for operation in walk(graph):
            if operation.name == "coreai.constant":
                found[operation.results[0]] = _stored(program.asset, operation, len(found))
    return found


def _stored(asset: Asset, operation: Any, number: int) -> Stored:
    attribute = operation.attributes["value"]
    shape, dtype = _tensor(operation.results[0].type)
    digits = re.search(r"\d+$", dtype)
    bits = int(digits[0]) if digits else 8
    sizes = tuple(int(size) for size in shape)
    text = str(attribute)[:200]
    handle = re.match(r"dense_resource<([^>]*)>", text)
    if handle is None:
        count = 1 if _SPLAT.match(text) else _count(sizes)
        return Stored(
            name=f"small_{number}",
            shape=sizes,
            dtype=dtype,
            bits=bits,
            bytes=count * max(1, bits // 8),
            blob=None,
            attribute=attribute,
        )
    blob = asset.blobs.get(handle[1].strip('"'))
    if blob is None or len(blob) * 8 < _count(sizes) * bits:
        raise ArtifactDamaged(
            f"the constant {handle[1]} holds fewer values than its shape says",
            where=str(asset.path),
            fix="build or copy it again, whole",
        )
    return Stored(
        name=handle[1].strip('"'),
        shape=sizes,
        dtype=dtype,
        bits=bits,
        bytes=len(blob),
        blob=blob,
        attribute=attribute,
    )


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def array_of(stored: Stored) -> NDArray[Any] | None:
    """The values of a constant; narrow integers unpacked to int8 or uint8. None for a type that numpy lacks."""
    import numpy as np

    if stored.blob is None:
        return _dense(stored)
    count = _count(stored.shape)
    if stored.bits >= 8:
        if stored.dtype not in _ARRAYS.values():
            return None
        return np.frombuffer(stored.blob, np.dtype(stored.dtype), count).reshape(stored.shape)
    stream = np.unpackbits(np.frombuffer(stored.blob, np.uint8), bitorder="little")[: count * stored.bits]
    values = np.packbits(stream.reshape(-1, stored.bits), axis=1, bitorder="little").reshape(-1)  # one byte for each
    if stored.dtype.startswith("int"):
        half = 1 << (stored.bits - 1)
        return np.asarray((values.astype(np.int8) ^ half) - half, np.int8).reshape(stored.shape)
    return values.reshape(stored.shape)


def _dense(stored: Stored) -> NDArray[Any] | None:
    import numpy as np

    element = str(stored.attribute.type).rsplit("x", 1)[-1].removeprefix("tensor<").rstrip(">")
    if element in _ARRAYS:
        from coreai._compiler.ir import DenseElementsAttr

        return np.array(DenseElementsAttr(stored.attribute))
    splat = _SPLAT.match(str(stored.attribute))
    if splat is None:
        return None
    kind = np.float32 if "float" in stored.dtype else np.int8 if stored.dtype.startswith("int") else np.uint8
    return np.full(stored.shape, kind(float(splat[1])))


def digest_of(values: NDArray[Any]) -> str:
    """SHA-256 of the values in row-major order."""
    return sha256(values.tobytes()).hexdigest()


def packed(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Bytes that ``array_of`` reads ``values`` from: narrow ones as a stream of bits, lowest first."""
    import numpy as np

    if bits >= 8:
        return np.frombuffer(np.ascontiguousarray(values), np.uint8)
    planes = np.unpackbits(values.reshape(-1, 1).view(np.uint8), axis=1, bitorder="little")[:, :bits]
    return np.packbits(planes.ravel(), bitorder="little")
