"""What an int8 cache costs and saves where it is full: two .pte artifacts of one decoder, float cache and int8.

    python benchmarks/int8_cache.py FLOAT INT8 --tokens 8000

FLOAT, INT8: artifact folders (manifest.json, model.pte, tokenizer.json) of the target executorch-xnnpack, alike but for
``options: {cache: int8}``. Each reads the shipped sentences in a process of its own, in calls as long as it takes, and
goes on greedily. Prints perplexity, SQNR between both sides' logits at every 32nd position and over the last 256,
tokens a second with a nearly empty and with the full cache, and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgebake import signatures
from edgebake.llm import generation
from edgebake.llm.judge import sizes
from edgebake.metrics import sqnr_db
from edgebake.recipe_files import recipes_folder
from edgebake_targets.runners import executorch_runtime

EVERY, LAST, NEW, SHORT = 32, 256, 24, 64  # positions, positions, tokens, tokens


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--inside", type=Path, help="measure one folder, write logits there")
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(inside(asked.folders[0], asked.tokens, asked.inside)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, f"{number}.npy") for number in range(len(asked.folders))]
        told = [apart(folder, asked.tokens, file) for folder, file in zip(asked.folders, files, strict=True)]
        for folder, row in zip(asked.folders, told, strict=True):
            print(folder, json.dumps(row))
        plain, other = (np.load(file, mmap_mode="r") for file in files)
        print(
            f"SQNR {sqnr_db(plain[:-LAST], other[:-LAST]):.1f} dB, last {sqnr_db(plain[-LAST:], other[-LAST:]):.1f} dB"
        )
        print(f"perplexity x{told[1]['perplexity'] / told[0]['perplexity']:.5f}")


def apart(folder: Path, tokens: int, file: Path) -> dict[str, Any]:
    """:func:`inside` in a process of its own."""
    command = [sys.executable, __file__, str(folder), "--tokens", str(tokens), "--inside", str(file)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def inside(folder: Path, tokens: int, file: Path) -> dict[str, Any]:
    """One artifact: what it says of the text, its pace, this process' peak memory in MiB."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    signature = signatures.from_json(manifest["signature"])
    session = executorch_runtime.open(folder / manifest["entry"], signature)
    (method,) = signature.methods

    def step(ids: Any, position: Any) -> Any:
        return session.call(method, {generation.TOKENS: ids, generation.POSITION: position})["logits"]

    text = ids_of(folder)[:tokens]
    once, _ = sizes(signature)
    empty = pace(step, text, SHORT, once)
    session.begin()
    lost, kept = 0.0, []
    begun = time.perf_counter()
    for start in range(0, tokens, once):
        part = text[start : start + once]
        logits = step(np.array([part], np.int64), np.array([start], np.int64))[0]
        lost += losses(logits, text[start + 1 : start + 1 + len(part)])
        kept += [row.copy() for n, row in enumerate(logits, start) if n % EVERY == 0 and n < tokens - LAST]
        kept += [row.copy() for n, row in enumerate(logits, start) if n >= tokens - LAST]
    took = time.perf_counter() - begun
    peak = peak_mib()
    np.save(file, np.stack(kept))
    return {
        "perplexity": float(np.exp(lost / (tokens - 1))),
        "prefill_tokens_per_s": tokens / took,
        "empty_tokens_per_s": empty,
        "full_tokens_per_s": pace(step, text, tokens, once, read=False),
        "peak_rss_mib": peak,
    }


def peak_mib() -> float:
    """Of this process since it began (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10


def ids_of(folder: Path) -> list[int]:
    """The shipped sentences."""
    lines = (recipes_folder() / "samples/sentences.txt").read_text("utf-8").splitlines()
    text = "\n".join(line.split("\t")[1] for line in lines)
    found: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return found


def losses(logits: Any, after: Sequence[int]) -> float:
    """Nats that the tokens ``after`` each row cost, summed."""
    rows = logits[: len(after)].astype(np.float64)
    top = rows.max(-1, keepdims=True)
    return float((top[:, 0] + np.log(np.exp(rows - top).sum(-1)) - rows[np.arange(len(after)), after]).sum())


def pace(step: Callable[[Any, Any], Any], text: Sequence[int], start: int, once: int, *, read: bool = True) -> float:
    """Tokens a second after the first ``start`` of ``text``: the median of NEW single steps."""
    if read:
        generation.read(step, text[:start], once)
    took, token = [], text[start - 1]
    for number in range(NEW):
        begun = time.perf_counter()
        logits = step(np.array([[token]], np.int64), np.array([start + number], np.int64))
        took.append(time.perf_counter() - begun)
        token = int(logits[0, -1].argmax())
    return 1 / float(np.median(took))


if __name__ == "__main__":
    main()
