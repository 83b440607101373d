"""The check before any work: what passes, what it fills in, what it warns of, and what it must never do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import edgebake
import edgebake_targets
from edgebake.check import check
from edgebake.checks import samples as checked_samples
from edgebake.checks.targets import targets_with
from edgebake.errors import RecipeError
from edgebake.plan import plan
from edgebake.recipe_yaml import list_shipped, read
from edgebake.target import TARGETS, find_target

HEAVY = ("torch", "numpy", "transformers", "onnx", "onnxruntime", "coremltools", "executorch", "huggingface_hub")

PY = """\
name: {name}
model: {{source: python, path: "net:make"}}
inputs: {{x: {{shape: [1, 4]}}}}
{more}
targets: [{targets}]
"""


def recipe(folder: Path, name: str = "one", more: str = "", targets: str = "onnx-cpu") -> Path:
    """A recipe with a python model whose module records that it was imported."""
    (folder / "net.py").write_text(f"open({str(folder / 'imported')!r}, 'w')\ndef make(): pass\ndef some(r): pass\n")
    path = folder / f"{name}.yaml"
    path.write_text(PY.format(name=name, more=more, targets=targets))
    return path


def refused(*paths: Path, trust: bool = False) -> str:
    """Every problem of recipes that must be refused, as printed."""
    with pytest.raises(RecipeError) as caught:
        check([read(path) for path in paths], trust=trust)
    return str(caught.value)


def test_checking_imports_nothing_that_the_recipe_names(tmp_path: Path) -> None:
    samples = "samples: {calibration: {python: 'net:some'}, evaluation: {python: 'net:some', skip: 64}}"
    units, _ = check([read(recipe(tmp_path, more=samples))], trust=False)
    plan(units)
    assert not (tmp_path / "imported").exists()


def test_options_of_the_target_are_filled_in(tmp_path: Path) -> None:
    units, _ = check([read(recipe(tmp_path, targets="{target: coreml, options: {minimum_os: iOS18}}"))], trust=False)
    assert set(units[0].options) == {option.name for option in find_target("coreml").OPTIONS}
    assert units[0].options["minimum_os"] == "iOS18"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (
            "scheme: w4g32",
            "coreml takes w4g32 with minimum_os iOS18 or macOS15, not iOS17\n    -> options: {minimum_os: iOS18}",
        ),
        (
            "scheme: w8, options: {minimum_os: iOS15}",
            "coreml takes w8 with minimum_os iOS16 or iOS17 or iOS18 or macOS13 or macOS14 or macOS15, not iOS15",
        ),
        (
            "scheme: w8, compress: {modules: {a: palette3}}",
            "coreml takes palette3 with minimum_os iOS18 or macOS15, not iOS17",
        ),
    ],
)
def test_a_scheme_that_the_chosen_system_does_not_take_is_refused(tmp_path: Path, rule: str, text: str) -> None:
    found = refused(recipe(tmp_path, targets=f"{{target: coreml, {rule}}}"))
    assert text in found and "one.yaml:" in found
    assert not (tmp_path / "imported").exists()
    check(
        [read(recipe(tmp_path, targets="{target: coreml, scheme: w4g32, options: {minimum_os: iOS18}}"))], trust=False
    )


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    text = refused(recipe(tmp_path / "a"), recipe(tmp_path / "b"))
    assert "one/model@onnx-cpu#fp32 stands twice (first at" in text
    assert "give the two recipes different names" in text


def test_a_name_tells_two_rules_of_one_target_apart(tmp_path: Path) -> None:
    targets = "onnx-cpu, {target: onnx-cpu, name: tight, limits: {size: {mib: 3}}}"
    units, _ = check([read(recipe(tmp_path, targets=targets))], trust=False)
    assert [str(unit.folder) for unit in units] == ["one/model/onnx-cpu/any/fp32", "one/model/onnx-cpu/any/tight"]


def test_a_scheme_that_a_target_lacks_names_what_it_has_and_who_has_it(tmp_path: Path) -> None:
    text = refused(recipe(tmp_path, targets="{target: coreml, scheme: 8da4w}"))
    assert "coreml cannot do w4g32a8d (8da4w)" in text
    for row in find_target("coreml").SUPPORTS:
        assert row.scheme in text
    assert "(`edgebake targets` says more of each)" in text
    others = [n for n in TARGETS.names() if any(r.scheme == "w4g32a8d" for r in find_target(n).SUPPORTS)]
    assert others and f"w4g32a8d works on {', '.join(others)}" in text


def test_groups_with_zero_points_are_refused_where_no_kernel_has_them(tmp_path: Path) -> None:
    text = refused(recipe(tmp_path, targets="{target: executorch-xnnpack, scheme: q4_1}"))
    assert "executorch-xnnpack cannot do w4g32z (q4_1)" in text
    assert "w4g32z works on onnx-genai" in text


def test_a_target_of_few_schemes_says_what_there_is_to_know_of_each(tmp_path: Path) -> None:
    text = refused(recipe(tmp_path, targets="{target: executorch-xnnpack, scheme: palette4}"))
    for row in find_target("executorch-xnnpack").SUPPORTS:
        assert row.override_only or (row.scheme in text and row.note in text)


def test_a_device_of_another_vendor_names_the_fitting_ones(tmp_path: Path) -> None:
    text = refused(recipe(tmp_path, targets="{target: coreml, device: mt6989}"))
    assert "devices that fit: a14, a15, a16, a17-pro" in text
    units, _ = check([read(recipe(tmp_path, targets="{target: onnx-cpu, device: mt6989}"))], trust=False)
    assert units[0].device == "mt6989"


def test_trust_lets_an_exported_program_through(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace('source: python, path: "net:make"', "source: exported, path: p.pt2"))
    (tmp_path / "p.pt2").touch()
    assert "--trust" in refused(path)
    assert len(check([read(path)], trust=True)[0]) == 1


def test_noise_random_weights_and_few_samples_are_warned_of(tmp_path: Path) -> None:
    more = "samples: {evaluation: {noise: true}}\nlimits: {parity: {cosine: 0.9}}"
    _, warnings = check([read(recipe(tmp_path, more=more))], trust=False)
    assert ["parity.cosine of one/model rest on noise samples" in warning.what for warning in warnings] == [True]
    assert warnings[0].where.endswith("one.yaml:4:samples.evaluation")
    more = "samples: {evaluation: {python: 'net:some'}}\nlimits: {agreement: {metric: top1, min: 0.9}}"
    _, warnings = check([read(recipe(tmp_path, more=more))], trust=False)
    assert "agreement of one/model rests on 64 samples" in warnings[0].what
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace('"net:make"', '"net:make", weights: random'))
    assert "random weights" in check([read(path)], trust=False)[1][0].what


def test_a_sample_that_is_a_sequence_is_not_taken_for_one_decision(tmp_path: Path) -> None:
    more = "samples: {evaluation: {python: 'net:some', count: 24}}\nlimits: {agreement: {metric: binary, min: 0.9}}"
    path = recipe(tmp_path, more=more)
    assert "rests on 24 samples" in check([read(path)], trust=False)[1][0].what
    state = "{x: {shape: [1, 4]}, h: {shape: [2, 1, 128], role: state, state_from: h_out}}"
    path.write_text(path.read_text().replace("{x: {shape: [1, 4]}}", state))
    assert check([read(path)], trust=False)[1] == ()


def test_missing_calibration_names_the_dynamic_scheme_only_where_the_target_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, targets="{target: onnx-cpu, scheme: w8a8}")
    assert "-> add samples: {calibration: ...}, or use w8a8d (ranges at run time)" in refused(path)
    rows = tuple(row for row in find_target("onnx-cpu").SUPPORTS if row.scheme != "w8a8d")
    monkeypatch.setattr(find_target("onnx-cpu"), "SUPPORTS", rows)
    targets_with.cache_clear()
    text = refused(path)
    targets_with.cache_clear()
    assert "-> add samples: {calibration: ...}" in text and "w8a8d" not in text


def test_an_option_that_looks_at_calibration_samples_needs_some(tmp_path: Path) -> None:
    targets = "{target: coreml, scheme: palette4, options: {palettes: sensitive_kmeans}}"
    text = refused(recipe(tmp_path, targets=targets))
    assert "palettes: sensitive_kmeans looks at calibration samples, and there are none" in text
    assert "one.yaml:5" in text and "-> add samples: {calibration: ...}, or options: {palettes: kmeans}" in text
    among = "{target: coreml, scheme: fp16, options: {keep_float32: 'encoder.*, auto'}}"
    assert "keep_float32: encoder.*, auto looks at calibration samples" in refused(recipe(tmp_path, targets=among))
    more = "samples: {calibration: {python: 'net:some', count: 8}}"
    both = f"{targets}, {{target: coreml, scheme: palette6}}"
    units, _ = check([read(recipe(tmp_path, more=more, targets=both))], trust=False)
    assert [planned["calibration"] for planned in plan(units)] == [True, False]


def test_noise_without_quality_limits_needs_no_warning(tmp_path: Path) -> None:
    more = "samples: {evaluation: {noise: true}}\nlimits: {size: {mib: 9}}"
    assert check([read(recipe(tmp_path, more=more))], trust=False)[1] == ()


def test_sets_of_one_source_that_do_not_overlap_pass(tmp_path: Path) -> None:
    one = "{{python: 'net:some', count: 8, skip: {}}}"
    sets = f"calibration: {one.replace('{}', '{0}')}, evaluation: {one.replace('{}', '{1}')}"
    for first, second in ((0, 8), (8, 0), (100, 3)):
        check([read(recipe(tmp_path, more=f"samples: {{{sets.format(first, second)}}}"))], trust=False)
    text = refused(recipe(tmp_path, more=f"samples: {{{sets.format(7, 0)}}}"))
    assert "samples 7 to 7 are used" in text and "set calibration: skip to 8 or more" in text
    other = sets.replace("count: 8, skip: {1}", "count: 8, options: {{split: test}}").format(0)
    check([read(recipe(tmp_path, more=f"samples: {{{other}}}"))], trust=False)


def test_states_and_several_methods_pass(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    state = "{x: {shape: [1, 4]}, h: {shape: [2, 1, 128], role: state, state_from: h_out}}"
    path.write_text(
        path.read_text().replace("inputs: {x: {shape: [1, 4]}}", f"methods: {{prefill: {state}, decode: {state}}}")
    )
    units, _ = check([read(path)], trust=False)
    assert list(units[0].spec.all_methods) == ["prefill", "decode"]


def test_component_names_with_dots_can_be_wired(tmp_path: Path) -> None:
    recipe(tmp_path)
    one = "{model: {source: python, path: 'net:make'}, inputs: {x: {shape: [1]}}, targets: [coreml]}"
    path = tmp_path / "pair.yaml"
    path.write_text(f"name: pair\ncomponents: {{a.b: {one}, c: {one}}}\nwiring: {{a.b.out: c.x}}\n")
    assert len(check([read(path)], trust=False)[0]) == 2


@pytest.mark.parametrize("name", sorted(list_shipped()))
def test_a_shipped_recipe_asks_for_nothing_that_its_targets_lack(name: str) -> None:
    try:
        units, _ = check([read(name)], trust=False)
    except RecipeError as error:
        assert all("not installed" in problem.what for problem in error.problems), error  # its weights package
    else:
        assert units


def test_text_is_checked_by_the_same_names_and_cap_as_it_is_read() -> None:
    from edgebake import samples_text

    assert set(checked_samples.TEXT_INPUTS) == set(samples_text.FIELDS)
    assert checked_samples.MAX_TEXT_BYTES == samples_text.MAX_BYTES


def test_reading_checking_and_planning_import_no_heavy_library() -> None:
    program = (
        "import sys, time\n"
        "from edgebake.recipe_yaml import read\n"
        "from edgebake.check import check\n"
        "from edgebake.plan import plan\n"
        "import edgebake.schema\n"
        "assert plan(check([read('minilm-l6')], trust=False)[0])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], time.process_time())\n"
    )
    path = [str(Path(str(module.__file__)).parents[1]) for module in (edgebake, edgebake_targets)]
    environment = {"PYTHONPATH": ":".join(path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    heavy, _, seconds = done.stdout.strip().rpartition(" ")
    assert heavy == "[]", done.stdout + done.stderr
    assert float(seconds) < 1.5  # 0.3 on an idle machine


def test_the_plan_says_what_runs_where(tmp_path: Path) -> None:
    more = "samples: {calibration: {python: 'net:some', count: 8}}"
    targets = (
        "{target: executorch-xnnpack, scheme: qs8}, {target: executorch-xnnpack, scheme: fp16}, "
        "{target: coreml, device: m4-max, scheme: pal4}"
    )
    units, _ = check([read(recipe(tmp_path, more=more, targets=targets))], trust=False)
    static, half, palette = plan(units)
    assert static["scheme_shown"].startswith("w8a8 (") and static["calibration"]
    assert static["methods"] == [{"method": "pt2e", "acts_on": "graph", "schemes": ["w8a8"]}]
    assert static["stages"] == ["load", "reference", "trace", "compress", "lower", "validate"]
    assert half["stages"] == ["load", "reference", "compress", "trace", "lower", "validate"]
    assert palette["methods"] == [{"method": "lower", "acts_on": "artifact", "schemes": ["palette4"]}]
    assert palette["stages"] == ["load", "reference", "trace", "lower", "validate"]
    assert palette["device"]["bandwidth_gb_s"] == 546 and palette["note"]
    assert palette["runs_code"] == ["net:make", "net:some"]
    assert palette["recipe"]["limits"]["size"] == {"mib": None, "of_float": None}


def test_more_targets_than_anybody_has_are_refused_at_once(tmp_path: Path) -> None:
    many = ", ".join(f"{{target: onnx-cpu, name: n{i}}}" for i in range(5000))
    (tmp_path / "many.yaml").write_text(f"name: many\nmodel: {{source: python, path: 'net:make'}}\ntargets: [{many}]\n")
    with pytest.raises(RecipeError, match=r"many.yaml:3:targets: is a list of 5000, more than edgebake takes"):
        read(tmp_path / "many.yaml")
