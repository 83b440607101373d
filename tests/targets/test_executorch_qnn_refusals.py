"""What executorch-qnn refuses before a weight is read, its toolchain's remedies, and its rewrites."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from asking import defaults, lower_request
from edgebake import toolchains
from edgebake.errors import RecipeError, StageFailed, ToolchainMissing
from edgebake.types import MethodSignature, Signature, TensorSpec, Traced
from edgebake_targets import _qnn_graph, _qnn_lowering, _qnn_reasons, _qnn_toolchain, executorch_qnn
from edgebake_targets.runners import executorch_qnn_simulator
from qnn_cases import image
from qnn_rules import FIXED, refused


def test_dimensions_that_vary_are_refused_with_the_rule_that_fixes_them(tmp_path: Path) -> None:
    said = refused(tmp_path, "{target: executorch-qnn, device: sm8650, scheme: fp16}")
    assert "the NPU takes fixed shapes only, and 'seq' varies" in said
    assert "dims: {seq: {min: 64, max: 64}}" in said
    assert "one.yaml:4" in said


CANNOT = {
    "{target: executorch-qnn, scheme: fp16, %s}": ("executorch-qnn", "device: "),
    "{target: executorch-qnn, device: m4, scheme: fp16, %s}": ("executorch-qnn does not run on m4", "fit: sm8450"),
    "{target: executorch-qnn, device: sm8635, scheme: w8a8, %s}": ("does not run on sm8635", "its soc_model is 68"),
    "{target: executorch-qnn, device: sm1, scheme: fp16, %s}": ("there is no device 'sm1'",),
    "{target: executorch-qnn, device: sm8650, scheme: w8a8d, %s}": ("cannot do w8a8d", "w8a16"),
    "{target: executorch-qnn, device: sm8650, scheme: fp16, %s, options: {soc: 57}}": ("has no option 'soc'",),
    "{target: executorch-qnn, device: sm8650, scheme: w8a8, %s, options: {percentile: 0}}": ("percentile", "99.99"),
    "{target: executorch-qnn, device: sm8650, scheme: w8a8, %s, options: {activation_range: kl}}": (
        "activation_range",
        "auto, histogram, minmax, percentile, entropy, mse",
    ),
    "{target: executorch-qnn, device: sm8650, scheme: w8a8, %s, compress: {modules: {'a.*': w8a16}}}": (
        "w8a16 in a network of w8a8: activations have one width here",
        "beside w8a8, modules take w8a8; for 16 bits where 8 lose too much, options: {wide_activations: auto}",
    ),
    "{target: executorch-qnn, device: sm8650, scheme: w8a16, %s, compress: {modules: {'a.*': fp16}}}": (
        "fp16 in a network of w8a16: activations have one width here",
        "beside w8a16, modules take w8a16, w4a16",
    ),
    "{target: executorch-qnn, device: sm8650, scheme: fp16, %s, compress: {modules: {'a.*': w8a16}}}": (
        "w8a16 in a network of fp16: activations have one width here",
        "beside fp16, modules take fp16",
    ),
    "{target: executorch-qnn, device: sm8650, scheme: w8a16, %s, options: {wide_activations: a}}": (
        "wide_activations widens activations of 8 bits, and those of w8a16 have not 8",
        "scheme: w8a8, or leave it out",
    ),
}


@pytest.mark.parametrize("rule", CANNOT)
def test_what_cannot_be_is_refused_by_name_with_a_remedy(tmp_path: Path, rule: str) -> None:
    said = refused(tmp_path, rule % FIXED)
    assert all(word in said for word in (*CANNOT[rule], "one.yaml:7")), said


def test_the_chips_are_those_that_executorch_knows() -> None:
    found = find_spec("executorch")
    assert found is not None and found.submodule_search_locations
    schema = Path(next(iter(found.submodule_search_locations))) / "backends/qualcomm/serialization/qc_schema.py"
    tree = ast.parse(schema.read_text())
    (chips,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "QcomChipset")
    numbers = [ast.literal_eval(node.value) for node in chips.body if isinstance(node, ast.Assign)]
    assert set(executorch_qnn.CHIPS) == set(numbers) - {0}


def cell(x: torch.Tensor) -> Traced:
    module = torch.nn.BatchNorm1d(4).train()
    program = torch.export.export(module, (x,), strict=False)
    taken = TensorSpec(name="x", shape=tuple(x.shape), dtype="float32")
    method = MethodSignature(inputs=(taken,), outputs=(taken,), buffers=("running_mean",))
    return Traced(programs={"forward": program}, signature=Signature(methods={"forward": method}))


def test_a_network_that_writes_to_its_buffers_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"writes to its buffer running_mean.*\n?.*role: state"):
        executorch_qnn.lower(cell(torch.randn(2, 4)), lower_request(tmp_path, defaults(executorch_qnn)))


def test_integers_without_calibration_samples_are_refused(tmp_path: Path) -> None:
    request = lower_request(tmp_path, defaults(executorch_qnn), scheme="w8a8")
    with pytest.raises(StageFailed, match=r"calibration samples, and none calls forward\n?.*samples.calibration"):
        _qnn_lowering._calibration(cell(torch.randn(2, 4)), request, "forward", tmp_path / "calls.npz")


@pytest.mark.parametrize(
    ("scheme", "asked", "found"),
    [
        ("w8a8", "auto", "histogram"),
        ("w8a16", "auto", "minmax"),
        ("w8a16", "histogram", "histogram"),
        ("w8a8", "entropy", "entropy"),
    ],
)
def test_ranges_of_sixteen_bits_keep_outliers(tmp_path: Path, scheme: str, asked: str, found: str) -> None:
    request = lower_request(tmp_path, {**defaults(executorch_qnn), "activation_range": asked}, scheme=scheme)
    assert _qnn_lowering.range_of(request) == found


def test_a_glob_that_names_no_operator_is_refused_with_the_nearest(tmp_path: Path) -> None:
    options = {**defaults(executorch_qnn), "wide_activations": "steam"}
    request = lower_request(tmp_path, options, scheme="w8a8")
    with pytest.raises(RecipeError, match=r"no module with operators matches 'steam'\n?.*such as 'stem"):
        _qnn_lowering.asked(image()[1], request, 57, tmp_path)


def test_the_process_is_told_which_modules_are_wide_and_whether_to_look_for_more(tmp_path: Path) -> None:
    options = {**defaults(executorch_qnn), "wide_activations": "p* auto", "percentile": 99}
    told = _qnn_lowering.asked(image()[1], lower_request(tmp_path, options, scheme="fp16"), 57, tmp_path)
    assert (told["wide"], told["search"], told["percentile"]) == (["point"], True, 99)


# What QNN 2.49 printed of a permutation of six axes.
REFUSED = [
    "[INFO] [Qnn ExecuTorch]: Visiting: aten_permute_copy_default, aten.permute_copy.default",
    "[ERROR] [Qnn ExecuTorch]:  <E> [4294967295] has incorrect Rank 6.",
    "[ERROR] [Qnn ExecuTorch]:  <E> QnnBackend_validateOpConfig failed 3110",
    "[ERROR] [Qnn ExecuTorch]:  <E> Failed to validate op aten_permute_copy_default with error 0xc26",
    "[WARNING] [Qnn ExecuTorch]: Qnn Backend op validation failed with error: 3110",
]
WARNED = "[QNN Delegate Op Builder]: Only the negative dimension is supported in layer_norm."


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (REFUSED, "QNN: has incorrect Rank 6."),
        ([*REFUSED[:1], WARNED], f"ExecuTorch: {WARNED.partition(': ')[2]}"),
        (REFUSED[:1], ""),
    ],
)
def test_the_reason_is_the_vendors_own_words_first(lines: list[str], reason: str) -> None:
    assert _qnn_reasons.complained(lines) == reason


# --- the toolchain ----------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEBAKE_STORE", str(tmp_path))
    monkeypatch.delenv(_qnn_toolchain.VARIABLE, raising=False)
    monkeypatch.setattr(_qnn_toolchain.platform, "system", lambda: "Linux")
    monkeypatch.setattr(_qnn_toolchain.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_qnn_toolchain, "_backend", lambda: [Path("found.so")])
    return tmp_path


@pytest.mark.parametrize("part", [executorch_qnn, executorch_qnn_simulator])
def test_without_libraries_the_remedy_is_the_command_that_makes_them(empty_store: Path, part: object) -> None:
    found = part.missing()  # type: ignore[attr-defined]
    assert found is not None
    assert found.reason == "the private toolchain qnn-onnxruntime-qnn-2.5.0 cannot be used: it has not been made"
    assert found.remedy.startswith("edgebake doctor --fix (installs onnxruntime-qnn==2.5.0")
    with pytest.raises(ToolchainMissing, match="edgebake doctor --fix"):
        _qnn_toolchain.environment()


def test_an_interrupted_toolchain_is_named(empty_store: Path) -> None:
    left = empty_store / "toolchains" / "qnn-onnxruntime-qnn-2.5.0.making"
    left.mkdir(parents=True)
    found = executorch_qnn.missing()
    assert found is not None and f"making it was interrupted, {left}" in found.reason


def sdk(folder: Path) -> Path:
    (folder / "lib" / _qnn_toolchain.HOST).mkdir(parents=True)
    (folder / "lib" / _qnn_toolchain.HOST / "libQnnHtp.so").write_bytes(b"library")
    return folder


def test_the_users_own_sdk_serves_as_well(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sdk(empty_store / "qairt")
    monkeypatch.setenv("QNN_SDK_ROOT", str(root))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    monkeypatch.setattr(_qnn_toolchain, "find_spec", lambda _: object())
    assert executorch_qnn.missing() is None
    libraries = root / "lib" / "x86_64-linux-clang"
    told = _qnn_toolchain.environment()
    assert told == {"QNN_SDK_ROOT": str(root), "LD_LIBRARY_PATH": f"{libraries}:/elsewhere"}
    assert executorch_qnn.fix(empty_store) == f"nothing made, QNN_SDK_ROOT names {root}"
    first = executorch_qnn.versions()["qnn"]
    (libraries / "libQnnHtp.so").write_bytes(b"another library")
    assert executorch_qnn.versions()["qnn"] != first, "two SDKs share no key"
    monkeypatch.delenv("QNN_SDK_ROOT")
    assert executorch_qnn.versions()["qnn"] == "qnn-onnxruntime-qnn-2.5.0"


def test_what_an_sdk_lacks_is_said_with_the_remedy(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(empty_store / "nowhere"))
    found = executorch_qnn.missing()
    assert found is not None
    assert f"QNN_SDK_ROOT is {empty_store / 'nowhere'}, and there is no " in found.reason
    assert "unset QNN_SDK_ROOT; edgebake doctor --fix" in found.remedy
    assert executorch_qnn.versions() == {"qnn": "absent"}
    monkeypatch.setenv("QNN_SDK_ROOT", str(sdk(empty_store / "qairt")))
    monkeypatch.setattr(_qnn_toolchain, "find_spec", lambda _: None)
    found = executorch_qnn.missing()
    assert found is not None and found.reason == "not installed: py-cpuinfo"
    assert found.remedy == "pip install py-cpuinfo==9.0.0"


def test_systems_and_wheels_without_the_backend_say_so(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_qnn_toolchain, "_backend", list)
    found = executorch_qnn.missing()
    assert found is not None and "no executorch with a Qualcomm backend" in found.reason
    assert "pip install" in found.remedy
    monkeypatch.setattr(_qnn_toolchain.platform, "system", lambda: "Darwin")
    found = executorch_qnn.missing()
    assert found is not None and "not on Darwin" in found.reason and "Linux x86-64" in found.remedy
    assert executorch_qnn.fix(empty_store).startswith("nothing made, ExecuTorch compiles for Qualcomm on Linux")


def test_pip_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        _qnn_toolchain._install("-no-such-option", tmp_path / "into")
    said = str(caught.value)
    assert "pip could not install -no-such-option into a private folder" in said
    assert "no such option" in said and "QNN_SDK_ROOT" in said
    assert toolchains.fault(tmp_path / "into") == "it has not been made"


# --- rewrites ---------------------------------------------------------------------------------------------------------


class Norms(torch.nn.Module):
    """A norm behind a convolution without bias, one behind a product that others read, one alone; ReLU6 between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.Conv2d(8, 8, 3, groups=2)
        self.alone, self.behind = torch.nn.BatchNorm2d(3, eps=0.5), torch.nn.BatchNorm2d(8, eps=0.5)
        self.shared = torch.nn.BatchNorm2d(8, eps=0.5, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.relu6(self.behind(self.first(self.alone(x))))
        y = self.second(x)
        return y + self.shared(y)


def exported(module: torch.nn.Module, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    module.eval().requires_grad_(requires_grad=False)
    return torch.export.export(module, inputs, strict=False).module(check_guards=False)


def decibels(wanted: torch.Tensor, got: torch.Tensor) -> float:
    noise = ((wanted - got).double() ** 2).sum().clamp(min=1e-30)
    return float(10 * torch.log10((wanted.double() ** 2).sum() / noise))


def test_norms_go_into_convolutions_and_the_rest_leave_no_epsilon_behind() -> None:
    torch.manual_seed(0)
    module = Norms()
    for norm in (module.alone, module.behind, module.shared):
        torch.nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
        torch.nn.init.normal_(norm.get_buffer("running_mean"))
    x = torch.randn(1, 3, 8, 8)
    graph = exported(module, x)
    wanted = module(x)
    _qnn_graph.rewrite(graph)
    assert decibels(wanted, graph(x)) > 100
    norms = [node for node in graph.graph.nodes if _qnn_graph.name_of(node) == "batch_norm"]
    assert [node.args[7] for node in norms] == [0.0, 0.0]
    names = [_qnn_graph.name_of(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert names.count("hardtanh") == 1 and "relu6" not in names


class Normed(torch.nn.Module):
    """A root mean square norm between two linear layers, in one of the ways that networks write it."""

    def __init__(self, norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.norm = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4), norm
        self.weight = torch.nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.norm(self.up(x), self.weight))
        return result


def mean_of(x: torch.Tensor) -> torch.Tensor:
    return x.mean(-1, keepdim=True)


NORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "transformers": lambda x, w: w * (x.float() * torch.rsqrt(mean_of(x.float().pow(2)) + 1e-3)).float(),
    "division": lambda x, w: x / torch.sqrt(mean_of(x * x) + 1e-3) * w,
    "reciprocal": lambda x, w: x * torch.sqrt(mean_of(x.square()) + 1e-3).reciprocal() * w,
    "no weight": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3),
    "operator": lambda x, w: torch.nn.functional.rms_norm(x, [16], w, 1e-3),
}
OTHERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "another axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-3),
    "another power": lambda x, w: x * torch.rsqrt(mean_of(x.pow(4)) + 1e-3),
    "another tensor": lambda x, w: (x + 1) * torch.rsqrt(mean_of(x * x) + 1e-3),
    "another quotient": lambda x, w: torch.sqrt(mean_of(x * x) + 1e-3) / x,
}


def rewritten(norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[str]:
    """Operators after the rewrites, which keep the outputs."""
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    graph = exported(Normed(norm), x)
    wanted = graph(x)
    _qnn_graph.rewrite(graph)
    assert decibels(wanted, graph(x)) > 100
    return [_qnn_graph.name_of(node) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", NORMS)
def test_norms_written_out_become_the_operator_and_the_outputs_stay(name: str) -> None:
    assert [n for n in rewritten(NORMS[name]) if n not in ("to", "_assert_tensor_metadata")] == [
        "linear",
        "rms_norm",
        "linear",
    ]


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_a_norm_stays(name: str) -> None:
    assert "rms_norm" not in rewritten(OTHERS[name])


class Masked(torch.nn.Module):
    """Scores with keys hidden in each of the usual ways."""

    def forward(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = scores.masked_fill(mask == 0, torch.finfo(torch.float32).min)
        added = scores + (1.0 - mask) * -10000.0
        chosen = torch.where(mask > 0, scores, torch.tensor(float("-inf")))
        return hidden.softmax(-1) + added.softmax(-1) + chosen.softmax(-1)


def lowest(graph: torch.fx.GraphModule) -> float:
    """The lowest number that the operators read."""
    scalars = [a for node in graph.graph.nodes for a in node.args if type(a) in (int, float)]
    constants = [_qnn_graph.value_of(graph, node) for node in graph.graph.nodes]
    return min(scalars + [float(value.min()) for value in constants if value is not None])


def test_masks_come_near_the_scores_and_the_outputs_stay() -> None:
    torch.manual_seed(0)
    scores, mask = torch.randn(1, 4, 8), torch.tensor([[[1.0, 1, 1, 1, 1, 0, 0, 0]]])
    graph = exported(Masked(), scores, mask)
    wanted = graph(scores, mask)
    assert lowest(graph) < -9999
    _qnn_graph.rewrite(graph)
    assert lowest(graph) == -100
    assert decibels(wanted, graph(scores, mask)) > 100


def test_a_large_number_that_is_no_mask_stays() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hidden = x + -1e4
            return hidden.softmax(-1), hidden.relu()

    graph = exported(Both(), torch.randn(1, 4))
    _qnn_graph.rewrite(graph)
    assert lowest(graph) == -1e4
