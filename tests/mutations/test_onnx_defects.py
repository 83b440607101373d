"""A defect in an .onnx file under a manifest that is signed again: `verify` fails it by the numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from mutations_onnx import CONTROLS, HARMLESS, MORE_CONTROLS, MORE_MUTATIONS, MUTATIONS, output_cast
from tampering import EXIT_LIMIT, Artifact, Mutation, Outcome, judged

from baking import finish, start

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


@pytest.fixture(scope="module")
def layered(workshop: Any) -> Artifact:
    """The unharmed float artifact."""
    found: Artifact = workshop.artifact("layered", TARGET, "fp32")
    return found


def test_an_output_of_another_type_fails_though_its_values_are_right(layered: Artifact) -> None:
    folder = layered.copy("double", output_cast(onnx.TensorProto.DOUBLE))
    assert layered.effect_db(folder) >= layered.limits["parity"]["sqnr_db"]
    _, code, failed = judged(folder)
    assert (code, failed) == (EXIT_LIMIT, {"structure.outputs"})


def test_the_command_line_exits_5_for_the_defect_and_0_for_the_control(layered: Artifact) -> None:
    bad, good = layered.copy("by-hand", MUTATIONS[0].edit), layered.copy("unharmed", CONTROLS[0].edit)
    passed, failed = (finish(start("verify", folder, "--json")) for folder in (good, bad))
    assert (passed.code, failed.code) == (0, EXIT_LIMIT), passed.err + failed.err
    assert "parity.sqnr_db" in {verdict["limit"] for verdict in failed.results[0]["verdicts"]}
