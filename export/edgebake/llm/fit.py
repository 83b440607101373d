"""Does a decoder fit? From its configuration alone: file, memory and speed on devices, and the export here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgebake.assignment import assign
from edgebake.devices import Device
from edgebake.errors import EdgebakeError, Problem
from edgebake.llm import fit_memory
from edgebake.llm.fit_gguf import config_of
from edgebake.llm.fit_memory import CACHES, CONTEXTS, GIB, Cache
from edgebake.llm.fit_shape import CONFIG, Decoder, decoder_of, first_layers, read_config
from edgebake.llm.fit_size import FORMATS, FileSize, file_size
from edgebake.llm.streaming import streams
from edgebake.llm.tasks import is_decoder
from edgebake.models import _paths
from edgebake.scheme import parse
from edgebake.target import Target, find_target
from edgebake.types import Module
from edgebake.units import Unit

DEFAULT_CONTEXT = 2048
LEAST_CONTEXT = 128  # with less, a conversation is no use
_SHIPPED = "configs"  # beside a recipe: published configurations of models that come from the hub

Verdict = Literal["fits", "fits with less context", "does not fit", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One device: its verdict, the most context that fits, bounds on decoding, and what would fit."""

    device: str
    verdict: Verdict
    why: str = ""
    ram_gib: float | None = None
    usable_bytes: int | None = None
    context: int | None = None
    decode_tokens_s: Mapping[str, float] | None = None
    would: tuple[str, ...] = ()
    kind: str = "predicted"


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A unit's sizes; device numbers are predictions, none was measured."""

    decoder: Decoder
    target: str
    format: str
    holds: str  # key of FORMATS
    schemes: Mapping[str, str]
    size: FileSize
    context: int
    prompt: int  # tokens that one call reads at most
    cache: Cache
    streamed: bool  # lowered from its files, not from a loaded network
    mapped: bool  # lowered from a network whose float weights lie in mapped files

    @property
    def memory(self) -> fit_memory.DeviceMemory:
        """On a device, at the recipe's context."""
        return fit_memory.device_memory(self.decoder, self.size.total, self.cache, self.context, self.prompt)

    @property
    def float_peak_bytes(self) -> int:
        """Of a process that loads and runs the float network here, and then the artifact beside it."""
        return fit_memory.float_peak_bytes(self.decoder, self.context, self.run_peak_bytes)

    @property
    def run_peak_bytes(self) -> int:
        """Of a process that runs the artifact here."""
        return fit_memory.run_peak_bytes(self.size.total, self.memory.cache)

    @property
    def export_peak_bytes(self) -> int | None:
        """Of the process that builds it here, a float network that need not be run left out; None if not known."""
        if self.streamed:
            return fit_memory.stream_peak_bytes(self.decoder, self.schemes)
        if self.target in fit_memory.NOT_FITTED:
            return None
        if self.mapped:
            return fit_memory.mapped_peak_bytes(self.decoder, self.size.total)
        return fit_memory.export_peak_bytes(self.decoder, self.size.total, self.format)


def predict(unit: Unit) -> Predicted:
    """Of a language model's unit; EdgebakeError with the reason when its configuration is not here or not known."""
    target = find_target(unit.target)
    decoder = _decoder(unit)
    context = min(decoder.positions, unit.spec.model.context or _longest(unit) or DEFAULT_CONTEXT)
    schemes = _schemes(decoder, unit.scheme, unit.spec.compress.modules, target, unit.target)
    if target.FORMAT not in FORMATS:
        raise EdgebakeError(f"sizes of .{target.FORMAT} files cannot be predicted")
    holds = unit.target if unit.target in FORMATS else target.FORMAT
    return Predicted(
        decoder=decoder,
        target=unit.target,
        format=target.FORMAT,
        holds=holds,
        schemes=schemes,
        size=file_size(decoder, schemes, holds),
        context=context,
        prompt=min(context, max((d.max for d in unit.spec.dims.values()), default=context)),
        cache=next(
            CACHES[kind]
            for kind in (unit.target, f"{target.FORMAT} {unit.options.get('cache')}", target.FORMAT)
            if kind in CACHES
        ),
        streamed=streams(unit),
        mapped=_in_files(unit) and fit_memory.is_mapped(decoder, target.FORMAT, schemes),
    )


def _in_files(unit: Unit) -> bool:
    """Whether a large network's weights would be read into mapped files."""
    model = unit.spec.model
    return model.source == "transformers" and model.context is not None and not model.pickles


def widths(unit: Unit) -> Mapping[str, tuple[str, int]]:
    """Scheme and input width of every compressed matrix by module; EdgebakeError as of :func:`predict`."""
    decoder = _decoder(unit)
    schemes = _schemes(decoder, unit.scheme, unit.spec.compress.modules, find_target(unit.target), unit.target)
    return {w.name: (schemes[w.name], w.shape[1]) for w in decoder.weights if w.name in schemes}


def configuration(unit: Unit) -> Path:
    """The folder whose config.json tells the shape; of a hub's model the copy beside the recipe, as nothing is fetched.

    EdgebakeError when there is none.
    """
    found = _paths.resolve(unit.spec.model.path, unit.base)
    if isinstance(found, Path):
        return found
    name = re.sub(r"-(instruct|it|chat)$", "", found.repo.rpartition("/")[2].lower())
    shipped = unit.base / _SHIPPED / name
    if not (shipped / CONFIG).is_file():
        raise EdgebakeError(
            f"the configuration of {found.repo!r} is not here",
            where="model.path",
            fix=f"put its {CONFIG} into {_SHIPPED}/{name}/ beside the recipe; plan fetches nothing",
        )
    return shipped


def _longest(unit: Unit) -> int:
    """Of a network without a cache: the longest text that it takes."""
    return max((d.max for d in unit.spec.dims.values()), default=0)


def _decoder(unit: Unit) -> Decoder:
    model = unit.spec.model
    if model.source == "gguf":
        found = decoder_of(config_of(_paths.resolve_file(model.path, unit.base, ".gguf")))
    elif model.source == "meta":
        from edgebake.models import _meta_params as meta

        found = decoder_of(meta.configuration(meta.read(configuration(unit)), tied=False))
    else:
        found = read_config(configuration(unit))
    kept = model.layers if model.layers is not None else _distilled(unit, found)
    return found if kept is None else first_layers(found, kept)


def _distilled(unit: Unit, whole: Decoder) -> int | None:
    """Layers that a step leaves of the network; half of them where it does not say."""
    step = next((step for step in unit.spec.compress.steps if step.method == "distill"), None)
    return None if step is None else int(step.options.get("layers") or whole.layers // 2)


def _schemes(decoder: Decoder, scheme: str, rules: Mapping[str, str], target: Target, name: str) -> Mapping[str, str]:
    modules = [
        Module(name=weight.name, kind=weight.kind, parameters=weight.values + weight.bias)
        for weight in decoder.weights
        if weight.kind != "norm"
    ]
    return assign(scheme, rules, modules, target, name).schemes


def refusal(unit: Unit, memory_mib: float | None) -> Problem | None:
    """Why the build of a language model cannot fit here; None when it can, or nothing can be predicted.

    ``memory_mib``: what ``--memory`` allows a worker, None without it.
    """
    if not is_decoder(unit.spec.model):
        return None
    try:
        peak = predict(unit).export_peak_bytes
    except EdgebakeError:
        return None
    here, there = _here(memory_mib)
    if peak is None or peak <= here:
        return None
    asked = there.startswith("--memory")
    return Problem(
        what=f"building it takes {gib(peak)} of memory (predicted), and {there}",
        where=unit.id,
        fix=("raise --memory, or " if asked else "") + "build it on a machine with more memory, or a smaller model",
    )


def within_memory(unit: Unit, memory_mib: float | None) -> Unit:
    """``unit``, saying what is not run here where it is lowered from files: the float network, or even the artifact."""
    if not streams(unit):
        return unit
    try:
        predicted = predict(unit)
    except EdgebakeError:
        return unit
    here, there = _here(memory_mib)
    peaks = {"float model": predicted.float_peak_bytes, "artifact": predicted.run_peak_bytes}
    why = {
        what: f"running the {what} takes {gib(peak)} of memory (predicted), and {there}" if peak > here else ""
        for what, peak in peaks.items()
    }
    pair = unit.pair and replace(unit.pair, unit=within_memory(unit.pair.unit, memory_mib))
    return replace(unit, without_float=why["float model"], without_run=why["artifact"], pair=pair)


def _here(memory_mib: float | None) -> tuple[int, str]:
    """Bytes that a worker may use, and the words for it."""
    here = fit_memory.host_memory_bytes(memory_mib)
    asked = memory_mib is not None and here == int(memory_mib * fit_memory.MIB)
    return here, f"--memory allows {gib(here)}" if asked else f"this machine has {gib(here)}"


# --- devices --------------------------------------------------------------------------------------------------------


def judge(unit: Unit, predicted: Predicted, device: Device) -> Judged:
    """Whether the artifact of ``unit`` fits ``device``, with how much context, and what would fit."""
    ram, bandwidth = device.facts.get("ram_gib"), device.facts.get("bandwidth_gb_s")
    speed = None if bandwidth is None else _speed(predicted, bandwidth)
    if ram is None:
        why = device.unknown["ram_gib"]
        return Judged(device=device.name, verdict="unknown", why=why, decode_tokens_s=speed)
    budget = int(ram * GIB * fit_memory.USABLE[device.platform])
    context = fit_memory.longest_context(
        predicted.decoder, predicted.size.total, predicted.cache, predicted.prompt, budget
    )
    verdict: Verdict = "fits" if context >= predicted.context else "fits with less context"
    verdict = "does not fit" if context < min(LEAST_CONTEXT, predicted.context) else verdict
    return Judged(
        device=device.name,
        verdict=verdict,
        ram_gib=ram,
        usable_bytes=budget,
        context=context,
        decode_tokens_s=speed,
        would=() if verdict == "fits" else tuple(_would(unit, predicted, budget, context)),
    )


def _speed(predicted: Predicted, bandwidth: float) -> dict[str, float]:
    """Upper bounds by how full the cache is."""
    ends = {"empty": 0, "full": predicted.context}
    read = {
        name: fit_memory.bytes_per_token(predicted.decoder, predicted.size, predicted.cache, tokens)
        for name, tokens in ends.items()
    }
    return {name: fit_memory.decode_tokens_s(size, bandwidth) for name, size in read.items()}


def _would(unit: Unit, predicted: Predicted, budget: int, context: int) -> Iterator[str]:
    """What would fit into ``budget``, least loss first: less context, fewer bits, both, a server."""
    if context >= LEAST_CONTEXT:
        yield f"context {context}"
    smaller = _fewer_bits(unit, predicted, budget)
    whole = next((scheme for scheme, most in smaller if most >= predicted.context), None)
    if whole:
        yield f"scheme {whole}"
    elif context < LEAST_CONTEXT:
        scheme, most = max(smaller, key=lambda pair: pair[1], default=("", 0))
        enough = most >= LEAST_CONTEXT
        server = f"serve it from a server with {gib(predicted.memory.total)} free"
        yield f"scheme {scheme} with context {most}" if enough else server


def _fewer_bits(unit: Unit, predicted: Predicted, budget: int) -> list[tuple[str, int]]:
    """The target's smaller schemes, wide ones first, each with the most context that fits.

    Of schemes with as many bits, those that leave activations as they are come first.
    """
    target, decoder, asked = find_target(unit.target), predicted.decoder, parse(unit.scheme)
    names = [row.scheme for row in target.SUPPORTS if not row.override_only and "linear" in row.kinds]
    smaller = [scheme for name in names if (scheme := parse(name)).weight_bits < asked.weight_bits]
    smaller.sort(key=lambda scheme: (-scheme.weight_bits, scheme.activation_bits != asked.activation_bits))
    found = []
    for scheme in smaller:
        schemes = _schemes(decoder, scheme.name, unit.spec.compress.modules, target, unit.target)
        size = file_size(decoder, schemes, predicted.holds).total
        found.append(
            (scheme.name, fit_memory.longest_context(decoder, size, predicted.cache, predicted.prompt, budget))
        )
    return found


def gib(size: float) -> str:
    """Bytes for people: ``0.98 GiB``."""
    return f"{size / GIB:.2f} GiB"


# --- as data --------------------------------------------------------------------------------------------------------


def document(unit: Unit, on: Sequence[Device]) -> dict[str, Any]:
    """All of it as plain data, judged for the devices ``on``; ``{"unknown": why}`` where nothing can be predicted."""
    try:
        predicted = predict(unit)
    except EdgebakeError as error:
        return {"unknown": error.problems[0].what, "fix": error.problems[0].fix}
    decoder, size, memory = predicted.decoder, predicted.size, predicted.memory
    contexts = sorted({*(c for c in CONTEXTS if c <= decoder.positions), predicted.context})
    return {
        "kind": "predicted",
        "family": decoder.family,
        "parameters": decoder.parameters,
        "context": predicted.context,
        "prompt": predicted.prompt,
        "size": {
            "bytes": size.total,
            "of_float": size.total / (4 * decoder.parameters),
            "parts": {name: {**asdict(part), "bytes": part.total} for name, part in size.parts.items()},
            "program": size.program,
        },
        "kv_cache": {
            "dtype": predicted.cache.dtype,
            "bytes_per_token": fit_memory.cache_bytes(decoder, 1, predicted.cache),
            "bytes_by_context": {str(c): fit_memory.cache_bytes(decoder, c, predicted.cache) for c in contexts},
        },
        "device_memory": {**asdict(memory), "bytes": memory.total},
        "export": _export(predicted),
        "devices": [asdict(judge(unit, predicted, device)) for device in on],
    }


def _export(predicted: Predicted) -> dict[str, Any]:
    here = fit_memory.host_memory_bytes(None)
    peak = predicted.export_peak_bytes
    disk = fit_memory.export_disk_bytes(predicted.decoder, predicted.size.total, traced=not predicted.streamed)
    return {
        "streamed": predicted.streamed,
        **({"float_peak_bytes": predicted.float_peak_bytes} if predicted.streamed else {}),
        "peak_bytes": peak,
        "disk_bytes": disk,
        "memory_here_bytes": here,
        "fits_here": None if peak is None else peak <= here,
    }
