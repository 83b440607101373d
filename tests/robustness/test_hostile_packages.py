"""Core ML packages damaged in thousands of ways: each is refused in words or gives a result; none harms the reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hostile_packages
from mil_packages import blob, block, constant, function, held, model, operation, save, stored

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and /proc")
FAST, ALL = 60, 2400
ROWS = ("float32", (2, 4))


def perceptron(folder: Path) -> None:
    """A linear layer from the weight file, an activation, shapes and slices."""
    ops = [
        constant("w", stored("float16", (4, 4), 64)),
        operation("cast", {"h": ("float16", (2, 4))}, x="%x", dtype="fp16"),
        operation("linear", {"l": ("float16", (2, 4))}, x="%h", weight="%w", bias=held(np.zeros(4), "float16")),
        operation("softmax", {"s": ("float16", (2, 4))}, x="%l", axis=-1),
        operation("reshape", {"r": ("float16", (1, 8))}, x="%s", shape=[1, -1]),
        operation("slice_by_index", {"c": ("float16", (1, 4))}, x="%r", begin=[0, 2], end=[1, 6], stride=[1, 1]),
        operation("tile", {"t": ("float16", (2, 4))}, x="%c", reps=[2, 1]),
        operation("cast", {"y": ROWS}, x="%t", dtype="fp32"),
    ]
    weights = blob(np.arange(16, dtype=np.float16).reshape(4, 4), 1)
    save(folder / "perceptron.mlpackage", model(function({"x": ROWS}, ops, ["y"])), weights)


def picture(folder: Path) -> None:
    """Convolution, pooling, resizing, padding."""
    wide = ("float32", (1, 2, 6, 6))
    kernel = held(np.ones((2, 2, 3, 3)), "float32")
    ops = [
        operation(
            "conv", {"a": wide}, x="%x", weight=kernel, strides=[1, 1], pad_type="custom", pad=[1, 1, 1, 1], groups=1
        ),
        operation(
            "max_pool", {"b": ("float32", (1, 2, 3, 3))}, x="%a", kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"
        ),
        operation("upsample_nearest_neighbor", {"c": wide}, x="%b", scale_factor_height=2, scale_factor_width=2),
        operation("pad", {"d": ("float32", (1, 2, 8, 8))}, x="%c", pad=[0, 0, 0, 0, 1, 1, 1, 1], mode="constant"),
        operation("reduce_mean", {"e": ("float32", (1, 2, 1, 1))}, x="%d", axes=[2, 3], keep_dims=True),
        operation("gather", {"y": ("float32", (1, 3, 1, 1))}, x="%e", indices=[0, 1, 1], axis=1),
    ]
    save(folder / "picture.mlpackage", model(function({"x": wide}, ops, ["y"])))


def looping(folder: Path) -> None:
    """A loop, a choice, a state and a decompressed weight."""
    carried = {"n": ("int32", ()), "total": ROWS}
    goes_on = block([operation("greater", {"more": ("bool", ())}, x="%n", y=0)], ["more"], carried)
    steps = [
        operation("sub", {"less": ("int32", ())}, x="%n2", y=1),
        operation("add", {"sum": ROWS}, x="%total2", y="%x"),
    ]
    body = block(steps, ["less", "sum"], {"n2": ("int32", ()), "total2": ROWS})
    loop = operation("while_loop", {"left": ("int32", ()), "l": ROWS}, [goes_on, body], loop_vars=["%n0", "%zero"])
    yes = block([operation("mul", {"p": ROWS}, x="%l", y=2.0)], ["p"])
    no = block([operation("exp", {"q": ROWS}, x="%l")], ["q"])
    data, scale = held(np.ones((2, 4), np.int8)), held(np.full((2, 1), 0.5, np.float32))
    ops = [
        constant("n0", 3),
        constant("zero", np.zeros((2, 4), np.float32)),
        operation("constexpr_blockwise_shift_scale", {"w": ROWS}, data=data, scale=scale),
        loop,
        operation("greater", {"large": ("bool", ())}, x="%left", y=1),
        operation("cond", {"c": ROWS}, [yes, no], pred="%large"),
        operation("read_state", {"m": ROWS}, input="%memory"),
        operation("add", {"a": ROWS}, x="%c", y="%m"),
        operation("coreml_update_state", {"u": ROWS}, state="%memory", value="%a"),
        operation("mul", {"y": ROWS}, x="%u", y="%w"),
    ]
    main = function({"x": ROWS}, ops, ["y"], states={"memory": ROWS})
    save(folder / "looping.mlpackage", model(main))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    for make in (perceptron, picture, looping):
        make(folder)
    return folder


def outcomes(seeds: Path, first: int, count: int) -> list[dict[str, Any]]:
    script = Path(hostile_packages.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(seeds), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def held_to_words(found: list[dict[str, Any]]) -> Counter[str]:
    bad = [told for told in found if told["ending"] not in hostile_packages.ENDINGS]
    assert not bad, json.dumps(bad[:5], indent=1)
    assert all(told["said"] for told in found if told["ending"] != "result")
    return Counter(told["ending"] for told in found)


def test_the_seeds_themselves_give_results(seeds: Path) -> None:
    for package in sorted(seeds.glob("*.mlpackage")):
        hostile_packages.judge(package)


def test_damaged_packages_end_in_words(seeds: Path) -> None:
    endings = held_to_words(outcomes(seeds, 0, FAST))
    assert sum(endings.values()) == FAST
    assert endings["ArtifactDamaged"] > FAST / 4


@pytest.mark.slow
def test_thousands_of_damaged_packages_end_in_words(seeds: Path) -> None:
    """Every kind of damage leads to every kind of ending that it can: the sweep is no sweep of one early refusal."""
    found = outcomes(seeds, FAST, ALL)
    endings = held_to_words(found)
    print(endings)
    assert len(found) == ALL
    assert endings["ArtifactDamaged"] > ALL / 4
    assert min(endings["result"], endings["Unsupported"]) > ALL / 50
    for kind in hostile_packages.MUTATIONS:
        assert sum(kind in told["mutations"] for told in found) > ALL / 50, kind
