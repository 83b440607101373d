"""What travels with a language model: tokenizer, chat template, stop tokens, generation defaults; read and checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import RecipeError
from edgebake.types import Language

TOKENIZER = "tokenizer.json"
CONFIG = "config.json"  # describes the weights: kept for lowering, and stays behind
# Files beside the weights that whoever generates text may need.
FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_KEPT = "companions"
_WORDS = ({"role": "user", "content": "Hello"},)


def companions(folder: Path) -> dict[str, Path]:
    """The files of ``folder`` that travel, and its configuration, by name. RecipeError without a tokenizer."""
    found = {name: folder / name for name in (*FILES, CONFIG) if (folder / name).is_file()}
    if TOKENIZER not in found:
        raise RecipeError(
            f"{folder.name!r} has no {TOKENIZER}",
            where="model.path",
            fix="save the model's fast tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        )
    return found


def store(files: Mapping[str, Path], folder: Path, configuration: str = "") -> None:
    """Keep ``files`` in ``folder``, a stage's, for :func:`kept`, :func:`deliver`; ``configuration`` replaces theirs."""
    if files:
        (folder / _KEPT).mkdir()
    for name, path in files.items():
        shutil.copyfile(path, folder / _KEPT / name)
    if configuration and CONFIG in files:
        (folder / _KEPT / CONFIG).write_text(configuration, "utf-8")


def kept(stored: Path) -> Path | None:
    """The folder of what :func:`store` kept in ``stored``; None where it kept nothing."""
    return stored / _KEPT if (stored / _KEPT).is_dir() else None


def deliver(stored: Path, folder: Path) -> tuple[str, ...]:
    """Copy what travels, of all that :func:`store` kept in ``stored``, into ``folder``, an artifact's; the names."""
    files = sorted(file for file in (stored / _KEPT).glob("*") if file.name != CONFIG)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return tuple(file.name for file in files)


def language(folder: Path, config: Any, context: int) -> Language:
    """What ``folder`` says of the text that the network of ``config`` reads and writes.

    RecipeError where tokenizer, stop tokens or chat template do not go with the network.
    """
    words = int(config.get_text_config().vocab_size)
    ids = _token_ids(folder / TOKENIZER)
    refuse_other_words(*max(ids.items(), key=lambda pair: pair[1], default=("", -1)), words)
    bos, stated = ends(folder, config)
    stop = _stop(folder, stated, ids)
    refuse_other_ends((bos, stop), words)
    _refuse_template(folder)
    return Language(context=context, vocabulary=words, bos=bos, stop=stop, tokens=max(ids.values(), default=-1) + 1)


def refuse_other_words(token: str, number: int, words: int) -> None:
    """RecipeError where ``token``, of all with the largest ``number``, is none of the network's ``words``."""
    if number >= words:
        raise RecipeError(
            f"the tokenizer gives {token!r} the number {number}, and the network knows {words} tokens",
            where="model.path",
            fix="put the tokenizer there that the network was trained with",
        )


def ends(folder: Path, config: Any) -> tuple[int | None, tuple[int, ...]]:
    """Tokens that begin and end a text: by the generation defaults in ``folder``, else by ``config``."""
    generation = _json(folder / "generation_config.json")
    bos = _first(generation.get("bos_token_id"), getattr(config, "bos_token_id", None))
    return bos, tuple(_numbers(generation.get("eos_token_id") or getattr(config, "eos_token_id", None)))


def refuse_other_ends(found: tuple[int | None, tuple[int, ...]], words: int) -> None:
    """RecipeError where one of :func:`ends` is none of the network's ``words``."""
    bos, stop = found
    wrong = [number for number in (*stop, *([] if bos is None else [bos])) if not 0 <= number < words]
    if wrong:
        raise RecipeError(
            f"the token {wrong[0]} that begins or ends a text is none of the network's {words}",
            where="model.path",
            fix="correct bos_token_id and eos_token_id in generation_config.json",
        )


def _stop(folder: Path, stated: tuple[int, ...], ids: Mapping[str, int]) -> tuple[int, ...]:
    """``stated``, and the token that the tokenizer itself ends a text with."""
    named = _json(folder / "tokenizer_config.json").get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    found = [*stated]
    if isinstance(named, str) and named in ids:
        found.append(ids[named])
    if not found:
        raise RecipeError(
            "nothing says which token ends a text",
            where="model.path",
            fix="give eos_token_id in generation_config.json",
        )
    return tuple(dict.fromkeys(found))


def _numbers(value: Any) -> Iterable[int]:
    return value if isinstance(value, (list, tuple)) else () if value is None else (int(value),)


def _first(*values: Any) -> int | None:
    return next((int(value) for value in values if value is not None), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        what = f"{path.name} cannot be read: {error}"
        raise RecipeError(what, where="model.path", fix="correct it, or copy the model again") from None
    if not isinstance(found, dict):
        what = f"{path.name} holds no mapping"
        raise RecipeError(what, where="model.path", fix="correct it, or copy the model again")
    return found


def _token_ids(path: Path) -> Mapping[str, int]:
    from tokenizers import Tokenizer

    try:
        found: Mapping[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust binding raises bare Exception
        raise RecipeError(
            f"{path.name} cannot be read: {error}", where="model.path", fix="save the tokenizer again"
        ) from error
    return found


def _refuse_template(folder: Path) -> None:
    """RecipeError where there is a chat template and it does not render a user's word."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        return
    try:
        tokenizer.apply_chat_template(list(_WORDS), tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise RecipeError(
            f"the chat template cannot render a user's word: {error}",
            where="model.path",
            fix="correct chat_template.jinja, or chat_template in tokenizer_config.json",
        ) from error
