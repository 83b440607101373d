"""Reading a program: what is whole is read as it stands, what is not is refused with its place, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreml_package import open_package
from edgebake_targets.mil import Unsupported
from edgebake_targets.mil.call import TensorType
from edgebake_targets.mil.program import program_of
from edgebake_targets.mil.values import value_of
from mil_packages import blob, block, constant, function, model, operation, save, stored

X = {"x": ("float32", (2, 3))}
ROW = ("float32", (2, 3))


def relu(source: str, name: str) -> Any:
    return operation("relu", {name: ROW}, x=f"%{source}")


def test_a_program_is_read_as_it_stands(tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float16).reshape(2, 3)
    ops = [
        constant("w", stored("float16", (2, 3), 64)),
        constant("text", "hello"),
        operation("add", {"y": ("float16", (None, 3))}, x="%x", y="%w"),
    ]
    path = save(tmp_path / "m.mlpackage", model(function(X, ops, ["y"])), blob(weights, 1))
    program = program_of(open_package(path))
    (main,) = program.functions.values()
    assert (main.name, main.opset, main.block.outputs) == ("main", "CoreML8", ("y",))
    w, text, add = main.block.operations
    assert value_of(w.attributes["val"]).tolist() == weights.tolist()
    assert value_of(text.attributes["val"]) == "hello"
    assert add.inputs == {"x": ("x",), "y": ("w",)}
    assert add.outputs[0].type == TensorType(dtype="float16", shape=(None, 3))


def _specialised(main: Any) -> Any:
    main.opset = "CoreML9"
    return main


def _twice() -> Any:
    return function(X, [relu("x", "y"), relu("x", "y")], ["y"])


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown value": (lambda: function(X, [relu("nobody", "y")], ["y"]), "reads 'nobody', which nothing before it"),
    "use before definition": (lambda: function(X, [relu("z", "y"), relu("x", "z")], ["y"]), "reads 'z', which nothing"),
    "cycle": (lambda: function(X, [relu("z", "y"), relu("y", "z")], ["z"]), "reads 'z', which nothing before it"),
    "own result": (lambda: function(X, [relu("y", "y")], ["y"]), "reads 'y', which nothing before it"),
    "unknown output": (lambda: function(X, [relu("x", "y")], ["z"]), "returns 'z', which nothing defines"),
    "defined twice": (_twice, "the value 'y' is defined twice"),
    "input redefined": (lambda: function(X, [relu("x", "x")], ["x"]), "the value 'x' is defined twice"),
    "no block": (lambda: _specialised(function(X, [relu("x", "y")], ["y"])), "no block for its op set 'CoreML9'"),
    "huge": (
        lambda: function(X, [operation("relu", {"y": ("float32", (2**40, 3))}, x="%x")], ["y"]),
        "y is declared with the shape (1099511627776, 3), more than 16 GiB",
    ),
    "deep": (lambda: _nested(40), "nested deeper than 32"),
    "outside the block": (
        lambda: function(
            X,
            [
                operation("cond", {"a": ROW}, [block([relu("x", "b")], ["b"]), block([], ["x"])], pred=True),
                relu("b", "y"),
            ],
            ["y"],
        ),
        "reads 'b', which nothing before it defines",
    ),
}


def _nested(depth: int) -> Any:
    inner = block([relu("x", "r0")], ["r0"])
    for level in range(1, depth):
        inner = block([operation("cond", {f"r{level}": ROW}, [inner, inner], pred=True)], [f"r{level}"])
        del inner.operations[0].blocks[1]
    made = function(X, [], [])
    made.block_specializations["CoreML8"].CopyFrom(inner)
    return made


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_program_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    make, text = BROKEN[case]
    spec = model(function(X, [relu("x", "y")], ["y"]))
    spec.mlProgram.functions["main"].CopyFrom(make())
    with pytest.raises(ArtifactDamaged) as caught:
        program_of(open_package(save(tmp_path / "m.mlpackage", spec)))
    assert text in str(caught.value)
    assert "m.mlpackage" in str(caught.value)
    assert "build or copy the package again" in str(caught.value)


VALUES = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    ("value", "weights", "text"),
    [
        (
            stored("float32", (2, 3), 64, "@model_path/../../secret"),
            b"",
            "weight file @model_path/../../secret is missing",
        ),
        (stored("float32", (2, 3), 2**40), blob(VALUES, 2), "ends before byte 1099511627776"),
        (stored("float32", (2, 3), 65), blob(VALUES, 2), "is damaged at byte 65"),
        (stored("float32", (3, 3), 64), blob(VALUES, 2), "is damaged at byte 64"),
        (stored("float32", (2, 3), 64), blob(VALUES, 2)[:-1], "is damaged at byte 64"),
        (stored("int32", (2, 3), 64), blob(VALUES, 2), "is declared as int32 and stored as float32"),
        (stored("float32", (2**33,), 64), blob(VALUES, 2), "more than 16 GiB"),
    ],
)
def test_a_constant_that_does_not_add_up_is_refused(tmp_path: Path, value: Any, weights: bytes, text: str) -> None:
    spec = model(function(X, [constant("w", value), operation("add", {"y": ROW}, x="%x", y="%w")], ["y"]))
    with pytest.raises(ArtifactDamaged) as caught:
        program_of(open_package(save(tmp_path / "m.mlpackage", spec, weights)))
    assert text in str(caught.value)


def test_a_weight_file_that_leads_outside_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.mlpackage", model(function(X, [relu("x", "y")], ["y"])))
    (tmp_path / "secret").write_bytes(b"secret")
    (path / "Data/com.apple.CoreML/weights/link.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactDamaged, match="a file outside itself"):
        open_package(path)


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    spec = model(function(X, [relu("x", "y")], ["y"]))
    spec.neuralNetwork.SetInParent()
    with pytest.raises(Unsupported, match="holds a neuralNetwork; only ML Programs can be interpreted"):
        program_of(open_package(save(tmp_path / "m.mlpackage", spec)))


def test_large_weights_are_mapped_and_not_read(tmp_path: Path) -> None:
    import psutil

    values = np.zeros(64 * 2**20, np.float16)  # 128 MiB
    ops = [constant("w", stored("float16", values.shape, 64)), relu("x", "y")]
    path = save(tmp_path / "m.mlpackage", model(function(X, ops, ["y"])), blob(values, 1))
    before = psutil.Process().memory_info().rss
    program = program_of(open_package(path))
    assert psutil.Process().memory_info().rss - before < 2**24
    assert program.functions["main"].block.operations[0].attributes["val"].payload.data.nbytes == values.nbytes  # type: ignore[union-attr]
