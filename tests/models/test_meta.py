"""Checkpoints as Meta publishes them: what Meta's code computes, of the very integers, or a clear refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import meta_checkpoints as checkpoints
from edgebake import lattice
from edgebake.check import check
from edgebake.errors import RecipeError
from edgebake.models import _low_rank, meta
from edgebake.recipe_yaml import read as read_recipe

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
IDS = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(1))


def decibels(wanted: torch.Tensor, got: torch.Tensor) -> float:
    noise = float((wanted.double() - got.double()).square().sum())
    return 10 * math.log10(float(wanted.double().square().sum()) / noise) if noise else math.inf


def meta_logits(state: dict[str, torch.Tensor], *, rotated: bool) -> torch.Tensor:
    """What ExecuTorch's copy of Meta's transformer computes with the float weights ``state``."""
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs
    from executorch.examples.models.llama.source_transformation import spin_quant

    args = ModelArgs(
        **checkpoints.PARAMS, max_seq_len=64, max_context_len=64, generate_full_logits=True, rope_scale_factor=32
    )
    network = construct_transformer(args)
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    if rotated:
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers the Hadamard transform

        network = spin_quant.inject_fast_hadamard_transform_native_for_spin_quant(network)
    with torch.no_grad():
        return network.eval()(IDS)


def logits(folder: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return checkpoints.loaded(folder, **options).methods["forward"](IDS)[0]


@pytest.mark.parametrize("kind", ["float", "spinquant", "qlora"])
def test_the_network_is_the_one_that_metas_code_computes(kind: str, tmp_path: Path) -> None:
    state = checkpoints.write(tmp_path / "model", kind)
    wanted = meta_logits(checkpoints.dequantised(state), rotated=kind == "spinquant")
    assert decibels(wanted, logits(tmp_path / "model")) > 100
    if kind == "qlora":
        assert decibels(wanted, logits(tmp_path / "model", adapters="merge")) > 100
    if kind == "spinquant":  # without its rotation it is another network
        assert decibels(wanted, meta_logits(checkpoints.dequantised(state), rotated=False)) < 10


def test_a_checkpoint_without_a_head_shares_the_embedding(tmp_path: Path) -> None:
    state = checkpoints.write(tmp_path / "model", head=False)
    network = checkpoints.loaded(tmp_path / "model").methods["forward"].wrapped
    assert network.lm_head.weight is network.model.embed_tokens.weight
    full = checkpoints.dequantised(state)
    wanted = meta_logits({**full, "output.weight": full["tok_embeddings.weight"]}, rotated=True)
    assert decibels(wanted, logits(tmp_path / "model")) > 100


def test_weights_are_the_integers_times_their_scales_bit_for_bit(tmp_path: Path) -> None:
    state = checkpoints.write(tmp_path / "model", "qlora")
    network = checkpoints.loaded(tmp_path / "model").methods["forward"].wrapped
    for own, name in (("feed_forward.w2", "mlp.down_proj"), ("attention.wv", "self_attn.v_proj")):
        weight = network.get_submodule(f"model.layers.1.{name}").weight.detach()
        q, scale, found = lattice.integers(weight.reshape(-1, checkpoints.GROUP).numpy(), 4)
        assert found.all()
        wanted = state[f"layers.1.{own}.weight"].reshape(q.shape)
        assert torch.equal(torch.from_numpy(q), wanted)  # each group has its largest integer, so no other scale fits
        assert torch.allclose(torch.from_numpy(scale), state[f"layers.1.{own}.scales"].reshape(-1), rtol=2**-22)
    q, _, found = lattice.integers(network.lm_head.weight.detach().numpy(), 8)
    assert found.all() and torch.equal(torch.from_numpy(q), state["output.weight"])
    assert int(q.min()) == -128


def test_queries_and_keys_change_the_order_of_their_rows_with_their_scales(tmp_path: Path) -> None:
    state = checkpoints.write(tmp_path / "model", "qlora")
    layer = checkpoints.loaded(tmp_path / "model").methods["forward"].wrapped.model.layers[0].self_attn
    head, half = checkpoints.DIM // checkpoints.HEADS, checkpoints.DIM // checkpoints.HEADS // 2
    full = checkpoints.dequantised({k: v for k, v in state.items() if ".adaptor." not in k})
    for own, got in (("wq", layer.q_proj), ("wk", layer.k_proj)):
        weight = full[f"layers.0.attention.{own}.weight"]
        for row in (1, half + 3, head + 2, len(weight) - 1):
            place, inside = divmod(row, head)
            assert torch.equal(got.weight[row], weight[place * head + 2 * (inside % half) + inside // half])


def test_the_rotation_is_executorchs_own_hadamard_transform() -> None:
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    wanted = torch.ops.llama.fast_hadamard_transform(x)
    assert decibels(wanted, _low_rank.rotation(128)(x)) > 120
    assert decibels(x, _low_rank.rotation(128)(wanted)) > 120


def test_an_adapter_adds_what_its_two_matrices_make_of_the_input() -> None:
    linear = torch.nn.Linear(6, 4)
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    made, x = _low_rank.adapt(linear, a, b), torch.randn(3, 6)
    assert torch.allclose(made(x), linear(x) + x @ (b @ a).T, atol=1e-5)
    assert isinstance(made, torch.nn.Linear) and made.weight is linear.weight and not hasattr(linear, "adapter")


def test_tokenizer_template_and_stop_tokens_come_from_metas_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoints.write(tmp_path / "model")
    found = checkpoints.loaded(tmp_path / "model", context=32)
    language = found.signature.language
    assert language is not None
    assert (language.bos, language.stop, language.vocabulary) == (256, (257, 264, 265), 512)
    assert found.facts["checkpoint"] == "int4 in groups of 32, embedding and head int8 by row, rotated before down_proj"
    kept: dict[str, Path] = {}

    def keep(key: str, fill: Any) -> Path:
        if key not in kept:
            kept[key] = tmp_path / "kept"
            kept[key].mkdir()
            fill(kept[key])
        return kept[key]

    asked = checkpoints.request(tmp_path / "model", context=32)
    asked = type(asked)(model=asked.model, component=asked.component, base=asked.base, keep=keep)
    folder = meta.tokenizer(asked)
    assert folder is not None and meta.load(asked).signature == found.signature
    assert list(kept) == list(meta.conversions(asked.model, asked.base))
    words = AutoTokenizer.from_pretrained(folder)
    assert words("h\u00e9").input_ids == [256, *"h\u00e9".encode()]
    assert words.decode([104, *"\u00e9".encode()]) == "h\u00e9"
    said = words.apply_chat_template([{"role": "user", "content": " Hi "}], tokenize=False, add_generation_prompt=True)
    assert said == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert words.convert_tokens_to_ids("<|reserved_special_token_246|>") == 511


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        checkpoints.loaded(folder, **options)
    return str(caught.value)


def changed(folder: Path, **tensors: Any) -> Path:
    """A checkpoint some of whose tensors are others, or are gone (None)."""
    state: dict[str, Any] = checkpoints.write(folder, tensors.pop("kind", "spinquant"))
    state |= {name.replace("__", "."): value for name, value in tensors.items()}
    checkpoints.save(folder, {name: value for name, value in state.items() if value is not None})
    return folder


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model")
    assert f"'{tmp_path}/model/params.json' is no folder" in refusal(tmp_path / "model" / "params.json")
    (tmp_path / "empty").mkdir()
    assert "has no params.json and no consolidated.00.pth" in refusal(tmp_path / "empty")
    (tmp_path / "model" / "consolidated.01.pth").write_bytes(b"")
    assert "its weights in 2 parts (consolidated.01.pth)" in refusal(tmp_path / "model")
    (tmp_path / "model" / "consolidated.01.pth").unlink()
    (tmp_path / "model" / "tokenizer.model").unlink()
    assert "has no tokenizer.model" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"n_heads": None}, "params.json of 'model': n_heads: Field required"),
        ({"dim": "64"}, "params.json of 'model': dim: Input should be a valid integer"),
        ({"n_heads": 5}, "5 heads and 2 key/value heads do not divide 64 values evenly"),
        (
            {"quantization_args": {"scheme": "fp8", "group_size": 32}},
            "quantization_args.scheme: Input should be 'int4_w",
        ),
        ({"quantization_args": None}, "holds integers, and params.json has no quantization_args"),
        (
            {"quantization_args": checkpoints.QUANTISED},
            "does not say whether SpinQuant's rotation stands before down_proj",
        ),
        ({"quantization_args": {"group_size": 64, "spinquant": True}}, "which are no groups of 64"),
        ({"hidden_dim": 192}, "a rotation of 192 values is asked for, and only powers of two are known"),
        ({"dim": 128}, "tok_embeddings.weight is (512, 64), and params.json wants (512, 128)"),
        ({"n_layers": 3}, "the checkpoint has no layers.2.attention.wq.weight, layers.2.attention.wk.weight"),
        ({"n_layers": 1}, "the network has no place for layers.1.attention.wk.scales"),
    ],
)
def test_parameters_that_do_not_go_with_the_checkpoint_are_refused(
    params: dict[str, Any], said: str, tmp_path: Path
) -> None:
    checkpoints.write(tmp_path / "model", **params)
    assert said in refusal(tmp_path / "model")


def test_tensors_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    wq = "layers__0__attention__wq"
    cases: list[tuple[dict[str, Any], str]] = [
        ({f"{wq}__scales": None}, "layers.0.attention.wq.weight holds torch.int8 and has no scales"),
        ({f"{wq}__weight": torch.full((64, 64), 9, dtype=torch.int8)}, "holds integers beyond -8 .. 7"),
        ({f"{wq}__zeros": torch.ones(64, 2)}, "layers.0.attention.wq has zero points that are not zero"),
        ({f"{wq}__adaptor__A__weight": torch.ones(4, 64)}, "has an adapter, and params.json has no lora_args"),
        ({f"{wq}__adaptor__A__weight": torch.ones(3, 64), "kind": "qlora"}, "A.weight is (3, 64), not (4, 64) as lora"),
        ({f"{wq}__adaptor__B__weight": None, "kind": "qlora"}, "adaptor.B.weight is absent, not (64, 4)"),
    ]
    for number, (tensors, said) in enumerate(cases):
        assert said in refusal(changed(tmp_path / str(number), **tensors))


def test_files_that_are_damaged_or_hold_code_are_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model")
    file = tmp_path / "model" / "consolidated.00.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "consolidated.00.pth cannot be read" in refusal(tmp_path / "model")
    torch.save({"tok_embeddings.weight": Path("code")}, file)
    assert "consolidated.00.pth holds more than tensors, or is damaged" in refusal(tmp_path / "model")
    torch.save([torch.ones(2)], file)
    assert "consolidated.00.pth is no table of tensors" in refusal(tmp_path / "model")
    (tmp_path / "model" / "params.json").write_text("{")
    assert "params.json of 'model' cannot be read" in refusal(tmp_path / "model")


def test_words_that_are_damaged_are_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model")
    words = tmp_path / "model" / "tokenizer.model"
    text = words.read_text()
    words.write_text(text.replace("\n", "\n?? 9\n", 1))
    assert "line 2 of tokenizer.model is no base64 token with its number" in refusal(tmp_path / "model")
    words.write_text(text.replace(" 9\n", " 700\n"))
    assert "the numbers of tokenizer.model do not count from 0 to 255" in refusal(tmp_path / "model")
    words.write_text("".join(line for line in text.splitlines(keepends=True) if not line.endswith(" 255\n")))
    assert "tokenizer.model has 255 tokens and 256 special ones follow, but the network knows 512" in refusal(
        tmp_path / "model"
    )


def test_options_that_say_something_else_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    checkpoints.write(folder)
    assert "the source meta has no option 'adapter'" in refusal(folder, adapter="keep")
    assert "adapters is 'no'" in refusal(folder, adapters="no")
    assert "params.json says spin_quant: true, the recipe false" in refusal(folder, spin_quant=False)
    params = json.loads((folder / "params.json").read_text())
    del params["quantization_args"]["spinquant"]
    (folder / "params.json").write_text(json.dumps(params))
    assert torch.isfinite(logits(folder, spin_quant=True)).all()


def told(folder: Path, **model: Any) -> list[str]:
    """What a check says of a recipe of the checkpoint in ``folder``/model."""
    given = checkpoints.component(Path("model"), context=64)
    content = {"name": "published", **given, "model": {**given["model"], **model}, "targets": ["executorch-xnnpack"]}
    (folder / "published.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    try:
        check([read_recipe(str(folder / "published.yaml"))], trust=False)
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_a_recipe_is_refused_with_its_line_before_a_weight_is_read(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "model")
    (tmp_path / "model" / "consolidated.00.pth").write_bytes(b"no weights, which a check does not read")
    assert not told(tmp_path)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"path": "gone/here.pth"}, "published.yaml:4:model.path: there is no "),
        ({"options": {"adapters": "no"}}, "published.yaml:5:model.options: adapters is 'no'"),
        ({"weights": "random"}, "model.weights: 'model' brings its weights: they cannot be random"),
        (
            {"task": "fill-mask"},
            "model.task: the source meta reads decoders that generate text, the task is 'fill-mask'",
        ),
        ({"revision": "main"}, "the source meta does not look at revision:"),
    ]
    for model, said in cases:
        assert any(said in line for line in told(tmp_path, **model)), (said, told(tmp_path, **model))
    (tmp_path / "model" / "params.json").write_text('{"dim": 64}')
    assert any("params.json of 'model': n_layers: Field required" in line for line in told(tmp_path))


def test_sizes_are_predicted_from_params_json(tmp_path: Path) -> None:
    from edgebake.llm.fit_shape import decoder_of
    from edgebake.models import _meta_params

    state = checkpoints.write(tmp_path / "model")
    params = _meta_params.read(tmp_path / "model")
    found = decoder_of(_meta_params.configuration(params, tied=False))
    values = sum(tensor.numel() for name, tensor in state.items() if name.endswith(".weight"))
    assert sum(weight.values for weight in found.weights) == values
    # Llama 3.2 1B and 3B, as their params.json have it
    assert params.model_copy(update={"dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256}).inner == 8192
    assert params.model_copy(update={"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256}).inner == 8192
