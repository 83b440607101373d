"""The examples of CONTRIBUTING.md are real: each is taken from the page, put where it says, and used."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

import edgebake.compress
import edgebake_targets
from asking import lower_request
from edgebake import devices, target
from edgebake.check import check
from edgebake.recipe_yaml import read
from edgebake.scheme import canonical, parse
from edgebake.target import METHODS, ModuleRequest, Support, find_target
from edgebake.types import Assignment, Lowered, Traced

Put = Callable[[ModuleType, str, str], None]  # package, file, example
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def example(name: str) -> str:
    """The fenced block that follows the marker of ``name``."""
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, f"CONTRIBUTING.md has no example {name!r}"
    return found[1]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts an example into the folder of a package, as a new file would lie there when edgebake starts."""

    def put(package: ModuleType, file: str, what: str) -> None:
        (tmp_path / file).write_text(example(what))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        monkeypatch.setattr(target, "_names_in", target._names_in.__wrapped__)
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{Path(file).stem}", raising=False)

    return put


@pytest.fixture
def portable(put: Put) -> str:
    """The page's target."""
    put(edgebake_targets, "executorch_portable.py", "target")
    return "executorch-portable"


def test_the_example_target_is_one_file_and_the_check_knows_it(portable: str, tmp_path: Path) -> None:
    found = find_target(portable)
    assert found.missing() is None
    assert all(canonical(row.scheme) == row.scheme for row in found.SUPPORTS)
    path = tmp_path / "one.yaml"
    more = "inputs: {x: {shape: [1, 4]}}\n"
    path.write_text(f"name: one\nmodel: {{source: python, path: 'net:make'}}\n{more}targets: [{portable}]\n")
    (tmp_path / "net.py").write_text("def make(): pass\n")
    ((unit,), _) = check([read(path)], trust=False)
    assert unit.id == "one/model@executorch-portable#fp32"


@pytest.mark.slow
def test_the_example_target_lowers_a_network_that_then_runs(portable: str, tmp_path: Path) -> None:
    import numpy as np
    import torch

    from edgebake.target import RUNNERS, Runner
    from edgebake.types import MethodSignature, Signature, TensorSpec

    network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
    given = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    spec = MethodSignature(
        inputs=(TensorSpec(name="x", shape=(1, 8), dtype="float32"),),
        outputs=(TensorSpec(name="y", shape=(1, 4), dtype="float32"),),
    )
    signature = Signature(methods={"forward": spec})
    traced = Traced(programs={"forward": torch.export.export(network, (given,), strict=False)}, signature=signature)
    lowered: Lowered = find_target(portable).lower(traced, lower_request(tmp_path, {}))
    runner = cast(Runner, RUNNERS.find("executorch-runtime"))
    got = runner.open(tmp_path / lowered.entry, signature).call("forward", {"x": given.numpy()})
    np.testing.assert_allclose(got["y"], network(given).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_example_scheme_row_names_a_scheme_and_a_method_that_exist() -> None:
    row: Any = eval(example("scheme row"), {"Support": Support})
    assert isinstance(row, Support)
    assert parse(row.scheme).name == row.scheme
    assert METHODS.find(row.method).ACTS_ON == "module"


def test_the_example_method_prunes_the_assigned_layers_and_leaves_the_reference_alone(
    put: Put,
) -> None:
    import copy

    import torch

    put(edgebake.compress, "prune.py", "method")
    torch.manual_seed(0)
    original = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    before = [p.detach().clone() for p in original.parameters()]
    shared = copy.deepcopy(original, {id(p): p for p in original.parameters()})
    assignment = Assignment(schemes={"0": "w8a8d"}, kinds={"0": "linear", "1": "linear"})
    request = ModuleRequest(
        module=shared, assignment=assignment, options={"share": 0.25}, run_calibration=lambda module: None
    )
    pruned = METHODS.find("prune").apply(request)
    assert pruned[0].weight.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not pruned[1].weight.eq(0).any()
    assert all(torch.equal(p, b) for p, b in zip(original.parameters(), before, strict=True))


def test_the_example_recipe_passes_the_check(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "sentences.txt").write_bytes((ROOT / "recipes/samples/sentences.txt").read_bytes())
    path = tmp_path / "text" / "tiny.yaml"
    path.write_text(example("recipe"))
    units, warnings = check([read(path)], trust=False)
    assert [u.id for u in units] == ["minilm-l6-tiny/model@executorch-xnnpack#w8a8d"]
    assert not warnings


def test_the_example_device_is_a_row_that_edgebake_reads() -> None:
    (device,) = devices.read(f"documents: {{}}\ndevices:\n{example('device')}").values()
    assert device.name not in devices.names()
    assert device.facts and device.unknown
