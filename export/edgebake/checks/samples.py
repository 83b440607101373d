"""Are the samples there, enough, apart from each other, and of a kind that feeds the inputs?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePath

from edgebake.checks.case import Case, moved
from edgebake.checks.models import callable_problems
from edgebake.checks.targets import targets_with
from edgebake.errors import EdgebakeError, Problem
from edgebake.recipe import Input, Samples
from edgebake.samples_checks import enough, only_method
from edgebake.samples_headers import check as fitting
from edgebake.samples_headers import misfit, shapes
from edgebake.samples_paths import IMAGE_SUFFIXES, resolve
from edgebake.scheme import parse, shown
from edgebake.target import METHODS
from edgebake.wording import said

PURPOSES = ("calibration", "evaluation")
# What edgebake.samples_text feeds; that module imports numpy, which this one must not.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
FILE_SUFFIXES = (".npz", ".safetensors")
MAX_TEXT_BYTES = 256 << 20
_META = ("count", "skip", "seed", "labels")  # two sets that differ in these only draw from one source


def problems(case: Case) -> Iterator[Problem]:
    """What is wrong with calibration and evaluation samples of a unit, and between them."""
    sets = case.unit.spec.samples
    for purpose in PURPOSES:
        spec = getattr(sets, purpose)
        if spec is not None:
            try:
                yield from _one(case, purpose, spec)
            except EdgebakeError as error:
                yield from moved(error, case.where("samples", purpose))
    yield from _calibration(case)
    if sets.calibration is not None and sets.evaluation is not None:
        yield from _overlap(case, sets.calibration, sets.evaluation)


def _one(case: Case, purpose: str, spec: Samples) -> Iterator[Problem]:
    yield from _stray_keys(case, purpose, spec)
    if not any(case.unit.spec.all_methods.values()):
        return  # without inputs, nothing below can be told
    if spec.kind == "text":
        yield from _text(case, purpose, spec)
    elif spec.kind == "images":
        yield from _images(case, purpose, spec)
    elif spec.kind == "file":
        yield from _file(case, purpose, spec)
    elif spec.kind == "python":
        where = case.where("samples", purpose, "python")
        yield from callable_problems(str(spec.python), case.unit.base, where)


_OF_KIND = {
    "pattern": "images",
    "size": "images",
    "crops": "images",
    "mean": "images",
    "std": "images",
    "labels": "images",
    "high": "noise",
    "length": "text",
    "options": "python",
}


def _stray_keys(case: Case, purpose: str, spec: Samples) -> Iterator[Problem]:
    for key, kind in _OF_KIND.items():
        if key in spec.model_fields_set and kind != spec.kind:
            what = f"{key}: is for {kind}, these samples are {spec.kind}"
            yield Problem(what=what, where=case.where("samples", purpose, key), fix="remove it")


def _text(case: Case, purpose: str, spec: Samples) -> Iterator[Problem]:
    where = case.where("samples", purpose, "text")
    _, inputs = only_method(case.unit.spec, "text")
    running = case.unit.spec.model.context is not None  # edgebake.samples_tokens
    if not running and ("input_ids" not in inputs or any(name not in TEXT_INPUTS for name in inputs)):
        yield Problem(
            what=f"text feeds {', '.join(TEXT_INPUTS)}; the inputs are {', '.join(inputs)}",
            where=where,
            fix="rename the inputs, or give samples of another kind",
        )
    if case.unit.spec.model.source not in ("transformers", "gguf", "meta"):
        what = "text needs the model's tokenizer, which only a transformers folder has"
        yield Problem(what=what, where=where, fix="give samples of another kind, such as python")
    path = resolve(str(spec.text), case.unit.base)
    if not path.is_file():
        yield _absent(f"there is no text file {said(spec.text)}", where)
    elif path.stat().st_size > MAX_TEXT_BYTES:
        yield Problem(what=f"{said(spec.text)} has more than {MAX_TEXT_BYTES >> 20} MiB", where=where, fix="cut it")
    elif not running:  # how many tokens the text has, the tokenizer alone can tell
        enough(spec, _count_lines(path, path.stat().st_mtime_ns), "lines")


@lru_cache
def _count_lines(path: Path, _mtime_ns: int) -> int:
    """Lines with text; before a tab stands the line's source."""
    with path.open("rb") as lines:
        return sum(bool(line.partition(b"\t")[2].strip() if b"\t" in line else line.strip()) for line in lines)


def _images(case: Case, purpose: str, spec: Samples) -> Iterator[Problem]:
    where = case.where("samples", purpose, "images")
    if len(spec.mean) not in (1, 3) or len(spec.std) != len(spec.mean):
        key = "std" if "std" in spec.model_fields_set else "mean"
        what, fix = "mean and std need one value per channel", "3 values for colour, 1 for grey"
        yield Problem(what=what, where=case.where("samples", purpose, key), fix=fix)
    method, inputs = only_method(case.unit.spec, "images")
    if len(inputs) != 1:
        what = f"images feed one input, the inputs are {', '.join(inputs)}"
        yield Problem(what=what, where=where, fix="write a samples callable instead")
    elif wrong := _image_misfit(spec, next(iter(inputs.values()))):
        base = ("methods", method) if case.unit.spec.methods else ("inputs",)
        place = case.where(*base, next(iter(inputs)), "shape")
        yield Problem(what=wrong, where=place, fix="change the input, or size, mean and std of the samples")
    if ".." in PurePath(spec.pattern).parts or PurePath(spec.pattern).is_absolute():
        what = f"the pattern {said(spec.pattern)} leaves the image folder"
        yield Problem(what=what, where=case.where("samples", purpose, "pattern"), fix="give a glob on file names in it")
        return
    folder = resolve(str(spec.images), case.unit.base)
    if not folder.is_dir():
        yield _absent(f"there is no image folder {said(spec.images)}", where)
        return
    try:
        found = sum(f.is_file() and f.suffix.lower() in IMAGE_SUFFIXES for f in folder.glob(spec.pattern))
    except (ValueError, NotImplementedError) as error:
        yield Problem(what=f"not a pattern: {error}", where=case.where("samples", purpose, "pattern"))
        return
    if not found:
        what = f"{said(spec.images)} holds no image that matches {said(spec.pattern)}"
        yield Problem(what=what, where=case.where("samples", purpose, "pattern"), fix=f"files: {_some(folder)}")
        return
    enough(spec, found * spec.crops, f"crops ({found} images, {spec.crops} crops each)")


def _image_misfit(spec: Samples, given: Input) -> str:
    expected = (1, len(spec.mean), spec.size, spec.size)
    fits = len(given.shape) == 4 and all(
        isinstance(a, str) or a == b for a, b in zip(given.shape, expected, strict=True)
    )
    if fits and given.dtype in ("float32", "uint8"):
        return ""
    shape = ", ".join(str(size) for size in given.shape)
    return f"the input is {given.dtype}[{shape[:60]}], the images come as float32 or uint8 {list(expected)}"


def _some(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(said(name) for name in names[:3]) or "none"


def _file(case: Case, purpose: str, spec: Samples) -> Iterator[Problem]:
    where = case.where("samples", purpose, "file")
    _, inputs = only_method(case.unit.spec, "file")
    path = resolve(str(spec.file), case.unit.base)
    if path.suffix not in FILE_SUFFIXES:
        yield Problem(what=f"{said(spec.file)} is not {' or '.join(FILE_SUFFIXES)}", where=where, fix="save it as one")
    elif not path.is_file():
        yield _absent(f"there is no file {said(spec.file)}", where)
    else:
        found = shapes(path)
        fitting(found, inputs, spec, path)
        for name, given in inputs.items():
            if wrong := misfit(found[name], given, case.unit.spec):
                fix = "rows are one sample each; change the samples or the declared shape or bounds"
                yield Problem(what=f"the array {said(name)} of {said(spec.file)} {wrong}", where=where, fix=fix)


def _absent(what: str, where: str) -> Problem:
    return Problem(what=what, where=where, fix="paths are relative to the recipe's folder, or pkg://package/path")


def _calibration(case: Case) -> Iterator[Problem]:
    if case.unit.spec.samples.calibration is not None:
        return
    schemes: dict[tuple[str, ...], str] = {("compress", "scheme"): case.unit.scheme}
    schemes |= {("compress", "modules", glob): name for glob, name in case.unit.spec.compress.modules.items()}
    for key, scheme in schemes.items():
        if parse(scheme).needs_calibration:
            dynamic = f"{scheme}d"
            there = case.unit.target in targets_with(dynamic)
            yield Problem(
                what=f"{shown(scheme)} fixes activation ranges from calibration samples, and there are none",
                where=case.where(*key),
                fix="add samples: {calibration: ...}" + (f", or use {dynamic} (ranges at run time)" if there else ""),
            )
    for position, step in enumerate(case.unit.spec.compress.steps):
        if step.method in METHODS.names() and getattr(METHODS.find(step.method), "CALIBRATED", False):
            yield Problem(
                what=f"the step {step.method} looks at calibration samples, and there are none",
                where=case.where("compress", "steps", position, "method"),
                fix="add samples: {calibration: ...}, or take the step out",
            )


def _overlap(case: Case, calibration: Samples, evaluation: Samples) -> Iterator[Problem]:
    if calibration.noise or calibration.model_dump(exclude=set(_META)) != evaluation.model_dump(exclude=set(_META)):
        return
    first, last = max(calibration.skip, evaluation.skip), min(_end(calibration), _end(evaluation)) - 1
    if first <= last:
        apart = _end(calibration) if calibration.skip <= evaluation.skip else _end(evaluation)
        later = "evaluation" if calibration.skip <= evaluation.skip else "calibration"
        yield Problem(
            what=f"samples {first} to {last} are used for calibration and for evaluation, which must not share any",
            where=case.where("samples", "evaluation"),
            fix=f"set {later}: skip to {apart} or more",
        )


def _end(spec: Samples) -> int:
    return spec.skip + spec.count
