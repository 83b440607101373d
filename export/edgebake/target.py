"""The contract that a target, a runner, a model source and a compression method fulfil, and how they are found.

Each is one module in one folder; the file's name is the name users write (``_`` for ``-``). Listing reads names only.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgebake.errors import Problem, RecipeError, StageFailed
from edgebake.types import (
    About,
    ActsOn,
    Assignment,
    Inspection,
    Keep,
    Loaded,
    Lowered,
    ModuleKind,
    ReferenceCall,
    RunnerKind,
    Sample,
    SampleSet,
    Signature,
    TensorSpec,
    Traced,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CONTRACT_VERSION = 1

# Names to the values of which each must have one; () where any will do, as long as it is known.
Needs = Mapping[str, tuple[str | int | float | bool, ...]]


@dataclass(frozen=True, kw_only=True)
class Support:
    """One row of what a target can do.

    ``kinds``: module kinds that the scheme compresses; modules of other kinds stay float32 when the scheme is the
    recipe's default and are an error when a rule names them. ``method``: the file under compress/ that applies the
    scheme before lowering; empty when ``lower`` applies it. ``override_only``: never as a recipe's default scheme.
    ``needs``: values that a target option must have one of, such as the systems that take the scheme.
    ``needs_device``: the same of the device's facts (``edgebake.devices.FACTS``). ``note``: kernel or hardware reason.
    """

    scheme: str
    kinds: tuple[ModuleKind, ...]
    method: str = ""
    override_only: bool = False
    needs: Needs = field(default_factory=dict)
    needs_device: Needs = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A target option: its type is the type of ``default``; ``choices`` closes it.

    ``calibrated``: values, or words among those of a text, with which ``lower`` looks at calibration samples.
    """

    name: str
    default: str | int | float | bool
    help: str
    choices: tuple[str | int | float | bool, ...] = ()
    calibrated: tuple[str | int | float | bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why a toolchain cannot be used and the exact command or step that mends it."""

    reason: str
    remedy: str


# Samples -> per sample the recorded calls of the float network, states carried from call to call.
FloatCalls = Callable[[Iterable[Sample]], Iterator[tuple[ReferenceCall, ...]]]


def no_float_calls(_samples: Iterable[Sample]) -> Iterator[tuple[ReferenceCall, ...]]:
    """Where nothing runs the float network."""
    raise StageFailed("this request for lowering comes without the float network", fix="give it float_calls")


@dataclass(frozen=True, kw_only=True)
class LowerRequest:
    """All that ``lower`` may look at besides the traced program."""

    unit: str
    scheme: str
    assignment: Assignment
    options: Mapping[str, Any]  # every OPTIONS name present, defaults filled in
    device: Mapping[str, Any] | None
    calibration: SampleSet | None  # None when nothing needs calibration
    folder: Path  # empty, or what a ``stream`` that was killed left; write the artifact's files here
    about: About = field(default_factory=About)
    float_calls: FloatCalls = no_float_calls
    beside: Path | None = None  # of a decoder: a folder with its config.json and the files that travel with it


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a recipe says of one unit, before anything is loaded.

    ``module_schemes`` are those of ``compress.modules``. ``device`` is its profile's row with ``name``, None without
    one. ``inputs`` by method; empty where the model tells them. ``varying`` names the dimensions of more than one size,
    ``sizes`` those with a list of them. ``channels``: how many images are normalised by, None without image samples.
    ``widths``: of a decoder whose configuration is here, scheme and input width by module; ``config``: its config.json.
    """

    scheme: str
    module_schemes: tuple[str, ...]
    options: Mapping[str, Any]  # every OPTIONS name present, each of its type and among its choices
    device: Mapping[str, Any] | None
    inputs: Mapping[str, tuple[TensorSpec, ...]]
    varying: tuple[str, ...]
    channels: int | None
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    widths: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """What a target cannot do of what is :class:`Asked`.

    ``key``: where that is written: ``device``, ``dims``, ``model``, ``scheme``, ``modules``, ``options.<name>`` or
    ``inputs.<method>.<name>``; empty for the rule itself.
    """

    what: str
    fix: str
    key: str = ""

    def problem(self) -> Problem:
        """For an error without the recipe's lines."""
        return Problem(what=self.what, fix=self.fix)


class Target(Protocol):
    """A module ``edgebake_targets/<runtime>_<backend>.py``; its top level imports stdlib and this contract only.

    Optional: ``CARRIES_ABOUT = True`` for a target that writes ``request.about`` into the artifact; a change of it then
    lowers again. ``DEVICES: Needs`` for one that runs on some devices only: ``{"vendor": ("apple",)}``; with a ``()``
    it lowers for one chip, and recipes must name a device. An option called ``minimum_os`` is held against the system
    that devices came with. ``refusals(asked)``: what ``lower`` would refuse and the recipe alone shows; imports no SDK.
    ``fix(folder)`` makes a private toolchain there and says so, ``versions()`` are of what is in it
    (``edgebake.toolchains``), part of the store key. ``DECODES = True`` for one with operators for a decoder's cache
    (``edgebake.llm.operators``). ``STREAMS = True`` for one with ``stream(streamed, request) -> Lowered``, which writes
    what ``lower`` would from weights that are read where they lie: a build then neither loads nor traces for it.
    """

    SUPPORTS: tuple[Support, ...]
    OPTIONS: tuple[Option, ...]
    FORMAT: str  # "pte", "onnx", "mlpackage": which inspector reads its files
    DISTRIBUTIONS: tuple[str, ...]  # pip distributions whose versions are part of the store key
    SOURCES: tuple[str, ...]  # modules besides itself whose source is part of the store key

    def missing(self) -> Missing | None:
        """None when the toolchain is usable; never imports it (find_spec)."""

    def lower(self, traced: Traced, request: LowerRequest) -> Lowered:
        """Write the artifact into ``request.folder``. Same inputs, same bytes."""


class GraphTarget(Target, Protocol):
    """A target whose SUPPORTS name the method ``pt2e``."""

    def quantizer(self, request: LowerRequest) -> Any:
        """A torchao PT2E Quantizer for ``request.assignment``."""


class NotMeasured(Exception):
    """Raised by a runner that cannot judge this artifact, which may be whole all the same; the text says why."""


class Session(Protocol):
    """An opened artifact.

    Optional: ``begin()``, called where a sequence of calls begins: after it, what earlier calls left in the artifact is
    gone and states are zero. One without it keeps nothing between calls.

    Optional: ``intermediates(method, inputs, modules)`` gives values inside it by module name. ``modes`` names ways to
    round, the first one not at all, and ``call_mode(mode, method, inputs)`` gives outputs in one of them together with
    the values inside that are not finite, name to operator, ``matmul of <module>`` where known (``edgebake.modes``).
    ``units`` names compute units that the runtime can be held to, and ``call_unit(unit, method, inputs)`` gives outputs
    there, or raises NotMeasured; ``placement()`` says which operators the runtime places where: unit name to
    ``{"operators": {type: count}, "cost": share of the work, None where unknown}`` (``edgebake.compute_units``).
    """

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once. ``inputs`` by signature name in the signature's dtypes; outputs by name, likewise."""


class Runner(Protocol):
    """A module ``edgebake_targets/runners/<name>.py``: something that executes artifacts.

    Optional: ``SOURCES``, modules besides itself whose source is part of the store key; ``APART = True`` for a process
    of its own in builds too (vendors' simulators); ``environment()``: what that one is started with besides.
    """

    RUNS: tuple[str, ...]  # globs on target names: ("executorch-xnnpack",)
    KIND: RunnerKind
    DISTRIBUTIONS: tuple[str, ...]

    def missing(self) -> Missing | None: ...

    def warm_up(self) -> None:
        """Import the runtime: the memory of its Python bindings is not the artifact's."""

    def open(self, entry: Path, signature: Signature) -> Session:
        """Load the artifact at ``entry``. It or the first calls raise NotMeasured."""


class Inspector(Protocol):
    """A module ``edgebake_targets/inspectors/<format>.py``: reads one file format, whoever wrote the file."""

    SUFFIXES: tuple[str, ...]  # (".pte",)

    def missing(self) -> Missing | None: ...

    def inspect(self, path: Path) -> Inspection: ...


class ModelSource(Protocol):
    """A module ``edgebake/models/<name>.py``.

    Optional, for networks with a cache that need not be loaded: ``describe(request) -> Described`` and
    ``tensors(request) -> Tensors``.
    """

    def load(self, request: Any) -> Loaded: ...


class CompressMethod(Protocol):
    """A module ``edgebake/compress/<name>.py``. Optional: ``CALIBRATED = True`` if it looks at calibration samples."""

    ACTS_ON: ActsOn
    DISTRIBUTIONS: tuple[str, ...]


@lru_cache
def _names_in(package: str) -> tuple[str, ...]:
    found = importlib.import_module(package)
    names = (m.name for m in pkgutil.iter_modules(found.__path__) if not m.ispkg)
    return tuple(sorted(n.replace("_", "-") for n in names if not n.startswith("_")))


@lru_cache
def _plugins() -> Mapping[str, Mapping[str, str]]:
    """Entry points by group; a hundred packages are looked at once, and only ours are parsed."""
    found: dict[str, dict[str, str]] = {}
    for distribution in metadata.distributions():
        if "[edgebake." in (distribution.read_text("entry_points.txt") or ""):
            for point in distribution.entry_points:
                found.setdefault(point.group, {}).setdefault(point.name, point.value)
    return found


@dataclass(frozen=True)
class Room:
    """A folder of interchangeable modules plus the entry points of third parties that extend it."""

    what: str
    package: str
    group: str

    def names(self) -> tuple[str, ...]:
        """All names, without importing a module."""
        own, others = _names_in(self.package), _plugins().get(self.group, {})
        clash = sorted(set(own) & set(others))
        if clash:
            raise RecipeError(
                f"{self.what} {clash[0]!r} is defined by edgebake and by the plug-in {others[clash[0]]!r}",
                fix="uninstall the plug-in or rename its entry point",
            )
        return tuple(sorted({*own, *others}))

    def module_name(self, name: str) -> str:
        """The module that implements ``name``."""
        return _plugins().get(self.group, {}).get(name) or f"{self.package}.{name.replace('-', '_')}"

    def find(self, name: str) -> Any:
        """Import and return the module; RecipeError with the nearest names when there is none."""
        known = self.names()
        name = name.replace("_", "-")
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise RecipeError(
                f"there is no {self.what} {name!r}",
                fix=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}",
            )
        module = importlib.import_module(self.module_name(name))
        version = getattr(module, "CONTRACT_VERSION", CONTRACT_VERSION)
        if version != CONTRACT_VERSION:
            raise RecipeError(
                f"{self.what} {name!r} was written for contract version {version}, this is {CONTRACT_VERSION}",
                fix="install a release of the plug-in that fits",
            )
        return module


TARGETS = Room("target", "edgebake_targets", "edgebake.targets")
RUNNERS = Room("runner", "edgebake_targets.runners", "edgebake.runners")
INSPECTORS = Room("inspector", "edgebake_targets.inspectors", "edgebake.inspectors")
MODELS = Room("model source", "edgebake.models", "edgebake.models")
METHODS = Room("compression method", "edgebake.compress", "edgebake.compress")
BUNDLES = Room("bundle format", "edgebake.bundles", "edgebake.bundles")


def find_target(name: str) -> Target:
    """The target ``name``."""
    return cast(Target, TARGETS.find(name))


@lru_cache
def runners_of(target: str) -> tuple[tuple[str, Runner], ...]:
    """Runners for ``target``, most faithful first."""
    order = ("device", "executed", "simulated", "interpreted", "stand-in")
    found = ((name, cast(Runner, RUNNERS.find(name))) for name in RUNNERS.names())
    fitting = [(n, r) for n, r in found if any(fnmatchcase(target, glob) for glob in r.RUNS)]
    return tuple(sorted(fitting, key=lambda pair: order.index(pair[1].KIND)))


def support_of(target: Target, scheme: str) -> Support | None:
    """The row of ``scheme``, or None."""
    return next((row for row in target.SUPPORTS if row.scheme == scheme), None)


def calibrating(target: Target, options: Mapping[str, Any]) -> tuple[Option, ...]:
    """The options whose value looks at calibration samples; one that is not in ``options`` has its default."""
    return tuple(o for o in target.OPTIONS if o.calibrated and _looks(o, options.get(o.name, o.default)))


def _looks(option: Option, value: str | float) -> bool:
    words = value.replace(",", " ").split() if isinstance(value, str) else [value]
    return not set(option.calibrated).isdisjoint(words)


def unmet(target: str, row: Support, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, fix) for each option that ``row`` needs other than it is in ``options``, where every option stands."""
    for name, values in row.needs.items():
        if options[name] not in values:
            able = " or ".join(map(str, values))
            what = f"{target} takes {row.scheme} with {name} {able}, not {options[name]}"
            yield what, f"options: {{{name}: {values[0]}}}"


# --- what the compress/ and models/ files are given -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModuleRequest:
    """For methods that act on modules: ``apply(request) -> nn.Module`` on a private copy that shares its weights.

    ``keep``: where the store keeps parts of long work, by names of the method's own; None outside of a build.
    """

    module: torch.nn.Module
    assignment: Assignment
    options: Mapping[str, Any]
    run_calibration: Callable[[torch.nn.Module], None]
    tell: Callable[[str], object] = str  # takes what reports say of it
    keep: Keep | None = None


@dataclass(frozen=True, kw_only=True)
class GraphRequest:
    """For methods that act on an exported program: ``apply(request) -> ExportedProgram``."""

    program: torch.export.ExportedProgram
    dynamic_shapes: Any
    quantizer: Any
    calibration: Sequence[Sequence[tuple[Any, ...]]]  # per sample, which begins anew, positional inputs of each call
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What a samples callable (``samples: {python: module:function}``) is given."""

    count: int
    skip: int
    seed: int
    options: Mapping[str, Any]
