"""Invented results of every state, as a build of several recipes would give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgebake.errors import EXIT_STAGE, EXIT_TOOLCHAIN, Problem
from edgebake.result import Failure, Result
from edgebake.types import Verdict

MIB = 2**20


def _measured(**changes: Any) -> dict[str, Any]:
    output = {
        "sqnr_db": 31.27,
        "cosine": 0.99963,
        "max_abs": 0.41,
        "mean_abs": 0.013,
        "relative_l2": 0.0273,
        "nonfinite": 0,
        "reference_nonfinite": 0,
        "worst_sample": {"index": 17, "source": "GPL-3", "sqnr_db": 24.11},
    }
    return {
        "version": 1,
        "runner": {"name": "executorch-runtime", "kind": "executed"},
        "notes": [],
        "samples": {"count": 512, "calls": 512, "sources": 24, "noise": False},
        "outputs": {"last_hidden_state": output},
        "agreement": {
            "metric": "spearman",
            "value": 0.99318,
            "low": 0.98817,
            "high": 0.99702,
            "count": 2048,
            "sources": 24,
            "output": "sentence_embedding",
        },
        "size": {
            "bytes": 23_000_000,
            "weights": 22_300_000,
            "scales": 190_000,
            "graph": 510_000,
            "float_bytes": 90_800_000,
            "of_float": 0.2533,
            "floor_bytes": 22_700_000,
            "reasons": [{"why": "stays fp32: embeddings.position_embeddings (0.8 MiB)", "bytes": 786_432}],
            "dtypes": {"int8": {"count": 37, "bytes": 22_200_000}, "float32": {"count": 60, "bytes": 100_000}},
        },
        "memory": {"planned_bytes": 3 * MIB, "run_peak_bytes": 98 * MIB, "run_base_bytes": 50 * MIB},
        "latency": {"median_ms": 12.41, "ratio": 0.41, "repetitions": 30, "reason": ""},
        "delegation": {"share": 0.9712, "partitions": 3, "left_out": [], "reason": ""},
        "stages": {"lower": {"seconds": 8.4, "peak_mib": 2100.0, "state": "ran"}},
        "host": {"cpu": "x86-64", "cores": 2, "os": "Linux", "python": "3.11"},
        **changes,
    }


def _result(target: str, scheme: str, recipe: str = "minilm-l6", **given: Any) -> Result:
    stages = {"load": "stored", "reference": "stored", "trace": "ran", "lower": "ran", "validate": "ran"}
    device = given.get("device")
    return Result(
        unit=f"{recipe}/model@{target}{'+' + device if device else ''}#{scheme}",
        recipe=recipe,
        component="model",
        target=target,
        scheme=scheme,
        **{"stages": stages, "seconds": 41.25, **given},
    )


def _verdict(limit: str, state: str, value: float | None, bound: float, subject: str = "", reason: str = "") -> Verdict:
    return Verdict(limit=limit, state=state, value=value, bound=bound, subject=subject, reason=reason)  # type: ignore[arg-type]


@pytest.fixture
def passing() -> Result:
    """A pass with every number."""
    hidden = "last_hidden_state"
    return _result(
        "executorch-xnnpack",
        "w8a8d",
        stages={"load": "ran", "reference": "ran", "trace": "ran", "lower": "ran", "validate": "ran"},
        measurements=_measured(),
        verdicts=(
            _verdict("parity.sqnr_db", "pass", 31.27, 25, hidden),
            _verdict("agreement.spearman", "pass", 0.99318, 0.98, "sentence_embedding"),
        ),
    )


@pytest.fixture
def failing() -> Result:
    """A pass on one limit, misses on others, with the place where the error begins."""
    output = {
        **_measured()["outputs"]["last_hidden_state"],
        "sqnr_db": 18.244,
        "cosine": 0.98999,
        "worst_sample": {"index": 203, "source": "python-docs", "sqnr_db": 9.27},
    }
    return _result(
        "onnx-qnn",
        "w8a8",
        device="sm8650",
        measurements=_measured(
            runner={"name": "qnn-htp-simulator", "kind": "simulated"},
            outputs={"last_hidden_state": output},
            agreement={"metric": "top1", "value": 0.9479, "low": 0.92, "high": 0.9699, "count": 512, "sources": 20},
            task={"metric": "top1", "float": 0.85, "artifact": 0.8, "count": 20},
            latency={"median_ms": None, "ratio": None, "reason": "simulated cycles say nothing about a phone"},
            memory={},
            located={
                "reason": "",
                "modules": [{"module": "encoder.layer.3.attention.output", "sqnr_db": 19.02, "before_db": 41.13}],
            },
            delegation={
                "share": 0.912,
                "partitions": 4,
                "left_out": [{"op": "GatherND", "count": 2, "macs": 0, "reason": "2-D mask"}],
                "units": [
                    {
                        "unit": "NPU",
                        "by": "QNNExecutionProvider",
                        "operators": {"FullyConnected": 36},
                        "macs": 1_234_567,
                        "subgraphs": 4,
                    },
                    {
                        "unit": "CPU",
                        "by": "CPUExecutionProvider",
                        "operators": {"GatherND": 2},
                        "macs": 0,
                        "subgraphs": 0,
                    },
                ],
                "border_bytes": 98_304,
            },
        ),
        verdicts=(
            _verdict("parity.sqnr_db", "fail", 18.244, 25, "last_hidden_state"),
            _verdict("delegated", "fail", 0.912, 0.95, "", "outside the backend: GatherND x2 (2-D mask)"),
            _verdict("size.mib", "pass", 21.93, 30),
            _verdict(
                "task.top1", "not measured", 0.05, 0.01, "logits", "20 labelled samples; a drop is judged from 100 on"
            ),
        ),
    )


@pytest.fixture
def unmeasured() -> Result:
    """Lowered, with no runner on this machine."""
    reason = "no runner on Linux executes an ExecuTorch Core ML delegate"
    return _result(
        "executorch-coreml",
        "palette6",
        device="m4-max",
        name="small",
        measurements={
            "runner": None,
            "not_measured": reason,
            "size": {"bytes": 17_400_000, "of_float": 0.1916, "reasons": []},
            "delegation": {"share": None, "reason": "only the Mac's compiler decides"},
            "notes": ["weights are random (seed 0): numbers say nothing about quality", "evaluation samples are noise"],
        },
        verdicts=(
            _verdict("parity.sqnr_db", "not measured", None, 25, "", reason),
            _verdict("agreement.spearman", "not measured", None, 0.98, "", reason),
            _verdict("delegated", "not measured", None, 0.95, "", "only the Mac's compiler decides"),
        ),
    )


@pytest.fixture
def failed() -> Result:
    """A stage that broke."""
    return _result(
        "onnx-cpu",
        "w4g32a8d",
        recipe="mobilenet-v2",
        stages={"load": "ran", "reference": "ran", "trace": "ran"},
        failure=Failure(
            stage="lower",
            exit_code=EXIT_STAGE,
            log=Path("logs/mobilenet-v2/lower.log"),
            problems=(
                Problem(
                    what="MatMulNBits needs the inner dimension to be a multiple of the group; 27 is not one of 32",
                    where="features.0.0",
                    fix="give this module w8 (compress: modules: {features.0.0: w8})",
                ),
            ),
        ),
    )


@pytest.fixture
def missing() -> Result:
    """A toolchain that is not installed."""
    return _result(
        "executorch-mediatek",
        "w8a8",
        recipe="mobilenet-v2",
        device="mt6989",
        optional=True,
        stages={},
        failure=Failure(
            stage="check",
            exit_code=EXIT_TOOLCHAIN,
            problems=(
                Problem(
                    what="mtk_converter is not installed",
                    fix="download NeuroPilot from MediaTek and pip install its wheels",
                ),
            ),
        ),
    )


@pytest.fixture
def results(passing: Result, failing: Result, unmeasured: Result, failed: Result, missing: Result) -> list[Result]:
    """One of each state."""
    return [passing, failing, unmeasured, failed, missing]


NASTY = (
    "\x1b[31mred\x1b]0;title\x07 [bold]x[/] <script>alert(1)</script> a|b `c` \u202egnp\x00 https://evil.example @all"
)


@pytest.fixture
def nasty() -> Result:
    """Every string that a model could choose is hostile."""
    output = {
        "sqnr_db": 3.0,
        "cosine": 0.5,
        "worst_sample": {"index": 0, "source": NASTY, "sqnr_db": 1.0},
        "nonfinite": 2,
    }
    return Result(
        unit=f"r/c@{NASTY}",
        recipe="r",
        component="c",
        target="onnx-cpu",
        scheme="w8a8",
        name="x",
        seconds=1,
        measurements={
            "runner": {"name": NASTY, "kind": "executed"},
            "notes": [NASTY],
            "outputs": {NASTY: output},
            "size": {"bytes": 10, "of_float": 0.5, "reasons": [{"why": NASTY, "bytes": 5}], "dtypes": {}},
            "located": {"modules": [{"module": NASTY, "sqnr_db": 1.0, "before_db": None}]},
            "delegation": {"share": 0.1, "left_out": [{"op": NASTY, "count": 1, "macs": 0, "reason": NASTY}]},
        },
        verdicts=(
            _verdict("parity.sqnr_db", "fail", 3.0, 25, NASTY, NASTY),
            _verdict("parity.cosine", "not measured", None, 0.9, NASTY, NASTY),
        ),
    )
