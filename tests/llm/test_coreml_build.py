"""Decoders built for Core ML as users build them: judged by their text, whole and cut into several packages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import baking
import decoders
from edgebake_targets._coreml_functions import functions_of
from edgebake_targets._coreml_package import open_package

TEXT = "\n".join(f"{n} times a line of the text that is read, and then {n * n} of another." for n in range(40))
IOS18 = {"minimum_os": "iOS18"}
EXACT = {"target": "coreml", "options": IOS18}
CUT = {"target": "coreml", "name": "cut", "options": {**IOS18, "chunk_mib": 0.18}}
FOUR = {"target": "coreml", "scheme": "w4g32", "options": IOS18, "limits": {"language": {"top1": 0.999}}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Any]:
    folder = tmp_path_factory.mktemp("coreml")
    (folder / "model").mkdir()
    decoders.save(folder / "model")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "text.txt").write_text(TEXT)
    samples = {"evaluation": {"text": "text.txt", "length": 40, "count": 6}}
    limits = {"language": {"top1": 0.3, "top5": 0.5, "stepwise_db": 60}}
    given = {**decoders.component(Path("../model")), "samples": samples, "limits": limits}
    place = baking.kitchen(folder, (EXACT, CUT, FOUR), name="decoder", **given)
    done = place.build()
    assert done.code == 5, done.err + done.out  # four bits miss their limit
    return done.results


@pytest.mark.slow
def test_a_decoder_is_built_and_judged_by_its_text(built: Sequence[Any]) -> None:
    exact, _, four = (result["measurements"] for result in built)
    language = exact["language"]
    assert exact["runner"] == {"name": "coreml-interpreter", "kind": "interpreted"}
    assert language["perplexity"]["ratio"] == pytest.approx(1, abs=2e-3)  # states are float16
    assert language["generated"]["value"] == language["stepwise"]["same"] == 1.0
    assert exact["outputs"]["logits"]["sqnr_db"] > 55
    assert set(exact["modes"]) == {"fp32", "declared", "fp16-worst"}
    assert exact["modes"]["fp32"]["outputs"]["logits"]["sqnr_db"] > 100
    assert 0 < four["language"]["kl"] < 3
    failed = [v["limit"] for result in built for v in result["verdicts"] if v["state"] == "fail"]
    assert failed == ["language.top1"]
    assert four["located"]["modules"]  # from values inside the functions
    assert four["size"]["bytes"] < 0.6 * exact["size"]["bytes"]


@pytest.mark.slow
def test_the_package_has_both_functions_and_the_tokenizer_lies_beside_it(built: Sequence[Any]) -> None:
    for number, result in enumerate(built):
        folder = Path(result["folder"])
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {f["path"].split("/")[0] for f in manifest["files"]}
        packages = {"part-1.mlpackage", "part-2.mlpackage"} if number == 1 else {"model.mlpackage"}
        assert files >= {*packages, "tokenizer.json", "tokenizer_config.json", "weights.check.json"}
        assert "config.json" not in files
        assert manifest["signature"]["language"]["stop"] == [decoders.EOS]
        assert manifest["encodings"]["functions"] == {"decode": 1, "prefill": decoders.ONCE}
        for package in packages:
            assert functions_of(open_package(folder / package)) == ("decode", "prefill")


@pytest.mark.slow
def test_the_parts_say_what_the_whole_does(built: Sequence[Any]) -> None:
    whole, cut, _ = built
    manifest = json.loads((Path(cut["folder"]) / "manifest.json").read_text())
    assert manifest["encodings"]["parts"] == ["part-1.mlpackage", "part-2.mlpackage"]
    whole, cut = (result["measurements"] for result in (whole, cut))
    assert cut["language"]["generated"] == whole["language"]["generated"]
    assert cut["language"]["perplexity"] == whole["language"]["perplexity"]
    assert cut["outputs"]["logits"] == whole["outputs"]["logits"]


@pytest.mark.slow
def test_a_part_that_is_gone_is_named(built: Sequence[Any], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "artifact"
    shutil.copytree(built[1]["folder"], folder)
    shutil.rmtree(folder / "part-2.mlpackage")
    told = baking.finish(baking.start("verify", folder, "--json"))
    assert told.code == 4
    assert "part-2.mlpackage" in told.out  # the table breaks names over lines
