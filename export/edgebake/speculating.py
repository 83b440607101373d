"""What comes after a draft's own stages: its artifact proposes tokens to its target's, and both are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgebake import runclient, stages, validate
from edgebake.errors import StageFailed
from edgebake.keys import StageKey, stage_keys
from edgebake.llm import companions, fit_speculative, vocabularies
from edgebake.units import Pair, Unit
from edgebake.workbench import Bench, stored


def run_unit(bench: Bench, unit: Unit) -> None:
    """Do everything that ``unit`` needs and that is not in the store yet."""
    stages.run_unit(bench, unit)
    if unit.pair is not None:
        _speculate(bench, unit, unit.pair, stage_keys(unit, bench.store.file_digest, bench.device(unit.device)))


def _speculate(bench: Bench, unit: Unit, pair: Pair, keys: Mapping[str, StageKey]) -> None:
    """The target's artifact is built where it is not in the store yet; its stages then show as the draft's."""
    beside = replace(bench, emit=lambda kind, **what: bench.emit(kind, **{**what, "unit": unit.id}))

    def write(_folder: Path) -> Mapping[str, Any]:
        target = stage_keys(pair.unit, bench.store.file_digest, bench.device(pair.unit.device))
        recorded = stages.reference(beside, pair.unit, target)
        _, lowered = stages.lower(beside, pair.unit, target)
        _, draft = stages.lower(bench, unit, keys)
        if without := unit.without_run or pair.unit.without_run:
            return {"speculative": {"target": pair.unit.id, "not_measured": without}}
        with bench.stage("speculate", unit):
            ours, theirs = ((entry.folder, entry.meta["lowered"]) for entry in (draft, lowered))
            found = measure(unit.target, ours, theirs, recorded.folder, pair.tokens, inside=True)
        if found.get("tokens_per_step"):
            device = bench.device(unit.device)
            per_step = found["tokens_per_step"]
            found["expected"] = fit_speculative.expected(unit, pair.unit, pair.tokens, per_step, device)
        return {"speculative": {"target": pair.unit.id, **found}}

    stored(bench, unit, "speculate", keys, write)


Artifact = tuple[Path, Mapping[str, Any]]  # folder, and what lowering said of it


def measure(
    kind: str, draft: Artifact, target: Artifact, reference: Path, tokens: int, *, inside: bool = False
) -> dict[str, Any]:
    """``draft`` proposing ``tokens`` at a time to ``target``, artifacts for the target ``kind``.

    ``reference`` is the target's, whose prompts are gone on with. StageFailed where the two have other tokenizers.
    """
    refuse_other_words(draft[0], target[0])
    runner = validate.choose_runner(kind)
    if isinstance(runner, str):
        return {"not_measured": runner}
    entries = [folder / str(lowered["entry"]) for folder, lowered in (draft, target)]
    with runclient.opened(runner[0], entries[1], target[1]["signature"], reference, inside=inside) as client:
        if "not_measured" in client.opened:
            return {"not_measured": f"{runner[0]}: {client.opened['not_measured']}"}
        return client.speculate(runner[0], entries[0], draft[1]["signature"], tokens)


def refuse_other_words(draft: Path, target: Path) -> None:
    """StageFailed where the tokenizers in the two artifacts' folders mean different tokens by a number."""
    files = [folder / companions.TOKENIZER for folder in (draft, target)]
    difference = next(vocabularies.differences(*files), None)
    if difference is not None:
        raise StageFailed(
            f"draft and target have different tokenizers: {difference}", where="speculative", fix=vocabularies.FIX
        )
