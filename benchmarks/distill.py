"""How often a draft's next word is its target's, before and after distillation: SmolLM2-135M's first layers.

    python benchmarks/distill.py FOLDER --layers 12 --steps 50

FOLDER: SmolLM2 as transformers keeps it (config.json, tokenizer.json, safetensors). Held text and calibration text are
disjoint parts of the shipped sentences. Prints the shares over the held words, what the step tells, and CPU seconds.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from edgebake.compress import distill
from edgebake.llm import decoder
from edgebake.models import transformers as hugging_face
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.recipe_files import recipes_folder
from edgebake.target import ModuleRequest
from edgebake.types import Assignment

LENGTH, HELD, FIRST = 128, 2048, 8448  # tokens: of a call, held, where calibration begins
INPUTS = {"tokens": {"shape": [1, "seq"], "dtype": "int64"}, "input_pos": {"shape": [1], "dtype": "int64"}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--calls", type=int, default=2)
    asked = parser.parse_args()
    whole = load(asked.folder)
    ids = tokens(asked.folder)
    held, learned = parts(ids[:HELD]), parts(ids[FIRST:])
    wanted = first_words(whole, held)
    plain, draft = shared(whole), shared(whole)
    decoder.first_layers(decoder.configured(plain), asked.layers)

    def run(module: torch.nn.Module) -> None:
        for call in learned:
            module(call, torch.tensor([0]))

    request = ModuleRequest(
        module=draft,
        assignment=Assignment(schemes={}, kinds={}),
        options={"layers": asked.layers, "steps": asked.steps, "calls": asked.calls},
        run_calibration=run,
        tell=print,
    )
    begun = time.process_time()
    draft = distill.apply(request)
    print(f"{time.process_time() - begun:.0f} s of CPU, {torch.get_num_threads()} threads, {len(learned)} calls")
    for name, module in (("untrained", plain), ("distilled", draft)):
        print(f"{name}: {(first_words(module, held) == wanted).float().mean():.1%} of {wanted.numel()} next words")


def load(folder: Path) -> torch.nn.Module:
    """The decoder with a cache of a few calls."""
    model = {"source": "transformers", "path": str(folder), "task": "text-generation", "context": 2 * LENGTH}
    component = Component.model_validate({"model": model, "inputs": INPUTS, "dims": {"seq": {"min": 1, "max": LENGTH}}})
    found = hugging_face.load(LoadRequest(model=component.model, component=component, base=folder))
    return found.methods["forward"]


def tokens(folder: Path) -> list[int]:
    """The shipped sentences."""
    lines = (recipes_folder() / "samples/sentences.txt").read_text("utf-8").splitlines()
    text = "\n".join(line.split("\t")[1] for line in lines)
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


def parts(ids: Sequence[int]) -> list[torch.Tensor]:
    """Whole calls."""
    return [torch.tensor([ids[at : at + LENGTH]]) for at in range(0, len(ids) - LENGTH + 1, LENGTH)]


def shared(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares its tensors."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def first_words(module: torch.nn.Module, calls: Sequence[torch.Tensor]) -> torch.Tensor:
    """The likeliest next word at each position."""
    with torch.no_grad():
        return torch.cat([module(call, torch.tensor([0]))[0][0].argmax(-1) for call in calls])


if __name__ == "__main__":
    main()
