"""Meta's ``tokenizer.model`` of Llama 3 (tiktoken's format) as the files that transformers and runtimes read."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from edgebake.errors import RecipeError
from edgebake.llm.companions import FILES, TOKENIZER
from edgebake.models._meta_params import WORDS, Params

SPECIAL = 256  # tokens behind those of the file
_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
# How Meta's reference code writes a dialogue.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def special_tokens() -> list[str]:
    """All of them in their order; those without a name of their own are numbered among themselves."""
    made, reserved = [], 0
    for number in range(SPECIAL):
        made.append(_NAMED.get(number, f"<|reserved_special_token_{reserved}|>"))
        reserved += number not in _NAMED
    return made


def write(source: Path, folder: Path, params: Params) -> None:
    """Put tokenizer, chat template and generation defaults of the checkpoint ``source`` into ``folder``.

    Files that lie beside the checkpoint under transformers' names are taken as they are. RecipeError where
    ``tokenizer.model`` is damaged or does not go with ``params``.
    """
    if (source / TOKENIZER).is_file():
        for name in FILES:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
        return
    ranks = _ranks(source / WORDS)
    if len(ranks) + SPECIAL != params.vocab_size:
        raise RecipeError(
            f"{WORDS} has {len(ranks)} tokens and {SPECIAL} special ones follow, but the network knows "
            f"{params.vocab_size}",
            where="model.path",
            fix="put the tokenizer there that the network was trained with",
        )
    _tokenizer(ranks).save(str(folder / TOKENIZER))
    bos, eot = _NAMED[0], _NAMED[9]
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eot}
    _put(folder / "tokenizer_config.json", {**about, "chat_template": _TEMPLATE})
    ids = {"bos_token_id": len(ranks), "eos_token_id": [len(ranks) + n for n in (1, 8, 9)]}
    _put(folder / "generation_config.json", ids)


def _put(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _ranks(file: Path) -> dict[bytes, int]:
    """Tokens by their bytes: a line each, base64 and the number, which counts from 0."""
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                token, number = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(number)
    except (ValueError, binascii.Error) as error:
        raise RecipeError(
            f"line {len(ranks) + 1} of {file.name} is no base64 token with its number: {error}",
            where="model.path",
            fix="copy the file again; other formats than tiktoken's need a tokenizer.json beside the checkpoint",
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise RecipeError(
            f"the numbers of {file.name} do not count from 0 to {len(ranks) - 1}",
            where="model.path",
            fix="copy the file again",
        )
    return ranks


def _tokenizer(ranks: dict[bytes, int]) -> Any:
    """The fast tokenizer: merges follow from the ranks, the pattern of words is transformers' for Llama 3."""
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):  # type: ignore[misc]  # transformers is untyped here
        """Takes the ranks that were read: transformers would want tiktoken for it."""

        @staticmethod
        def load_tiktoken_bpe(_tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    made: Any = Converter(vocab_file=WORDS, extra_special_tokens=special_tokens()).converted()
    bos = _NAMED[0]
    begins = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, len(ranks))]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    return made
