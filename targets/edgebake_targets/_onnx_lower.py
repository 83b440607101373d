"""The order of lowering to ONNX: export, half, weights, static activations, and the check that nothing was skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgebake import scheme as schemes
from edgebake.target import LowerRequest
from edgebake.types import SampleSet, Traced
from edgebake_targets._onnx import clean_keeping_scopes, export, live_parameters
from edgebake_targets._onnx_graph import weight_uses
from edgebake_targets._onnx_quantize import check_blocks, check_compressed, compress
from edgebake_targets._onnx_static import Feed, feeds

if TYPE_CHECKING:
    import onnx

    # (model, {node: scheme}, calls, number of calls, request) -> the model with static integers
    Static = Callable[[onnx.ModelProto, Mapping[str, str], Iterable[Feed], int, LowerRequest], onnx.ModelProto]


def static_int8(
    model: onnx.ModelProto, nodes: Mapping[str, str], calls: Iterable[Feed], count: int, request: LowerRequest
) -> onnx.ModelProto:
    """``nodes`` in int8 and what lies between them alone: what ONNX Runtime's CPU kernels take."""
    from edgebake_targets._onnx_static import quantize

    return quantize(model, list(nodes), calls, count, request.options)


def compressed_models(
    traced: Traced,
    request: LowerRequest,
    opset: int,
    *,
    prepare: Callable[[onnx.ModelProto], None] | None = None,
    static: Static = static_int8,
) -> dict[str, onnx.ModelProto]:
    """Method name to finished model. RecipeError for widths that do not fit, StageFailed for modules left float.

    ``prepare`` rewrites the float graphs; ``static`` applies the schemes that need calibration.
    """
    methods = traced.signature.methods
    models = {name: export(program, methods[name], opset) for name, program in traced.programs.items()}
    if prepare is not None:
        for model in models.values():
            prepare(model)
    uses = {name: weight_uses(model, request.assignment.kinds) for name, model in models.items()}
    for name, model in models.items():
        check_blocks(uses[name], model, request.assignment)
    planned = {name: _by_module(found) for name, found in uses.items()}
    calibrated = {s for s in request.assignment.schemes.values() if schemes.parse(s).needs_calibration}
    floats = {name: _copy(model) for name, model in models.items()} if calibrated else {}
    finished: dict[str, onnx.ModelProto] = {}
    for name, exported in models.items():
        model = exported
        _rewrite(model, request)
        nodes = _static_nodes(planned[name], request.assignment.schemes)
        if nodes:
            calls = feeds(floats, request.calibration or SampleSet(samples=()), traced.signature, name)
            count = sum(call.method == name for sample in request.calibration or () for call in sample.calls)
            model = static(model, nodes, calls, count, request)
        _finish(model)
        finished[name] = model
    for name, program in traced.programs.items():
        check_compressed(finished[name], planned[name], request.assignment, live_parameters(program))
    return finished


def _by_module(uses: list[Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for use in uses:
        found.setdefault(use.module, []).append(use.node.name)
    return found


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied


def _rewrite(model: onnx.ModelProto, request: LowerRequest) -> None:
    assignment = request.assignment
    whole = schemes.canonical(request.scheme) == "fp16"
    if whole:
        from edgebake_targets._onnx_half import convert

        stay = [u.node.name for u in weight_uses(model, assignment.kinds) if assignment.schemes.get(u.module) != "fp16"]
        convert(model, stay)
    compress(model, weight_uses(model, assignment.kinds), assignment)


def _static_nodes(planned: Mapping[str, list[str]], schemes_of: Mapping[str, str]) -> dict[str, str]:
    static = [m for m in planned if schemes.parse(schemes_of.get(m, "fp32")).needs_calibration]
    return {node: schemes_of[module] for module in static for node in planned[module]}


def _finish(model: onnx.ModelProto) -> None:
    from onnx import helper

    clean_keeping_scopes(model)
    used = {node.domain for node in model.graph.node} | {""}
    kept = {o.domain: o.version for o in model.opset_import if o.domain in used}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, kept[domain]) for domain in sorted(kept))


def readers(model: onnx.ModelProto) -> dict[str, str]:
    """What wrote ``model`` and the first ONNX that reads it: of its file format and of its operators."""
    from importlib.metadata import version

    from onnx import helper

    opset = max(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    able = (row[0] for row in helper.VERSION_TABLE if row[1] >= model.ir_version and row[2] >= opset)
    oldest = ".".join(next(able).split(".")[:2])
    return {
        "written_by": f"onnx {version('onnx')}",
        "oldest_reader": f"ONNX {oldest} (operator set {opset}, file format {model.ir_version})",
    }


def summary(traced: Traced, request: LowerRequest) -> dict[str, Any]:
    """``{"schemes": {scheme: modules}, "float": modules, "notes": [...]}`` for the manifest."""
    assignment = request.assignment
    compressed = {m for m, s in assignment.schemes.items() if s != "fp32"}
    live: frozenset[str] = frozenset().union(*(live_parameters(p) for p in traced.programs.values()))
    unused = sorted(m for m in compressed if f"{m}.weight" not in live)
    notes = [f"no output depends on these modules: {', '.join(unused)}"] if unused else []
    floats = sorted(m for m in assignment.kinds if m not in compressed)
    return {"schemes": assignment.by_scheme(), "float": floats, "notes": notes}
