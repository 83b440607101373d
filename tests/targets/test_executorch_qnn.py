"""The executorch-qnn target on tiny networks: compiled for a Snapdragon and run on the vendor's simulator."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asking import defaults, lower_request
from edgebake import devices, toolchains
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import LowerRequest
from edgebake.types import Lowered, Signature, Traced
from edgebake_targets import _qnn_lowering, _qnn_toolchain, executorch_qnn
from edgebake_targets.inspectors.pte import inspect
from executorch_qnn_cases import RUNNER, toolchain
from onnx_cases import Wrapper, image_inputs, samples
from qnn_cases import Bent, Normed, image, lower, padded_text, sqnr, text, traced_vector, vector, vectors

ROUNDING = Path(__file__).resolve().parents[1] / "helpers/qnn_rounding.py"
slow = pytest.mark.slow
Built = tuple[Path, Lowered]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with toolchain(tmp_path_factory.mktemp("store")) as folder:
        yield folder


@pytest.fixture(scope="module")
def built(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    module, traced = image()
    return folder, lower(traced, module, folder, "w8a8", image_inputs(8, seed=2), executorch_qnn)


def measured(module: torch.nn.Module, folder: Path, lowered: Lowered, inputs: Any) -> float:
    return sqnr(module, folder, lowered, inputs, runner=RUNNER)


# Floors are 4-6 dB below what was measured.
@slow
@pytest.mark.parametrize(("scheme", "floor"), [("fp16", 66), ("w8a16", 52), ("w4a16", 23)])
def test_every_scheme_runs_a_convolutional_network_on_the_npu(
    store: Path, tmp_path: Path, scheme: str, floor: float
) -> None:
    module, traced = image()
    lowered = lower(traced, module, tmp_path, scheme, image_inputs(16, seed=2), executorch_qnn)
    assert measured(module, tmp_path, lowered, image_inputs(4)) > floor
    assert (lowered.delegation.share, lowered.delegation.partitions, lowered.delegation.left_out) == (1.0, 1, ())


@slow
def test_eight_bits_keep_what_a_clamp_lets_through(built: Built) -> None:
    """With ReLU6 unknown to the quantizer and scales from before the clamp it is 30 dB."""
    folder, lowered = built
    assert measured(image()[0], folder, lowered, image_inputs(4)) > 35
    assert lowered.delegation.left_out == ()


class Spiky(torch.nn.Module):
    """What nobody reads of the first layer is a thousand times as large as what is, which 8 bits then lose."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spiky, self.after, self.last = (torch.nn.Linear(64, 64) for _ in range(3))
        self.head = torch.nn.Linear(64, 8)
        with torch.no_grad():
            self.spiky.weight[0] *= 1000
            self.after.weight[:, 0] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(torch.relu(self.last(torch.relu(self.after(self.spiky(x))))))
        return result


@slow
def test_values_that_8_bits_lose_have_16_where_the_search_finds_them(store: Path, tmp_path: Path) -> None:
    module = Wrapper(Spiky()).eval()
    traced = traced_vector(module, vector(8, 1))
    found = {}
    for wide in ("", "auto"):
        folder = tmp_path / f"wide-{wide}"
        folder.mkdir()
        options = {"wide_activations": wide, "activation_range": "minmax"}
        lowered = lower(traced, module, folder, "w8a8", vectors(16, 1), executorch_qnn, **options)
        found[wide] = measured(module, folder, lowered, vectors(4, 1))
        assert lowered.delegation.left_out == ()
    assert found[""] < 15 < 33 < found["auto"], found
    (note,) = lowered.notes
    assert note.startswith("wide_activations: auto: 2 of 5 modules") and note.endswith(": head, spiky")


@slow
def test_every_way_to_choose_ranges_is_honoured(store: Path, tmp_path: Path) -> None:
    """One value of one sample is far larger than all others: what keeps it has few of 256 levels for them."""
    torch.manual_seed(0)
    module = Wrapper(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))).eval()
    calls = vectors(16, 4)
    calls[7]["x"][0, 5] = 60.0
    options = defaults(executorch_qnn) | {"percentile": 99.0}
    asked = lower_request(tmp_path, options, scheme="w8a8", calibration=samples(calls))
    told = _qnn_lowering.asked(traced_vector(module, vector(8, 4)), asked, 57, tmp_path)
    (tmp_path / "request.json").write_text(json.dumps(told))
    np.savez(tmp_path / "probe.npz", **{f"{n}.x": call["x"] for n, call in enumerate(vectors(4, 4))})  # type: ignore[arg-type]
    command = [sys.executable, str(ROUNDING), str(tmp_path / "request.json")]
    environment = {**os.environ, **_qnn_toolchain.environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["minmax"] + 4 < min(found["percentile"], found["entropy"]), found
    assert found["minmax"] + 0.5 < found["mse"], found  # the square of what is cut weighs more than fine steps
    assert len(set(found.values())) == len(found), found


@slow
@pytest.mark.parametrize(("scheme", "floor"), [("fp16", 62), ("w8a16", 41)])
def test_attention_with_padding_stays_on_the_npu_and_close(
    store: Path, tmp_path: Path, scheme: str, floor: float
) -> None:
    module, traced = text()
    lowered = lower(traced, module, tmp_path, scheme, padded_text(12), executorch_qnn)
    assert measured(module, tmp_path, lowered, padded_text(4)) > floor
    assert lowered.delegation.left_out == ()


@slow
def test_two_folders_and_processes_give_the_same_bytes(built: Built, tmp_path: Path) -> None:
    module, traced = image()
    lower(traced, module, tmp_path, "w8a8", image_inputs(8, seed=2), executorch_qnn)
    assert (tmp_path / "model.pte").read_bytes() == (built[0] / "model.pte").read_bytes()


@slow
def test_the_artifact_names_its_chip_and_who_wrote_it(built: Built) -> None:
    folder, lowered = built
    assert lowered.encodings["runtime"]["device"] == "sm8650"
    assert lowered.encodings["runtime"]["soc_model"] == "57"
    assert lowered.encodings["runtime"]["written_by"] == executorch_qnn.versions()["qnn"]
    found = inspect(folder / "model.pte")
    assert found.delegates == {"QnnBackend": 1}
    assert found.facts["soc_model"] == "57"
    assert [i.shape for i in found.inputs] == [(1, 3, 16, 16)]


@slow
def test_another_chip_gives_another_binary(built: Built, tmp_path: Path) -> None:
    module, traced = image()
    lower(traced, module, tmp_path, "w8a8", image_inputs(8, seed=2), executorch_qnn, device="sm8750")
    assert (tmp_path / "model.pte").read_bytes() != (built[0] / "model.pte").read_bytes()


class Norms(torch.nn.Module):
    """Two norms whose epsilon matters, one behind a convolution and one that nothing can be folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.behind, self.alone = torch.nn.BatchNorm2d(16, eps=1e-3), torch.nn.BatchNorm2d(16, eps=1e-3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.behind(self.stem(image))
        classes: torch.Tensor = torch.nn.functional.pad(self.alone(torch.relu(x)).mean((2, 3)), (0, 0))[:, :8]
        return classes


@slow
def test_norms_keep_their_epsilon(store: Path, tmp_path: Path) -> None:
    """The builder takes 1e-9 for every network: channels with little variance come out many times too big."""
    torch.manual_seed(0)
    module = Wrapper(Norms()).eval()
    for norm in (child for child in module.modules() if isinstance(child, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.get_buffer("running_var"), 1e-5, 1e-3)
    traced = replace(
        image()[1], programs={"forward": torch.export.export(module, (torch.randn(1, 3, 16, 16),), strict=False)}
    )
    lowered = lower(traced, module, tmp_path, "fp16", [], executorch_qnn)
    assert measured(module, tmp_path, lowered, image_inputs(4)) > 55


class Pooled(torch.nn.Module):
    """The mean of embedded tokens where the mask is one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(96, 64)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = mask.unsqueeze(-1).to(torch.float32)
        summed = (self.words(ids) * kept).sum(1)
        return summed, torch.nn.functional.normalize(summed / kept.sum(1).clamp(min=1.0))


class Large(Normed):
    """Squares of a few hundred are more than half precision holds."""

    def sized(self, x: torch.Tensor) -> torch.Tensor:
        return x * 600


@slow
def test_a_norm_written_out_keeps_large_values_in_half_precision(store: Path, tmp_path: Path) -> None:
    """As it is written it has 9 dB."""
    torch.manual_seed(0)
    module = Wrapper(Large()).eval()
    traced = traced_vector(module, vector(64, 1, 8))
    lowered = lower(traced, module, tmp_path, "fp16", vectors(2, 1, 8), executorch_qnn)
    assert measured(module, tmp_path, lowered, vectors(4, 1, 8)) > 59
    assert lowered.delegation.units[0].operators["aten.rms_norm"] == 1


class Uneven(Normed):
    """Rows whose sizes differ by a factor of 160."""

    def sized(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8]).reshape(1, 8, 1)


@slow
def test_a_norm_written_out_keeps_small_rows_in_integers(store: Path, tmp_path: Path) -> None:
    """As it is written their squares round to zero, and it has -4.4 dB."""
    torch.manual_seed(0)
    module = Wrapper(Uneven()).eval()
    traced = traced_vector(module, vector(64, 1, 8))
    lowered = lower(traced, module, tmp_path, "w8a8", vectors(16, 1, 8), executorch_qnn)
    assert measured(module, tmp_path, lowered, vectors(8, 1, 8)) > 4


@slow
def test_a_mask_that_becomes_float_keeps_its_value(store: Path, tmp_path: Path) -> None:
    """The HTP casts integers by their bits: with a scale of the mask's own range the sums are 0 dB."""
    torch.manual_seed(0)
    module = Wrapper(Pooled()).eval()
    ones = torch.ones(1, 8, dtype=torch.int64)
    program = torch.export.export(module, (torch.zeros_like(ones), ones), strict=False)
    method = text()[1].signature.methods["forward"]
    outputs = tuple(replace(spec, shape=(1, 64)) for spec in method.outputs)
    signature = Signature(methods={"forward": replace(method, outputs=outputs)})
    traced = Traced(programs={"forward": program}, signature=signature)
    lowered = lower(traced, module, tmp_path, "w8a16", padded_text(12), executorch_qnn)
    assert measured(module, tmp_path, lowered, padded_text(4)) > 36
    with pytest.raises(StageFailed, match="whole numbers from 300 to 300 become floats in the network"):
        far = [{**call, "attention_mask": np.full((1, 8), 300)} for call in padded_text(1)]
        lower(traced, module, tmp_path, "w8a8", far, executorch_qnn)


# --- what the NPU does not take, and what goes wrong ------------------------------------------------------------------


@slow
def test_operators_that_the_npu_lacks_are_listed_with_the_reason_and_run_on_the_cpu(
    store: Path, tmp_path: Path
) -> None:
    module = Wrapper(Bent()).eval()
    traced = traced_vector(module, vector(8, 1))
    lowered = lower(traced, module, tmp_path, "fp16", vectors(2, 1), executorch_qnn)
    reasons = {row.op: row.reason for row in lowered.delegation.left_out}
    assert reasons["aten.erf"] == "ExecuTorch has no builder of aten.erf.default for QNN"
    assert reasons["aten.permute_copy"] == "QNN: has incorrect Rank 6."
    assert (lowered.delegation.partitions, lowered.delegation.share) == (2, 1.0)
    assert {work.unit for work in lowered.delegation.units} == {"NPU", "CPU"}
    assert measured(module, tmp_path, lowered, vectors(4, 1)) > 45


@slow
def test_a_network_of_which_the_npu_takes_nothing_is_refused_with_the_reasons(store: Path, tmp_path: Path) -> None:
    class Only(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.erf(x)

    module = Wrapper(Only()).eval()
    traced = traced_vector(module, vector(64, 1))
    with pytest.raises(StageFailed) as caught:
        lower(traced, module, tmp_path, "fp16", [], executorch_qnn)
    said = str(caught.value)
    assert "takes none of the network's operators: " in said
    assert "aten.erf (ExecuTorch has no builder of aten.erf.default for QNN)" in said
    assert "build this network for executorch-xnnpack" in said


def request_for(folder: Path) -> LowerRequest:
    asked = lower_request(folder, defaults(executorch_qnn), scheme="fp16")
    return replace(asked, device=devices.row("sm8650"))


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for the interpreter")
def test_a_compiler_that_crashes_is_one_clear_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho '[QnnPartitioner] aten.convolution.default | True'\nkill -SEGV $$\n")
    dying.chmod(dying.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(dying))
    monkeypatch.setattr(_qnn_toolchain, "environment", dict)
    with pytest.raises(StageFailed) as caught:
        _qnn_lowering.lowered(image()[1], request_for(tmp_path), 57)
    said = str(caught.value)
    assert "backend ended with signal 11 while starting for sm8650 in fp16" in said
    assert "the last operator it looked at: aten.convolution.default" in said
    assert "build for onnx-qnn" in said


@slow
def test_a_chip_that_the_backend_does_not_know_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        _qnn_lowering.lowered(image()[1], request_for(tmp_path), 68)
    said = str(caught.value)
    assert "ended with exit code 1 while compiling for sm8650 in fp16" in said
    assert "68 is not a valid QcomChipset" in said


# --- the runner and the toolchain -------------------------------------------------------------------------------------


@slow
def test_a_binary_that_was_changed_is_an_error_not_another_answer(built: Built, tmp_path: Path) -> None:
    folder, lowered = built
    data = bytearray((folder / "model.pte").read_bytes())
    start = data.index(b"\xcd\xab\x78\x56") + 64
    data[start : start + 20_000] = bytes(20_000)
    (tmp_path / "model.pte").write_bytes(data)
    with pytest.raises((ArtifactDamaged, StageFailed), match=r"cannot load method|ended with"):
        measured(image()[0], tmp_path, lowered, image_inputs(1))


@slow
def test_the_toolchain_is_made_from_nothing_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_qnn_toolchain.VARIABLE, raising=False)
    monkeypatch.setenv("EDGEBAKE_STORE", str(tmp_path))
    at = tmp_path / "toolchains" / _qnn_toolchain.NAME
    assert executorch_qnn.fix(tmp_path / "toolchains") == f"made {at}"
    assert executorch_qnn.missing() is None
    libraries = Path(_qnn_toolchain.environment()["LD_LIBRARY_PATH"].split(os.pathsep)[0])
    assert {"libQnnHtp.so", "libHtpPrepare.so", "libQnnSystem.so"} <= {file.name for file in libraries.iterdir()}
    assert list((at / "licences").iterdir())
    with (libraries / "libHtpPrepare.so").open("r+b") as file:
        file.write(b"damage")
    assert "libHtpPrepare.so is not what was installed" in (toolchains.damage(at) or "")
    assert executorch_qnn.fix(tmp_path / "toolchains") == f"made {at}"
    assert toolchains.damage(at) is None
