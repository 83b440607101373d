"""Where the error begins: values inside the compressed network against the float model's, module by module."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgebake.buffers import untouched
from edgebake.metrics import CAP_DB, sqnr_db, to_json
from edgebake.types import Loaded, ReferenceCall, Traced, canonical_module_name, module_of_stack_entry

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_SHOWN = 8  # modules listed in a report
_RECOVERY = 3  # modules within which a value that only looks wrong is itself again: convolution, normalisation, ReLU6
_NOISE_DB = 120.0  # beyond float32's own rounding, differences mean nothing


def _first_tensor(value: object) -> torch.Tensor | None:
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for v in value if (found := _first_tensor(v)) is not None), None)
    return None


def float_values(module: torch.nn.Module, args: Sequence[torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    """Output of every named submodule, in order of execution, by canonical name; (…) float32."""
    import torch

    values: dict[str, NDArray[np.float32]] = {}

    def hook(name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def record(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None and tensor.is_floating_point():
                values.pop(name, None)  # a module that runs more than once stands where it ran last
                values[name] = tensor.detach().float().clone().numpy()  # it may be a buffer, which is put back

        return record

    named = [(canonical_module_name(n), m) for n, m in module.named_modules() if canonical_module_name(n)]
    handles = [m.register_forward_hook(hook(n)) for n, m in named]
    try:
        with torch.inference_mode(), untouched(module):
            module(*args)
    finally:
        for handle in handles:
            handle.remove()
    return values


def program_values(
    program: torch.export.ExportedProgram, args: Sequence[torch.Tensor]
) -> dict[str, NDArray[np.float32]]:
    """Value of the last operator of every module of ``program``, by canonical module name; (…) float32."""
    import torch

    graph_module: Any = program.module()
    last: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            for entry in (node.meta.get("nn_module_stack") or {}).values():
                if path := module_of_stack_entry(entry):
                    last[path] = node.name
    wanted = set(last.values())
    seen: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        """fx offers its per-node hook by overriding only."""

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in wanted and isinstance(value, torch.Tensor) and value.is_floating_point():
                seen[n.name] = value
            return value

    with torch.inference_mode(), untouched(graph_module):
        Recorder(graph_module).run(*args)
        return {path: seen[name].detach().float().clone().numpy() for path, name in last.items() if name in seen}


def rank(
    floats: Mapping[str, NDArray[np.float32]], compressed: Mapping[str, NDArray[np.float32]]
) -> list[dict[str, Any]]:
    """Modules by how much signal they lose against the module that ran before them, largest loss first.

    SQNR in dB per module output, settled; ``before_db`` is that of the previous compared module (None for the first).
    """
    compared = [n for n, value in floats.items() if n in compressed and compressed[n].shape == value.shape]
    measured = [sqnr_db(floats[n], compressed[n]) for n in compared]
    settled = [_settled(measured[at : at + _RECOVERY]) for at in range(len(measured))]
    rows: list[dict[str, Any]] = [
        {"module": name, "sqnr_db": now, "before_db": before}
        for name, now, before in zip(compared, settled, [None, *settled], strict=False)
    ]

    def loss(row: Mapping[str, Any]) -> float:
        start = _NOISE_DB if row["before_db"] is None else min(row["before_db"], _NOISE_DB)
        now = -_NOISE_DB if math.isnan(row["sqnr_db"]) else min(row["sqnr_db"], _NOISE_DB)
        return float(start - now)

    worst = sorted((row for row in rows if loss(row) > 0), key=loss, reverse=True)[:_SHOWN]
    return [{**row, **{key: _plain(row[key]) for key in ("sqnr_db", "before_db")}} for row in worst]


def _settled(own_and_next: Sequence[float]) -> float:
    """SQNR of a module's value, or of what follows at once where that is closer to the float model again.

    No operator undoes an error. Compressed networks hold another value there: a convolution whose batch normalisation
    is in its weights, a sum that is already clamped as the ReLU6 behind it will.
    """
    return own_and_next[0] if math.isnan(own_and_next[0]) else max(v for v in own_and_next if not math.isnan(v))


def _plain(value: float | None) -> float | None:
    return None if value is None else to_json(value, CAP_DB)


def locate(
    loaded: Loaded, compressed: Traced, call: ReferenceCall, artifact: Callable[[list[str]], Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Compare module by module on one recorded call.

    ``artifact(modules)`` gives values from inside the artifact where its runtime can; else the compressed graph before
    lowering stands for it, and ``graph_sqnr_db`` says how far that graph itself is from the float model.
    """
    import torch

    method = call.method
    order = [t.name for t in loaded.signature.methods[method].inputs]
    args = [torch.from_numpy(call.inputs[name]) for name in order]
    floats = float_values(loaded.methods[method], args)
    if artifact is not None:
        return {"modules": rank(floats, artifact(list(floats))), "reason": "read inside the artifact as it ran"}
    program = compressed.programs[method]
    graph_db = _outputs_sqnr_db(compressed, call, args)
    reason = f"read in the compressed graph before lowering, whose own outputs are at {graph_db:.1f} dB"
    return {"modules": rank(floats, program_values(program, args)), "graph_sqnr_db": _plain(graph_db), "reason": reason}


def _outputs_sqnr_db(compressed: Traced, call: ReferenceCall, args: Sequence[torch.Tensor]) -> float:
    """Worst output of the compressed graph on ``call``, in dB."""
    import torch

    program: Any = compressed.programs[call.method].module()
    names = [t.name for t in compressed.signature.methods[call.method].outputs]
    with torch.inference_mode(), untouched(program):
        outputs: Any = program(*args)
        flat = [value.clone() for value in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]
    return min(sqnr_db(call.outputs[n], value.float().numpy()) for n, value in zip(names, flat, strict=True))
