"""The ``coreml`` target: a Core ML package (.mlpackage) for iPhones, iPads and Macs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, RecipeError, StageFailed, ToolchainMissing
from edgebake.scheme import parse
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support, unmet
from edgebake.types import Delegation, Lowered, Signature, Traced, Verdict, rule_for
from edgebake_targets._coreml_rows import (
    ALL,
    FP32,
    INT4,
    INT8,
    IOS18,
    W8,
    add_states,
    encodings,
    grouped_palettes,
    palette,
)

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

    from edgebake_targets._coreml_methods import Written

_IOS16 = {"minimum_os": ("iOS16", "iOS17", "iOS18", "macOS13", "macOS14", "macOS15")}
_IOS17 = {"minimum_os": ("iOS17", "iOS18", "macOS14", "macOS15")}
_GROUPED = ((1, 4), (2, 4), (4, 8))  # values that stay, of neighbours: n:m pruning

SUPPORTS = (
    FP32,
    Support(scheme="fp16", kinds=ALL),
    Support(
        scheme="w8",
        kinds=ALL,
        needs=_IOS16,
        note=f"{W8}; from iOS 16, macOS 13",
    ),
    Support(
        scheme="w8a8",
        kinds=("linear", "conv"),
        method="pt2e",
        needs=_IOS17,
        note="int8 per output channel; these modules read uint8, ranges from samples.calibration; what lies between "
        "them computes in float16; from iOS 17, macOS 14; integer products on the Neural Engine from A17 Pro and M4",
    ),
    Support(
        scheme="w8t",
        kinds=ALL,
        needs=_IOS16,
        note="int8, one scale for the whole weight: smallest, and coarse; from iOS 16, macOS 13",
    ),
    *INT8,
    Support(
        scheme="w4t",
        kinds=ALL,
        needs=IOS18,
        note="int4, one scale for the whole weight: smallest, and very coarse; from iOS 18, macOS 15",
    ),
    *INT4,
    *(
        Support(
            scheme=f"palette{bits}",
            kinds=ALL,
            needs=IOS18 if bits == 3 else _IOS16,
            note=f"{palette(bits)}; from " + ("iOS 18, macOS 15" if bits == 3 else "iOS 16, macOS 13"),
        )
        for bits in (1, 2, 3, 4, 6, 8)
    ),
    *grouped_palettes(((2, 16), (3, 16), (4, 8), (4, 16), (4, 32), (6, 16))),
    *(
        Support(
            scheme=f"palette{bits}s",
            kinds=ALL,
            needs=IOS18,
            note=f"one table of {2**bits} values for the weight divided by a scale per output channel; from iOS 18, "
            "macOS 15",
        )
        for bits in (3, 4, 6)
    ),
    *(
        Support(
            scheme=f"palette{bits}v{size}",
            kinds=ALL,
            needs=IOS18,
            note=f"{2**bits} vectors of {size} neighbouring output channels, which must be divisible by {size}: "
            f"{bits / size:g} bits per value; from iOS 18, macOS 15",
        )
        for bits, size in ((4, 2), (6, 2), (8, 2), (8, 4))
    ),
    *(
        Support(
            scheme=f"sparse{percent}",
            kinds=ALL,
            needs=_IOS16,
            note=f"the smallest {percent} % of each weight become zero and are not stored, without training after it: "
            "check the task; from iOS 16, macOS 13",
        )
        for percent in (50, 75)
    ),
    *(
        Support(
            scheme=f"sparse{stay}of{size}",
            kinds=ALL,
            needs=_IOS16,
            note=f"of every {size} neighbouring input channels, which must be divisible by {size}, all but the "
            f"{stay} of largest magnitude become zero; from iOS 16, macOS 13",
        )
        for stay, size in _GROUPED
    ),
    *(
        Support(
            scheme=f"{zeros}-{inner}",
            kinds=ALL,
            needs=IOS18,
            note=f"{zeros}, and what stays is stored as {inner}; from iOS 18, macOS 15",
        )
        for zeros in ("sparse50", "sparse75", *(f"sparse{stay}of{size}" for stay, size in _GROUPED))
        for inner in ("w8", "palette6", "palette4")
    ),
)

OPTIONS = (
    Option(
        name="minimum_os",
        default="iOS17",
        help="oldest system that has to load the package; macOS12..macOS15 mean iOS15..iOS18, which came with them",
        choices=("iOS15", "iOS16", "iOS17", "iOS18", "macOS12", "macOS13", "macOS14", "macOS15"),
    ),
    Option(
        name="compute_precision",
        default="auto",
        help="what operators compute in; auto is fp32 for the scheme fp32 and fp16 otherwise",
        choices=("auto", "fp16", "fp32"),
    ),
    Option(
        name="activation_range",
        default="minmax",
        help="w8a8: how calibration chooses an activation's range; minmax keeps outliers, the others trim them: to a "
        "share of the values, the least divergence of distributions or the least squared error (mse, histogram)",
        choices=("minmax", "percentile", "entropy", "mse", "histogram"),
    ),
    Option(
        name="percentile", default=99.99, help="share of values inside the range, with activation_range: percentile"
    ),
    Option(
        name="image_inputs",
        default="array",
        help="image: inputs with the role image take 8-bit pixels, normalised inside as the recipe's samples are",
        choices=("array", "image"),
    ),
    Option(
        name="keep_float32",
        default="",
        help="globs on module names, between spaces: their own operators compute in float32 in a package of float16; "
        "auto: those that calibration samples show to need it; . is what belongs to no module",
        calibrated=("auto",),
    ),
    Option(
        name="palettes",
        default="kmeans",
        help="how the values of palettes are found; sensitive_kmeans: weights on which the outputs depend more, by "
        "gradients on the calibration samples, are kept more exactly",
        choices=("kmeans", "sensitive_kmeans"),
        calibrated=("sensitive_kmeans",),
    ),
    Option(
        name="chunk_mib",
        default=0.0,
        help="language models: the most MiB of weights in a package; layers are cut into several packages, called in "
        "turn; 0: one",
    ),
    Option(
        name="correct_biases",
        default=False,
        help="take off the biases what palettes, groups and pruning add to a layer's output on average, by calibration "
        "samples; for int8 and int4 per channel the compression step correct-biases does that",
        calibrated=(True,),
    ),
    Option(
        name="compute_units",
        default="all",
        help="what the app should load the package with; kept as metadata, since only the app can choose",
        choices=("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne"),
    ),
    Option(name="author", default="", help="metadata"),
    Option(name="version", default="", help="metadata: version of the model"),
    Option(name="description", default="", help="metadata; the recipe's description where this is empty"),
    Option(name="licence", default="", help="metadata; the model's licence where this is empty"),
    Option(name="labels", default="", help="metadata: a name for every class, one a line or between commas"),
)

CARRIES_ABOUT = True
DECODES = True
DEVICES = {"vendor": ("apple",)}

FORMAT = "mlpackage"
DISTRIBUTIONS = ("coremltools", "torch", "numpy", "protobuf", "sympy")
SOURCES = (
    *(
        f"edgebake_targets.{file.stem}"
        for pattern in ("_coreml*.py", "_decoder*.py")
        for file in sorted(Path(__file__).parent.glob(pattern))
    ),
    "edgebake_targets._observers",
    "edgebake_targets._ranges",
    "edgebake_targets._weight_record",
    *(
        ".".join(("edgebake_targets", *file.relative_to(Path(__file__).parent).with_suffix("").parts))
        for file in sorted(Path(__file__).parent.glob("mil/**/*.py"))
    ),
)


def missing() -> Missing | None:
    """None when coremltools is installed; it converts on Linux and macOS."""
    if find_spec("coremltools") is None:
        return Missing(reason="coremltools is not installed", remedy="pip install coremltools==9.0")
    return None


def quantizer(request: LowerRequest) -> Quantizer:
    """A PT2E quantizer that observes the inputs of the modules under ``w8a8``. ToolchainMissing without torchao."""
    if find_spec("torchao") is None:
        raise ToolchainMissing("torchao is not installed, which w8a8 needs", fix="pip install torchao==0.18.0")
    from edgebake_targets._coreml_quantizer import build

    options = request.options
    return build(request.assignment, str(options["activation_range"]), float(options["percentile"]))


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What ``lower`` would refuse, as far as the recipe alone shows it."""
    from edgebake_targets import _coreml_refusals

    return _coreml_refusals.refusals(asked)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write one package and ``weights.check.json``, against which ``structure`` holds the weights later.

    Several methods become functions that share their weights, the first one the default; packages of their own before
    iOS 18. A decoder becomes two functions over one cache, in packages that are called in turn where ``chunk_mib`` asks
    for several (``_coreml_decoder``). RecipeError for what the chosen system cannot hold; StageFailed, naming the
    modules, when the converter refuses the network or a module that is to be compressed did not come out compressed.
    """
    from edgebake_targets import (
        _coreml_decoder,
        _coreml_images,
        _coreml_metadata,
        _coreml_methods,
        _coreml_options,
        _coreml_shapes,
    )
    from edgebake_targets._coreml_checks import CHECKS_FILE
    from edgebake_targets._coreml_refusals import check_names
    from edgebake_targets._coreml_search import found_in, said
    from edgebake_targets._coreml_states import coarse
    from edgebake_targets._coremltools import quiet

    request = _coreml_options.canonical(request)
    _refuse(request)
    _coreml_shapes.check(traced.signature, request)
    _coreml_metadata.check_labels(request.options, traced.signature)
    split = _coreml_decoder.split(traced, request)
    methods = next(iter(split.values())).signature.methods
    taken = {name: _coreml_images.taken_as_images(method, request) for name, method in methods.items()}
    parts = {name: _with_dtypes(part, taken) for name, part in split.items()}
    first, *_ = parts.values()
    with quiet():
        for part in parts.values():
            for method in part.signature.methods.values():
                check_names(method)
        found = found_in(first, request, taken)
        facts = _coreml_decoder.facts_of_parts({name: part.signature for name, part in parts.items()})
        written = _coreml_methods.write(parts, request, taken, found, facts)
    _refuse_lost(request, written.modules)
    return Lowered(
        files=(*written.packages, CHECKS_FILE),
        entry=written.packages[0],
        signature=_coreml_decoder.lowered(traced.signature) if traced.signature.language else first.signature,
        delegation=Delegation(share=None, reason="needs a compute plan on a Mac"),
        encodings={**_encodings(request, written), **_coreml_decoder.encodings(traced.signature, written.packages)},
        notes=(*said(found), *coarse(traced.programs.values(), written.states)),
    )


def _with_dtypes(traced: Traced, images: Mapping[str, Mapping[str, Any]]) -> Traced:
    """``traced`` with the dtypes of the package in its signature."""
    from edgebake_targets._coreml import lowered_specs

    methods = {name: lowered_specs(method, images[name]) for name, method in traced.signature.methods.items()}
    return replace(traced, signature=replace(traced.signature, methods=methods))


def _refuse_lost(request: LowerRequest, seen: frozenset[str]) -> None:
    """StageFailed when the weight of a module that is to be compressed was ``seen`` in no package."""
    from edgebake_targets._coreml_schemes import is_compressed

    lost = sorted({module for module, scheme in request.assignment.schemes.items() if is_compressed(scheme)} - seen)
    if lost:
        raise StageFailed(
            f"the program does not use the weight of {', '.join(lost)}, so it cannot be compressed",
            fix=f"leave it out of the compression: {rule_for(lost[0], 'fp16')}",
        )


def _refuse(request: LowerRequest) -> None:
    """RecipeError for schemes that the system does not take, also when no recipe's check came before."""
    rows = [row for row in SUPPORTS if row.scheme in {request.scheme, *request.assignment.schemes.values()}]
    problems = [Problem(what=what, fix=fix) for row in rows for what, fix in unmet("coreml", row, request.options)]
    if problems:
        raise RecipeError(problems)


def _encodings(request: LowerRequest, written: Written) -> dict[str, Any]:
    found = encodings(request, "weights that are not compressed")
    found["decomposition"] = ", ".join(sorted(written.decompositions))
    notes = found["notes"]
    if any(parse(name).palette for name in found["schemes"]):
        found["palettes"] = request.options["palettes"]
    if request.options["correct_biases"]:
        notes.append("biases make up for what palettes, groups and pruning add on average over calibration samples")
    if float32 := sorted(written.kept):
        found["float32_modules"] = float32
        notes.append(f"computes in float32 on request: {', '.join(float32)}")
    read = {
        file: sorted(module for entry in named.values() for module in entry["modules"])
        for file, named in written.activations.items()
        if named
    }
    if read:
        found["quantised_inputs"] = read
        lies = {"fp16": "float16", "fp32": "float32"}[found["compute_precision"]]
        notes.append(f"the inputs of w8a8 modules are uint8; what lies between them computes in {lies}")
    add_states(found, written.states)
    return found


def read_checks(folder: Path) -> Mapping[str, Any]:
    """What ``lower`` recorded in the artifact ``folder``: of the float weights, for ``structure``, and of modules."""
    from edgebake_targets import _coreml_checks

    return _coreml_checks.read_checks(folder / _coreml_checks.CHECKS_FILE)


def structure(entry: Path, signature: Signature, checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the package ``entry`` against the promised ``signature`` and the recorded weights (``read_checks``).

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``, ``structure.weights``, and
    ``structure.activations`` and ``structure.states`` where there are any. Needs no training model and no Mac; it says
    nothing about what the package computes.
    """
    from edgebake_targets import _coreml_checks, _coreml_decoder

    if signature.language is None:
        return _coreml_checks.structure(entry, signature, checks)
    parts = _coreml_decoder.parts_of(entry, signature, checks.get("parts", ()))
    return tuple(verdict for part in parts for verdict in _coreml_checks.structure(*part, checks))
