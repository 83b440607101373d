"""Several methods in one .pte for Qualcomm's NPU: run on the simulator, sized with and without shared weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asking import defaults, lower_request
from edgebake import devices
from edgebake.errors import StageFailed
from edgebake.target import Asked
from edgebake.types import Lowered
from edgebake_targets import _qnn_lowering, _qnn_toolchain, executorch_qnn
from edgebake_targets.inspectors.pte import inspect
from executorch_qnn_cases import RUNNER, toolchain
from onnx_cases import Wrapper
from qnn_cases import Bent, traced_vector, vector
from qnn_methods import decibels, lowered_into, opened, traced_methods

slow = pytest.mark.slow
Built = tuple[Path, Lowered]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with toolchain(tmp_path_factory.mktemp("store")) as folder:
        yield folder


@pytest.fixture(scope="module")
def apart(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("apart")
    return folder, lowered_into(folder, executorch_qnn, share=False)


@pytest.fixture(scope="module")
def shared(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("shared")
    return folder, lowered_into(folder, executorch_qnn, share=True)


@slow
def test_each_method_runs_on_the_simulator(apart: Built, tmp_path: Path) -> None:
    with opened(*apart, tmp_path, RUNNER) as client:
        assert min(decibels(client.outputs())) > 43
    folder, lowered = apart
    assert (lowered.delegation.share, lowered.delegation.partitions, lowered.delegation.left_out) == (1.0, 2, ())
    found = inspect(folder / "model.pte")
    assert sorted(found.facts["methods"]) == ["decode", "prefill"]
    assert found.delegates == {"QnnBackend": 2}
    assert found.facts["shares_weights"] is False
    (npu,) = found.units
    assert (npu.unit, npu.subgraphs) == ("NPU", 2)
    counted = lowered.delegation.units[0].operators
    assert npu.operators["aten.linear"] == counted["aten.linear"] == 12, "a linear layer in each method, six times"
    assert npu.operators["aten.relu"] == 8


@slow
def test_shared_weights_lie_in_the_binary_once_and_the_report_says_by_how_much(apart: Built, shared: Built) -> None:
    folder, lowered = shared
    told = lowered.encodings["shared"]
    assert told["methods"] == ["prefill", "decode"]
    found = inspect(folder / "model.pte")
    assert found.facts["shares_weights"] is True
    assert found.facts["delegate_bytes"] == {"QnnBackend": told["bytes"]}
    assert sum(weight.bytes for weight in found.weights) == told["bytes"] < found.total_bytes
    assert inspect(apart[0] / "model.pte").facts["delegate_bytes"] == {"QnnBackend": told["separate_bytes"]}
    weights = 64 * 256 + 4 * 256 * 256 + 256 * 8
    assert told["separate_bytes"] - told["bytes"] > 0.9 * weights, "the second method brought weights of its own"
    (note,) = lowered.notes
    said = (
        f"one binary of {told['bytes']:,} bytes for prefill, decode; without sharing: {told['separate_bytes']:,} bytes"
    )
    assert note == said


@slow
def test_a_binary_of_shared_weights_is_not_measured_here_for_the_vendors_reason(shared: Built, tmp_path: Path) -> None:
    with opened(*shared, tmp_path, RUNNER) as client:
        said = client.opened["not_measured"]
    assert "Shared weights buffer isn't supported on this platform" in said
    assert "built without share_weights, the same graphs are measured" in said
    load = (
        "import sys; from executorch.extension.pybindings import _portable_lib as b;"
        "b._load_program(sys.argv[1], enable_etdump=False, debug_buffer_size=0,"
        " program_verification=b.Verification.InternalConsistency).load_method('decode')"
    )
    command = [sys.executable, "-c", load, str(shared[0] / "model.pte")]
    environment = {**os.environ, **_qnn_toolchain.environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "Shared weights buffer isn't supported on this platform" in done.stdout + done.stderr


@slow
def test_methods_that_fall_into_different_numbers_of_parts_are_refused_with_what_parts_them(
    store: Path, tmp_path: Path
) -> None:
    bent = traced_vector(Wrapper(Bent()).eval(), vector(8, 1))
    whole = traced_vector(torch.nn.Linear(64, 8), vector(8, 1))
    programs = {"prefill": bent.programs["forward"], "decode": whole.programs["forward"]}
    signature = replace(traced_methods().signature)
    traced = replace(bent, programs=programs, signature=signature)
    request = lower_request(tmp_path, defaults(executorch_qnn), scheme="fp16")
    with pytest.raises(StageFailed) as caught:
        _qnn_lowering.lowered(traced, replace(request, device=devices.row("sm8650")), 57)
    said = str(caught.value)
    assert "the NPU of sm8650 takes prefill, decode in different numbers of parts" in said
    assert "aten_erf_default (ExecuTorch has no builder of aten.erf.default for QNN)" in said
    assert "make a component of each method" in said


def asked(share: bool, *methods: str) -> Asked:
    return Asked(
        scheme="fp16",
        module_schemes=(),
        options=defaults(executorch_qnn) | {"share_weights": share},
        device=devices.row("sm8650"),
        inputs=dict.fromkeys(methods, ()),
        varying=(),
        channels=None,
    )


@pytest.mark.parametrize("share", [True, False])
def test_several_methods_are_taken(share: bool) -> None:
    assert list(executorch_qnn.refusals(asked(share, "prefill", "decode"))) == []


def test_sharing_is_refused_where_there_is_nothing_to_share(tmp_path: Path) -> None:
    (one,) = executorch_qnn.refusals(asked(True, "forward"))
    assert one.what == "share_weights needs several methods to share weights, and there is one"
    assert (one.fix, one.key) == ("leave it out, or give the component methods", "options.share_weights")
    options = defaults(executorch_qnn) | {"share_weights": True}
    request = replace(lower_request(tmp_path, options, scheme="fp16"), device=devices.row("sm8650"))
    with pytest.raises(StageFailed, match=r"share weights, and there is forward alone\n?.*give the component methods"):
        executorch_qnn.lower(traced_vector(torch.nn.Linear(64, 8), vector(8, 1)), request)


def test_each_method_is_calibrated_by_its_own_calls(tmp_path: Path) -> None:
    from qnn_methods import sample_set

    request = lower_request(tmp_path, defaults(executorch_qnn), scheme="w8a16", calibration=sample_set(3))
    found = [[*_qnn_lowering._calls(traced_methods(), request, method)] for method in ("prefill", "decode")]
    assert [{call["x"].shape for call in calls} for calls in found] == [{(16, 64)}, {(1, 64)}]
    assert [len(calls) for calls in found] == [3, 3]
    silent = replace(request, calibration=None)
    with pytest.raises(StageFailed, match=r"need calibration samples, and none calls decode\n?.*samples.calibration"):
        _qnn_lowering._calibration(traced_methods(), silent, "decode", tmp_path / "calls.npz")
