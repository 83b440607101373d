"""Reading recipes: short form, extends, --set, lines, shipped recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgebake.errors import RecipeError
from edgebake.recipe_files import find, recipes_folder
from edgebake.recipe_yaml import RecipeFile, list_shipped, read

ONE = """\
name: one
model: {source: python, path: "net:make"}
inputs:
  x: {shape: [1, n]}
dims: {n: {max: 4}}
samples:
  evaluation: {text: data/lines.txt, count: 8}
limits:
  parity: {cosine: 0.9}
targets:
  - coreml
  - {target: onnx-cpu, scheme: qd8}
"""


def written(folder: Path, name: str, text: str) -> Path:
    """``text`` as the file ``name`` below ``folder``."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems(path: Path, *settings: str) -> str:
    """All problems of a recipe that must be refused, as printed."""
    with pytest.raises(RecipeError) as caught:
        read(path, settings)
    return str(caught.value)


def test_the_short_form_is_the_component_model(tmp_path: Path) -> None:
    file = read(written(tmp_path, "one.yaml", ONE))
    assert list(file.recipe.components) == ["model"]
    assert file.base == tmp_path
    assert [rule.target for rule in file.recipe.components["model"].targets] == ["coreml", "onnx-cpu"]
    assert file.recipe.components["model"].targets[1].scheme == "w8a8d"


def test_short_and_long_form_read_alike(tmp_path: Path) -> None:
    body = ONE.partition("\n")[2]
    long = "name: one\ncomponents:\n  model:\n" + "".join(f"    {line}\n" for line in body.splitlines())
    assert read(written(tmp_path, "a.yaml", ONE)).recipe == read(written(tmp_path, "b.yaml", long)).recipe


def test_every_key_has_its_line(tmp_path: Path) -> None:
    file = read(written(tmp_path, "one.yaml", ONE))
    shown = str(tmp_path / "one.yaml")
    assert file.where("components", "model", "limits", "parity", "cosine") == f"{shown}:9:limits.parity.cosine"
    assert file.where("components", "model", "targets", 1, "scheme") == f"{shown}:12:targets.1.scheme"
    assert file.where("components", "model", "targets", 1, "options", "a") == f"{shown}:12:targets.1.options.a"
    assert file.lines["components", "model", "inputs", "x"] == 4
    assert file.where("name") == f"{shown}:1:name"


def test_a_key_without_a_value_means_not_given(tmp_path: Path) -> None:
    recipe = read(written(tmp_path, "one.yaml", ONE.replace("  parity: {cosine: 0.9}\n", "  parity:\n"))).recipe
    assert recipe.components["model"].limits.parity.cosine is None
    assert read(written(tmp_path, "two.yaml", ONE + "compress:\nbundle:\n")).recipe.bundle.formats == ()


def test_scalars_follow_yaml_1_2(tmp_path: Path) -> None:
    text = ONE + "description: no\nbundle: [on, 1:30]\n"
    recipe = read(written(tmp_path, "one.yaml", text.replace("0.9", "9e-1"))).recipe
    assert recipe.description == "no"
    assert recipe.bundle.formats == ("on", "1:30")
    assert recipe.components["model"].limits.parity.cosine == 0.9


def test_anchors_are_understood(tmp_path: Path) -> None:
    text = ONE.replace("max: 4", "max: &four 4").replace("count: 8", "count: *four")
    samples = read(written(tmp_path, "one.yaml", text)).recipe.components["model"].samples
    assert samples.evaluation is not None and samples.evaluation.count == 4


# --- extends --------------------------------------------------------------------------------------------------------


def test_extends_changes_key_by_key_and_replaces_lists(tmp_path: Path) -> None:
    written(tmp_path, "one.yaml", ONE)
    child = "extends: one.yaml\nname: two\nlimits: {parity: {sqnr_db: 3}, delegated: 50%}\ntargets: [coreml]\n"
    file = read(written(tmp_path, "two.yaml", child))
    component = file.recipe.components["model"]
    assert file.recipe.name == "two"
    assert (component.limits.parity.cosine, component.limits.parity.sqnr_db) == (0.9, 3)
    assert component.limits.delegated == 0.5
    assert len(component.targets) == 1


def test_nothing_in_an_extending_recipe_takes_away(tmp_path: Path) -> None:
    written(tmp_path, "one.yaml", ONE)
    file = read(written(tmp_path, "two.yaml", "extends: one.yaml\nlimits: {parity: {cosine: null}}\n"))
    assert file.recipe.components["model"].limits.parity.cosine is None


def test_problems_of_an_extended_recipe_name_the_right_file(tmp_path: Path) -> None:
    written(tmp_path, "one.yaml", ONE.replace("cosine: 0.9", "cosine: 9"))
    child = written(tmp_path, "two.yaml", "extends: one.yaml\n\ndims: {n: {max: 0}}\n")
    text = problems(child)
    assert f"{tmp_path / 'one.yaml'}:9:limits.parity.cosine: must be 1 or less" in text
    assert f"{child}:3:dims.n.max: must be 1 or more" in text


def test_a_list_that_replaces_one_has_its_own_lines(tmp_path: Path) -> None:
    written(tmp_path, "one.yaml", ONE)
    file = read(written(tmp_path, "two.yaml", "extends: one.yaml\ntargets:\n  - {target: coreml}\n"))
    assert file.where("components", "model", "targets", 0, "target") == f"{tmp_path / 'two.yaml'}:3:targets.0.target"
    assert ("components", "model", "targets", 1) not in file.marks


def test_paths_of_an_extended_recipe_in_a_folder_below_still_hold(tmp_path: Path) -> None:
    written(tmp_path, "base/data/lines.txt", "x\n")
    written(tmp_path, "base/one.yaml", ONE)
    samples = read(written(tmp_path, "two.yaml", "extends: base/one.yaml\n")).recipe.components["model"].samples
    assert samples.evaluation is not None and samples.evaluation.text == "base/data/lines.txt"


def test_a_shipped_recipe_can_be_extended_from_anywhere(tmp_path: Path) -> None:
    file = read(written(tmp_path, "mine.yaml", "extends: minilm-l6\nname: mine\ntargets: [coreml]\n"))
    spec = file.recipe.components["model"].samples.evaluation
    assert spec is not None and (file.base / str(spec.text)).is_file()
    assert file.recipe.components["model"].model.path.startswith("pkg://")


def test_a_link_inside_the_folder_may_be_extended(tmp_path: Path) -> None:
    written(tmp_path, "sub/one.yaml", ONE)
    (tmp_path / "link.yaml").symlink_to(tmp_path / "sub" / "one.yaml")
    assert read(written(tmp_path, "two.yaml", "extends: link.yaml\n")).recipe.name == "one"


# --- --set ----------------------------------------------------------------------------------------------------------


def test_settings_change_values_of_any_kind(tmp_path: Path) -> None:
    settings = ("name=two", "limits.parity.cosine=0.5", "targets.0.scheme=fp16", "samples.evaluation.count=3")
    file = read(written(tmp_path, "one.yaml", ONE), settings)
    component = file.recipe.components["model"]
    assert file.recipe.name == "two" and component.limits.parity.cosine == 0.5
    assert (component.targets[0].target, component.targets[0].scheme) == ("coreml", "fp16")
    assert file.where("components", "model", "limits", "parity", "cosine") == "--set limits.parity.cosine"
    assert file.where("components", "model", "targets", 0, "scheme") == "--set targets.0.scheme"


def test_a_quoted_part_of_a_setting_may_hold_dots(tmp_path: Path) -> None:
    file = read(written(tmp_path, "one.yaml", ONE), ('compress.modules."encoder.layer.0.*"=fp32',))
    assert file.recipe.components["model"].compress.modules == {"encoder.layer.0.*": "fp32"}


def test_a_setting_can_be_a_list_a_mapping_or_nothing(tmp_path: Path) -> None:
    file = read(written(tmp_path, "one.yaml", ONE), ("targets=[coreml]", "limits={size: {mib: 3}}", "dims.n={max: 9}"))
    component = file.recipe.components["model"]
    assert len(component.targets) == 1 and component.limits.size.mib == 3 and component.dims["n"].max == 9
    assert read(file.path, ("limits.parity.cosine=null",)).recipe.components["model"].limits.parity.cosine is None


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("limit.parity.cosine=1", "did you mean 'limits'?"),
        ("limits.parity.cosin=1", "did you mean 'cosine'?"),
        ("limits.parity.cosine=high", "must be a number, not the text 'high'"),
        ("limits.parity.cosine", "says no value"),
        ("limits.parity.cosine=", "limits.parity.cosine=null takes the key away"),
        ("limits.parity.cosine=  ", "says no value"),
        ("=5", "is not a key"),
        ("limits..cosine=5", "is not a key"),
        ('limits."parity=5', "is not a key"),
        ("targets.7.scheme=w8", "write 0 to 1"),
        ("targets.x.scheme=w8", "is no position in a list of 2"),
        ("model.path.deep=1", "there is no key 'deep'"),
        ("extends=other", "cannot be set"),
        ("name=[", "its value is wrong: not readable as YAML"),
        ("name=!!python/name:os.system x", "tags such as"),
        ("name={a: 1, a: 2}", "stands twice"),
        ("name=\x1b[31m", "control character"),
        ("a" * 5000 + "=1", "unknown key"),
        (".".join(["limits"] * 60) + "=1", "cannot be set"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name(tmp_path: Path, setting: str, says: str) -> None:
    text = problems(written(tmp_path, "one.yaml", ONE), setting)
    assert says in text
    assert "--set" in text.splitlines()[0]


def test_a_setting_must_say_which_component(tmp_path: Path) -> None:
    two = "name: two\ncomponents:\n  a: &a {model: {source: python, path: 'm:f'}}\n  b: *a\n"
    path = written(tmp_path, "two.yaml", two)
    assert "write components.<one of a, b>.compress.scheme" in problems(path, "compress.scheme=w8")
    recipe = read(path, ("components.b.compress.scheme=w8",)).recipe
    assert [component.compress.scheme for component in recipe.components.values()] == ["fp32", "w8"]


# --- finding --------------------------------------------------------------------------------------------------------


def test_shipped_recipes_are_found_by_name() -> None:
    file = read("minilm-l6")
    assert file.recipe.name == "minilm-l6"
    assert file.path.is_relative_to(recipes_folder())


@pytest.mark.parametrize("name", sorted(list_shipped()))
def test_a_shipped_recipe_reads_and_is_named_like_its_file(name: str) -> None:
    assert read(name).recipe.name == name


def test_no_two_shipped_recipes_share_a_name() -> None:
    stems = [path.stem for path in recipes_folder().rglob("*.yaml")]
    assert len(stems) == len(set(stems))


def test_what_is_no_recipe_file_is_refused_with_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, "mine.yaml", ONE)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    for given, says in (
        ("minilm-l5", "did you mean 'minilm-l6'?"),
        (tmp_path / "mne.yaml", f"did you mean '{tmp_path / 'mine.yaml'}'? known: "),
        ("", "an empty name"),
        (tmp_path / "loop.yaml", "is a link that leads nowhere"),
        (tmp_path / "gone.yaml", "is a link that leads nowhere"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "is not an ordinary file"),
        ("no/such/folder/x.yaml", "there is no recipe"),
        ("x\0y", "there is no recipe"),
        ("x" * 5000, "there is no recipe"),
    ):
        with pytest.raises(RecipeError, match=re.escape(says)):
            find(given)


def test_a_windows_file_with_a_byte_order_mark_reads(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + ONE.replace("\n", "\r\n").encode())
    file: RecipeFile = read(path)
    assert file.recipe.name == "one" and file.lines["components", "model", "limits"] == 8
