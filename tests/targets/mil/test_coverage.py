"""Every operator type of the format has an implementation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgebake_targets.mil.operators import operators

# coremltools uses these while it converts; no package holds them.
NEVER_STORED = {
    "_const_symbolic",  # a constant of unknown sizes, folded or refused before the program is written
}
# Stored as an attribute of its own, not as an operator to call.
STORED_VALUES = {"const"}


def test_every_type_that_coremltools_defines() -> None:
    """168 in coremltools 9.0; a later one that defines more fails here."""
    registry = pytest.importorskip("coremltools.converters.mil.mil.ops.registry")
    defined = set(registry.SSAOpRegistry.core_ops)
    assert len(defined) == 168
    assert defined - operators().keys() == NEVER_STORED | STORED_VALUES


def test_states_are_written_by_an_operator_of_the_format_alone() -> None:
    """coremltools splits its ``coreml_update_state`` when it writes a package."""
    assert {"read_state", "write_state"} <= operators().keys()


@pytest.mark.slow
def test_every_operator_is_held_against_five_cases_and_an_edge(tmp_path: Path) -> None:
    """Counted while the tests of this folder run; range_1d and classify have no shapes worth the name of an edge."""
    counts = tmp_path / "cases.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "counting", "--cases", str(counts)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    folder = Path(__file__).parent
    done = subprocess.run(
        [*command, "-m", "not slow", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder.parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(counts.read_text())
    cases = sorted(numbers["cases"] for numbers in found.values())
    print(f"{len(found)} operators, {sum(cases)} cases, fewest {cases[0]}, median {cases[len(cases) // 2]}")
    assert found.keys() == operators().keys()
    assert {name: numbers["cases"] for name, numbers in found.items() if numbers["cases"] < 5} == {}
    assert {name for name, numbers in found.items() if not numbers["edges"]} == set()
