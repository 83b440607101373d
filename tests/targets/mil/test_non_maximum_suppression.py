"""Non-maximum suppression against a search that compares every pair of boxes by its corners."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mil_ops import run


def _overlap(a: NDArray[Any], b: Any) -> float:
    """Intersection over union of two boxes given by centre and size, from their corners."""
    sides = [
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2) for i in (0, 1)
    ]
    shared = max(sides[0], 0) * max(sides[1], 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def _kept(
    boxes: NDArray[Any], scores: NDArray[Any], limit: float, threshold: float, most: int, apart: bool | None
) -> list[int]:
    """Indices by falling score: a box stays when no box that stayed covers it."""
    kept = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i].max()):
        rivals = [k for k in kept if not apart or scores[k].argmax() == scores[index].argmax()]
        if scores[index].max() >= threshold and all(_overlap(boxes[k], boxes[index]) <= limit for k in rivals):
            kept.append(index)
    return (kept or [int(scores.max(1).argmax())])[:most]


@pytest.mark.parametrize("apart", [None, True])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize(
    ("count", "most", "limit", "threshold"),
    [(30, 37, 0.3, -50), (30, 5, 0.1, 0), (10, 7, 0.9, 200), (1, 1, 0.5, 0), (60, 20, 0.01, -999)],
)
def test_non_maximum_suppression(
    count: int, most: int, limit: float, threshold: float, classes: int, apart: bool | None
) -> None:
    random = np.random.default_rng(count)
    boxes = random.uniform(5, 100, (2, count, 4)).astype(np.float32)
    scores = random.uniform(-100, 100, (2, count, classes)).astype(np.float32)
    parameters = {"iou_threshold": limit, "max_boxes": most, "per_class_suppression": apart}
    old = run(
        "non_maximum_suppression", boxes=boxes, scores=scores, score_threshold=threshold, opset="CoreML6", **parameters
    )
    new = run("non_maximum_suppression", boxes=boxes.swapaxes(1, 2), scores=scores.swapaxes(1, 2), **parameters)
    assert [tuple(r.shape) for r in old] == [(2, most, 4), (2, most, classes), (2, most), (2,)]
    assert [tuple(r.shape) for r in new] == [(2, 4, most), (2, classes, most), (2, most)]
    for batch in range(2):
        for results, lowest in ((old, threshold), ((new[0].mT, new[1].mT, new[2], None), -np.inf)):
            kept = _kept(boxes[batch], scores[batch], limit, lowest, most, apart)
            padding = most - len(kept)
            np.testing.assert_array_equal(results[2][batch].numpy(), kept + [-1] * padding)
            np.testing.assert_array_equal(results[0][batch].numpy(), np.pad(boxes[batch, kept], ((0, padding), (0, 0))))
            np.testing.assert_array_equal(
                results[1][batch].numpy(), np.pad(scores[batch, kept], ((0, padding), (0, 0)))
            )
            assert results[3] is None or results[3][batch] == len(kept)


def test_boxes_without_area_suppress_nothing() -> None:
    boxes = np.array([[[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]], np.float32).swapaxes(1, 2)
    scores = np.array([[[1, 3, 2]]], np.float32)
    result = run("non_maximum_suppression", boxes=boxes, scores=scores, iou_threshold=0.0, max_boxes=3)
    assert result[2].tolist() == [[1, 2, 0]]


def test_boxes_and_scores_must_agree() -> None:
    with pytest.raises(ValueError, match=r"boxes .1, 3, 4., scores .1, 2, 1."):
        run(
            "non_maximum_suppression",
            boxes=np.zeros((1, 4, 3)),
            scores=np.zeros((1, 1, 2)),
            iou_threshold=0.5,
            max_boxes=1,
        )
