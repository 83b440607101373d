"""Operators as coremltools stores them, in programs of every op set, against numpy.

The other tests call operators by themselves; here their parameters come out of a package, with the names, types and
declared shapes that it has there. Values are inputs, because the converter would fold constants away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgebake_targets.mil import MilModel

ct = pytest.importorskip("coremltools")
mil = pytest.importorskip("coremltools.converters.mil")

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
IMAGE = np.random.default_rng(1).standard_normal((2, 8, 4, 4)).astype(np.float32)
I = np.array([2, 0, 1], np.int32)  # noqa: E741 - indices
N = 2
SCALE, ZERO = np.array([0.1, 0.2, 0.3], np.float32), np.array([1, 2, 3], np.int8)


@dataclass(frozen=True)
class Case:
    """``build`` makes the value from the builder and the inputs; ``since`` is the first generation that has it."""

    build: Callable[..., Any]
    expected: Any
    since: int = 5


def _loop(b: Any, x: Any, n: Any) -> Any:
    """A list that a loop fills with multiples of a row, then changed at two places."""
    row = b.squeeze(x=b.slice_by_size(x=x, begin=[0, 0, 0], size=[1, 1, 4]), axes=[0, 1])
    filled = b.while_loop(
        _cond=lambda k, _: b.less(x=k, y=n),
        _body=lambda k, ls: (
            b.add(x=k, y=1),
            b.list_write(ls=ls, index=k, value=b.mul(x=row, y=b.cast(x=k, dtype="fp32"))),
        ),
        loop_vars=(0, b.make_list(init_length=1, elem_shape=(4,))),
    )[1]
    return b.list_scatter(ls=filled, indices=[3, 0], value=np.ones((2, 4), np.float32))


def _all_of(b: Any, ls: Any) -> Any:
    return b.list_gather(ls=ls, indices=b.range_1d(start=0, end=b.list_length(ls=ls), step=1))


def _boxes(b: Any, m: Any) -> Any:
    return b.abs(x=b.reshape(x=b.slice_by_size(x=m, begin=[0, 0, 0, 0], size=[2, 1, 4, 4]), shape=[2, 4, 4]))


def _block_order(x: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    return np.concatenate([x[:, :, r::rows, c::columns] for r in range(rows) for c in range(columns)])


def _scattered(mode: str) -> NDArray[Any]:
    result = X.copy()
    for place, index in enumerate(I):
        result[:, index] = X[:, place] if mode == "update" else result[:, index] + X[:, place]
    return result


CASES = {
    "slice_open": Case(
        lambda b, x, m, i, n: b.slice_by_index(x=x, begin=b.concat(values=[0, n, 0], axis=0), end=[2, 3, 2]),
        X[:, 2:, :2],
    ),
    "slice_back": Case(
        lambda b, x, m, i, n: b.slice_by_index(
            x=x,
            begin=[0, 2, 0],
            end=[0, 0, 4],
            stride=[1, -1, 2],
            begin_mask=[True, False, False],
            end_mask=[True, True, False],
        ),
        X[:, ::-1, ::2],
    ),
    "slice_squeezed": Case(
        lambda b, x, m, i, n: b.slice_by_index(x=x, begin=[0, -1, 1], end=[0, 0, 4], squeeze_mask=[True, True, False]),
        X[0, -1, 1:],
    ),
    "slice_sized": Case(lambda b, x, m, i, n: b.slice_by_size(x=x, begin=[0, 1, 0], size=[-1, 2, 3]), X[:, 1:, :3]),
    "slice_updated": Case(
        lambda b, x, m, i, n: b.slice_update(
            x=x,
            update=b.reshape(x=b.slice_by_size(x=m, begin=[0, 0, 0, 0], size=[1, 1, 2, 4]), shape=[1, 2, 4]),
            begin=[0, 2, 0],
            end=[1, 0, 0],
            stride=[1, -1, 1],
            end_mask=[False, False, True],
        ),
        np.stack([np.stack([X[0, 0], IMAGE[0, 0, 1], IMAGE[0, 0, 0]]), X[1]]),
        since=8,
    ),
    "reshape_dynamic": Case(
        lambda b, x, m, i, n: b.reshape(x=x, shape=b.concat(values=[n, -1], axis=0)), X.reshape(2, 12)
    ),
    "reshape_zero": Case(lambda b, x, m, i, n: b.reshape(x=x, shape=[0, -1, 2]), X.reshape(2, 6, 2)),
    "reshape_like": Case(
        lambda b, x, m, i, n: b.reshape_like(
            x=x, ref_tensors=[x, x], begins=[1, 0], ends=[3, 1], end_masks=[True, False]
        ),
        X.reshape(3, 4, 2),
        since=6,
    ),
    "split_left": Case(lambda b, x, m, i, n: b.split(x=x, split_sizes=[1, 3], axis=-1)[0], X[..., :1]),
    "split_right": Case(lambda b, x, m, i, n: b.split(x=x, split_sizes=[1, 3], axis=-1)[1], X[..., 1:]),
    "concat_turns": Case(
        lambda b, x, m, i, n: b.concat(values=[x, b.mul(x=x, y=2.0)], axis=1, interleave=True),
        np.stack([X, X * 2], 2).reshape(2, 6, 4),
    ),
    "stacked": Case(lambda b, x, m, i, n: b.stack(values=[x, b.abs(x=x)], axis=-1), np.stack([X, abs(X)], -1)),
    "top_values": Case(lambda b, x, m, i, n: b.topk(x=x, k=2, axis=-1)[0], -np.sort(-X, -1)[..., :2]),
    "top_indices": Case(lambda b, x, m, i, n: b.topk(x=x, k=2, axis=-1)[1], np.argsort(-X, -1)[..., :2]),
    "top_small_indices": Case(
        lambda b, x, m, i, n: b.cast(
            x=b.topk(x=x, k=1, ascending=True, output_indices_dtype="uint16")[1], dtype="int32"
        ),
        np.argsort(X, -1)[..., :1],
        since=7,
    ),
    "sorted": Case(lambda b, x, m, i, n: b.argsort(x=x, axis=1, ascending=True), np.argsort(X, 1)),
    "largest": Case(lambda b, x, m, i, n: b.reduce_argmax(x=x, axis=1, keep_dims=True), X.argmax(1)[:, None]),
    "smallest": Case(
        lambda b, x, m, i, n: b.cast(x=b.reduce_argmin(x=x, axis=1, output_dtype="uint16"), dtype="int32"),
        X.argmin(1),
        since=7,
    ),
    "mean": Case(lambda b, x, m, i, n: b.reduce_mean(x=x, axes=[-1, 0]), X.mean((2, 0))),
    "log_sum_exp": Case(lambda b, x, m, i, n: b.reduce_log_sum_exp(x=x, axes=[1]), np.log(np.exp(X).sum(1))),
    "norm": Case(
        lambda b, x, m, i, n: b.reduce_l2_norm(x=x, axes=[1], keep_dims=True), np.linalg.norm(X, axis=1)[:, None]
    ),
    "total": Case(lambda b, x, m, i, n: b.reduce_sum(x=i, axes=[0], keep_dims=True), I.sum(keepdims=True)),
    "gathered": Case(lambda b, x, m, i, n: b.gather(x=x, indices=i, axis=1), X[:, I]),
    "gathered_one": Case(lambda b, x, m, i, n: b.gather(x=x, indices=n, axis=1), X[:, N]),
    "gathered_along": Case(
        lambda b, x, m, i, n: b.gather_along_axis(x=x, indices=b.argsort(x=x, axis=1, ascending=True), axis=1),
        np.sort(X, 1),
    ),
    "gathered_nd": Case(
        lambda b, x, m, i, n: b.gather_nd(x=x, indices=b.stack(values=[b.minimum(x=i, y=1), i], axis=-1)),
        X[np.minimum(I, 1), I],
    ),
    "scattered": Case(
        lambda b, x, m, i, n: b.scatter(data=x, indices=i, updates=x, axis=1, mode="update"), _scattered("update")
    ),
    "scattered_sum": Case(lambda b, x, m, i, n: b.scatter(data=x, indices=i, updates=x, axis=1), _scattered("add")),
    "scattered_along": Case(
        lambda b, x, m, i, n: b.scatter_along_axis(
            data=x, indices=b.argsort(x=x, axis=1, ascending=True), updates=x, axis=1, mode="update"
        ),
        np.take_along_axis(X, np.argsort(np.argsort(X, 1), 1), 1),
    ),
    "padded": Case(
        lambda b, x, m, i, n: b.pad(x=m, pad=[1, 2, 0, 1], constant_val=3.0),
        np.pad(IMAGE, ((0, 0), (0, 0), (1, 2), (0, 1)), constant_values=3),
    ),
    "padded_mirror": Case(
        lambda b, x, m, i, n: b.pad(x=m, pad=[1, 2, 0, 1], mode="reflect"),
        np.pad(IMAGE, ((0, 0), (0, 0), (1, 2), (0, 1)), "reflect"),
    ),
    "one_hot": Case(
        lambda b, x, m, i, n: b.one_hot(indices=i, one_hot_vector_size=4, axis=0, on_value=2.0, off_value=-1.0),
        np.where(np.arange(4)[:, None] == I, 2.0, -1.0),
    ),
    "non_zero": Case(lambda b, x, m, i, n: b.non_zero(x=i), [[0], [2]]),
    "running": Case(
        lambda b, x, m, i, n: b.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        np.stack([X[:, 1] + X[:, 2], X[:, 2], 0 * X[:, 0]], 1),
    ),
    "band": Case(lambda b, x, m, i, n: b.band_part(x=x, lower=0, upper=1), np.triu(X) - np.triu(X, 2)),
    "tiled": Case(lambda b, x, m, i, n: b.tile(x=x, reps=[1, 2, 3]), np.tile(X, (1, 2, 3))),
    "filled": Case(
        lambda b, x, m, i, n: b.fill(shape=b.concat(values=[n, 3], axis=0), value=2.0), np.full((2, 3), 2.0)
    ),
    "filled_like": Case(
        lambda b, x, m, i, n: b.fill_like(ref_tensor=b.gather(x=x, indices=i, axis=1), value=1.5),
        X * 0 + 1.5,
        since=6,
    ),
    "range": Case(lambda b, x, m, i, n: b.range_1d(start=0, end=n, step=1), [0, 1]),
    "flat": Case(lambda b, x, m, i, n: b.flatten2d(x=x, axis=2), X.reshape(6, 4)),
    "shape": Case(
        lambda b, x, m, i, n: b.shape(x=b.slice_by_size(x=x, begin=[0, 0, 0], size=b.concat(values=[n, 1, 1], axis=0))),
        [2, 1, 1],
    ),
    "batches": Case(
        lambda b, x, m, i, n: b.space_to_batch(x=m, block_shape=[2, 2], paddings=[[0, 0], [2, 0]]),
        _block_order(np.pad(IMAGE, ((0, 0), (0, 0), (0, 0), (2, 0))), 2, 2),
    ),
    "depth": Case(
        lambda b, x, m, i, n: b.space_to_depth(x=m, block_size=2),
        np.concatenate([IMAGE[:, :, r::2, c::2] for r in range(2) for c in range(2)], 1),
    ),
    "unshuffled": Case(
        lambda b, x, m, i, n: b.pixel_unshuffle(x=m, downscale_factor=np.uint32(2)),
        np.stack([IMAGE[:, :, r::2, c::2] for r in range(2) for c in range(2)], 2).reshape(2, 32, 2, 2),
        since=6,
    ),
    "windows": Case(lambda b, x, m, i, n: b.sliding_windows(x=x, axis=2, size=2, stride=2), X.reshape(2, 3, 2, 2)),
    "reversed": Case(lambda b, x, m, i, n: b.reverse(x=x, axes=[1]), X[:, ::-1]),
    "sequence": Case(
        lambda b, x, m, i, n: b.reverse_sequence(
            x=x, lengths=b.slice_by_size(x=i, begin=[0], size=[2]), seq_axis=1, batch_axis=0
        ),
        np.stack([X[0, [1, 0, 2]], X[1]]),
    ),
    "quantized": Case(
        lambda b, x, m, i, n: b.dequantize(
            input=b.quantize(input=x, scale=SCALE, zero_point=ZERO, axis=1, output_dtype="int8"),
            scale=SCALE,
            zero_point=ZERO,
            axis=1,
        ),
        np.round(X / SCALE[:, None]) * SCALE[:, None],
        since=7,
    ),
    "kept_boxes": Case(
        lambda b, x, m, i, n: b.non_maximum_suppression(boxes=_boxes(b, m), scores=x, iou_threshold=1.0, max_boxes=5)[
            2
        ],
        np.pad(np.argsort(-X.max(1), 1, kind="stable"), ((0, 0), (0, 1)), constant_values=-1),
        since=7,
    ),
    "collected": Case(
        lambda b, x, m, i, n: _all_of(b, _loop(b, x, n)), np.stack([X[0, 0] ** 0, X[0, 0], X[0, 0] * 0, X[0, 0] ** 0])
    ),
    "element": Case(lambda b, x, m, i, n: b.list_read(ls=_loop(b, x, n), index=1), X[0, 0]),
}


def _program(target: Any, generation: int) -> Any:
    b = mil.Builder

    def every_case(x: Any, m: Any, i: Any, n: Any) -> tuple[Any, ...]:
        single = b.squeeze(x=n)
        made = {name: case.build(b, x, m, i, single) for name, case in CASES.items() if case.since <= generation}
        return tuple(b.identity(x=value, name=name) for name, value in made.items())

    inputs = [b.TensorSpec(shape=X.shape), b.TensorSpec(shape=IMAGE.shape)]
    inputs += [b.TensorSpec(shape=(size,), dtype=mil.mil.types.int32) for size in (3, 1)]
    program = b.program(input_specs=inputs, opset_version=target)(every_case)
    return ct.convert(program, minimum_deployment_target=target, compute_precision=ct.precision.FLOAT32)


@pytest.mark.parametrize(("generation", "system"), [(5, "iOS15"), (6, "iOS16"), (7, "iOS17"), (8, "iOS18")])
def test_operators_of_packages(generation: int, system: str, tmp_path: Path) -> None:
    _program(getattr(ct.target, system), generation).save(str(tmp_path / "model.mlpackage"))
    given = {"x": X, "m": IMAGE, "i": I, "n": np.array([N], np.int32)}
    results = MilModel(tmp_path / "model.mlpackage").predict(given)
    wanted = {name: case.expected for name, case in CASES.items() if case.since <= generation}
    assert results.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert results[name].shape == np.shape(expected), name
        np.testing.assert_allclose(results[name], expected, rtol=2e-6, atol=1e-6, err_msg=name)


def test_a_classifier(tmp_path: Path) -> None:
    """The label and the probability of each class, in the order of the classes."""
    b = mil.Builder

    @b.program(input_specs=[b.TensorSpec(shape=(1, 3))], opset_version=ct.target.iOS16)
    def program(x: Any) -> Any:
        return b.softmax(x=x, axis=-1, name="probabilities")

    labels = ct.ClassifierConfig(["cat", "dog", "bee"])
    ct.convert(program, classifier_config=labels, minimum_deployment_target=ct.target.iOS16).save(
        str(tmp_path / "model.mlpackage")
    )
    results = MilModel(tmp_path / "model.mlpackage").predict({"x": np.log([[1, 7, 2]]).astype(np.float32)})
    assert results["classLabel"] == "dog"
    assert results["classLabel_probs"] == pytest.approx({"cat": 0.1, "dog": 0.7, "bee": 0.2}, abs=1e-3)
