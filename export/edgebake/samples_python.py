"""Samples made by a callable that the recipe names (``samples: {python: module:function}``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

from edgebake.callables import declared_versions, import_module, module_file, own_code_failed, split_callable
from edgebake.errors import EdgebakeError, RecipeError
from edgebake.recipe import Samples
from edgebake.target import SampleRequest
from edgebake.types import Sample


def read_python(spec: Samples, base: Path) -> list[Sample]:
    """What the callable returns for the recipe's count, skip, seed and options; modules beside the recipe come first.

    RecipeError when there is no such callable, when it returns something else than samples, or too few of them.
    """
    name = str(spec.python)
    module, function = split_callable(name)
    found = getattr(import_module(module, base), function, None)
    if not callable(found):
        raise RecipeError(f"{module_file(module, base)} has no callable {function!r}", fix="correct `samples: python`")
    request = SampleRequest(count=spec.count, skip=spec.skip, seed=spec.seed, options=spec.options)
    samples = _called(found, name, request)
    strangers = [sample for sample in samples if not isinstance(sample, Sample)]
    if strangers:
        raise RecipeError(
            f"{name} returned a {type(strangers[0]).__name__} among its samples",
            fix="return a sequence of edgebake.types.Sample",
        )
    if len(samples) < spec.count:
        skipped = f" after skipping {spec.skip}" if spec.skip else ""
        raise RecipeError(
            f"{name} returned {len(samples)} samples, the recipe asks for {spec.count}{skipped}",
            fix=f"set count to {len(samples)} or less, or have the callable make more",
        )
    return samples[: spec.count]


def _called(function: Callable[[SampleRequest], Iterable[object]], name: str, request: SampleRequest) -> list[Sample]:
    """As many samples as are asked for, at most: a generator need not end. StageFailed when it raises."""
    try:
        made = function(request)
        if not isinstance(made, Iterable):
            raise RecipeError(
                f"{name} returned {type(made).__name__}", fix="return a sequence of edgebake.types.Sample"
            )
        return list(islice(made, request.count))  # type: ignore[arg-type]
    except EdgebakeError:
        raise
    except Exception as error:
        raise own_code_failed(name, error) from error


def fingerprint_python(spec: Samples, base: Path, file_digest: Callable[[Path], str]) -> Mapping[str, str]:
    """Digests of the Python files beside the callable's module and versions of the packages it declares.

    A module declares them as a literal, ``DISTRIBUTIONS = ("espeakng-loader",)``; nothing is imported.
    """
    module, _ = split_callable(str(spec.python))
    source = module_file(module, base)
    found = {f"code/{file.name}": file_digest(file) for file in sorted(source.parent.glob("*.py"))}
    return {**found, **declared_versions(source, "samples: python")}
