"""MiniLM to a dynamically quantised ONNX file with optimum-onnx, run on the same 512 sentences; started by rivals.py.

Runs in an environment of its own: optimum-onnx needs another transformers than edgebake.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from tokenizers import Tokenizer
from transformers import AutoModel

SKIP, COUNT, SHORTEST, LONGEST = 128, 512, 8, 128


def samples(folder: Path, sentences: Path) -> list[dict[str, Any]]:
    """Inputs of each sentence, as edgebake's recipe takes them."""
    lines = [line.rpartition("\t")[2] for line in sentences.read_text().splitlines() if line.strip()]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=LONGEST)
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(lines[SKIP : SKIP + COUNT])
    for one in encoded:
        one.pad(SHORTEST, pad_id=0, pad_token="[PAD]")
    return [
        {
            "input_ids": np.array([one.ids]),
            "attention_mask": np.array([one.attention_mask]),
            "token_type_ids": np.array([one.type_ids]),
        }
        for one in encoded
    ]


def pooled(tokens: Any, mask: Any) -> Any:
    """Mean over the visible tokens, normalised."""
    kept = mask[:, :, None]
    vector = (tokens * kept).sum(1) / kept.sum(1)
    return vector / np.linalg.norm(vector, axis=1, keepdims=True)


def main() -> None:
    """Export, quantise, run, compare; one JSON object on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    ORTModelForFeatureExtraction.from_pretrained(options.model, export=True).save_pretrained(options.out / "float")
    quantizer = ORTQuantizer.from_pretrained(options.out / "float", file_name="model.onnx")
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer.quantize(save_dir=options.out / "int8", quantization_config=config)
    file = next((options.out / "int8").glob("*.onnx"))

    model = AutoModel.from_pretrained(options.model, add_pooling_layer=False).eval()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    wanted = {given.name for given in session.get_inputs()}
    floats, artifact = [], []
    with torch.inference_mode():
        for inputs in samples(options.model, options.sentences):
            seen = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).last_hidden_state
            floats.append(pooled(seen.numpy(), inputs["attention_mask"]))
            given = {name: value for name, value in inputs.items() if name in wanted}
            artifact.append(pooled(session.run(None, given)[0], inputs["attention_mask"]))
    r, a = (np.concatenate(v).astype(np.float64).ravel() for v in (floats, artifact))
    found = {
        "bytes": file.stat().st_size,
        "sqnr_db": 10 * float(np.log10((r @ r) / ((r - a) @ (r - a)))),
        "cosine": float(r @ a / np.sqrt((r @ r) * (a @ a))),
    }
    (options.out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
