"""The Core ML target: what is stored is what was asked for, the same bytes come out twice, and damage is seen."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgebake.errors import RecipeError, StageFailed
from edgebake.target import LowerRequest
from edgebake.trace import trace
from edgebake.types import (
    Assignment,
    DimBounds,
    Loaded,
    Lowered,
    MethodSignature,
    ModuleKind,
    Signature,
    TensorSpec,
    Traced,
    Verdict,
)
from edgebake_targets import _coreml, _coreml_compress, coreml
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package, payload_of
from edgebake_targets._coreml_weights import float_weights
from edgebake_targets.inspectors import mlpackage

KINDS: dict[str, ModuleKind] = {"embed": "embedding", "conv": "conv", "up": "conv", "first": "linear", "last": "linear"}


class Network(nn.Module):
    """An embedding, a convolution and a transposed one with batch normalisation, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.conv, self.norm = nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.up, self.up_norm = nn.ConvTranspose1d(32, 24, 3, padding=1), nn.BatchNorm1d(24)
        self.first, self.last = nn.Linear(24, 16), nn.Linear(16, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids: (1, sequence)."""
        x = self.embed(ids).transpose(1, 2)
        x = torch.relu(self.norm(self.conv(x)))
        hidden = self.first(self.up_norm(self.up(x)).transpose(1, 2))
        return hidden, self.last(torch.relu(hidden))


class Wrapper(nn.Module):
    """As models/ wraps a network."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tuple whatever the network returns."""
        out = self.wrapped(x)
        return out if isinstance(out, tuple) else (out,)


def network() -> Network:
    torch.manual_seed(0)
    net = Network()
    for norm in (net.norm, net.up_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        net.last.weight[3] = 0  # a dead channel: its scale would be 0 / 127
    return net.eval()


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def traced_of(net: nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec], **dims: DimBounds) -> Traced:
    method = MethodSignature(inputs=tuple(inputs), outputs=tuple(outputs))
    signature = Signature(methods={"forward": method}, dims=dims)
    return trace(Loaded(methods={"forward": Wrapper(net).eval()}, signature=signature, facts={}))


@pytest.fixture(scope="module")
def traced() -> Traced:
    outputs = [spec("hidden", 1, "seq", 16), spec("logits", 1, "seq", 20)]
    return traced_of(network(), [spec("ids", 1, "seq", dtype="int64")], outputs, seq=DimBounds(min=4, max=64))


def ask(
    folder: Path, schemes: Mapping[str, str], scheme: str = "fp16", system: str = "iOS17", precision: str = "auto"
) -> LowerRequest:
    folder.mkdir(parents=True, exist_ok=True)
    return LowerRequest(
        unit="test",
        scheme=scheme,
        assignment=Assignment(schemes=schemes, kinds=dict.fromkeys(schemes, "linear")),
        options={"minimum_os": system, "compute_precision": precision},
        device=None,
        calibration=None,
        folder=folder,
    )


def everywhere(scheme: str) -> dict[str, str]:
    return dict.fromkeys(KINDS, scheme)


def verdicts(folder: Path, lowered: Lowered) -> dict[str, Verdict]:
    found = coreml.structure(folder / lowered.entry, lowered.signature, coreml.read_checks(folder))
    return {verdict.limit: verdict for verdict in found}


def formats(package: Path) -> dict[str, str]:
    return {record.name: record.dtype for record in mlpackage.inspect(package).weights}


FORMATS = {"w8": "int8", "fp16": "float16", "fp32": "float32"}


@pytest.mark.parametrize(
    ("scheme", "system"),
    [
        *[("fp32", "iOS15"), ("fp16", "iOS17"), ("w8", "iOS17"), ("w8", "iOS18"), ("palette4", "iOS16")],
        *[("palette6", "iOS17"), ("palette6", "iOS18"), ("palette8", "iOS18")],
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
    with _coreml.quiet():
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
    weights = {
        w.module: w.values
        for w in float_weights(traced.programs["forward"], Assignment(schemes=everywhere("w8"), kinds=KINDS))
    }
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
    decoded = decode(package, constants(package)["weight_w8"])
    exact = net[0].weight.detach().numpy()  # type: ignore[union-attr]
    assert np.abs(decoded - exact).max() <= np.abs(exact).max() / 250


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("count", [4_000, 40_000])
def test_a_palette_is_close_to_the_best_one(bits: int, count: int) -> None:
    with _coreml.quiet():
        from coremltools._deps import kmeans1d

    rng = np.random.default_rng(bits)
    values = np.concatenate([rng.standard_normal(count), 6 * rng.standard_normal(40)]).astype(np.float32)[:, None]
    indices, table = _coreml_compress.palettise(values, bits, np.float32)
    assert (np.diff(table) >= 0).all()
    ours = np.square(table[indices] - values).sum()
    best = np.asarray(kmeans1d.cluster(values.ravel().tolist(), 2**bits).centroids)
    theirs = np.square(np.abs(values - best[None]).min(axis=1)).sum()
    assert ours <= 1.15 * theirs
    nearest = np.abs(values[:, :, None] - table).argmin(axis=2)
    assert np.array_equal(np.abs(table[nearest] - values), np.abs(table[indices] - values))


def test_a_weight_with_few_values_is_kept_exactly_by_a_palette() -> None:
    values = np.array([[0.5, -0.25, 0.0], [0.5, 1.0, -0.0]], np.float32)
    indices, table = _coreml_compress.palettise(values, 4, np.float16)
    assert table.shape == (16,)
    assert np.array_equal(table[indices].astype(np.float32), values)


def test_a_histogram_is_ascending_for_weights_of_any_size() -> None:
    values = np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)
    points, counts = _coreml_compress._histogram(values)
    assert (np.diff(points) > 0).all()
    assert counts.sum() == values.size


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_coreml as t
from edgebake_targets import coreml
from edgebake.types import DimBounds
if {warm}:
    warm = t.traced_of(t.nn.Linear(4, 4), [t.spec("x", 1, 4)], [t.spec("y", 1, 4)])
    coreml.lower(warm, t.ask(Path({folder!r}) / "warm", {{"": "w8"}}, "w8"))
net = t.traced_of(t.network(), [t.spec("ids", 1, "seq", dtype="int64")],
                  [t.spec("hidden", 1, "seq", 16), t.spec("logits", 1, "seq", 20)], seq=DimBounds(min=4, max=64))
coreml.lower(net, t.ask(Path({folder!r}), {{**t.everywhere("w8"), "first": "palette6", "last": "fp32"}}, "w8"))
"""


def test_two_processes_and_two_folders_give_the_same_bytes(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parents[1] / "export"), str(here.parents[1] / "targets")]
    files = []
    for number, folder in enumerate((tmp_path / "one", tmp_path / "deeper" / "two")):
        folder.mkdir(parents=True)
        script = SCRIPT.format(paths=paths, folder=str(folder), warm=bool(number))
        environment = {"PYTHONHASHSEED": str(number + 1), "PATH": "/usr/bin", "HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=folder, capture_output=True)
        paths_here = sorted(p for p in folder.rglob("*") if p.is_file() and "warm" not in p.parts)
        files.append({p.relative_to(folder).as_posix(): p.read_bytes() for p in paths_here})
    assert sorted(files[0]) == [
        "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
        "model.mlpackage/Manifest.json",
        "weights.check.json",
    ]
    assert files[0] == files[1]
    for content in files[0].values():
        assert str(here).encode() not in content
        assert str(tmp_path).encode() not in content
        assert b"wrapped" not in content.replace(b"_wrapped_", b"")


def damaged(folder: Path, lowered: Lowered, constant: str, part: str, change: Any) -> None:
    """Overwrite one stored part of a constant in the weight file."""
    package = open_package(folder / lowered.entry)
    payload = payload_of(package, constants(package)[constant].parts[part])
    assert payload.key is not None
    values = np.frombuffer(bytearray(payload.data), np.dtype(payload.dtype)).copy()
    change(values)
    blob = package.blobs[payload.key[0]]
    start = bytes(blob).index(bytes(payload.data), payload.key[1])
    file = folder / lowered.entry / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(file.read_bytes())
    content[start : start + len(payload.data)] = values.tobytes()
    file.write_bytes(content)


def double_one(values: np.ndarray[Any, Any]) -> None:
    values[len(values) // 3] *= 2


@pytest.mark.parametrize(
    ("scheme", "system", "part"),
    [
        ("w8", "iOS17", "scale"),
        ("w8", "iOS18", "scale"),
        ("palette6", "iOS17", "lut"),
        ("palette4", "iOS18", "lut"),
        ("fp16", "iOS17", "val"),
    ],
)
def test_one_damaged_scale_or_table_entry_fails_the_check(
    traced: Traced, tmp_path: Path, scheme: str, system: str, part: str
) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, everywhere(scheme), scheme, system))
    damaged(tmp_path, lowered, f"embed_weight_{scheme}", part, double_one)
    found = verdicts(tmp_path, lowered)
    assert found["structure.loads"].state == "pass"
    assert found["structure.weights"].state == "fail"
    assert "embed" in found["structure.weights"].reason


def test_a_truncated_weight_file_does_not_load(traced: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, everywhere("w8"), "w8"))
    file = tmp_path / lowered.entry / "Data/com.apple.CoreML/weights/weight.bin"
    file.write_bytes(file.read_bytes()[:200])
    found = verdicts(tmp_path, lowered)
    assert found["structure.loads"].state == "fail"
    assert found["structure.weights"].state == "not measured"


def test_other_inputs_and_outputs_than_promised_fail(traced: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(traced, ask(tmp_path, {}, "fp16"))
    inputs, outputs = (
        (spec("ids", 1, "seq", dtype="int64"),),
        (spec("hidden", 1, "seq", 17), spec("scores", 1, "seq", 20)),
    )
    promised = Signature(
        methods={"forward": MethodSignature(inputs=inputs, outputs=outputs)}, dims=lowered.signature.dims
    )
    found = {v.limit: v for v in coreml.structure(tmp_path / lowered.entry, promised, coreml.read_checks(tmp_path))}
    assert found["structure.inputs"].state == "fail"
    assert "int32 1x4..64, not int64" in found["structure.inputs"].reason
    assert found["structure.outputs"].state == "fail"
    assert "hidden is float32" in found["structure.outputs"].reason
    assert "scores is not there" in found["structure.outputs"].reason
    assert found["structure.weights"].state == "not measured"


def test_a_module_that_the_program_does_not_use_is_named(traced: Traced, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"weight of nowhere"):
        coreml.lower(traced, ask(tmp_path, {"first": "w8", "nowhere": "w8"}, "w8"))


def test_a_weight_that_is_computed_is_named(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    torch.manual_seed(0)
    net = traced_of(Scaled(), [spec("x", 1, 8)], [spec("y", 1, 16)])
    with pytest.raises(StageFailed, match="weight of layer is computed"):
        coreml.lower(net, ask(tmp_path, {"layer": "w8"}, "w8"))


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
    with pytest.raises(RecipeError, match="iOS 15"):
        coreml.lower(traced, ask(tmp_path, {"first": "w8"}, "w8", "iOS15"))


def test_names_that_core_ml_would_change_are_refused(tmp_path: Path) -> None:
    net = traced_of(nn.Linear(4, 4), [spec("in.put", 1, 4)], [spec("in.put", 1, 4)])
    with pytest.raises(RecipeError) as caught:
        coreml.lower(net, ask(tmp_path, {}, "fp16"))
    assert len(caught.value.problems) == 2


def test_a_network_that_writes_its_buffers_is_refused(tmp_path: Path) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x)  # type: ignore[operator]
            return self.seen * 2  # type: ignore[operator]

    program = torch.export.export(Wrapper(Counter()), (torch.ones(4),), strict=False)
    method = MethodSignature(inputs=(spec("x", 4),), outputs=(spec("y", 4),))
    net = Traced(programs={"forward": program}, signature=Signature(methods={"forward": method}))
    with pytest.raises(StageFailed, match=r"writes to its buffer seen"):
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
    with _coreml.quiet():
        assert logger.level == logging.ERROR
    assert logger.level == before


def test_the_record_of_weights_names_modules_and_errors(traced: Traced, tmp_path: Path) -> None:
    coreml.lower(traced, ask(tmp_path, {"first": "palette4"}, "palette4"))
    (entry,) = json.loads((tmp_path / coreml.CHECKS_FILE).read_text())["packages"]["model.mlpackage"].values()
    assert (entry["modules"], entry["scheme"], entry["shape"]) == (["first"], "palette4", [16, 24])
    assert 0.02 < entry["relative_l2"] < 0.2
    assert entry["distance"] / entry["norm"] == pytest.approx(entry["relative_l2"], rel=0.5)
