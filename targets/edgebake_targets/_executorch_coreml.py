"""The Core ML packages inside an ExecuTorch program: compressed, checked, written again as the same bytes each time.

ExecuTorch converts each part of a network that Core ML takes with ``coremltools.convert``. What comes of it holds float
weights, random identifiers, the date and names of files in the order of the file system.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.target import LowerRequest
from edgebake.types import module_of_stack_entry, rule_for
from edgebake_targets import _coreml, _coreml_checks, _coreml_flattened, _coreml_modules, _coreml_rewrites
from edgebake_targets._coreml_options import precision_of
from edgebake_targets._coreml_package import Package, open_package, write_package
from edgebake_targets._coreml_schemes import is_compressed, misfits
from edgebake_targets._coreml_weights import FloatWeight, float_weights, folds_norms, locate

if TYPE_CHECKING:
    import torch
    from executorch.exir import EdgeProgramManager

    from edgebake.types import MethodSignature

_WEIGHTS_FOLDER = Path("Data") / "com.apple.CoreML" / "weights"


def partitioner(request: LowerRequest, programs: Iterable[torch.export.ExportedProgram]) -> Any:
    """ExecuTorch's Core ML partitioner for ``programs`` with the options of ``request``."""
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.compiler.coreml_preprocess import MULTIMETHOD_WEIGHT_SHARING_STRATEGY
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    pipeline = ct.PassPipeline.DEFAULT
    if not all(map(folds_norms, programs)):
        pipeline.remove_passes({"common::fuse_conv_batchnorm", "common::fuse_conv_scale"})
    specs = CoreMLBackend.generate_compile_specs(
        compute_unit=ct.ComputeUnit[str(request.options["compute_units"]).upper()],
        minimum_deployment_target=getattr(ct.target, str(request.options["minimum_os"])),
        compute_precision=ct.precision.FLOAT16 if precision_of(request) == "fp16" else ct.precision.FLOAT32,
        pass_names=list(pipeline.passes),
    )
    # Shared packages lie under random names, and only where all methods fall into equally many parts.
    apart = MULTIMETHOD_WEIGHT_SHARING_STRATEGY.DISABLED
    specs.append(CoreMLBackend.generate_multimethod_weight_sharing_strategy_compile_spec(apart))
    made = CoreMLPartitioner(compile_specs=specs)
    propose = made.partition

    def partition(program: torch.export.ExportedProgram) -> Any:
        found = propose(program)
        _keep_outside(program)
        return found

    made.partition = partition
    return made


def _keep_outside(program: torch.export.ExportedProgram) -> None:
    """Leave a buffer outside the parts unless one part does all that reads it and what writes it.

    ExecuTorch 1.4 gives it to one of the parts that read it all the same: the others see its first value for ever, and
    a write outside has no buffer to go to. ``program`` is tagged; its tags are changed in place.
    """
    signature = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    writers = {buffer: nodes[name] for name, buffer in signature.buffers_to_mutate.items()}
    for name, buffer in signature.inputs_to_buffers.items():
        if buffer in writers and name in nodes:
            tags = {user.meta.get("delegation_tag") for user in (*nodes[name].users, writers[buffer])}
            if len(tags) > 1:
                nodes[name].meta.pop("delegation_tag", None)


def weights_of(program: torch.export.ExportedProgram, request: LowerRequest) -> tuple[FloatWeight, ...]:
    """The float weights of the modules with a scheme. StageFailed where a scheme's groups do not divide."""
    found = float_weights(program, request.assignment)
    if problems := list(misfits((w.module, w.scheme, w.values.shape, w.axis) for w in found)):
        raise StageFailed(problems)
    return found


def prepared(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """A copy of ``program`` with what Core ML cannot express rewritten; composites stay whole."""
    copy: torch.export.ExportedProgram = program.run_decompositions({})
    _coreml_rewrites.rewrite_attention(copy)
    _coreml_rewrites.state_sizes(copy)
    return copy


def rewrite_packages(
    edge: EdgeProgramManager,
    method: str,
    weights: tuple[FloatWeight, ...],
    specs: MethodSignature,
    states: Mapping[str, str],
    request: LowerRequest,
) -> dict[str, dict[str, Any]]:
    """Compress, check and rewrite, in place, every package of ``method``; what to record of each, by its identifier.

    ``states``: the buffers that the method writes to, by the name of their state. StageFailed names each module to be
    compressed whose weight no package holds, and each state that its package never writes to.
    """
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    graph = edge.exported_program(method).graph_module
    records: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for part in graph.modules():
        if isinstance(part, LoweredBackendModule):
            where = f"lower: method {method}"
            identifier, records_of, modules = _rewrite(part, where, weights, specs, states, request)
            records[identifier] = records_of
            seen |= modules
    lost = sorted({weight.module for weight in weights if is_compressed(weight.scheme)} - seen)
    if lost:
        raise StageFailed(
            f"no Core ML part of the program holds the weight of {', '.join(lost)}, so it cannot be compressed",
            where=f"lower: method {method}",
            fix=f"leave it out of the compression: {rule_for(lost[0], 'fp32')}",
        )
    return records


def _rewrite(
    part: Any,
    where: str,
    weights: tuple[FloatWeight, ...],
    specs: MethodSignature,
    states: Mapping[str, str],
    request: LowerRequest,
) -> tuple[str, dict[str, Any], set[str]]:
    """Identifier of the package, what to record of it, and the modules whose weights it holds."""
    files = _coreml_flattened.read(memoryview(part.processed_bytes), where)
    made = _made_from(files)
    modules = _handed_on(part.original_module, specs, made)
    inside = _inside(part.original_module, made)
    with tempfile.TemporaryDirectory(prefix="edgebake-") as scratch:
        path = Path(scratch) / _coreml_flattened.PACKAGE
        named = _repack(files, weights, request, path)
        package = open_package(path)
        record = {
            "packages": _coreml_checks.record(package, named),
            "modules": _coreml_checks.record_modules(package, modules),
            "inside": _coreml_checks.record_inside(package, inside),
            "states": _record_states(package, states),
        }
        held = {file.relative_to(scratch).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        del package  # its weights are mapped from the folder that is about to go
    identifier = _identifier(held)
    inputs, outputs = _coreml_flattened.names_of(files, where)
    names = {"identifier": identifier, "inputNames": inputs, "outputNames": outputs}
    held[_coreml_flattened.METADATA] = json.dumps(names, sort_keys=True).encode()
    part._processed_bytes = _coreml_flattened.write(held)  # upstream's only other way is to convert again
    return identifier, record, {module for one in named.values() for module in one.modules}


def _record_states(package: Package, states: Mapping[str, str]) -> dict[str, str]:
    """Those of ``states`` that lie in ``package``."""
    declared = _coreml_checks.declared_states(package)
    return _coreml_checks.record_states(package, {name: states[name] for name in declared if name in states})


def _identifier(held: Mapping[str, bytes]) -> str:
    """Under it ExecuTorch's runtime keeps what it compiles of the package: another one for other content."""
    digest = sha256()
    for path in sorted(held):
        digest.update(path.encode() + b"\0" + sha256(held[path]).digest())
    return f"executorch_{uuid.uuid5(uuid.NAMESPACE_URL, f'edgebake:executorch-coreml:{digest.hexdigest()}')}"


def _repack(
    files: Mapping[str, memoryview], weights: tuple[FloatWeight, ...], request: LowerRequest, path: Path
) -> dict[str, Any]:
    """Write the package among ``files`` to ``path``, its weights compressed; where they are, by constant."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    original = path.parent / "original"
    for relative, data in files.items():
        (original / relative).parent.mkdir(parents=True, exist_ok=True)
        (original / relative).write_bytes(data)
    before = open_package(original / _coreml_flattened.PACKAGE)
    folder = original / _coreml_flattened.PACKAGE / _WEIGHTS_FOLDER
    program = load(before.spec, specification_version=before.spec.specificationVersion, file_weights_dir=str(folder))
    operations = program.functions["main"].operations
    held, _ = locate(operations, weights)  # a weight may lie in another part; what is in none is refused later
    converted = _coreml.Converted(
        program=program, held=held, decomposition="", modules={}, states={}, inside={}, kept=(), activations={}
    )
    named = _coreml.compress(converted)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=getattr(ct.target, str(request.options["minimum_os"])),
        pass_pipeline=ct.PassPipeline.CLEANUP,
        skip_model_load=True,
        package_dir=str(path.parent / "converted.mlpackage"),
    )
    spec = model.get_spec()
    spec.description.CopyFrom(before.spec.description)  # the loaded program has lost the ranges of its inputs
    facts = spec.description.metadata.userDefined
    facts.clear()
    facts["com.github.apple.coremltools.version"] = str(ct.__version__)
    binary = Path(model.weights_dir) / "weight.bin"
    write_package(path, spec, binary if binary.exists() else None)
    return named


def _made_from(files: Mapping[str, memoryview]) -> dict[str, list[int]]:
    """The marks of the torch operators that each value of the package was made from; those of constants left out."""
    debug = json.loads(bytes(files.get(_coreml_flattened.DEBUG, b"{}")))
    found = {}
    for symbol, marks in (debug.get("debugSymbolToHandles") or {}).items():
        value, _, operator = symbol.rpartition(":")
        if operator != "const":
            found[value] = list(marks)
    return found


def _handed_on(
    program: torch.export.ExportedProgram, specs: MethodSignature, made: Mapping[str, list[int]]
) -> dict[str, list[str]]:
    """As ``_coreml_modules.handed_on``; where the converter gave a value another name, its mark tells."""
    marks = {node.name: node.meta.get("debug_handle") for node in program.graph.nodes}
    by_mark: dict[Any, list[str]] = {}
    for value, found in made.items():
        for one in found:
            by_mark.setdefault(one, []).insert(0, _coreml_modules.stem(value))
    named = _coreml_modules.handed_on(program, specs)
    return {
        module: [*names, *(value for name in names for value in by_mark.get(marks.get(name), ()))]
        for module, names in named.items()
    }


def _inside(program: torch.export.ExportedProgram, made: Mapping[str, list[int]]) -> dict[str, str]:
    """The module that computes each value of a package, by the value's name."""
    modules: dict[int, str] = {}
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        handle = node.meta.get("debug_handle")
        if stack and isinstance(handle, int):
            modules[handle] = module_of_stack_entry(stack[-1])
    found = {value: next((modules[one] for one in marks if modules.get(one)), "") for value, marks in made.items()}
    return {value: module for value, module in sorted(found.items()) if module}
