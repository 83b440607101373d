"""The Core AI target: stored as asked for, the same bytes twice, computing what the network computes, damage seen."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from coreai_cases import IDS, INSTALLED, ask, changed, decibels, float_outputs, verdicts
from coreml_cases import KINDS, everywhere, network, spec, traced_of
from edgebake.compress import cast
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import About, ModuleRequest, NotMeasured, runners_of
from edgebake.types import Assignment, DimBounds, Lowered, MethodSignature, Signature, Traced
from edgebake_targets import _coreai_packages, _coreai_session, coreai
from edgebake_targets._coreai_asset import open_asset
from edgebake_targets._coreai_constants import decode, weights_of
from edgebake_targets._coreai_program import open_program
from edgebake_targets.inspectors import aimodel
from edgebake_targets.runners import coreai_macos, coreai_runtime

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="the runtime inside coreai-core is for Linux")
FORMATS = {"w8": "int8", "w4": "int4", "w4g16": "int4", "palette4": "palette4", "palette6": "palette6"}


@pytest.fixture(scope="module")
def lowered(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Lowered]]:
    """One artifact of each kind; palettes are apart, since their k-means comes with coremltools (10 s to import)."""
    made = {}
    schemes = {"fp32": everywhere("fp32"), "w8": everywhere("w8"), "w4": everywhere("w4")}
    schemes["w4g16"] = {"embed": "w4g16", "conv": "w4g16", "last": "w4g16", "first": "w8", "up": "w8"}
    for scheme, assigned in schemes.items():
        folder = tmp_path_factory.mktemp(scheme)
        made[scheme] = folder, coreai.lower(traced, ask(folder, assigned, scheme))
    return made


def ran(folder: Path, lowered: Lowered) -> dict[str, np.ndarray[Any, Any]]:
    return coreai_runtime.open(folder / lowered.entry, lowered.signature).call("forward", {"ids": IDS})


@INSTALLED
@pytest.mark.parametrize("scheme", ["fp32", "w8", "w4", "w4g16"])
def test_each_scheme_is_stored_and_passes_its_checks(lowered: dict[str, tuple[Path, Lowered]], scheme: str) -> None:
    folder, made = lowered[scheme]
    assert made.files == ("model.aimodel", "weights.check.json")
    found = verdicts(folder, made)
    assert {limit: (v.state, v.reason) for limit, v in found.items() if limit != "structure.weights"} == {
        "structure.loads": ("pass", ""),
        "structure.inputs": ("pass", ""),
        "structure.outputs": ("pass", ""),
    }
    weights = found["structure.weights"]
    assert (weights.state, weights.reason.startswith("worst of 5: ")) == ("pass", True)
    stored = {record.name: record.dtype for record in aimodel.inspect(folder / made.entry).weights}
    expected = json.loads((folder / "weights.check.json").read_text())["weights"]
    assert len(expected) == len(KINDS)
    for module in KINDS:
        scheme_here = made.encodings["schemes"]
        (own,) = [name for name, modules in scheme_here.items() if module in modules]
        assert stored[f"{module}.weight"] == FORMATS.get(own, "float32")


@INSTALLED
@LINUX
@pytest.mark.parametrize(("scheme", "least"), [("fp32", 120.0), ("w8", 40.0), ("w4", 12.0), ("w4g16", 18.0)])
def test_it_computes_what_the_network_computes(
    lowered: dict[str, tuple[Path, Lowered]], scheme: str, least: float
) -> None:
    folder, made = lowered[scheme]
    outputs = ran(folder, made)
    for name, exact in float_outputs().items():
        assert outputs[name].dtype == np.float32
        assert least < decibels(exact, outputs[name]) < least + 40


@INSTALLED
@LINUX
@pytest.mark.parametrize("scheme", ["w8", "w4g16"])
def test_it_computes_with_the_weights_that_are_decoded_here(
    lowered: dict[str, tuple[Path, Lowered]], scheme: str
) -> None:
    """Our reading of the stored integers is that of Core AI: a network with the decoded weights gives its outputs."""
    folder, made = lowered[scheme]
    net, parameters = network(), {}
    for weight in weights_of(open_program(folder / made.entry)):
        values = decode(weight)
        assert values is not None
        parameters[weight.name] = torch.from_numpy(values)
    loaded = net.load_state_dict({k: v for k, v in parameters.items() if k in net.state_dict()}, strict=False)
    assert not {f"{module}.weight" for module in KINDS} & set(loaded.missing_keys)
    with torch.no_grad():
        hidden, logits = net(torch.from_numpy(IDS))
    outputs = ran(folder, made)
    assert decibels(hidden.numpy(), outputs["hidden"]) > 120
    assert decibels(logits.numpy(), outputs["logits"]) > 120


@INSTALLED
@LINUX
@pytest.mark.parametrize("length", [4, 17, 64])
def test_one_program_serves_every_length(lowered: dict[str, tuple[Path, Lowered]], length: int) -> None:
    folder, made = lowered["fp32"]
    session = coreai_runtime.open(folder / made.entry, made.signature)
    ids = np.arange(length)[None] % 50
    with torch.no_grad():
        _, logits = network()(torch.from_numpy(ids))
    assert decibels(logits.numpy(), session.call("forward", {"ids": ids})["logits"]) > 120


@INSTALLED
@LINUX
@pytest.mark.slow
def test_palettes_are_stored_decoded_and_executed(traced: Traced, tmp_path: Path) -> None:
    for scheme, least in (("palette6", 30.0), ("palette4", 18.0), ("palette4g8", 18.0), ("palette1", 1.0)):
        schemes = everywhere(scheme)
        if scheme == "palette4g8":
            schemes |= {"embed": "palette4", "last": "palette4"}
        folder = tmp_path / scheme
        made = coreai.lower(traced, ask(folder, schemes, scheme))
        assert {v.state for v in verdicts(folder, made).values()} == {"pass"}
        records = aimodel.inspect(folder / made.entry).weights
        bits = int(scheme.removeprefix("palette").split("g")[0])
        assert {record.dtype for record in records} == {f"palette{bits}"}
        assert {r.name: r.bytes for r in records}["up.weight"] == 32 * 24 * 3 * bits // 8
        assert decibels(float_outputs()["logits"], ran(folder, made)["logits"]) > least


@INSTALLED
@LINUX
def test_half_precision_is_half_the_bytes_and_close(tmp_path: Path) -> None:
    assigned = Assignment(schemes=everywhere("fp16"), kinds=KINDS)

    def calibrate(_module: nn.Module) -> None:
        raise AssertionError("nothing is calibrated")

    net = cast.apply(ModuleRequest(module=network(), assignment=assigned, options={}, run_calibration=calibrate))
    outputs = [spec("hidden", 1, "seq", 16), spec("logits", 1, "seq", 20)]
    half = traced_of(net, [spec("ids", 1, "seq", dtype="int64")], outputs, seq=DimBounds(min=4, max=64))
    made = coreai.lower(half, ask(tmp_path, everywhere("fp16"), "fp16"))
    assert {v.state for v in verdicts(tmp_path, made).values()} == {"pass"}
    records = {record.name: record for record in aimodel.inspect(tmp_path / made.entry).weights}
    assert (records["up.weight"].dtype, records["up.weight"].bytes) == ("float16", 32 * 24 * 3 * 2)
    assert [s.dtype for s in aimodel.inspect(tmp_path / made.entry).outputs] == ["float32", "float32"]
    assert 50 < decibels(float_outputs()["logits"], ran(tmp_path, made)["logits"]) < 90


@INSTALLED
def test_the_same_bytes_in_another_folder_and_another_process(
    lowered: dict[str, tuple[Path, Lowered]], tmp_path: Path
) -> None:
    here, made = lowered["w4g16"]
    there = tmp_path / "another folder"
    root = Path(__file__).resolve().parents[2]
    code = f"""
import sys
sys.path[:0] = {[str(root / p) for p in ("export", "targets", "tests/helpers")]!r}
from pathlib import Path
from coreai_cases import ask
from coreml_cases import traced_network
from edgebake_targets import _coreai_session, coreai
schemes = {{"embed": "w4g16", "conv": "w4g16", "last": "w4g16", "first": "w8", "up": "w8"}}
coreai.lower(traced_network(), ask(Path({str(there)!r}), schemes, "w4g16"))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)

    def digests(folder: Path) -> dict[str, str]:
        files = [file for name in made.files for file in [folder / name, *(folder / name).rglob("*")]]
        return {str(f.relative_to(folder)): sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}

    assert len(digests(here)) == 4
    assert digests(here) == digests(there)


@INSTALLED
def test_metadata_says_what_the_recipe_says_and_no_date(traced: Traced, tmp_path: Path) -> None:
    request = ask(tmp_path, {}, author="Somebody", licence="MIT")
    about = About(description="A network", licence="Apache-2.0", digest="d1")
    made = coreai.lower(traced, type(request)(**{**vars(request), "about": about}))
    facts = aimodel.inspect(tmp_path / made.entry).facts
    assert (facts["author"], facts["license"], facts["description"]) == ("Somebody", "MIT", "A network")
    assert facts["metadata"] == {"edgebake.made_from": "d1"}
    assert "creationDate" not in open_asset(tmp_path / made.entry).metadata
    assert str(tmp_path).encode() not in (tmp_path / "model.aimodel/main.mlirb").read_bytes()


@INSTALLED
@LINUX
def test_several_methods_are_functions_of_one_asset_and_share_weights(tmp_path: Path) -> None:
    table = nn.Embedding(50, 64)

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.table, self.factor = table, factor

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.table(ids) * self.factor,)

    parts = {
        name: traced_of(Scaled(factor), [spec("ids", 1, 4, dtype="int64")], [spec("y", 1, 4, 64)])
        for name, factor in (("prefill", 2.0), ("decode", -1.0))
    }
    programs = {name: part.programs["forward"] for name, part in parts.items()}
    method = MethodSignature(inputs=(spec("ids", 1, 4, dtype="int64"),), outputs=(spec("y", 1, 4, 64),))
    both = Traced(programs=programs, signature=Signature(methods=dict.fromkeys(programs, method)))
    made = coreai.lower(both, ask(tmp_path, {}))
    inspected = aimodel.inspect(tmp_path / made.entry)
    assert inspected.facts["functions"] == ["decode", "prefill"]
    assert [record.bytes for record in inspected.weights] == [50 * 64 * 4]
    session = coreai_runtime.open(tmp_path / made.entry, made.signature)
    ids = np.arange(4)[None]
    exact = table(torch.from_numpy(ids)).detach().numpy()
    assert decibels(exact * 2, session.call("prefill", {"ids": ids})["y"]) > 120
    assert decibels(-exact, session.call("decode", {"ids": ids})["y"]) > 120


@INSTALLED
def test_changed_weights_inputs_and_outputs_are_seen(lowered: dict[str, tuple[Path, Lowered]], tmp_path: Path) -> None:
    folder, made = lowered["w8"]
    checks, entry = coreai.read_checks(folder), folder / made.entry
    blob = bytes(open_asset(entry).blobs["up.weight"])
    flipped = bytes([blob[0] ^ 0x40]) + blob[1:]

    def found(path: Path, signature: Signature = made.signature) -> dict[str, tuple[str, str]]:
        return {v.limit: (v.state, v.reason) for v in coreai.structure(path, signature, checks)}

    weights = found(changed(entry, tmp_path / "weights", blob, flipped))["structure.weights"]
    assert weights == ("fail", "up (w8) decodes to other values than those it was built from")
    renamed = found(changed(entry, tmp_path / "names", b"up.weight\x00", b"up.wEight\x00"))["structure.weights"]
    assert renamed == ("fail", "the weight of up (w8) is not there")
    method = made.signature.methods["forward"]
    other = MethodSignature(inputs=(spec("ids", 1, "seq", 2),), outputs=(*method.outputs, spec("more", 1)))
    wrong = found(entry, Signature(methods={"forward": other}, dims=made.signature.dims))
    assert wrong["structure.inputs"] == ("fail", "ids is int32 1x?, not float32 1x?x2")
    assert wrong["structure.outputs"] == ("fail", "more is not there")


@INSTALLED
def test_a_constant_smaller_than_its_shape_is_damaged(lowered: dict[str, tuple[Path, Lowered]]) -> None:
    folder, made = lowered["w8"]
    program = open_program(folder / made.entry)
    short = {name: blob[:-1] if name == "up.weight" else blob for name, blob in program.asset.blobs.items()}
    with pytest.raises(ArtifactDamaged, match=r"constant up\.weight holds fewer values than its shape says"):
        weights_of(replace(program, asset=replace(program.asset, blobs=short)))


@INSTALLED
def test_a_damaged_program_fails_to_load_and_ends_no_process(
    lowered: dict[str, tuple[Path, Lowered]], tmp_path: Path
) -> None:
    folder, made = lowered["w8"]
    entry = folder / made.entry
    unsigned = changed(entry, tmp_path / "a", b"blockwise_shift_scale", b"blockwise_shift_scalf", sign=False)
    loads = coreai.structure(unsigned, made.signature, coreai.read_checks(folder))[0]
    assert (loads.state, loads.reason) == ("fail", "main.mlirb is not the program that main.hash names")
    signed = changed(entry, tmp_path / "b", b"blockwise_shift_scale", b"blockwise_shift_scalf")
    rest = coreai.structure(signed, made.signature, coreai.read_checks(folder))
    assert (rest[0].state, rest[0].reason.startswith("Core AI cannot read it: ")) == ("fail", True)
    assert {v.state for v in rest[1:]} == {"not measured"}
    with pytest.raises(ArtifactDamaged, match="Core AI cannot read it"):
        coreai_runtime.open(signed, made.signature)


def test_the_record_of_the_weights_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactDamaged, match="record of the weights cannot be read"):
        coreai.read_checks(tmp_path)
    (tmp_path / "weights.check.json").write_text('{"version": 99}')
    with pytest.raises(ArtifactDamaged, match="another version"):
        coreai.read_checks(tmp_path)


@INSTALLED
@LINUX
def test_a_function_that_is_not_there_is_named(lowered: dict[str, tuple[Path, Lowered]]) -> None:
    folder, made = lowered["w8"]
    method = made.signature.methods["forward"]
    two = Signature(methods={"prefill": method, "decode": method}, dims=made.signature.dims)
    with pytest.raises(ArtifactDamaged, match="it has no function 'decode'; its functions: main"):
        coreai_runtime.open(folder / made.entry, two)
    states = [v.state for v in coreai.structure(folder / made.entry, two, coreai.read_checks(folder))]
    assert states == ["pass", "fail", "pass", "pass"]


@INSTALLED
@LINUX
def test_inputs_that_do_not_fit_are_refused(lowered: dict[str, tuple[Path, Lowered]]) -> None:
    folder, made = lowered["w8"]
    session = coreai_runtime.open(folder / made.entry, made.signature)
    with pytest.raises(StageFailed, match=r"Core AI failed in forward with ids \(2, 12\)"):
        session.call("forward", {"ids": np.repeat(IDS, 2, 0)})


@INSTALLED
@LINUX
def test_a_first_call_that_promises_hours_is_not_measured(
    lowered: dict[str, tuple[Path, Lowered]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = lowered["w8"]
    session = coreai_runtime.open(folder / made.entry, made.signature)
    monkeypatch.setattr(_coreai_session, "SLOW_S", 0.0)
    with pytest.raises(NotMeasured, match=r"the first call took .* s of CPU time, more than 0 s: .* on a Mac"):
        session.call("forward", {"ids": IDS})
    monkeypatch.undo()
    assert session.call("forward", {"ids": IDS}).keys() == {"hidden", "logits"}
    monkeypatch.setattr(_coreai_session, "SLOW_S", 0.0)
    assert session.call("forward", {"ids": IDS}), "later calls are never refused"


def test_runners_are_ranked_and_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(name, runner.KIND) for name, runner in runners_of("coreai")] == [
        ("coreai-macos", "device"),
        ("coreai-runtime", "executed"),
    ]
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    elsewhere = coreai_macos.missing()
    assert elsewhere is not None and "part of macOS" in elsewhere.reason and "edgebake verify" in elsewhere.remedy
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    old = coreai_macos.missing()
    assert old is not None and old.reason == "Core AI's framework is part of macOS 27, this is 15.5"
    monkeypatch.setattr(_coreai_packages, "find_spec", lambda _name: None)
    for module in (coreai, coreai_runtime, aimodel):
        gone = module.missing()
        assert gone is not None and gone.remedy == "pip install 'edgebake[coreai]'"


@INSTALLED
def test_nothing_temporary_is_left_behind(traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    made = coreai.lower(traced, ask(tmp_path / "out", {}))
    if platform.system() == "Linux":
        ran(tmp_path / "out", made)
    assert list(scratch.iterdir()) == []
    shutil.rmtree(scratch)
