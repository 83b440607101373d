"""A defect in a .pte file under a manifest that is signed again: `verify` fails it by the numbers alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mutations_pte import CONTROLS, HARMLESS, MUTATIONS, WRONG_NETWORKS
from tampering import Mutation, Outcome

TARGET = "executorch-xnnpack"
Judge = Callable[[Mutation], Outcome]
pytestmark = pytest.mark.slow  # every judgement starts ExecuTorch's runtime, which takes seconds to import


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_defect_in_the_constants_fails(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_found()


@pytest.mark.parametrize("mutation", WRONG_NETWORKS, ids=str)
def test_a_program_of_a_wrong_network_fails(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_found()


@pytest.mark.parametrize("mutation", CONTROLS, ids=str)
def test_the_unharmed_control_signed_again_passes(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_passes()


@pytest.mark.parametrize("mutation", HARMLESS, ids=str)
def test_a_change_below_the_limit_passes(mutation: Mutation, outcome: Judge) -> None:
    outcome(mutation).assert_passes()
