"""Metadata of a Core ML package and options that belong together: what is written, shown, canonical and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from coreml_cases import ask, spec, traced_of
from edgebake.errors import RecipeError
from edgebake.target import About
from edgebake.types import Traced
from edgebake_targets import _coreml_options, coreml
from edgebake_targets.inspectors import mlpackage

ABOUT = About(description="A tiny one", licence="Apache-2.0", digest="ab" * 32)


@pytest.fixture(scope="module")
def tiny() -> Traced:
    return traced_of(nn.Linear(4, 3), [spec("x", 1, 4)], [spec("y", 1, 3)])


def test_what_the_recipe_and_the_options_say_is_in_the_package(tiny: Traced, tmp_path: Path) -> None:
    asked = ask(tmp_path, {}, author="A. Author", version="1.2", labels="cat, dog\n bird \nfish, raw")

    lowered = coreml.lower(tiny, replace(asked, about=ABOUT))
    facts = mlpackage.inspect(tmp_path / lowered.entry).facts
    assert {name: facts[name] for name in ("description", "license", "author", "version")} == {
        "description": "A tiny one",
        "license": "Apache-2.0",
        "author": "A. Author",
        "version": "1.2",
    }
    assert facts["metadata"]["edgebake.made_from"] == "ab" * 32
    assert facts["metadata"]["edgebake.compute_units"] == "all"
    assert facts["metadata"]["labels"] == '["cat, dog", "bird", "fish, raw"]'


def test_options_stand_before_the_recipe_and_nothing_is_made_up(tiny: Traced, tmp_path: Path) -> None:
    asked = ask(tmp_path / "own", {}, description="Mine", licence="MIT", labels="a,b,c", compute_units="cpu_only")
    own = mlpackage.inspect(tmp_path / "own" / coreml.lower(tiny, replace(asked, about=ABOUT)).entry).facts
    assert (own["description"], own["license"]) == ("Mine", "MIT")
    assert own["metadata"]["labels"] == '["a", "b", "c"]'
    assert own["metadata"]["edgebake.compute_units"] == "cpu_only"
    bare = mlpackage.inspect(tmp_path / "bare" / coreml.lower(tiny, ask(tmp_path / "bare", {})).entry).facts
    assert not {"description", "license", "author", "version"} & set(bare)
    assert not {"edgebake.made_from", "labels"} & set(bare["metadata"])


def test_labels_that_do_not_fit_are_refused(tiny: Traced, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 labels for the 3 classes of y"):
        coreml.lower(tiny, ask(tmp_path, {}, labels="a,b"))
    with pytest.raises(RecipeError, match="label 1 is empty"):
        coreml.lower(tiny, ask(tmp_path, {}, labels="a,,c"))


@pytest.mark.parametrize(
    ("system", "same"), [("macOS12", "iOS15"), ("macOS13", "iOS16"), ("macOS15", "iOS18"), ("iOS17", "iOS17")]
)
def test_a_macos_means_the_ios_of_its_generation(tmp_path: Path, system: str, same: str) -> None:
    assert _coreml_options.canonical(ask(tmp_path, {}, system=system)).options["minimum_os"] == same


def test_macos_14_lowers_as_ios_17(tiny: Traced, tmp_path: Path) -> None:
    lowered = coreml.lower(tiny, ask(tmp_path, {}, system="macOS14"))
    assert mlpackage.inspect(tmp_path / lowered.entry).facts["minimum_os"] == "iOS17"


def test_combinations_that_cannot_be_are_named(tiny: Traced, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        coreml.lower(tiny, ask(tmp_path, {}, "fp32", "macOS12", compute_units="cpu_and_ne"))
    said = [(problem.what, problem.fix) for problem in caught.value.problems]
    assert said == [
        (
            "apps ask for the CPU and the Neural Engine alone (cpu_and_ne) since iOS 16 and macOS 13",
            "options: {minimum_os: iOS16}, or {compute_units: all}",
        ),
        (
            "the Neural Engine computes in float16 only, and this package computes in float32",
            "options: {compute_precision: fp16}, or {compute_units: cpu_and_gpu}",
        ),
    ]
    coreml.lower(tiny, ask(tmp_path / "half", {}, "fp16", "macOS13", compute_units="cpu_and_ne"))


def test_a_scheme_is_taken_under_the_macos_name_of_its_generation(tmp_path: Path) -> None:
    network = traced_of(nn.Sequential(nn.Linear(64, 32)), [spec("x", 1, 64)], [spec("y", 1, 32)])
    lowered = coreml.lower(network, ask(tmp_path / "new", {"0": "w4"}, "w4", "macOS15"))
    assert lowered.encodings["schemes"] == {"w4": ["0"]}
    with pytest.raises(RecipeError, match="minimum_os iOS18 or macOS15, not"):
        coreml.lower(network, ask(tmp_path / "old", {"0": "w4"}, "w4", "macOS14"))
