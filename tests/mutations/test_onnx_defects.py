"""A defect in an .onnx file under a manifest that is signed again: `verify` fails it by the numbers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from mutations_onnx import CONTROLS, HARMLESS, MORE_CONTROLS, MORE_MUTATIONS, MUTATIONS, output_cast
from tampering import EXIT_LIMIT, Mutation, Outcome, edgebake, judged

TARGET = "onnx-cpu"
Judge = Callable[[Mutation], Outcome]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_defect_above_the_limit_fails(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_found()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MORE_MUTATIONS, ids=str)
def test_a_defect_of_convolutions_and_attention_fails(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_found()


@pytest.mark.parametrize("mutation", CONTROLS, ids=str)
def test_the_unharmed_control_signed_again_passes(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_passes()


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MORE_CONTROLS, ids=str)
def test_the_unharmed_control_with_attention_passes(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_passes()


@pytest.mark.parametrize("mutation", HARMLESS, ids=str)
def test_a_change_below_the_limit_passes(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_passes()


def test_an_output_of_another_type_fails_though_its_values_are_right(workshop: Any) -> None:
    artifact = workshop.artifact("layered", TARGET, "fp32")
    folder = artifact.copy("double", output_cast(onnx.TensorProto.DOUBLE))
    assert artifact.effect_db(folder) >= artifact.limits["parity"]["sqnr_db"]
    _, code, failed = judged(folder)
    assert (code, failed) == (EXIT_LIMIT, {"structure.outputs"})


def test_the_command_line_exits_5_for_the_defect_and_0_for_the_control(workshop: Any, tmp_path: Path) -> None:
    artifact = workshop.artifact("layered", TARGET, "fp32")
    bad = artifact.copy("by-hand", MUTATIONS[0].edit)
    good = artifact.copy("unharmed", CONTROLS[0].edit)
    passed = edgebake("verify", good, "--json", store=workshop.store, cwd=tmp_path)
    failed = edgebake("verify", bad, "--json", store=workshop.store, cwd=tmp_path)
    assert (passed.returncode, failed.returncode) == (0, EXIT_LIMIT), passed.stderr + failed.stderr
    assert "parity.sqnr_db" in json.dumps(json.loads(failed.stdout))
