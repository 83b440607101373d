"""The walk: rounding by mode, declared types, memory that is given back, control flow, and what is refused."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreml_package import open_package
from edgebake_targets.mil import Mode, Unsupported, values
from edgebake_targets.mil.call import State
from edgebake_targets.mil.evaluate import Evaluator
from edgebake_targets.mil.program import program_of
from mil_ops import run
from mil_packages import blob, block, constant, function, held, model, operation, save, stored

VECTOR = ("float32", (4,))
HALF = ("float16", (4,))
X = {"x": VECTOR}


def evaluator(folder: Path, main: Any, mode: Mode = Mode.DECLARED, weights: bytes = b"") -> Evaluator:
    path = save(folder / "m.mlpackage", model(main), weights)
    return Evaluator.of(program_of(open_package(path)).functions["main"], mode)


def halves() -> Any:
    """x * 1.001 in float16, then in float32."""
    ops = [
        operation("cast", {"h": HALF}, x="%x", dtype="fp16"),
        operation("mul", {"m": HALF}, x="%h", y=held(1.001, "float16")),
        operation("cast", {"y": VECTOR}, x="%m", dtype="fp32"),
    ]
    return function(X, ops, ["y"])


def test_results_are_rounded_to_their_declared_type_as_the_mode_says(tmp_path: Path) -> None:
    x = torch.tensor([1 / 3, 2e-8, 60000.0, -7.7])
    factor = np.float16(1.001)
    with np.errstate(over="ignore"):
        declared = (x.numpy().astype(np.float16).astype(np.float32) * np.float32(factor)).astype(np.float16)
    for mode, expected in (
        (Mode.FP32, x.numpy() * np.float32(factor)),
        (Mode.DECLARED, declared.astype(np.float32)),
        (Mode.FP16_WORST, declared.astype(np.float32)),
    ):
        folder = tmp_path / mode
        folder.mkdir()
        (y,) = evaluator(folder, halves(), mode)({"x": x}).values()
        np.testing.assert_array_equal(y.numpy(), expected)


def test_only_the_worst_mode_rounds_sums(tmp_path: Path) -> None:
    """1024 + 1 + 1 ... : float16 cannot count on from 2048."""
    wide = {"x": ("float16", (4096,))}
    main = function(wide, [operation("reduce_sum", {"y": ("float16", (1,))}, x="%x", axes=[0], keep_dims=True)], ["y"])
    found = {}
    for mode in Mode:
        (tmp_path / mode).mkdir()
        found[mode] = float(evaluator(tmp_path / mode, main, mode)({"x": torch.ones(4096)})["y"])
    assert found[Mode.FP32] == found[Mode.DECLARED] == 4096
    assert found[Mode.FP16_WORST] < 4096


def test_integers_come_out_in_their_declared_type(tmp_path: Path) -> None:
    ops = [operation("cast", {"y": ("int32", (4,))}, x="%x", dtype="int32")]
    (y,) = evaluator(tmp_path, function(X, ops, ["y"]))({"x": torch.tensor([1.9, -1.9, 0, 3])}).values()
    assert (y.dtype, y.tolist()) == (torch.int32, [1, -1, 0, 3])


def test_a_shape_that_contradicts_the_declaration_names_the_operation(tmp_path: Path) -> None:
    main = function(X, [operation("relu", {"y": ("float32", (3,))}, x="%x")], ["y"])
    with pytest.raises(ArtifactDamaged, match=r"relu y: y has the shape \(4,\), declared is \(3,\)"):
        evaluator(tmp_path, main)({"x": torch.zeros(4)})
    with pytest.raises(ArtifactDamaged, match=r"input x has the shape \(2, 2\)"):
        evaluator(tmp_path / "b", function(X, [operation("relu", {"y": VECTOR}, x="%x")], ["y"]))(
            {"x": torch.zeros(2, 2)}
        )


def test_an_impossible_operation_is_named_with_its_reason(tmp_path: Path) -> None:
    main = function(X, [operation("add", {"y": VECTOR}, x="%x", y=[1.0, 2.0, 3.0])], ["y"])
    with pytest.raises(ArtifactDamaged, match=r"add y cannot be evaluated: The size of tensor a \(4\) must match"):
        evaluator(tmp_path, main)({"x": torch.zeros(4)})
    main = function(X, [operation("reshape", {"y": VECTOR}, x="%x", shape=[5])], ["y"])
    with pytest.raises(
        ArtifactDamaged, match=r"reshape y cannot be evaluated: reshape of \[4\] to \[5\]: 4 values do not"
    ):
        evaluator(tmp_path / "a", main)({"x": torch.zeros(4)})
    main = function(X, [operation("relu", {"y": VECTOR}, other="%x")], ["y"])
    with pytest.raises(ArtifactDamaged, match="relu y cannot be evaluated: 'x'"):
        evaluator(tmp_path / "b", main)({"x": torch.zeros(4)})


def test_every_unknown_operator_is_named_before_anything_runs(tmp_path: Path) -> None:
    inner = block([operation("warp", {"w2": VECTOR}, x="%x")], ["w2"])
    ops = [
        operation("warp", {"w1": VECTOR}, x="%x"),
        operation("fold", {"f": VECTOR}, x="%w1"),
        operation("cond", {"y": VECTOR}, [inner, block([], ["f"])], pred=True),
    ]
    with pytest.raises(
        Unsupported, match=r"operator fold \(1 times\), operator warp \(2 times\) cannot be interpreted"
    ):
        evaluator(tmp_path, function(X, ops, ["y"]))


def test_values_are_given_back_after_their_last_use(tmp_path: Path) -> None:
    names = [f"v{i}" for i in range(6)]
    ops = [operation("add", {n: VECTOR}, x=f"%{b}", y=1.0) for b, n in zip(["x", *names], names, strict=False)]
    alive: list[int] = []
    seen: list[weakref.ref[torch.Tensor]] = []

    def watch(_operation: Any, _name: str, value: torch.Tensor) -> None:
        seen.append(weakref.ref(value))
        alive.append(sum(ref() is not None for ref in seen))

    evaluator(tmp_path, function(X, ops, ["v5"]))({"x": torch.zeros(4)}, watch)
    assert max(alive) == 2  # the one that is read and the one that is made


def test_constants_are_made_once_and_dropped_beyond_the_budget(tmp_path: Path) -> None:
    weights = np.ones((200, 200), np.float16)
    main = function(
        {"x": ("float32", (200, 200))},
        [
            constant("w", stored("float16", weights.shape, 64)),
            operation("add", {"y": ("float32", (200, 200))}, x="%x", y="%w"),
        ],
        ["y"],
    )
    evaluate = evaluator(tmp_path, main, weights=blob(weights, 1))
    for _ in range(3):
        assert float(evaluate({"x": torch.zeros(200, 200)})["y"].sum()) == weights.size
    assert evaluate.constants.spent == [weights.size * 4]
    object.__setattr__(evaluate.constants, "budget", 0)
    evaluate.constants.kept.clear()
    assert float(evaluate({"x": torch.zeros(200, 200)})["y"].sum()) == weights.size
    assert not evaluate.constants.kept


def test_a_decompressed_constant_is_rounded_to_its_declared_type(tmp_path: Path) -> None:
    data = np.array([[3, -5], [7, 100]], np.int8)
    ops = [
        constant("data", held(data)),
        constant("scale", held(np.array([[0.1], [0.3]], np.float16))),
        operation("constexpr_blockwise_shift_scale", {"w": ("float16", (2, 2))}, data="%data", scale="%scale"),
        operation("add", {"y": ("float32", (2, 2))}, x="%x", y="%w"),
    ]
    main = function({"x": ("float32", (2, 2))}, ops, ["y"])
    scale = np.array([[0.1], [0.3]], np.float16).astype(np.float32)
    for mode, exact in ((Mode.FP32, data * scale), (Mode.DECLARED, (data * scale).astype(np.float16))):
        (tmp_path / mode).mkdir()
        (y,) = evaluator(tmp_path / mode, main, mode)({"x": torch.zeros(2, 2)}).values()
        np.testing.assert_array_equal(y.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("pred", [True, False])
def test_cond_evaluates_one_of_its_blocks(tmp_path: Path, pred: bool) -> None:
    yes = block([operation("add", {"a": VECTOR}, x="%x", y=1.0)], ["a"])
    no = block([operation("mul", {"a": VECTOR}, x="%x", y=5.0)], ["a"])
    flag = [constant("flag", pred), operation("cond", {"y": VECTOR}, [yes, no], pred="%flag")]
    seen = []
    evaluate = evaluator(tmp_path, function(X, flag, ["y"]))
    result = evaluate({"x": torch.arange(4.0)}, lambda op, _n, _v: seen.append(op.operator))
    assert result["y"].tolist() == ([1, 2, 3, 4] if pred else [0, 5, 10, 15])
    assert seen == (["add", "cond"] if pred else ["mul", "cond"])


def countdown(body: list[Any], outputs: list[str]) -> Any:
    """while n > 0, with x from outside and the carried n and total."""
    carried = {"n": ("int32", ()), "total": VECTOR}
    goes_on = block([operation("greater", {"more": ("bool", ())}, x="%n", y=0)], ["more"], carried)
    other = {"n2": ("int32", ()), "total2": VECTOR}
    loop = operation("while_loop", {"n3": ("int32", ()), "y": VECTOR}, loop_vars=["%n0", "%zero"])
    loop.blocks.extend([goes_on, block(body, outputs, other)])
    return function(X, [constant("n0", 5), constant("zero", np.zeros(4, np.float32)), loop], ["y"])


def test_while_loop_carries_its_values(tmp_path: Path) -> None:
    body = [
        operation("sub", {"less": ("int32", ())}, x="%n2", y=1),
        operation("add", {"more2": VECTOR}, x="%total2", y="%x"),
    ]
    evaluate = evaluator(tmp_path, countdown(body, ["less", "more2"]))
    for _ in range(2):
        assert evaluate({"x": torch.arange(4.0)})["y"].tolist() == [0, 5, 10, 15]


def test_a_loop_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgebake_targets.mil.ops.control_flow.MOST_ROUNDS", 50)
    with pytest.raises(Unsupported, match="while_loop n3: a loop of more than 50 rounds"):
        evaluator(tmp_path, countdown([], ["n2", "total2"]))({"x": torch.zeros(4)})


SHAPES = [
    ((2, 3), (2, 3), (2, 3)),
    ((2, 1), (3,), (1, 1)),
    ((), (4,), ()),
    ((1, 0), (1, 0), ()),
    ((5, 1, 2), (), (3, 2)),
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_select_takes_value_by_value(shapes: tuple[tuple[int, ...], ...]) -> None:
    rng = np.random.default_rng(0)
    cond, a, b = rng.random(shapes[0]) < 0.5, *(rng.normal(size=s).astype(np.float32) for s in shapes[1:])
    np.testing.assert_array_equal(run("select", cond=cond, a=a, b=b).numpy(), np.where(cond, a, b).astype(np.float32))


def test_states_are_read_and_replaced() -> None:
    state = State(name="memory", value=torch.zeros(3))
    before = state.value
    from edgebake_targets.mil.call import Call
    from edgebake_targets.mil.operators import operators

    def call(operator: str, **inputs: Any) -> Any:
        return operators()[operator](Call(operator=operator, inputs=inputs, outputs=()))

    assert call("write_state", input=state, data=torch.tensor([1.0, 2, 3])) == ()
    assert call("read_state", input=state).tolist() == [1, 2, 3]
    assert call("coreml_update_state", state=state, value=torch.ones(3)).tolist() == [1, 1, 1]
    assert (state.value.tolist(), before.tolist()) == ([1, 1, 1], [0, 0, 0])
    with pytest.raises(ValueError, match=r"\(2,\) written to the state memory of \(3,\)"):
        call("write_state", input=state, data=torch.zeros(2))
    with pytest.raises(TypeError, match="input is no state"):
        call("read_state", input=torch.zeros(2))


def test_a_large_value_is_rounded_in_its_own_memory() -> None:
    exact = torch.randn(2**20 + 5, generator=torch.Generator().manual_seed(0)) * 1e3
    value = exact.clone()
    found = values.rounded_in_place(value, "float16")
    assert found.data_ptr() == value.data_ptr()
    assert torch.equal(found, values.rounded(exact, "float16"))
    turned = torch.arange(6.0).reshape(2, 3).T / 3  # not contiguous: a copy
    assert torch.equal(values.rounded_in_place(turned, "bfloat16"), values.rounded(turned, "bfloat16"))
    assert values.rounded_in_place(value, "float32") is value
