"""A defect in compressed weights shows in their structure (`structure.weights`), also where outputs hardly change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tampering import EXIT_LIMIT, Edit, Mutation, assert_unharmed_passes, judged, tampered

from coreml_cases import overwrite, stored_part
from edgebake_targets._coreml_constants import constants, decode
from edgebake_targets._coreml_package import open_package

pytestmark = pytest.mark.slow  # coremltools takes seconds to import
PACKAGE = "model.mlpackage"
Change = Callable[[np.ndarray], np.ndarray]


def _change(name: str, part: str, change: Change, folder: Path) -> None:
    at, values = stored_part(folder / PACKAGE, name, part)
    overwrite(folder / PACKAGE, at, np.ascontiguousarray(change(values.copy()), values.dtype))


def edit(name: str, part: str, change: Change) -> Edit:
    """An edit of one part of a compressed weight."""
    return partial(_change, name, part, change)


def exchanged(one: str, other: str, part: str) -> Edit:
    """The same part of two weights in each other's place."""

    def change(folder: Path) -> None:
        package = folder / PACKAGE
        (at, first), (there, second) = stored_part(package, one, part), stored_part(package, other, part)
        overwrite(package, at, second)
        overwrite(package, there, first)

    return change


def put(index: Any, change: Change) -> Change:
    """Some values changed."""

    def changed(values: np.ndarray) -> np.ndarray:
        values[index] = change(values[index])
        return values

    return changed


MUTATIONS = (
    Mutation("scale", "layered", "w8", edit("second_weight_w8", "scale", put(5, lambda s: s * 1.1))),
    Mutation("scales-moved", "layered", "w8", edit("first_weight_w8", "scale", lambda s: np.roll(s, 1))),
    Mutation("zero-point", "layered", "w8", edit("third_weight_w8", "zero_point", put(9, lambda z: z + 4))),
    Mutation("channel-negated", "layered", "w8", edit("head_weight_w8", "quantized_data", put(3, lambda q: -q))),
    Mutation("transposed", "layered", "w8", edit("second_weight_w8", "quantized_data", np.transpose)),
    Mutation("swapped", "layered", "w8", exchanged("first_weight_w8", "second_weight_w8", "quantized_data")),
    Mutation("table-entry", "layered", "palette4", edit("second_weight_palette4", "lut", put(6, lambda v: v + 0.05))),
    Mutation("table-turned", "layered", "palette4", edit("head_weight_palette4", "lut", lambda t: t[::-1])),
    Mutation("group-scale", "layered", "w4g32", edit("second_weight_w4g32", "scale", put((5, 1), lambda s: s * 1.5))),
    Mutation("group-moved", "layered", "w4g32", edit("third_weight_w4g32", "scale", lambda s: s[:, ::-1])),
    Mutation(
        "tables-moved", "layered", "palette4g8", edit("first_weight_palette4g8", "lut", partial(np.roll, shift=16))
    ),
    Mutation("mask", "layered", "sparse50", edit("second_weight_sparse50", "mask", lambda m: np.roll(m, 1))),
    Mutation(
        "sparse-value", "layered", "sparse50", edit("first_weight_sparse50", "nonzero_data", put(3, lambda v: -v))
    ),
    Mutation(
        "joint-scale",
        "layered",
        "sparse50-w8",
        edit("third_weight_sparse50_w8_stored_0", "scale", put(4, lambda s: s * 2)),
    ),
    Mutation(
        "indices", "layered", "palette4", edit("third_weight_palette4", "indices", put(slice(9), lambda i: i ^ 3))
    ),
)


@pytest.fixture(scope="module")
def built(workshop: Any) -> Path:
    """The folder of the network's packages, one for each scheme."""
    found: Path = workshop.built("layered", "coreml")
    return found


def _weights(folder: Path) -> dict[str, np.ndarray]:
    package = open_package(folder / PACKAGE)
    found = {name: c for name, c in constants(package).items() if "constexpr" in c.operator}
    return {name: decode(package, c) for name, c in found.items() if not name.endswith("_stored_0")}  # feeds another


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_changed_weight_fails_structure_weights(mutation: Mutation, built: Path) -> None:
    source = built / mutation.scheme
    folder = tampered(source, mutation.name, mutation.edit, {})
    before, after = _weights(source), _weights(folder)
    change = max(np.linalg.norm(after[n] - before[n]) / np.linalg.norm(before[n]) for n in before)
    assert change > 0.001
    result, code, failed = judged(folder)
    assert (result.state, code, failed) == ("fail", EXIT_LIMIT, {"structure.weights"}), result.verdicts
    verdict = next(v for v in result.verdicts if v.state == "fail")
    print(f"\nMUTATION coreml {mutation}: weight off by {change:.2%}, {verdict.reason}")


@pytest.mark.parametrize("scheme", ["w8", "palette4", "w4g32", "palette4g8", "sparse50", "sparse50-w8"])
def test_the_unharmed_control_signed_again_passes(scheme: str, built: Path) -> None:
    assert_unharmed_passes(built / scheme, "not measured")  # their recipe sets no limits
