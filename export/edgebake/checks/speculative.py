"""A draft and its target: do the two components of ``speculative`` go together?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgebake.checks.case import Case, moved
from edgebake.errors import EdgebakeError, Problem, RecipeError
from edgebake.llm import vocabularies
from edgebake.llm.companions import TOKENIZER
from edgebake.models import _paths
from edgebake.recipe import Component, Speculative
from edgebake.recipe_files import RecipeFile
from edgebake.units import Unit, proposing_to
from edgebake.wording import did_you_mean, said

_CONTEXT = "give it task: text-generation, context: 2048, and the inputs tokens and input_pos"


def problems(file: RecipeFile, cases: Sequence[Case]) -> Iterator[Problem]:
    """What contradicts ``speculative``, and limits on drafts and derived models where there are none."""
    wanted = file.recipe.speculative
    for case in cases:
        yield from _strays(case, wanted)
    if wanted is None:
        return
    unknown = list(_components(file, wanted))
    yield from unknown
    if unknown:
        return
    drafts = [case for case in cases if case.unit.component == wanted.draft]
    units = [case.unit for case in cases]
    for case in drafts:
        if case.unit.pair is None:
            yield _alone(case, proposing_to(case.unit, units, wanted.target), wanted)
        else:
            yield from _pair(file, case, case.unit.pair.unit, wanted)


def _strays(case: Case, wanted: Speculative | None) -> Iterator[Problem]:
    spec = case.unit.spec
    given = [name for name, bound in spec.limits.speculative if bound is not None]
    if given and (wanted is None or case.unit.component != wanted.draft):
        what = f"speculative.{given[0]} is a limit for a draft, which {said(case.unit.component)} is not"
        fix = (
            "put it into the draft's limits" if wanted else "add speculative: {target: <component>, draft: <component>}"
        )
        yield Problem(what=what, where=case.where("limits", "speculative", given[0]), fix=fix)
    if spec.model.layers is not None and spec.model.context is None:
        what = "layers: takes the first layers of a decoder with a key/value cache"
        yield Problem(what=what, where=case.where("model", "layers"), fix="give context:, or take layers: out")


def _components(file: RecipeFile, wanted: Speculative) -> Iterator[Problem]:
    known = file.recipe.components
    for key, name in (("target", wanted.target), ("draft", wanted.draft)):
        where = file.where("speculative", key)
        if name not in known:
            what = f"{said(name)} names no component of this recipe"
            yield Problem(what=what, where=where, fix=did_you_mean(name, known))
        elif known[name].model.context is None:
            what = f"the {key} {said(name)} is no decoder with a key/value cache"
            yield Problem(what=what, where=file.where("components", name, "model"), fix=_CONTEXT)
    if wanted.target == wanted.draft:
        what = f"{said(wanted.draft)} cannot draft for itself"
        yield Problem(what=what, where=file.where("speculative", "draft"), fix="name two components")


def _alone(case: Case, found: Sequence[Unit], wanted: Speculative) -> Problem:
    where = case.where_rule()
    if not found:
        on = case.unit.target + (f" for {case.unit.device}" if case.unit.device else "")
        what = f"the draft has nothing to propose to: {said(wanted.target)} is not built with {on}"
        return Problem(what=what, where=where, fix=f"add that target to {wanted.target}, or take it out here")
    what = f"the draft could propose to any of {', '.join(unit.folder.name for unit in found)}"
    return Problem(what=what, where=where, fix="give the draft's rule and its target's the same name:")


def _pair(file: RecipeFile, case: Case, target: Unit, wanted: Speculative) -> Iterator[Problem]:
    draft, whole = case.unit.spec, target.spec
    ours, theirs = draft.model.context, whole.model.context
    if ours is not None and theirs is not None and ours < theirs:
        what = f"the draft's context of {ours} tokens is shorter than its target's of {theirs}"
        yield Problem(what=what, where=case.where("model", "context"), fix=f"give context: {theirs}")
    once = _once(whole)
    if once is not None and wanted.tokens >= once:
        what = f"the target reads {once} tokens at once: {wanted.tokens} proposals and the token before them are more"
        place = file.where("speculative", "tokens")
        yield Problem(
            what=what, where=place, fix=f"give tokens: {once - 1}, or a larger max" if once > 1 else "give max"
        )
    try:
        difference = _other_words(case.unit, target)
    except EdgebakeError as error:
        yield from moved(error, case.where("model", "path"))
        return
    if difference is not None:
        what = f"draft and target have different tokenizers: {difference}"
        yield Problem(what=what, where=case.where("model", "path"), fix=vocabularies.FIX)


def _once(spec: Component) -> int | None:
    """The most tokens that a call takes; None where the inputs are not those of a decoder, which is told elsewhere."""
    shape = next(iter(next(iter(spec.all_methods.values())).values())).shape if spec.inputs else ()
    size = shape[1] if len(shape) == 2 else None
    return (
        spec.dims[size].max if isinstance(size, str) and size in spec.dims else size if isinstance(size, int) else None
    )


def _other_words(draft: Unit, target: Unit) -> str | None:
    """How the tokenizers differ that lie here as files; those of the hub and of GGUF files are compared when built."""
    files = [_tokenizer(unit) for unit in (draft, target)]
    if None in files or files[0] == files[1]:
        return None
    return next(vocabularies.differences(*(file for file in files if file is not None)), None)


def _tokenizer(unit: Unit) -> Path | None:
    try:
        found = _paths.resolve(unit.spec.model.path, unit.base)
    except RecipeError:  # told by the model's own check
        return None
    file = found / TOKENIZER if isinstance(found, Path) else None
    return file if file is not None and file.is_file() else None
