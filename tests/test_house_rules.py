"""The rules of the house, held over every file: sizes, docstrings, annotations, imports, and generated texts."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from edgebake import errors, tables
from edgebake.target import TARGETS, find_target

ROOT = Path(__file__).resolve().parents[1]
CODE = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"))
    for folder in ("export", "targets", "tests", "benchmarks", "device_tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
SHIPPED = {name: tree for name, tree in CODE.items() if name.startswith(("export/", "targets/"))}
TARGET_FILES = {name: tree for name, tree in SHIPPED.items() if name.startswith("targets/")}
HEAVY = ("torch", "torchao", "transformers", "onnx", "onnxruntime", "coremltools", "executorch", "sklearn", "scipy")
# The interpreter of Core ML programs is a library: who imports it wants torch. Its runner does when it opens a package.
LIBRARY = "targets/edgebake_targets/mil/"
CONTRACT = (
    "edgebake.errors",
    "edgebake.lattice",
    "edgebake.scheme",
    "edgebake.target",
    "edgebake.toolchains",
    "edgebake.types",
)
MAX_LINES, MAX_FUNCTION = 400, 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Dotted names that ``nodes`` import, ``from a import b`` as ``a.b``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """What is imported when the module is; what only type checkers read is left out."""

    def running(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, Function):
                continue
            yield node
            if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
                yield from running(getattr(node, "body", []))
            for part in ("orelse", "finalbody", "handlers"):
                yield from running(getattr(node, part, []))

    return imported(running(tree.body))


def test_a_file_stays_below_400_lines() -> None:
    lengths = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in CODE}
    assert not {name: lines for name, lines in lengths.items() if lines >= MAX_LINES}


def test_a_function_fits_a_screen() -> None:
    every = [(name, f) for name, tree in CODE.items() for f in functions(tree)]
    lengths = [(name, f.name, (f.end_lineno or 0) - f.lineno + 1) for name, f in every]
    assert not [found for found in lengths if found[2] > MAX_FUNCTION]


def test_a_module_opens_with_a_docstring() -> None:
    assert not [name for name, tree in CODE.items() if not ast.get_docstring(tree)]


def test_every_function_is_annotated() -> None:
    def bare(f: Function) -> list[str]:
        given = f.args
        taken = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        gaps = [a.arg for a in taken if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        return gaps + (["return"] if f.returns is None else [])

    assert not {(name, f.name): gaps for name, tree in CODE.items() for f in functions(tree) if (gaps := bare(f))}


def test_public_functions_and_classes_have_a_docstring() -> None:
    shown = (ast.FunctionDef, ast.ClassDef)
    every = [(name, n) for name, tree in SHIPPED.items() for n in tree.body if isinstance(n, shown)]
    assert not [(name, n.name) for name, n in every if not n.name.startswith("_") and not ast.get_docstring(n)]


def test_importing_a_module_imports_nothing_heavy() -> None:
    light = {name: tree for name, tree in SHIPPED.items() if not name.startswith(LIBRARY)}
    heavy = {name: [i for i in at_import(tree) if i.split(".")[0] in HEAVY] for name, tree in light.items()}
    assert not {name: found for name, found in heavy.items() if found}


def test_a_target_imports_the_contract_and_what_its_family_shares_and_no_other_target() -> None:
    def fine(what: str) -> bool:
        first, *rest = what.split(".")
        if first == "edgebake_targets":
            return bool(rest) and (rest[0].startswith("_") or rest[0] in ("inspectors", "mil"))
        return first != "edgebake" or what.startswith(CONTRACT)

    wrong = {name: [i for i in imported(ast.walk(tree)) if not fine(i)] for name, tree in TARGET_FILES.items()}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_top_level_of_a_target_imports_the_standard_library_and_the_contract_only() -> None:
    allowed = {*sys.stdlib_module_names, "edgebake", "edgebake_targets"}
    targets = {name: tree for name, tree in TARGET_FILES.items() if not name.startswith(LIBRARY)}
    at_top = [(name, i) for name, tree in targets.items() for i in at_import(tree)]
    assert not [(name, i) for name, i in at_top if i.split(".")[0] not in allowed]


def test_targets_are_found_by_name_and_never_imported() -> None:
    house = [(name, tree) for name, tree in SHIPPED.items() if name.startswith("export/")]
    named = [(name, i) for name, tree in house for i in imported(ast.walk(tree))]
    assert not [(name, i) for name, i in named if i.startswith("edgebake_targets")]


def test_the_store_key_of_a_target_covers_every_source_it_uses() -> None:
    """Two things that could differ never share a key: SOURCES names all of ours that a target's module reaches."""
    from grimp import build_graph

    graph = build_graph("edgebake_targets", cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}
    missed = {}
    for name in TARGETS.names():
        used = graph.find_upstream_modules(TARGETS.module_name(name)) - packages
        missed[name] = used - set(find_target(name).SOURCES)
    assert not {name: modules for name, modules in missed.items() if modules}


LIGHT = (
    ["--help"],
    ["--version"],
    ["targets"],
    ["devices"],
    ["schema"],
    ["plan", "minilm-l6"],
    ["check", "minilm-l6"],
    ["build", "--help"],
)
SCRIPT = f"""
import sys
from edgebake.cli import main
sys.argv = ["edgebake", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("HEAVY", sorted(set(sys.modules) & {set(HEAVY)!r}))
"""


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_every_verb_has_its_file_and_every_file_its_verb() -> None:
    verbs = set(re.findall(r'_run\(\s*"(\w+)"', (ROOT / "export/edgebake/cli.py").read_text("utf-8")))
    files = {p.stem for p in (ROOT / "export/edgebake/commands").glob("*.py") if not p.name.startswith("_")}
    assert verbs == files


def test_every_error_class_is_raised_somewhere() -> None:
    raised = {
        node.exc.func.id
        for name, tree in SHIPPED.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    returned = {
        node.value.func.id
        for tree in SHIPPED.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    }
    classes = {c.__name__ for c in errors.BY_NAME.values()} - {"EdgebakeError"}
    assert classes <= raised | returned
    assert classes == {c.__name__ for c in errors.EdgebakeError.__subclasses__() if c.__module__ == errors.__name__}


def test_errors_of_users_stand_in_one_file() -> None:
    classes = {c.__name__ for c in errors.BY_NAME.values()}
    elsewhere = [
        (name, node.name)
        for name, tree in SHIPPED.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and name != "export/edgebake/errors.py"
        if {ast.unparse(base) for base in node.bases} & classes
    ]
    assert not elsewhere


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: nothing tells committed files from others")
    place = re.compile(r"(?<![\w.])(?:/root/|/home/(?!user/)\w|/Users/(?!user/)\w|/work/\w|/tmp/\w+/|[A-Z]:\\+Users)")
    found = {}
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path != Path(__file__) and b"\0" not in (data := path.read_bytes()):
            hits = place.findall(data.decode("utf-8", errors="replace"))
            found |= {name: hits} if hits else {}
    assert not found


def test_the_readme_shows_what_the_targets_support() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert tables.between_markers(text, tables.table()) == text, "run `make tables`"


def test_what_the_readme_and_the_contributing_page_name_exists() -> None:
    verbs = {p.stem for p in (ROOT / "export/edgebake/commands").glob("*.py")}
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text("utf-8")
        named = re.findall(r"`((?:export|targets|recipes|tests)/[\w./-]+)`", text)
        new = {"targets/edgebake_targets/executorch_portable.py"}  # the page's own example
        assert not [p for p in named if p not in new and not (ROOT / p).exists()], page
        used = re.findall(r"`edgebake ([a-z]+)", text) + re.findall(r"^edgebake ([a-z]+)", text, re.MULTILINE)
        assert set(used) <= verbs, page
