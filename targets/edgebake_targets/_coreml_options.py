"""What the options of the target mean together: systems of one generation, combinations that cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgebake.errors import RecipeError
from edgebake.target import Asked, LowerRequest, Refusal

# The macOS of each generation takes the same packages.
_SAME_AS = {"macOS12": "iOS15", "macOS13": "iOS16", "macOS14": "iOS17", "macOS15": "iOS18"}


ITSELF = "."  # in keep_float32: operators that belong to no module, which are the network's own
_SEARCH = "auto"  # in keep_float32: what the package is found to need


def canonical(request: LowerRequest) -> LowerRequest:
    """``request`` with ``minimum_os`` as the iOS of its generation; RecipeError for what does not go together."""
    problems = [refusal.problem() for refusal in contradictions(request)]
    if problems:
        raise RecipeError(problems)
    return replace(request, options={**request.options, "minimum_os": system_of(request.options)})


def system_of(options: Mapping[str, Any]) -> str:
    """``minimum_os`` as the iOS of its generation."""
    system = str(options["minimum_os"])
    return _SAME_AS.get(system, system)


def precision_of(request: LowerRequest | Asked) -> str:
    """``fp16`` or ``fp32``: what the program computes in."""
    asked = str(request.options["compute_precision"])
    return ("fp32" if request.scheme == "fp32" else "fp16") if asked == "auto" else asked


def kept_float32(request: LowerRequest) -> tuple[str, ...]:
    """The globs of the option ``keep_float32``."""
    return tuple(part for part in _words(request.options) if part != _SEARCH)


def searches_float32(options: Mapping[str, Any]) -> bool:
    """Whether the modules that need float32 are to be found on calibration samples."""
    return _SEARCH in _words(options)


def _words(options: Mapping[str, Any]) -> list[str]:
    return str(options["keep_float32"]).replace(",", " ").split()


def contradictions(request: LowerRequest | Asked) -> Iterator[Refusal]:
    """Options that cannot stand together."""
    if _words(request.options) and precision_of(request) == "fp32":
        yield Refusal(
            key="options.keep_float32",
            what="keep_float32 names modules of a package that computes in float32 everywhere",
            fix="leave keep_float32 out, or options: {compute_precision: fp16}",
        )
    if _words(request.options) and request.options["chunk_mib"]:
        yield Refusal(
            key="options.chunk_mib",
            what="keep_float32 names modules of a whole package, and chunk_mib cuts it",
            fix="leave one of both out",
        )
    if request.options["chunk_mib"] < 0:
        yield Refusal(key="options.chunk_mib", what="chunk_mib is a size", fix="1000, or 0 for one package")
    units = request.options["compute_units"]
    if units != "cpu_and_ne":
        return
    if system_of(request.options) == "iOS15":
        yield Refusal(
            key="options.compute_units",
            what="apps ask for the CPU and the Neural Engine alone (cpu_and_ne) since iOS 16 and macOS 13",
            fix="options: {minimum_os: iOS16}, or {compute_units: all}",
        )
    if precision_of(request) == "fp32":
        yield Refusal(
            key="options.compute_units",
            what="the Neural Engine computes in float16 only, and this package computes in float32",
            fix="options: {compute_precision: fp16}, or {compute_units: cpu_and_gpu}",
        )
