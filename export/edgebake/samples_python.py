"""Samples made by a callable that the recipe names (``samples: {python: module:function}``)."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from itertools import islice
from pathlib import Path

from edgebake.errors import EdgebakeError, RecipeError
from edgebake.recipe import Samples
from edgebake.samples_paths import module_file, own_code_failed, split_callable
from edgebake.target import SampleRequest
from edgebake.types import Sample


def read_python(spec: Samples, base: Path) -> list[Sample]:
    """What the callable returns for the recipe's count, skip, seed and options; modules beside the recipe come first.

    RecipeError when there is no such callable, when it returns something else than samples, or too few of them.
    """
    name = str(spec.python)
    module, function = split_callable(name)
    file = module_file(module, base)
    if str(base) not in sys.path and file.is_relative_to(base):
        sys.path.insert(0, str(base))
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        raise RecipeError(f"{file} has no callable {function!r}", fix="correct `samples: python`")
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
    for distribution in _declared(source):
        try:
            found[f"distribution/{distribution}"] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            raise RecipeError(
                f"{module} makes its samples with {distribution!r}, which is not installed",
                fix=f"pip install {distribution}",
            ) from None
    return found


def _declared(source: Path) -> list[str]:
    try:
        tree = ast.parse(source.read_text("utf-8"))
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{source} is not valid Python: {error}", fix="correct it") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "DISTRIBUTIONS" for t in node.targets
        ):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []
