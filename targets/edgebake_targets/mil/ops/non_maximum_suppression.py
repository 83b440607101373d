"""Non-maximum suppression of boxes, in the layouts of iOS 15 and iOS 17."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgebake_targets.mil.call import Call, Operator
from edgebake_targets.mil.ops._shapes import bounded


def _overlap(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of ``box`` with each of ``others``: (x, y, width, height), (x, y) the centre."""
    low = torch.maximum(box[:2] - box[2:] / 2, others[:, :2] - others[:, 2:] / 2)
    high = torch.minimum(box[:2] + box[2:] / 2, others[:, :2] + others[:, 2:] / 2)
    shared = (high - low).clamp(min=0).prod(1)
    union = box[2:].prod() + others[:, 2:].prod(1) - shared
    return torch.where(union > 0, shared / union, torch.zeros(()))  # boxes without area suppress nothing


def _selected(call: Call, boxes: torch.Tensor, scores: torch.Tensor, most: int) -> list[int]:
    """Indices of the boxes kept, best first; the best one when no score reaches the threshold."""
    best, classes = scores.max(1)
    limit, threshold = call.number("iou_threshold"), call.number("score_threshold", float("-inf"))
    apart = call.flag("per_class_suppression", False)
    order = best.argsort(descending=True, stable=True)
    open_ = best >= threshold
    if call.since(7):
        open_ = torch.ones_like(open_)
    chosen: list[int] = []
    for index in order.tolist():
        if len(chosen) == most:
            break
        if open_[index]:
            chosen.append(index)
            covered = _overlap(boxes[index], boxes) > limit
            open_ &= ~(covered & (classes == classes[index]) if apart else covered)
    return chosen or order[:1].tolist()


def non_maximum_suppression(call: Call) -> tuple[torch.Tensor, ...]:
    """Boxes, scores and indices of those kept, padded with 0 and -1, and before iOS 17 how many they are.

    A box has the class and the score of its highest score. Since iOS 17 the boxes lie along the last axis, and no score
    is too low.
    """
    boxes, scores, most = call["boxes"].float(), call["scores"].float(), call.integer("max_boxes")
    last = call.since(7)
    if last:
        boxes, scores = boxes.mT, scores.mT
    if boxes.ndim != 3 or scores.ndim != 3 or boxes.shape[:2] != scores.shape[:2] or boxes.shape[2] != 4:
        raise ValueError(f"non_maximum_suppression of boxes {list(boxes.shape)}, scores {list(scores.shape)}")
    batches, _, classes = scores.shape
    kept_boxes = torch.zeros(bounded(call, [batches, most, 4]))
    kept_scores = torch.zeros(bounded(call, [batches, most, classes]))
    indices = torch.full((batches, most), -1, dtype=torch.int32)
    counts = torch.zeros(batches, dtype=torch.int32)
    for batch in range(batches):
        chosen = _selected(call, boxes[batch], scores[batch], most)[:most]
        kept_boxes[batch, : len(chosen)] = boxes[batch, chosen]
        kept_scores[batch, : len(chosen)] = scores[batch, chosen]
        indices[batch, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        counts[batch] = len(chosen)
    return (kept_boxes.mT, kept_scores.mT, indices) if last else (kept_boxes, kept_scores, indices, counts)


OPERATORS: Mapping[str, Operator] = {"non_maximum_suppression": non_maximum_suppression}
