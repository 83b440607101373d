"""A decoder of a few thousand weights in a folder as transformers keeps it, with a tokenizer that knows its letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgebake.types import Loaded

WORDS, CONTEXT, ONCE = 96, 64, 16
BOS, EOS = 1, 2
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file without tensors
INPUTS = {"tokens": {"shape": [1, "seq"], "dtype": "int64"}, "input_pos": {"shape": [1], "dtype": "int64"}}


def save(folder: Path, kind: str = "llama", template: str = TEMPLATE, **config: Any) -> Path:
    """Write a decoder of the family ``kind`` with seeded weights and its tokenizer into ``folder``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **config}))
    for name, weight in network.named_parameters():
        if weight.dim() > 1:  # transformers' 0.02 would leave every logit alike
            torch.nn.init.normal_(weight, std=0.6 if "embed" in name else 0.2)
    network.save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def save_tokenizer(folder: Path, template: str = TEMPLATE, letters: int = WORDS - 3) -> None:
    """Bytes as tokens, the last ones left out where ``letters`` are fewer; three special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = [chr(code) for code in range(33, 127)]
    alphabet = ["Ġ", "Ċ", *printable][:letters]
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": template}))


def loaded(folder: Path) -> Loaded:
    """The decoder in ``folder`` as the source ``transformers`` loads it for :func:`component`."""
    from edgebake.models import transformers as hugging_face
    from edgebake.models._request import LoadRequest
    from edgebake.recipe import Component

    asked = Component.model_validate(component(folder))
    return hugging_face.load(LoadRequest(model=asked.model, component=asked, base=folder))


def component(folder: Path, **more: Any) -> dict[str, Any]:
    """What a recipe says of the decoder in ``folder``; ``more`` replaces keys."""
    return {
        "model": {"source": "transformers", "path": str(folder), "task": "text-generation", "context": CONTEXT},
        "inputs": INPUTS,
        "dims": {"seq": {"min": 1, "max": ONCE}},
        **more,
    }
