"""Several methods in one of Qualcomm's binaries: compiled, sized, run on the simulator, refused when changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from asking import defaults, lower_request
from baking import kitchen
from edgebake import devices
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import Asked
from edgebake.types import (
    Delegation,
    Lowered,
)
from edgebake_targets import _onnx_qnn_shared, onnx_qnn
from edgebake_targets._onnx_qnn_compile import Compiled
from edgebake_targets._qnn import ContextFacts
from edgebake_targets._qnn_shared import COMPILED_WITH
from edgebake_targets.runners import onnxruntime_qnn
from qnn_cases import traced_vector, vector
from qnn_methods import ROWS, decibels, lowered_into, opened

installed = pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lowered]:
    folder = tmp_path_factory.mktemp("shared")
    return folder, lowered_into(folder, onnx_qnn, share=True)


@installed
@pytest.mark.slow
def test_one_binary_of_two_methods_is_smaller_and_says_by_how_much(built: tuple[Path, Lowered]) -> None:
    folder, lowered = built
    binary = lowered.encodings["files"]["context"]
    names = ["decode.onnx", "decode.plain.onnx", "prefill.onnx", "prefill.plain.onnx", binary]
    assert sorted(lowered.files) == sorted(names)
    assert lowered.entry == "prefill.onnx"
    size = (folder / binary).stat().st_size
    told = lowered.encodings["shared"]
    assert told["methods"] == ["prefill", "decode"] and told["bytes"] == size
    weights = 64 * 256 + 4 * 256 * 256 + 256 * 8
    assert size - told["separate_bytes"] / 2 < 0.5 * weights  # the second method brought no weights of its own
    assert weights <= lowered.encodings["compiled_from"] < 1.2 * weights
    shown = f"one binary of {size:,} bytes for prefill, decode; one for each: {told['separate_bytes']:,} bytes"
    assert shown in lowered.notes
    assert (lowered.delegation.share, lowered.delegation.left_out) == (1.0, ())
    assert lowered.delegation.units[0].operators["FullyConnected"] == 12


@installed
@pytest.mark.slow
def test_each_entry_point_runs_on_the_simulator(built: tuple[Path, Lowered], tmp_path: Path) -> None:
    with opened(*built, tmp_path, "onnxruntime-qnn") as client:
        assert min(decibels(client.outputs())) > 25


@installed
@pytest.mark.slow
def test_another_folder_and_process_give_the_same_bytes(built: tuple[Path, Lowered], tmp_path: Path) -> None:
    folder, lowered = built
    lowered_into(tmp_path, onnx_qnn, share=True)
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in lowered.files)


@installed
@pytest.mark.slow
def test_a_changed_artifact_is_refused_before_anything_runs(built: tuple[Path, Lowered], tmp_path: Path) -> None:
    """The comparison alone, without compiling again: one bit of the binary, and a file that was never signed."""
    folder, lowered = built
    for name in lowered.files:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = onnx.load_model(tmp_path / lowered.entry)
    kept = [p for p in model.metadata_props if p.key != COMPILED_WITH]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    (tmp_path / "unsigned.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactDamaged, match="does not say what its binary was compiled with") as caught:
        onnxruntime_qnn.open(tmp_path / "unsigned.onnx", lowered.signature)
    assert caught.value.problems[0].fix == "build it again"
    again = tmp_path / "again"
    again.mkdir()
    for name in lowered.files:
        (again / name).write_bytes((folder / name).read_bytes())
    onnxruntime_qnn._same_binaries(tmp_path, again, ["prefill", "decode"])
    binary = again / lowered.encodings["files"]["context"]
    data = bytearray(binary.read_bytes())
    data[len(data) // 2] ^= 1
    binary.write_bytes(data)
    with pytest.raises(ArtifactDamaged, match=f"what prefill.plain.onnx compiles to is not .*{binary.name}") as caught:
        onnxruntime_qnn._same_binaries(tmp_path, again, ["prefill", "decode"])
    assert caught.value.problems[0].fix == "build it again with this onnxruntime-qnn"


def asked(methods: dict[str, Any], **options: Any) -> Asked:
    given = {option.name: option.default for option in onnx_qnn.OPTIONS} | {"share_weights": True} | options
    return Asked(
        scheme="fp16",
        module_schemes=(),
        options=given,
        device=devices.row("sm8650"),
        inputs=methods,
        varying=(),
        channels=None,
    )


def test_sharing_is_refused_where_there_is_nothing_to_share() -> None:
    assert list(onnx_qnn.refusals(asked({"prefill": (), "decode": ()}))) == []
    (one,) = onnx_qnn.refusals(asked({"forward": ()}))
    assert one.what == "share_weights needs several methods to share weights, and there is one"
    assert (one.fix, one.key) == ("leave it out, or give the component methods", "options.share_weights")
    (split,) = onnx_qnn.refusals(asked({"prefill": (), "decode": ()}, cpu_fallback=True))
    assert split.what == "share_weights compiles whole methods for the NPU, and cpu_fallback splits them"
    assert split.fix == "leave one of the two out"


def test_without_sharing_several_methods_are_refused_with_the_option_that_takes_them() -> None:
    (refusal,) = onnx_qnn.refusals(asked({"prefill": (), "decode": ()}, share_weights=False))
    assert refusal.what == "onnx-qnn takes networks of one method, not prefill, decode"
    assert refusal.fix == "make a component of each method, or options: {share_weights: true}"


def test_a_model_that_turns_out_to_have_one_method_shares_nothing(tmp_path: Path) -> None:
    traced = traced_vector(torch.nn.Linear(64, 8), vector(8, 1))
    request = lower_request(tmp_path, defaults(onnx_qnn) | {"share_weights": True}, scheme="fp16")
    with pytest.raises(StageFailed, match="and there is forward alone") as caught:
        onnx_qnn.lower(traced, replace(request, device=devices.row("sm8650")))
    assert caught.value.problems[0].fix == "leave it out, or give the component methods"


def test_binaries_that_share_nothing_are_no_result() -> None:
    def made(name: str) -> Compiled:
        facts = ContextFacts(partitions=1, embedded_bytes=0, sdk="2.51.0", soc_model="57", files=(name,))
        return Compiled(facts=facts, delegation=Delegation(share=1.0))

    with pytest.raises(StageFailed) as caught:
        _onnx_qnn_shared._one_binary({"prefill": made("a.bin"), "decode": made("b.bin")}, "sm8650")
    assert (
        caught.value.problems[0].what
        == "Qualcomm's compiler made 2 binaries for sm8650 out of prefill, decode, not one"
    )
    assert "make a component of each method" in caught.value.problems[0].fix
    assert _onnx_qnn_shared._one_binary({"prefill": made("a.bin"), "decode": made("a.bin")}, "sm8650") == "a.bin"


RECIPE_NETWORK = """
import numpy as np
import torch
from edgebake.types import Call, Sample
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

def build():
    torch.manual_seed(0)
    return Net()

def both(request):
    rng = np.random.default_rng(request.skip)
    made = lambda rows: {"x": rng.normal(size=(rows, 64)).astype(np.float32)}
    return [
        Sample(calls=(Call(method="prefill", inputs=made(16)), Call(method="decode", inputs=made(1))), source=str(n))
        for n in range(request.count)
    ]
"""


@installed
@pytest.mark.slow
def test_a_recipe_of_two_methods_is_built_judged_and_shows_what_sharing_saves(tmp_path: Path) -> None:
    rule = {"target": "onnx-qnn", "device": "sm8650", "scheme": "w8a16", "options": {"share_weights": True}}
    made = kitchen(
        tmp_path,
        [rule],
        model={"source": "python", "path": "two_methods:build"},
        inputs=None,
        methods={m: {"x": {"shape": [n, 64]}} for m, n in ROWS.items()},
        samples={
            "calibration": {"python": "two_methods:both", "count": 8},
            "evaluation": {"python": "two_methods:both", "count": 4, "skip": 8},
        },
        limits={"parity": {"cosine": 0.98}, "delegated": "100%"},
    )
    (made.recipe.parent / "two_methods.py").write_text(RECIPE_NETWORK)
    done = made.build()
    assert done.code == 0, done.out + done.err
    folder = made.out / "tiny" / "model" / "onnx-qnn" / "sm8650" / "w8a16"
    manifest = json.loads((folder / "manifest.json").read_text())
    told = manifest["encodings"]["shared"]
    assert told["bytes"] < told["separate_bytes"]
    measured = json.loads((folder / "measurements.json").read_text())
    assert measured["runner"] == {"name": "onnxruntime-qnn", "kind": "simulated"}
    assert any(note.startswith(f"one binary of {told['bytes']:,} bytes for ") for note in measured["notes"])
