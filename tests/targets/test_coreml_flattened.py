"""The flattened folder of a Core ML delegate: what is written is read, and what is no folder is refused in words."""

from __future__ import annotations

import json

import pytest

from edgebake.errors import ArtifactDamaged
from edgebake_targets import _coreml_flattened as flattened
from edgebake_targets.inspectors import _coreml_delegate

FILES = {
    "metadata.json": b'{"identifier": "executorch_1", "inputNames": ["x"], "outputNames": ["y", "z"]}',
    "model.mlpackage/Manifest.json": b"{}",
    "model.mlpackage/Data/com.apple.CoreML/model.mlmodel": b"specification",
    "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": bytes(range(256)),
}


def test_what_is_written_is_read_whatever_the_order() -> None:
    blob = flattened.write(FILES)
    assert blob == flattened.write(dict(reversed(FILES.items())))
    assert {name: bytes(data) for name, data in flattened.read(memoryview(blob), "here").items()} == FILES


def test_weights_lie_first_so_that_their_alignment_holds() -> None:
    assert flattened.write(FILES).startswith(bytes(range(256)))


def test_a_long_index_is_read_too() -> None:
    files = {f"{'folder/' * 3}{number:04}.bin": b"." for number in range(500)}
    assert flattened.read(memoryview(flattened.write(files)), "here").keys() == files.keys()


def node(name: str, kind: int, children: dict[str, int], offset: int = 0, size: int = 0) -> dict[str, object]:
    return {"name": name, "kind": kind, "children": children, "dataRegion": {"offset": offset, "size": size}}


def blob(*nodes: dict[str, object]) -> memoryview:
    return memoryview(json.dumps({"nodes": nodes}).encode()[::-1])


HOSTILE = {
    "nothing": (memoryview(b""), "flattened folder"),
    "text": (memoryview(b"no folder at all"), "flattened folder"),
    "no nodes": (blob(), "contains itself"),
    "a cycle": (blob(node("a", 1, {"b": 0})), "contains itself"),
    "beyond the end": (blob(node("f", 0, {}, 10, 10**9), node("r", 1, {"f": 0})), "reaches beyond"),
    "before the start": (blob(node("f", 0, {}, -4, 4), node("r", 1, {"f": 0})), "reaches beyond"),
    "a way out": (blob(node("f", 0, {}), node("r", 1, {"..": 0})), r"a file named '\.\.'"),
    "an absolute path": (blob(node("f", 0, {}), node("r", 1, {"/etc": 0})), "a file named '/etc'"),
    "a missing node": (blob(node("r", 1, {"f": 7})), "flattened folder"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_folder_is_refused(case: str) -> None:
    data, words = HOSTILE[case]
    with pytest.raises(ArtifactDamaged, match=words) as caught:
        flattened.read(data, "model.pte: forward.delegate0")
    assert "model.pte: forward.delegate0" in str(caught.value)


def test_names_and_identifier_are_read_and_missing_ones_are_told() -> None:
    files = {name: memoryview(data) for name, data in FILES.items()}
    assert flattened.names_of(files, "here") == (("x",), ("y", "z"))
    assert flattened.identifier_of(files, "here") == "executorch_1"
    for content, words in ((b"[]", "not an object"), (b"{", "cannot be read"), (b"{}", "lacks names")):
        with pytest.raises(ArtifactDamaged, match=words):
            flattened.names_of({"metadata.json": memoryview(content)}, "here")
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        flattened.names_of({}, "here")


def test_a_folder_without_a_readable_package_is_told() -> None:
    files = {name: memoryview(data) for name, data in FILES.items()}
    with pytest.raises(ArtifactDamaged, match="no specification"):
        flattened.package_of(files, "here")
    with pytest.raises(ArtifactDamaged, match="a folder without a model"):
        flattened.package_of({}, "here")
    with pytest.raises(ArtifactDamaged, match=r"compiled model \(.mlmodelc\)"):
        flattened.package_of({"model.mlmodelc/model.mil": memoryview(b"")}, "here")


def test_a_reference_leads_to_the_shared_package() -> None:
    """What ExecuTorch writes for methods that share their weights."""
    shared = memoryview(flattened.write(FILES))
    reference = memoryview(b'CMJR{"version": 1, "key": "coreml_1", "functionName": "decode"}')
    assert _coreml_delegate.packed(reference, {"coreml_1": shared}, "here") == (shared, "coreml_1")
    assert _coreml_delegate.packed(shared, {}, "here") == (shared, "")
    with pytest.raises(ArtifactDamaged, match="lacks the shared Core ML package 'coreml_1'"):
        _coreml_delegate.packed(reference, {}, "here")
    with pytest.raises(ArtifactDamaged, match="is damaged"):
        _coreml_delegate.packed(memoryview(b"CMJR{"), {}, "here")
