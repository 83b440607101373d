"""Every operator type of the format has an implementation."""

from __future__ import annotations

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
