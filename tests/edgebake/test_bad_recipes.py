"""Malformed, contradictory and hostile recipes: each is refused with a message and the line it is about."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import decoders
from edgebake import recipe_yaml
from edgebake.check import check
from edgebake.errors import RecipeError
from edgebake.plan import plan

TABLES = Path(__file__).with_name("bad_recipes")
GOOD = (TABLES / "good.yaml").read_text()
EDITS: list[list[Any]] = yaml.safe_load((TABLES / "edits.yaml").read_text())
WHOLE: list[dict[str, Any]] = yaml.safe_load((TABLES / "whole.yaml").read_text())
JARGON = re.compile(r"Input should|pydantic|https://errors|validation error|Traceback|NoneType|type=", re.I)

PIECES = sorted(set(re.findall(r"[^\s{}\[\],:]+|[{}\[\],:]|\n {2}|\n", GOOD)))
VALUES = [
    "",
    "null",
    "[]",
    "{}",
    "-1",
    "0",
    "1e999",
    ".nan",
    "true",
    "'x'",
    "[1, [2]]",
    "{a: {b: c}}",
    "9" * 30,
    "é",
    "\\",
    "%",
]


WORDS = sorted({*re.findall(r"[a-z_0-9-]{2,}", GOOD), "noise", "images", "image", "state", "role", "methods"})
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.sampled_from(WORDS), st.text(max_size=5)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe folder with everything that good.yaml names, and traps around it."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.yaml").write_text(GOOD)
    base = tmp_path_factory.mktemp("recipes")
    for name, files in {
        "model": ("config.json", "model.safetensors"),
        "pickled": ("config.json", "pytorch_model.bin"),
        "unweighted": ("config.json",),
        "escaping": ("config.json", "model.safetensors"),
        "images": ("one_1.png", "two_2.png"),
    }.items():
        (base / name).mkdir()
        for file in files:
            (base / name / file).write_bytes(decoders.NO_WEIGHTS if file.endswith(".safetensors") else b"")
    (base / "escaping" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../secret"}}')
    (base / "lines.txt").write_text("".join(f"line {n}\n" for n in range(700)))
    (base / "net.py").write_text("def make():\n    pass\ndef samples(request):\n    return []\n")
    (base / "broken.py").write_text("def make(:\n")
    for name in ("program.pt2", "pickle.pt", "good.yaml"):
        (base / name).write_text(GOOD)
    (base / "link.yaml").symlink_to(outside / "secret.yaml")
    (base / "chain.yaml").write_text("extends: good.yaml\n")
    one = "{model: {source: python, path: 'net:make'}, targets: [coreml]}"
    (base / "pair.yaml").write_text(f"name: pair\ncomponents:\n  one: {one}\n  two: {one}\n")
    return base


def refusal(folder: Path, text: str | bytes) -> RecipeError:
    """What reading and checking ``text`` as ``bad.yaml`` raises."""
    path = folder / "bad.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as caught:
        check([recipe_yaml.read(path)], trust=False)
    return caught.value


def assert_said(error: RecipeError, folder: Path, line: int, says: str) -> None:
    """One problem says ``says`` at ``bad.yaml:line``; none shows jargon, raw control characters or an endless value."""
    hits = [problem for problem in error.problems if says in f"{problem.what} -> {problem.fix}"]
    assert hits, f"no problem says {says!r}:\n{error}"
    where = str(folder / "bad.yaml") + (f":{line}" if line else "")
    assert any(re.fullmatch(re.escape(where) + r"(:.*)?", problem.where) for problem in hits), f"not {where}:\n{error}"
    for problem in error.problems:
        assert not JARGON.search(str(problem)), problem
        assert all(part.isprintable() for part in (problem.what, problem.where, problem.fix)), problem
        assert len(str(problem)) < 2500, problem


def test_the_recipe_that_the_table_changes_is_good(folder: Path) -> None:
    path = folder / "good.yaml"
    units, warnings = check([recipe_yaml.read(path)], trust=False)
    assert [unit.id for unit in units] == [
        "good/model@executorch-xnnpack#w8a8d",
        "good/model@onnx-cpu#w8a8",
        "good/model@coreml+m4-max#palette6",
    ]
    assert not warnings


@pytest.mark.parametrize(("old", "new", "line", "says"), EDITS, ids=[f"{e[2]}-{e[3][:40]}" for e in EDITS])
def test_one_changed_piece_is_refused_at_its_line(folder: Path, old: str, new: str, line: int, says: str) -> None:
    assert GOOD.count(old) == 1, "the piece to replace must stand once"
    assert_said(refusal(folder, GOOD.replace(old, new)), folder, line, says)


@pytest.mark.parametrize("case", WHOLE, ids=[f"{n}-{case['says'][:40]}" for n, case in enumerate(WHOLE)])
def test_a_whole_bad_recipe_is_refused_at_its_line(folder: Path, case: dict[str, Any]) -> None:
    error = refusal(folder, case["text"])
    assert_said(error, folder, case.get("line_of", case["line"]), case["says"])


def test_every_problem_is_reported_at_once(folder: Path) -> None:
    text = GOOD.replace("dtype: int64}\n  att", "dtype: x}\n  att").replace("cosine: 0.99", "cosine: 7")
    error = refusal(folder, text.replace("scheme: w8a8}", "schem: w8a8}"))
    assert [int(problem.where.split(":")[1]) for problem in error.problems] == [7, 17, 23]
    options = "minimum_os: macOS12, compute_precision: fp32, compute_units: cpu_and_ne, keep_float32: auto, labels: ','"
    options += ", percentile: 0"
    asked = GOOD.replace("minimum_os: iOS17", options).replace("scheme: palette6", "scheme: fp16")
    error = refusal(folder, asked.replace("of_float: 0.35", "of_float: 1"))
    assert [problem.what[:24] for problem in error.problems] == [
        "keep_float32 names modul",
        "apps ask for the CPU and",
        "the Neural Engine comput",
        "label 0 is empty",
        "percentile is a share in",
    ]
    text = GOOD.replace("coreml, device: m4-max", "corml, device: m9").replace("path: model", "path: ./no")
    assert {int(problem.where.split(":")[1]) for problem in refusal(folder, text).problems} == {4, 24}


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"name: \xff\xfe\n", 1, "is not UTF-8 text (byte 0xff)"),
        (b"name: a\ndescription: \xc3(\n", 2, "is not UTF-8 text"),
        (b"name: a\x00b\n", 1, "control character"),
        (b"name: a\nmodel: \x1b[2J\n", 2, "control character"),
        ("name: a\nmodel: x\u202ey\n".encode(), 2, "invisible character"),
        (b'name: "\\ud800"\n', 1, "invisible character"),
        (b"name: a\n" + b"#" * (1 << 20), 0, "is larger than 1 MiB"),
        (b"a: " + b"[" * 5000, 1, "nested deeper than 32 levels"),
        (b"{a: " * 5000, 1, "nested deeper than 32 levels"),
        (b"- " * 5000, 1, "nested deeper than 32 levels"),
        (b"? " * 5000, 1, "a key must be one word"),
        (b"a: &x [1]\nb: &y [" + b"*x," * 9999 + b"]\nc: *y\n", 2, "holds more than 20000 values"),
        (b"- 1\n" * 30_000, 20_000, "holds more than 20000 values"),
        (b"".join(b"k%d: 1\n" % n for n in range(60_000)), 20_000, "holds more than 20000 values"),
        (b"a: *" + b"b" * 500_000, 1, "..."),
        (b"name: " + b"x" * 300_000, 1, "is longer than 100 characters"),
        (b"'" + b"k" * 1_000 + b"': 1", 1, "unknown key"),
        (b"'" + b"k" * 300_000 + b"': 1", 1, "not readable as YAML"),
        (b"name: a\n" + b"".join(b"k%d: 1\n" % n for n in range(2000)), 0, "more problems"),
        (b"name: " + b"9" * 300_000, 1, "is longer than 100 characters"),
        (b"name: a\nmodel: {source: python, path: 'a:b', seed: " + b"9" * 39 + b", x: 1}", 2, "unknown key 'x'"),
    ],
    ids=lambda value: value[:24].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_hostile_bytes_are_refused_fast(folder: Path, content: bytes, line: int, says: str) -> None:
    started = time.process_time()
    error = refusal(folder, content)
    assert time.process_time() - started < 8
    if "more problems" in says:
        assert error.problems[-1].what.endswith(says) and len(error.problems) == recipe_yaml.MAX_SHOWN + 1
        return
    hit = [problem for problem in error.problems if says in problem.what]
    assert hit and hit[0].where.startswith(str(folder / "bad.yaml") + (f":{line}" if line else ""))
    assert all(len(str(problem)) < 2500 for problem in error.problems)


def test_terminal_and_markup_escapes_reach_no_message_raw(folder: Path) -> None:
    error = refusal(folder, 'name: a\nmodel: {"<script>alert(1)</script>": 1}\n')
    assert any("unknown key '<script>alert(1)</script>'" in problem.what for problem in error.problems)
    error = refusal(folder, 'name: a\n"a\\nb": 1\nmodel: {source: python, path: "x\\ny"}\n')
    assert all(part.isprintable() for problem in error.problems for part in (problem.what, problem.where))


def test_the_tables_hold_more_than_a_hundred_cases() -> None:
    assert len(EDITS) + len(WHOLE) > 160


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(PIECES + VALUES)), min_size=1, max_size=3))
def test_no_edit_of_a_recipe_ends_in_a_traceback(folder: Path, edits: list[tuple[str, str]]) -> None:
    text = GOOD
    for old, new in edits:
        text = text.replace(old, new, 1)
    accept_or_refuse(folder, text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["name", "model", "inputs", "dims", "samples", "compress", "limits", "targets", "bundle"]), TREES
)
def test_no_shape_of_a_section_ends_in_a_traceback(folder: Path, key: str, tree: Any) -> None:
    data = {**yaml.safe_load(GOOD), key: tree}
    accept_or_refuse(folder, json.dumps(data))
    accept_or_refuse(folder, json.dumps({"name": "a", "components": {"m": data, key: tree}, "wiring": {"m.x": "m.y"}}))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(max_size=60), st.from_regex(r'[a-z."]{0,30}=.{0,12}', fullmatch=True)))
def test_no_setting_ends_in_a_traceback(folder: Path, setting: str) -> None:
    try:
        recipe_yaml.read(folder / "good.yaml", [setting])
    except RecipeError as error:
        assert all(problem.where.isprintable() for problem in error.problems)


def accept_or_refuse(folder: Path, text: str) -> None:
    """Reading, checking and planning either work or raise RecipeError in plain words."""
    path = folder / "bad.yaml"
    path.write_text(text)
    try:
        plan(check([recipe_yaml.read(path)], trust=False)[0])
    except RecipeError as error:
        assert error.problems and not JARGON.search(str(error)), error
        assert all(problem.where.startswith(str(path)) for problem in error.problems), error
