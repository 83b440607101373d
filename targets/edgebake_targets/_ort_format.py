"""ONNX Runtime's own file format (.ort), written again as the same bytes each time.

A file is a flatbuffer (onnxruntime/core/flatbuffers/schema/ort.fbs): the model, and a table that tells a runtime
without schemas which arguments of an operator have which type. ONNX Runtime writes that table in the order of a hash
table that differs from process to process. A flatbuffer is built from its end, and what is built first refers only to
itself: so the model, built first, is a block that can be kept as it is behind a table in sorted order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgebake.errors import StageFailed
from edgebake_targets.inspectors._flatbuffers import Malformed, Table, integer
from edgebake_targets.inspectors._ort_model import MARK, opened

# (operator, ((type parameter, ((kind of argument, its index), ...)), ...)), each sorted
Resolved = tuple[str, tuple[tuple[str, tuple[tuple[int, int], ...]], ...]]


def canonical(data: bytes) -> bytes:
    """``data`` with everything outside the model in sorted order. StageFailed when it is no such file."""
    import flatbuffers  # type: ignore[import-untyped]

    view = memoryview(data)
    try:
        session = opened(view)
        model, resolver = session.table(1), session.table(3)
        if model is None:
            raise Malformed("it holds no model")
        entries = sorted(map(_resolved, resolver.tables(0))) if resolver is not None else []
        start = min(model.position, model.position - integer(view, model.position, "i"))
        version = session.text(0)
    except Malformed as error:
        raise StageFailed(f"ONNX Runtime wrote no whole .ort file: {error}") from error
    builder = flatbuffers.Builder(2 * len(data))
    placed = _block(builder, view[start:], model.position - start)
    finished = _session(builder, version, placed, entries)
    builder.Finish(finished, file_identifier=MARK)
    return bytes(builder.Output())


def _resolved(entry: Table) -> Resolved:
    types = [
        (argument.text(0), tuple(sorted((one.whole(0, "b"), one.whole(1, "I")) for one in argument.tables(1))))
        for argument in entry.tables(1)
    ]
    return entry.text(0), tuple(sorted(types))


def _block(builder: Any, block: memoryview, inside: int) -> int:
    """Put ``block`` at the end of the new buffer; the offset, counted from there, of what lies ``inside`` bytes in."""
    builder.head -= len(block)
    builder.Bytes[builder.head :] = bytes(block)
    builder.minalign = 16  # the largest alignment that the format's tensors ask for
    return int(builder.Offset()) - inside


def _session(builder: Any, version: str, model: int, entries: Sequence[Resolved]) -> int:
    written = _vector(builder, [_entry(builder, entry) for entry in entries])
    resolver = _table(builder, [(0, written)])
    return _table(builder, [(0, builder.CreateString(version)), (1, model), (3, resolver)])


def _entry(builder: Any, entry: Resolved) -> int:
    operator, types = entry
    arguments = []
    for name, places in types:
        listed = _vector(builder, [_place(builder, kind, index) for kind, index in places])
        arguments.append(_table(builder, [(0, builder.CreateString(name)), (1, listed)]))
    listed = _vector(builder, arguments)
    return _table(builder, [(0, builder.CreateString(operator)), (1, listed)])


def _place(builder: Any, kind: int, index: int) -> int:
    builder.StartObject(2)
    builder.PrependInt8Slot(0, kind, 0)
    builder.PrependUint32Slot(1, index, 0)
    return int(builder.EndObject())


def _table(builder: Any, fields: Sequence[tuple[int, int]]) -> int:
    builder.StartObject(fields[-1][0] + 1)
    for slot, offset in fields:
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    return int(builder.EndObject())


def _vector(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
