"""Verbs that look at artifacts and run nothing new: inspect, report, diff, verify, bench."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgebake.errors import EXIT_LIMIT, EXIT_RECIPE, EXIT_STAGE
from verbs import Baked, Edgebake, refused, resign


def test_inspect_says_what_an_artifact_folder_holds(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("inspect", baked.artifact)
    assert said.code == 0
    assert "built as tiny/model@onnx-cpu#fp32 by edgebake" in said.out
    assert "inputs:\n  input float32[1, 16]\n" in said.out
    assert "operators: Gemm x3, Relu x2" in said.out
    assert "units:\n  CPU by CPUExecutionProvider: 1 part, 5 operators (Gemm 3, Relu 2), 5,632 MACs\n" in said.out
    assert "float32: 6 tensors, 22.5 KiB" in said.out


def test_inspect_reads_a_file_without_its_folder(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    alone = tmp_path / "somebody.onnx"
    alone.write_bytes((baked.artifact / "model.onnx").read_bytes())
    said = edgebake("inspect", alone, "--json")
    assert said.code == 0
    assert said.json["manifest"] is None
    assert said.json["operators"] == {"Gemm": 3, "Relu": 2}


def test_inspect_of_a_file_says_what_the_manifest_beside_it_says_of_that_content(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    said = edgebake("inspect", baked.artifact / "model.onnx")
    assert "built as tiny/model@onnx-cpu#fp32 by edgebake" in said.out
    assert "5 operators (Gemm 3, Relu 2), 5,632 MACs\n" in said.out
    for name in ("model.onnx", "manifest.json"):
        (tmp_path / name).write_bytes((baked.artifact / name).read_bytes())
    changed = tmp_path / "model.onnx"
    changed.write_bytes(changed.read_bytes() + b"\x3a\x00")  # an empty graph of functions, joined to what is there
    said = edgebake("inspect", changed)
    assert (said.code, "built as" in said.out) == (0, False)
    (tmp_path / "manifest.json").write_text("[]")
    assert edgebake("inspect", changed).code == 0


@pytest.mark.parametrize(
    ("name", "content", "code", "fragment"),
    [
        ("empty.onnx", b"", EXIT_STAGE, "the file is empty"),
        ("blank.onnx", b"\x08\x0a", EXIT_STAGE, "holds no ONNX graph"),
        ("cut.onnx", b"\x08" * 501, EXIT_STAGE, "not an ONNX file"),
        ("noise.pte", bytes(range(256)) * 64, EXIT_STAGE, "no whole ExecuTorch program"),
        ("model.tflite", b"TFL3", EXIT_RECIPE, "nothing here reads this kind of file"),
        ("model.mlpackage", b"", EXIT_RECIPE, "a Core ML package is a folder"),
        ("model.aimodel", b"", EXIT_RECIPE, "a Core AI model is a folder"),
        ("MODEL.ONNX", b"\x08" * 501, EXIT_STAGE, "not an ONNX file"),
        ("noend", b"", EXIT_RECIPE, "nothing here reads"),
    ],
)
def test_inspect_refuses_what_is_no_artifact(
    edgebake: Edgebake, tmp_path: Path, name: str, content: bytes, code: int, fragment: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(edgebake("inspect", tmp_path / name), code, name, fragment)


def test_inspect_of_a_folder_names_the_artifacts_below_it(edgebake: Edgebake, baked: Baked) -> None:
    refused(edgebake("inspect", baked.out), EXIT_RECIPE, "is a folder", str(baked.artifact))


def test_inspect_of_nothing(edgebake: Edgebake, tmp_path: Path) -> None:
    refused(edgebake("inspect", tmp_path / "nowhere.onnx"), EXIT_RECIPE, "does not exist")


def test_inspect_of_an_empty_package(edgebake: Edgebake, tmp_path: Path) -> None:
    package = tmp_path / "model.mlpackage"
    package.mkdir()
    refused(edgebake("inspect", package), EXIT_STAGE, "Manifest.json is missing", "copy the package again")
    (package / "Manifest.json").write_text("{")
    refused(edgebake("inspect", package), EXIT_STAGE, "names no root model", "-> build or copy it again, whole")


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_inspect_does_not_wait_for_a_pipe(edgebake: Edgebake, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")
    refused(edgebake("inspect", tmp_path / "model.onnx"), EXIT_RECIPE, "neither a file nor a folder")


def test_recorded_outputs_are_no_artifact(edgebake: Edgebake, baked: Baked) -> None:
    above = baked.out / "tiny/model/reference"
    (inside,) = above.iterdir()
    for verb in ("inspect", "verify", "bench", "report"):
        refused(edgebake(verb, inside), EXIT_RECIPE, "holds recorded float outputs, no artifact")
    refused(edgebake("verify", above), EXIT_RECIPE, "holds recorded float outputs, no artifact")


def test_artifacts_in_folders_called_reference_are_found(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    copied = baked.copied(tmp_path)
    (copied.out / "tiny").rename(copied.out / "reference")
    assert len(edgebake("report", copied.out, "--json").json["results"]) == 2


def test_errors_are_json_when_json_is_asked_for(edgebake: Edgebake, tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").write_bytes(b"")
    said = edgebake("inspect", tmp_path / "empty.onnx", "--json")
    assert said.code == said.json["exit_code"] == EXIT_STAGE
    (problem,) = said.json["error"]
    assert problem["where"].endswith("empty.onnx")
    assert problem["fix"]


def test_report_shows_what_was_measured_and_judges_it_again(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    written = [tmp_path / f"report.{suffix}" for suffix in ("json", "md", "xml", "html")]
    said = edgebake("report", baked.out, *(f"--report={path}" for path in written))
    assert said.code == 0
    assert "2 passed; every limit was measured" in said.out
    assert all(path.read_text() for path in written)
    assert [r["unit"] for r in json.loads(written[0].read_text())["results"]] == [
        "tiny/model@onnx-cpu#fp32",
        "tiny/model@onnx-cpu#w8",
    ]


def test_report_fails_with_the_recorded_numbers(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    harmed = baked.copied(tmp_path)
    resign(harmed.artifact / "manifest.json", limits={"parity": {"sqnr_db": 500.0}})
    said = edgebake("report", harmed.out, "--json")
    assert said.code == EXIT_LIMIT
    assert {r["unit"]: r["state"] for r in said.json["results"]}["tiny/model@onnx-cpu#fp32"] == "fail"


def test_report_and_verify_show_what_is_damaged_beside_the_rest(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    harmed = baked.copied(tmp_path)
    (harmed.artifact / "manifest.json").write_text("{")
    for verb in ("report", "verify"):
        said = edgebake(verb, harmed.out)
        assert said.code == EXIT_STAGE
        assert "tiny/model\n" in said.out
        assert "fp32/manifest.json: this is not JSON" in " ".join(said.out.split())
        assert "1 passed, 1 not judged" in said.out


@pytest.mark.parametrize("suffix", ["doc", ""])
def test_a_report_of_an_unknown_format_is_refused(
    edgebake: Edgebake, baked: Baked, tmp_path: Path, suffix: str
) -> None:
    refused(edgebake("report", baked.out, "--report", tmp_path / f"report.{suffix}"), EXIT_RECIPE, "by suffix")


def test_diff_of_a_build_with_itself(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("diff", baked.out, baked.out)
    assert (said.code, said.out) == (0, "no difference in 2 artifacts\n")


def test_diff_of_two_schemes_says_what_is_worse(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("diff", baked.artifact, baked.artifact.with_name("w8"))
    assert said.code == 0
    assert said.out.startswith("tiny/model@onnx-cpu#fp32 -> tiny/model@onnx-cpu#w8\n")
    lines = said.out.splitlines()
    assert next(line for line in lines if "sqnr_db" in line).endswith(" worse")
    assert next(line for line in lines if "size bytes" in line).endswith(" better")


def test_diff_reads_json_reports(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    assert edgebake("report", baked.out, "--report", before).code == 0
    assert edgebake("diff", before, baked.out).out == "no difference in 2 artifacts\n"
    harmed = baked.copied(tmp_path)
    resign(harmed.artifact / "manifest.json", limits={"parity": {"sqnr_db": 500.0}})
    said = edgebake("diff", before, harmed.out, "--json")
    assert said.code == EXIT_LIMIT
    assert said.json["states"] == [{"unit": "tiny/model@onnx-cpu#fp32", "old": "pass", "new": "fail"}]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"results": [{}]}', b"\xff\xfe", b"[" * 100_000])
def test_diff_refuses_what_is_no_report(edgebake: Edgebake, baked: Baked, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    refused(edgebake("diff", tmp_path / "report.json", baked.out), EXIT_RECIPE, "no JSON report of edgebake")


def test_diff_refuses_a_report_of_a_newer_edgebake_and_one_that_names_an_artifact_twice(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    edgebake("report", baked.out, "--report", path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "version": 99}))
    refused(edgebake("diff", path, baked.out), EXIT_RECIPE, "has version 99", "install a newer edgebake")
    path.write_text(json.dumps({**document, "results": document["results"] * 2}))
    refused(edgebake("diff", baked.out, path), EXIT_RECIPE, "report.json holds tiny/model@onnx-cpu#fp32 more than once")
    refused(edgebake("diff", tmp_path / "none", path), EXIT_RECIPE, "none does not exist", "or a JSON report")


@pytest.mark.parametrize("verb", ["verify", "report", "bench"])
def test_a_folder_without_artifacts(edgebake: Edgebake, tmp_path: Path, verb: str) -> None:
    refused(edgebake(verb, tmp_path), EXIT_RECIPE, "holds no artifact", "edgebake build")
    refused(edgebake(verb, tmp_path / "none"), EXIT_RECIPE, "does not exist")
    (tmp_path / "file").write_bytes(b"")
    refused(edgebake(verb, tmp_path / "file"), EXIT_RECIPE, "is a file, not an artifact folder")


def test_verify_passes_what_was_built_and_needs_no_model(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    alone = baked.copied(tmp_path / ".hidden")  # a folder whose name the search for artifacts skips below it
    said = edgebake("verify", alone.out, "--json")
    assert said.code == 0, said.err
    assert [(r["unit"], r["state"]) for r in said.json["results"]] == [
        ("tiny/model@onnx-cpu#fp32", "pass"),
        ("tiny/model@onnx-cpu#w8", "pass"),
    ]
    assert said.err == ""


def test_verify_names_each_file_that_changed_and_judges_the_rest(
    edgebake: Edgebake, baked: Baked, tmp_path: Path
) -> None:
    harmed = baked.copied(tmp_path)
    model = harmed.artifact / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    said = edgebake("verify", harmed.out, "--json")
    assert said.code == EXIT_STAGE
    bad, good = said.json["results"]
    assert (bad["state"], good["state"]) == ("failed", "pass")
    assert bad["failure"]["problems"][0]["where"].endswith("fp32/model.onnx")


def test_bench_names_the_file_that_keeps_it_from_running(edgebake: Edgebake, baked: Baked, tmp_path: Path) -> None:
    harmed = baked.copied(tmp_path)
    (harmed.artifact / "model.onnx").write_bytes(b"")
    said = edgebake("bench", harmed.artifact)
    assert said.code == EXIT_STAGE
    assert f"{harmed.artifact}: failed\n    {harmed.artifact / 'model.onnx'}: the file is not what" in said.out
    assert "-> build the artifact again" in said.out


def test_bench_times_and_weighs(edgebake: Edgebake, baked: Baked) -> None:
    said = edgebake("bench", baked.artifact, "-n", "5", "--json")
    assert said.code == 0, said.err
    (row,) = said.json
    assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert row["runner"] == {"name": "onnxruntime-cpu", "kind": "executed"}
    assert 0 <= row["peak_bytes"] < 1 << 30
