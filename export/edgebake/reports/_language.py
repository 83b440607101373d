"""What reports say of a language model's text, beside its row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgebake.reports._text import counted, decibels, number, percent


def cell(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Agreement of decisions and what happens to the perplexity; empty where nothing was held against a float model."""
    language = found.get("language") or {}
    if "perplexity" not in language:
        return ()
    ratio = language["perplexity"]["ratio"]
    return (f"top1 {percent(language['top1']['value'])}", f"ppl ×{ratio:.4f}" if ratio else "ppl -")


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of each line below the row."""
    yield from _text(found)
    yield from _draft(found.get("speculative") or {})


def _draft(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a draft does for its target: acceptance, whose text it is, speed on the device and here."""
    if not found:
        return
    if found.get("not_measured"):
        yield "draft", f"for {found['target']}: {found['not_measured']}"
        return
    same = found["identical"]
    ties = f", {counted(same['near_ties'], 'near-tie')} apart" if same["near_ties"] else ""
    yield (
        "draft",
        f"for {found['target']}: {percent(found['acceptance'])} of tested proposals accepted, "
        f"{number(found['tokens_per_step'], 3)} tokens a step of the target ({found['tokens']} proposed at a time, "
        f"{counted(found['prompts'], 'prompt')}); the target's own text in {same['same']} of {same['texts']}{ties}",
    )
    yield "speed-up", "; ".join((*_expected(found.get("expected") or {}), *_here(found["here"])))


def _expected(found: Mapping[str, Any]) -> Iterator[str]:
    if not found:  # of a verification, which knows artifacts and no recipe
        return
    if "empty" not in found:
        yield f"not predicted: {found['reason']}"
        return
    empty, full = found["empty"], found["full"]
    where = f" on {found['device']}" if found["device"] else " where memory bounds decoding"
    told = f"predicted ×{empty['speedup']:.2f}{where}, ×{full['speedup']:.2f} with a full cache"
    if "tokens_per_s" in empty:
        told += f" (at most {empty['alone_tokens_per_s']:.0f} to {empty['tokens_per_s']:.0f} tokens/s)"
    yield told


def _here(found: Mapping[str, Any]) -> Iterator[str]:
    alone, together = found["alone_tokens_per_s"], found["tokens_per_s"]
    if alone and together:
        yield f"here ×{together / alone:.2f}: {together:.1f} tokens/s, {alone:.1f} without it"


def _text(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    language = found.get("language") or {}
    if not language:
        return
    again = f"token by token against at once: {decibels(language['stepwise']['sqnr_db'])}"
    if "perplexity" not in language:
        yield "alone", again
    else:
        yield from _against_float(language, again)
        yield from _positions(language)
    if language.get("unknown"):
        count = counted(language["unknown"], "token")
        yield (
            "padding",
            f"generates {count} that the tokenizer has no word for: whoever decodes its text must skip them",
        )
    speed = language["speed"]
    if speed["decode_tokens_per_s"] is not None:
        yield (
            "pace",
            f"{speed['decode_tokens_per_s']:.1f} tokens/s, {speed['first_token_ms']:.0f} ms to the first after a short "
            "prompt, here",
        )


def _positions(language: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The text by ranges of positions, where there are several."""
    ranges = language.get("positions") or []
    if len(ranges) > 1:
        told = (
            f"{each['from']} to {each['to']}: KL {number(each['kl'], 3)}, top-1 {percent(each['top1'])}"
            for each in ranges
        )
        yield "positions", "; ".join(told)


def _against_float(language: Mapping[str, Any], again: str) -> Iterator[tuple[str, str]]:
    perplexity, top1, generated = language["perplexity"], language["top1"], language["generated"]
    between = [number(perplexity[side], 5) for side in ("low", "high")]
    yield (
        "text",
        f"perplexity {number(perplexity['artifact'], 5)}, float {number(perplexity['float'], 5)} "
        f"(ratio {' to '.join(between)}) on {counted(language['words'], 'token')}; "
        f"KL {number(language['kl'], 3)} nats; "
        f"top-5 {percent(language['top5'])}; {counted(top1['near_ties'], 'near-tie')} left out of top-1",
    )
    if generated["value"] is not None:
        yield (
            "generates",
            f"as the float model does for {generated['mean_length']:.1f} of {generated['new_words']} tokens "
            f"({generated['whole']} of {counted(generated['prompts'], 'prompt')} to the end); {again}",
        )
