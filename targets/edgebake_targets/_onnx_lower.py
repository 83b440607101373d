"""The order of lowering to ONNX: export, half, weights, static activations, and the check that nothing was skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgebake import scheme as schemes
from edgebake.target import LowerRequest
from edgebake.types import SampleSet, Traced
from edgebake_targets._onnx import clean_keeping_scopes, export, live_parameters
from edgebake_targets._onnx_graph import weight_uses
from edgebake_targets._onnx_quantize import check_blocks, check_compressed, compress
from edgebake_targets._onnx_static import feeds

if TYPE_CHECKING:
    import onnx


def compressed_models(traced: Traced, request: LowerRequest) -> dict[str, onnx.ModelProto]:
    """Method name to finished model. RecipeError for widths that do not fit, StageFailed for modules left float."""
    methods = traced.signature.methods
    opset = int(request.options["opset"])
    models = {name: export(program, methods[name], opset) for name, program in traced.programs.items()}
    uses = {name: weight_uses(model, request.assignment.kinds) for name, model in models.items()}
    for name, model in models.items():
        check_blocks(uses[name], model, request.assignment)
    planned = {name: _by_module(found) for name, found in uses.items()}
    static = {s for s in request.assignment.schemes.values() if schemes.parse(s).needs_calibration}
    floats = {name: _copy(model) for name, model in models.items()} if static else {}
    finished: dict[str, onnx.ModelProto] = {}
    for name, exported in models.items():
        model = exported
        _rewrite(model, request)
        nodes = _static_nodes(planned[name], request.assignment.schemes)
        if nodes:
            calls = feeds(floats, request.calibration or SampleSet(samples=()), traced.signature, name)
            model = _calibrated(model, nodes, name, calls, request)
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


def _static_nodes(planned: Mapping[str, list[str]], schemes_of: Mapping[str, str]) -> list[str]:
    static = [m for m in planned if schemes.parse(schemes_of.get(m, "fp32")).needs_calibration]
    return [node for module in static for node in planned[module]]


def _calibrated(
    model: onnx.ModelProto, nodes: list[str], method: str, calls: Iterator[Any], request: LowerRequest
) -> onnx.ModelProto:
    from edgebake_targets._onnx_static import quantize

    count = sum(call.method == method for sample in request.calibration or () for call in sample.calls)
    return quantize(model, nodes, calls, count, request.options)


def _finish(model: onnx.ModelProto) -> None:
    from onnx import helper

    clean_keeping_scopes(model)
    used = {node.domain for node in model.graph.node} | {""}
    kept = {o.domain: o.version for o in model.opset_import if o.domain in used}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, kept[domain]) for domain in sorted(kept))


def summary(traced: Traced, request: LowerRequest) -> dict[str, Any]:
    """``{"schemes": {scheme: modules}, "float": modules, "notes": [...]}`` for the manifest."""
    assignment = request.assignment
    by_scheme: dict[str, list[str]] = {}
    for module, scheme in assignment.schemes.items():
        by_scheme.setdefault(scheme, []).append(module)
    compressed = {m for m, s in assignment.schemes.items() if s != "fp32"}
    live: frozenset[str] = frozenset().union(*(live_parameters(p) for p in traced.programs.values()))
    unused = sorted(m for m in compressed if f"{m}.weight" not in live)
    notes = [f"no output depends on these modules: {', '.join(unused)}"] if unused else []
    floats = sorted(m for m in assignment.kinds if m not in compressed)
    return {"schemes": {k: sorted(v) for k, v in sorted(by_scheme.items())}, "float": floats, "notes": notes}
