"""Whole builds for onnx-mobile with the command line: what is delivered, said, refused, and the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baking import digests, finish, kitchen, start
from edgebake.check import check
from edgebake.errors import RecipeError
from edgebake.recipe_yaml import read
from edgebake_targets import onnx_mobile

RULES = ("onnx-mobile", {"target": "onnx-mobile", "scheme": "w8a8", "device": "sm8650"})
installed = pytest.mark.skipif(onnx_mobile.missing() is not None, reason="onnx or onnxruntime is not installed")


@installed
@pytest.mark.slow
def test_builds_in_two_places_deliver_the_same_bytes_and_what_providers_take(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "here", tmp_path / "quite" / "somewhere else"):
        made = kitchen(folder, RULES)
        done = made.build()
        assert done.code == 0, done.err
        found.append(digests(made.out))
    assert found[0] == found[1]
    folder = made.out / "tiny" / "model" / "onnx-mobile" / "any" / "fp32"
    measured = json.loads((folder / "measurements.json").read_text())
    assert measured["runner"] == {"name": "onnxruntime-cpu", "kind": "executed"}
    assert any(note.startswith("NNAPI takes 5 of 5 operators in 1 part") for note in measured["notes"])
    assert measured["size"]["beside"] == (folder / "required_operators.config").stat().st_size
    said = finish(start("inspect", folder))
    assert "  CPU by CPUExecutionProvider: 1 part, 5 operators (Gemm 3, Relu 2), 6,656 MACs\n" in said.out
    assert "note: XNNPACK takes 3 of 5 operators in 3 parts; not Relu\n" in said.out


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{target: onnx-mobile, device: m4-max}", ("onnx-mobile does not run on m4-max", "platform")),
        ("{target: onnx-mobile, scheme: fp16}", ("onnx-mobile cannot do fp16",)),
        ("{target: onnx-mobile, options: {optimization: most}}", ("optimization", "all", "basic")),
    ],
)
def test_what_a_phone_does_not_take_is_refused_by_name(tmp_path: Path, rule: str, words: tuple[str, ...]) -> None:
    (tmp_path / "net.py").write_text("def make(): pass\n")
    path = tmp_path / "one.yaml"
    path.write_text(
        f"name: one\nmodel: {{source: python, path: 'net:make'}}\ninputs: {{x: {{shape: [1, 4]}}}}\n"
        f"samples: {{evaluation: {{noise: true}}}}\ntargets: [{rule}]\n"
    )
    with pytest.raises(RecipeError) as caught:
        check([read(path)], trust=False)
    assert all(word in str(caught.value) for word in words), str(caught.value)
