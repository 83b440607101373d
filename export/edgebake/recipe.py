"""The recipe: the one place of its schema and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from edgebake.scheme import parse

NAME = r"^[a-z0-9][a-z0-9._-]*$"
MAX_TARGETS = 256  # of a component; real recipes have a dozen
MAX_TOKENS = 32  # that a draft proposes at a time; what pays is under ten
DECODER_INPUTS = ("tokens", "input_pos")  # of a network with `context`: [1, seq] and [1], as ExecuTorch calls it
Name = Annotated[str, Field(pattern=NAME, max_length=100)]
DType = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]


def _scheme(value: object) -> object:
    return parse(value).name if isinstance(value, str) else value


def _share(value: object) -> object:
    """``95%`` and ``0.95`` mean the same."""
    if not isinstance(value, str):
        return value
    try:
        return float(value.strip().removesuffix("%")) / 100 if value.strip().endswith("%") else value
    except ValueError:
        raise ValueError(f"{value!r} is not a share; write 95% or 0.95") from None


SchemeName = Annotated[str, BeforeValidator(_scheme)]
_FROM_LIST = Field(strict=False)  # YAML lists become tuples; their elements stay strict


class Frozen(BaseModel):
    """Unknown keys are refused, nothing is coerced silently, nothing changes after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class Model(Frozen):
    """Where the network and its weights come from."""

    source: str = Field(description="a model source: transformers, gguf, meta, python, exported, or a plug-in's")
    path: str = Field(
        min_length=1,
        description="folder or file (relative to the recipe), pkg://package/folder, hub id, or module:callable",
    )
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    task: str | None = Field(None, description="feature-extraction, sentence-embedding, image-classification ...")
    context: int | None = Field(
        None, ge=2, description="text-generation: tokens that a key/value cache keeps; inputs are tokens and input_pos"
    )
    layers: int | None = Field(
        None, ge=1, description="with context: the first layers alone, under the network's own norm and head (a draft)"
    )
    weights: Literal["trained", "random"] = Field(
        "trained", description="random: the architecture with seeded random weights; every number says so"
    )
    seed: int = Field(0, ge=0, description="seed of random weights")
    state_dict: str | None = Field(None, description="python source: safetensors or weights-only pickle to load")
    pickles: bool = Field(False, description="allow weights_only pickles where no safetensors exist")
    remote_code: str | None = Field(None, description="hub id whose own Python code may run; must equal `path`")
    licence: str | None = Field(None, description="SPDX id of the weights, kept in the manifest")
    options: Mapping[str, Any] = Field(
        {}, description="arguments of a python callable or a plug-in; of meta: adapters, spin_quant"
    )


class Input(Frozen):
    """One input tensor."""

    shape: tuple[Annotated[int, Field(ge=1)] | str, ...] = Field(
        strict=False, description="sizes; a word names a dynamic dimension"
    )
    dtype: DType = "float32"
    role: Literal["input", "state", "image"] = "input"
    state_from: str | None = Field(
        None, description="role state: the output that feeds this input in the next call; starts at zeros"
    )


class Dim(Frozen):
    """Bounds of a named dimension, both inclusive, or the only sizes that it takes."""

    min: int = Field(1, ge=1)
    max: int = Field(ge=1)
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        strict=False,
        description="in the place of min and max: the only sizes, the first the default; Core ML packages list them",
    )

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        """Bounds from sizes; what is no list of numbers is left to the field to refuse."""
        sizes = given.get("sizes") if isinstance(given, dict) else None
        if not sizes or not isinstance(sizes, list | tuple) or any(type(size) is not int for size in sizes):
            return given
        if {"min", "max"} & given.keys():
            raise ValueError("sizes stand in the place of min and max: leave these out")
        if len(set(sizes)) != len(sizes):
            raise ValueError(f"a size is named twice in {sizes}")
        return {**given, "min": min(sizes), "max": max(sizes)}

    @model_validator(mode="after")
    def _ordered(self) -> Dim:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def takes(self, size: int) -> bool:
        """Whether an input may have ``size`` here."""
        return size in self.sizes if self.sizes else self.min <= size <= self.max

    def __str__(self) -> str:
        return "|".join(map(str, self.sizes)) if self.sizes else f"{self.min}..{self.max}"


class Samples(Frozen):
    """Samples of one purpose. Exactly one of file, images, text, python, noise."""

    file: str | None = Field(None, description=".npz or .safetensors: one array per input, first axis = samples")
    images: str | None = Field(None, description="image folder (or pkg://package/folder)")
    text: str | None = Field(None, description="text file, one sample a line; `group<TAB>line` names its source")
    python: str | None = Field(None, description="module:function returning samples (edgebake.target.SampleRequest)")
    noise: bool = Field(False, description="seeded noise: exercises the graph, says nothing about quality")
    count: int = Field(64, ge=1, le=100_000)
    skip: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)
    length: int = Field(256, ge=2, description="text for a network with `context`: tokens of a sample, cut in a row")
    pattern: str = Field("*", description="images: glob on file names")
    size: int = Field(224, ge=1, le=4096, description="images: side of the crop in pixels")
    crops: int = Field(1, ge=1, le=1000, description="images: crops per image (the first is the centre)")
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406), strict=False, description="images: per channel, of pixels in 0..1"
    )
    std: tuple[float, ...] = Field(
        (0.229, 0.224, 0.225), strict=False, description="images: per channel, of pixels in 0..1"
    )
    labels: Literal["none", "filename"] = Field("none", description="filename: the last number of the file name")
    high: int = Field(1000, ge=2, description="noise: integers are drawn from 0..high-1")
    options: Mapping[str, Any] = Field({}, description="arguments of a python callable")

    @model_validator(mode="after")
    def _one_kind(self) -> Samples:
        given = [k for k in ("file", "images", "text", "python") if getattr(self, k) is not None]
        given += ["noise"] if self.noise else []
        if len(given) != 1:
            got = "none of them" if not given else " and ".join(given)
            raise ValueError(f"give exactly one of file, images, text, python, noise (got {got})")
        if any(s <= 0 for s in self.std):
            raise ValueError("std must be positive")
        return self

    @property
    def kind(self) -> str:
        """Which of the five kinds this is."""
        return next(k for k in ("file", "images", "text", "python", "noise") if getattr(self, k))


class SampleSets(Frozen):
    """Calibration and evaluation samples, kept apart."""

    calibration: Samples | None = None
    evaluation: Samples | None = None


class Step(Frozen):
    """A compression method beyond the schemes (a file under compress/)."""

    method: str
    options: Mapping[str, Any] = {}


def _steps(value: object) -> object:
    return [{"method": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


class Compress(Frozen):
    """Number formats and the methods that get there."""

    scheme: SchemeName = Field("fp32", description="scheme of every module the target can compress with it")
    modules: Mapping[str, SchemeName] = Field(
        {},
        description="glob on module names -> scheme; the last matching rule wins; a rule that matches none is an error",
    )
    steps: Annotated[tuple[Step, ...], BeforeValidator(_steps), _FROM_LIST] = ()


class Parity(Frozen):
    """Closeness to the float model, each output, energy summed over all evaluation samples."""

    cosine: float | None = Field(None, ge=-1, le=1)
    sqnr_db: float | None = None
    max_abs: float | None = Field(None, ge=0)
    relative_l2: float | None = Field(None, ge=0)


class Agreement(Frozen):
    """Same decisions as the float model."""

    metric: Literal["top1", "spearman", "binary"]
    min: float = Field(ge=-1, le=1)
    output: str | None = Field(None, description="output it is read from; default the first")
    threshold: float = Field(0.5, description="binary: decision threshold")
    tie_margin: float = Field(0.01, ge=0, description="top1: flips whose float margin is below this share are ties")


class Task(Frozen):
    """Task metric on labelled samples."""

    metric: Literal["top1", "top5"]
    max_drop: float | None = Field(None, ge=0, le=1, description="largest allowed drop against float; None prints only")
    output: str | None = None


class LanguageLimits(Frozen):
    """Text of a network with `context`, held against the float model's on the evaluation text."""

    perplexity: float | None = Field(None, gt=0, description="largest ratio to the float model's perplexity: 1.01")
    kl: float | None = Field(None, ge=0, description="largest mean KL divergence from the float model, in nats")
    top1: float | None = Field(None, ge=0, le=1, description="least share of the same first words, near-ties apart")
    top5: float | None = Field(None, ge=0, le=1, description="least share of first words among the artifact's first 5")
    generated: float | None = Field(None, ge=0, le=1, description="least share of greedy tokens before texts differ")
    stepwise_db: float | None = Field(None, description="least SQNR of logits token by token against all at once")
    drift: float | None = Field(
        None, ge=0, description="nats that the KL divergence at later positions may be above that of the first 128"
    )


class SpeculativeLimits(Frozen):
    """A draft's proposals to its target, on the beginnings of the target's evaluation texts."""

    acceptance: float | None = Field(None, ge=0, le=1, description="least share of tested proposals that are accepted")
    tokens_per_step: float | None = Field(None, ge=1, description="least tokens that one call of the target yields")
    identical: float | None = Field(
        None, ge=0, le=1, description="least share of texts that are the target's own, near-ties apart"
    )


class Size(Frozen):
    """Bytes on disk."""

    mib: float | None = Field(None, gt=0)
    of_float: float | None = Field(None, gt=0, description="ratio to the float32 weights of the model")


class Memory(Frozen):
    """Peak memory of running the artifact here."""

    peak_mib: float | None = Field(None, gt=0)
    planned_mib: float | None = Field(None, gt=0, description="ExecuTorch's planned arenas")


class Limits(Frozen):
    """What a build must still be able to do; a limit that is not given is printed and not gated."""

    parity: Parity = Parity()
    agreement: Agreement | None = None
    task: Task | None = None
    language: LanguageLimits = LanguageLimits()
    speculative: SpeculativeLimits = SpeculativeLimits()
    size: Size = Size()
    memory: Memory = Memory()
    delegated: Annotated[float, Field(ge=0, le=1), BeforeValidator(_share)] | None = Field(
        None, description="share of multiply-accumulates on the backend: 95% or 0.95"
    )


def _target_rule(value: object) -> object:
    return {"target": value} if isinstance(value, str) else value


class TargetRule(Frozen):
    """One target; whatever else is given here overrides what the recipe sets for all, key by key."""

    target: str = Field(description="<runtime>-<backend>: executorch-xnnpack, onnx-cpu, coreml ... (edgebake targets)")
    name: Name | None = Field(None, description="tells two rules of the same target apart")
    device: str | None = Field(None, description="a device profile: sm8650, m4-max ... (edgebake devices)")
    scheme: SchemeName | None = Field(None, description="short for compress: {scheme: ...}")
    options: Mapping[str, Any] = Field({}, description="options of the target (edgebake targets)")
    optional: bool = Field(False, description="a missing toolchain is no failure")
    compress: Mapping[str, Any] = Field({}, description="overrides, key by key; null takes away")
    limits: Mapping[str, Any] = Field({}, description="overrides, key by key; null takes away")
    samples: Mapping[str, Any] = Field({}, description="overrides, key by key; null takes away")
    dims: Mapping[str, Any] = Field({}, description="overrides, key by key")
    inputs: Mapping[str, Any] = Field({}, description="overrides, key by key")
    model: Mapping[str, Any] = Field({}, description="overrides, key by key; null takes away")


class Component(Frozen):
    """One network: what it is, how it is compressed, where it goes, what it must reach."""

    model: Model
    inputs: Mapping[str, Input] = Field({}, description="inputs of the method `forward`")
    methods: Mapping[str, Mapping[str, Input]] = Field({}, description="several methods: {method: inputs}")
    dims: Mapping[str, Dim] = {}
    samples: SampleSets = SampleSets()
    compress: Compress = Compress()
    targets: Annotated[
        tuple[Annotated[TargetRule, BeforeValidator(_target_rule)], ...], _FROM_LIST, Field(max_length=MAX_TARGETS)
    ] = ()
    limits: Limits = Limits()

    @property
    def all_methods(self) -> Mapping[str, Mapping[str, Input]]:
        """Inputs of every method; the short form ``inputs`` is the method ``forward``."""
        return self.methods or {"forward": self.inputs}


def _bundle(value: object) -> object:
    if isinstance(value, str):
        return {"formats": [value]}
    return {"formats": value} if isinstance(value, list) else value


class Bundle(Frozen):
    """What is packed for app developers."""

    formats: Annotated[tuple[str, ...], _FROM_LIST] = ()
    include_reference: bool = False


class Speculative(Frozen):
    """Two decoders of the recipe: one proposes tokens, the other reads them at once and keeps what it would say."""

    target: str = Field(description="the component whose text it is")
    draft: str = Field(description="the component that proposes")
    tokens: int = Field(4, ge=1, le=MAX_TOKENS, description="tokens that the draft proposes at a time")


class Recipe(Frozen):
    """A whole recipe, ``extends`` and the one-component shorthand already resolved."""

    name: Name
    description: str = ""
    components: Mapping[Name, Component] = Field(min_length=1)
    wiring: Mapping[str, str] = Field({}, description="component.output -> component.input")
    speculative: Speculative | None = Field(None, description="which component drafts for which")
    bundle: Annotated[Bundle, BeforeValidator(_bundle)] = Bundle()


SHORTHAND_COMPONENT = "model"  # the name of the only component of a recipe that declares none
COMPONENT_KEYS = frozenset(Component.model_fields)
RECIPE_KEYS = frozenset(Recipe.model_fields) | COMPONENT_KEYS | {"extends"}
