"""The nouns of a build: frozen, typed, and free of heavy imports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Role = Literal["input", "state", "constant", "image"]
RunnerKind = Literal["device", "executed", "simulated", "interpreted", "stand-in"]
VerdictState = Literal["pass", "fail", "not measured"]
ActsOn = Literal["module", "graph", "artifact"]
ModuleKind = Literal["linear", "conv", "embedding"]
# (part, fill) -> the folder that ``fill(folder)`` has filled, now or in an earlier build.
Keep = Callable[[str, Callable[[Path], object]], Path]

# A wrapper module keeps the network it wraps under this attribute, so that users' module names never show it.
WRAPPED = "wrapped"


def canonical_module_name(path: str) -> str:
    """The module name that users write: ``path`` without the wrappers that edgebake put around the network."""
    parts = path.split(".")
    while parts and parts[0] == WRAPPED:
        parts.pop(0)
    return ".".join(parts)


def rule_for(module: str, scheme: str) -> str:
    """The recipe's words that give ``module`` a scheme of its own: ``compress: {modules: {"head": fp16}}``."""
    return f'compress: {{modules: {{"{module}": {scheme}}}}}'


def module_of_stack_entry(entry: Any) -> str:
    """Canonical module name of an entry of torch's ``nn_module_stack``; empty for the network itself."""
    path = entry[0] if isinstance(entry, tuple) else str(entry)
    return canonical_module_name(path.removeprefix("L['self']").removeprefix("L__self___").strip("."))


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: ``shape`` of ints and dimension names, ``dtype`` as numpy names it (``float32`` ...)."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    role: Role = "input"
    state_from: str | None = None  # role "state": the output that feeds this input in the next call
    lowered_dtype: str | None = None  # dtype in the artifact, where it differs (Core ML: int64 -> int32)


@dataclass(frozen=True, kw_only=True)
class MethodSignature:
    """Inputs and outputs of one method, in call order; ``buffers``: names of the network's own that it writes to."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DimBounds:
    """Bounds of a named dimension, both inclusive; ``sizes``: the only ones between them, the default first."""

    min: int
    max: int
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Language:
    """Of a decoder that keeps ``context`` tokens: how many words it knows, which one begins a text and which end it.

    ``tokens``: how many of them its tokenizer has words for, the first ones; others pad a vocabulary.
    """

    context: int
    vocabulary: int
    bos: int | None
    stop: tuple[int, ...]
    tokens: int | None = None  # of what older versions wrote


@dataclass(frozen=True, kw_only=True)
class Signature:
    """All methods of a component and the bounds of its named dimensions; ``language`` of a decoder with a cache."""

    methods: Mapping[str, MethodSignature]
    dims: Mapping[str, DimBounds] = field(default_factory=dict)
    language: Language | None = None


@dataclass(frozen=True, kw_only=True)
class Image8:
    """Pixels kept as 8 bits: ``float32 = (pixels / 255 - mean) / std`` per channel, ``pixels`` uint8 (C, H, W).

    A quarter of the memory and of the reference's size on disk; exact, since it is what the image file held.
    """

    pixels: NDArray[np.uint8]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_float32(self) -> NDArray[np.float32]:
        """(1, C, H, W) float32."""
        import numpy as np

        mean = np.asarray(self.mean, np.float32)[:, None, None]
        std = np.asarray(self.std, np.float32)[:, None, None]
        scaled = self.pixels.astype(np.float32) / np.float32(255.0)
        return np.ascontiguousarray(((scaled - mean) / std)[None])


@dataclass(frozen=True, kw_only=True)
class Call:
    """One invocation of ``method``. State inputs are absent: the first call starts at zeros, later ones carry on."""

    inputs: Mapping[str, NDArray[Any] | Image8]
    method: str = "forward"

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Inputs as the network takes them."""
        return {k: v.to_float32() if isinstance(v, Image8) else v for k, v in self.inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sequence of calls from a zero state (one call for a stateless network).

    ``source`` names what the sample was cut from (image file, clip, document): confidence intervals cluster by it.
    """

    calls: tuple[Call, ...]
    source: str
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Samples of one purpose; ``noise`` when they are seeded noise, on which no quality can rest."""

    samples: tuple[Sample, ...]
    noise: bool = False
    description: str = ""

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A float model ready to run.

    ``methods`` maps method name to an eval-mode float32 ``nn.Module`` that takes the signature's inputs by position and
    returns a tuple of tensors in the order of ``signature.methods[...].outputs``.
    """

    methods: Mapping[str, torch.nn.Module]
    signature: Signature
    facts: Mapping[str, Any]  # deterministic: class, parameters, revision, licence, "weights": "trained"|"random"
    operators: tuple[str, ...] = ()  # "module:function" that register what its exported programs hold
    companions: Mapping[str, Path] = field(default_factory=dict)  # config.json, and files that travel with artifacts


@dataclass(frozen=True, kw_only=True)
class ReferenceCall:
    """Inputs (states included, as the float model saw them) and float outputs of one call."""

    method: str
    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One exported program per method, weights shared; ``compressed_by`` names the methods already applied."""

    programs: Mapping[str, torch.export.ExportedProgram]
    signature: Signature


class Tensors(Protocol):
    """A network's float weights by name, read a few rows at a time; RecipeError for names that there are not."""

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor ``name``."""

    def rows(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The matrix ``name`` from its first row to its last, some rows at a time."""

    def whole(self, name: str) -> NDArray[np.float32]:
        """All of the tensor ``name``."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A network with a cache as its files describe it, no weight read. ``modules``: those that rules can name."""

    signature: Signature
    modules: tuple[Module, ...]
    float_bytes: int  # of all distinct weights and buffers at float32
    facts: Mapping[str, Any]  # as of ``Loaded``
    companions: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What targets with ``STREAMS`` lower in the place of ``Traced``: weights that are read where they lie."""

    tensors: Tensors
    signature: Signature


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which scheme each module gets: ``{module name: canonical scheme}``; modules not named stay float32."""

    schemes: Mapping[str, str]
    kinds: Mapping[str, ModuleKind]

    def of(self, *schemes: str) -> tuple[str, ...]:
        """Names of the modules that get one of ``schemes``."""
        return tuple(name for name, scheme in self.schemes.items() if scheme in schemes)

    def by_scheme(self) -> dict[str, list[str]]:
        """Names of the modules of each scheme, both sorted."""
        return {scheme: sorted(self.of(scheme)) for scheme in sorted(set(self.schemes.values()))}

    def counted(self) -> dict[str, Any]:
        """``{"modules": {scheme: how many}, "float_modules": names}`` for the manifest."""
        return {
            "modules": {scheme: len(names) for scheme, names in self.by_scheme().items()},
            "float_modules": sorted(set(self.kinds) - set(self.schemes)),
        }


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Operators that the backend did not take."""

    op: str
    count: int
    macs: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class UnitWork:
    """What ``by`` (a backend, or a runtime's own kernels) computes of a graph on ``unit``, "NPU", "GPU" or "CPU".

    ``operators`` are those of what was compiled, by their type; empty where a compiled part does not show them.
    ``macs`` is None where a multiply-accumulate may be uncounted. ``subgraphs``: compiled parts, 0 for single kernels.
    """

    unit: str
    by: str
    operators: Mapping[str, int]
    macs: int | None
    subgraphs: int


@dataclass(frozen=True, kw_only=True)
class Delegation:
    """What runs on the backend, by multiply-accumulates (0..1). ``share`` is None where nothing here can tell.

    ``border_bytes``: what passes in one call between compiled parts, and between them and what lies outside, each
    tensor once for every part that reads it; the network's own inputs, outputs and constants do not count. None where
    nothing here can tell.
    """

    share: float | None
    partitions: int = 0
    left_out: tuple[LeftOut, ...] = ()
    reason: str = ""  # why ``share`` is None
    units: tuple[UnitWork, ...] = ()  # empty where the device decides
    border_bytes: int | None = None


# The dtype of what a vendor's compiler made of weights and programs together: nobody else can tell them apart.
COMPILED = "compiled"


@dataclass(frozen=True, kw_only=True)
class WeightRecord:
    """One constant of an artifact. ``bytes`` is its payload, ``scale_bytes`` its scales, zero points and tables.

    A part with the dtype ``COMPILED`` is no constant: its bytes are weights and programs in one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32", "int8", "int4", "palette6" ...
    bytes: int
    scale_bytes: int = 0
    digest: str = ""  # SHA-256 of the payload, to find duplicates


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """What ``lower`` wrote into its folder."""

    files: tuple[str, ...]  # relative to the artifact folder
    entry: str  # the file (or .mlpackage folder) that a runtime opens
    signature: Signature
    delegation: Delegation
    planned_memory_bytes: int | None = None
    encodings: Mapping[str, Any] = field(default_factory=dict)  # summary: {scheme: modules}, float modules, notes
    notes: tuple[str, ...] = ()  # what reports say of it: choices that lowering made by itself


@dataclass(frozen=True, kw_only=True)
class About:
    """What the recipe says of a network, for formats that carry it; ``digest`` of the model, the rules and options.

    ``mean`` and ``std``: how pixels in 0..1 become what inputs with role image hold; empty where no samples say it.
    """

    description: str = ""
    licence: str = ""
    digest: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What an artifact file says of itself, whoever made it."""

    format: str  # "pte", "onnx", "ort", "mlpackage"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: Mapping[str, int]
    delegates: Mapping[str, int]
    weights: tuple[WeightRecord, ...]
    total_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    units: tuple[UnitWork, ...] = ()  # what runs it, where the file tells; the next two as in Delegation
    border_bytes: int | None = None
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One limit: ``pass``, ``fail`` or ``not measured``, with the number and why."""

    limit: str  # "parity.cosine", "size.mib", ...
    state: VerdictState
    value: float | None = None
    bound: float | None = None
    subject: str = ""  # output name, component
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module that a rule can name."""

    name: str
    kind: ModuleKind
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A folder that holds an artifact, with its manifest read."""

    folder: Path
    manifest: Mapping[str, Any]
