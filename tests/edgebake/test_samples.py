"""Samples: what is read, what is refused, and that the same recipe gives the same samples."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgebake import samples
from edgebake.errors import RecipeError, StageFailed
from edgebake.recipe import Component
from edgebake.store_files import sha256_file
from edgebake.types import Image8, SampleSet

MODEL = {"source": "python", "path": "m:f"}


def component(inputs: dict[str, Any], dims: dict[str, Any] | None = None) -> Component:
    return Component.model_validate({"model": MODEL, "inputs": inputs, "dims": dims or {}})


def read(spec: dict[str, Any], of: Component, base: Path, tokenizer: Path | None = None) -> SampleSet:
    full = Component.model_validate({"model": MODEL, "samples": {"evaluation": spec}}).samples.evaluation
    assert full is not None
    return samples.read(full, of, base, tokenizer)


def values(found: SampleSet, name: str = "x") -> list[np.ndarray[Any, Any]]:
    return [call.tensors()[name] for sample in found for call in sample.calls]


VECTOR = component({"x": {"shape": [1, 3]}})


# --- array files ----------------------------------------------------------------------------------------------------


def test_npz_rows_become_samples_after_skip_with_labels_and_sources(tmp_path: Path) -> None:
    x = np.arange(15, dtype=np.float64).reshape(5, 3)
    np.savez(tmp_path / "a.npz", x=x, label=np.arange(5), source=np.array(list("aabbc")))
    found = read({"file": "a.npz", "count": 2, "skip": 1}, VECTOR, tmp_path)
    assert [(s.source, s.label) for s in found] == [("a", 1), ("b", 2)]
    assert values(found)[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(values(found)), x[1:3])


def test_safetensors_hold_sequences_for_stateful_networks(tmp_path: Path) -> None:
    of = component(
        {"x": {"shape": [1, 3]}, "h": {"shape": [1, 4], "role": "state", "state_from": "h_next"}},
    )
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 1, 3)
    save_file({"x": x}, tmp_path / "a.safetensors")
    found = read({"file": "a.safetensors", "count": 2}, of, tmp_path)
    assert [len(s.calls) for s in found] == [4, 4]
    assert set(found.samples[0].calls[0].inputs) == {"x"}
    np.testing.assert_array_equal(found.samples[1].calls[3].tensors()["x"], x[1, 3])


@pytest.mark.parametrize(
    ("arrays", "count", "said"),
    [
        ({"x": np.zeros((4, 3), np.float32)}, 9, "has 4 samples, the recipe asks for 9"),
        ({"y": np.zeros((4, 3), np.float32)}, 1, "has the arrays y"),
        ({"x": np.zeros((4, 7), np.float32)}, 1, r"float32\[1, 7\], the recipe declares float32\[1, 3\]"),
        ({"x": np.zeros((4, 3), np.int64)}, 1, r"int64\[1, 3\]"),
    ],
)
def test_array_files_that_do_not_fit_are_refused(tmp_path: Path, arrays: Any, count: int, said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(RecipeError, match=said):
        read({"file": "a.npz", "count": count}, VECTOR, tmp_path)


def test_sequences_of_different_lengths_are_refused(tmp_path: Path) -> None:
    of = component({"x": {"shape": [1, 3]}, "y": {"shape": [1, 3]}})
    x = np.zeros((1, 4, 1, 3), np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=x[:, :3])
    with pytest.raises(RecipeError, match=r"differ in length: \{'x': 4, 'y': 3\}"):
        read({"file": "a.npz", "count": 1}, of, tmp_path)
    np.savez(tmp_path / "a.npz", x=x, y=x[:, :1])  # one value for all calls
    assert len(read({"file": "a.npz", "count": 1}, of, tmp_path).samples[0].calls) == 4


def test_pickles_and_garbage_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    (tmp_path / "garbage.npz").write_bytes(b"no zip at all")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 64)
    for name in ("objects.npz", "garbage.npz", "garbage.safetensors", "missing.npz"):
        with pytest.raises(RecipeError, match=name):
            read({"file": name, "count": 1}, VECTOR, tmp_path)


def test_named_dimensions_must_agree_within_a_call_and_stay_in_bounds(tmp_path: Path) -> None:
    of = component({"x": {"shape": [1, "n"]}, "y": {"shape": [1, "n"]}}, {"n": {"min": 2, "max": 3}})
    np.savez(tmp_path / "differ.npz", x=np.zeros((1, 2), np.float32), y=np.zeros((1, 3), np.float32))
    np.savez(tmp_path / "long.npz", x=np.zeros((1, 4), np.float32), y=np.zeros((1, 4), np.float32))
    for name in ("differ.npz", "long.npz"):
        with pytest.raises(RecipeError, match=r"n = 2\.\.3"):
            read({"file": name, "count": 1}, of, tmp_path)


# --- noise ----------------------------------------------------------------------------------------------------------


def test_noise_knows_roles_and_bounds_and_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    of = component(
        {
            "input_ids": {"shape": [1, "seq"], "dtype": "int64"},
            "attention_mask": {"shape": [1, "seq"], "dtype": "int64"},
            "token_type_ids": {"shape": [1, "seq"], "dtype": "int64"},
            "audio": {"shape": [1, 50]},
        },
        {"seq": {"min": 4, "max": 9}},
    )
    found = read({"noise": True, "count": 20, "high": 7}, of, tmp_path)
    assert found.noise
    lengths = {value.shape[1] for value in values(found, "input_ids")}
    assert lengths <= set(range(4, 10))
    assert len(lengths) > 2
    assert {int(v) for value in values(found, "input_ids") for v in value.flat} == set(range(7))
    assert all((value == 1).all() for value in values(found, "attention_mask"))
    assert all((value == 0).all() for value in values(found, "token_type_ids"))
    assert 0.8 < np.std(values(found, "audio")) < 1.2
    later = read({"noise": True, "count": 1, "skip": 13, "high": 7}, of, tmp_path)
    assert later.samples[0].source == found.samples[13].source
    np.testing.assert_array_equal(values(later, "audio")[0], values(found, "audio")[13])


def test_only_listed_sizes_are_drawn_and_taken(tmp_path: Path) -> None:
    of = component({"x": {"shape": [1, "n"]}}, {"n": {"sizes": [64, 16, 32]}})
    found = read({"noise": True, "count": 20}, of, tmp_path)
    assert {sample.calls[0].tensors()["x"].shape[1] for sample in found} == {16, 32, 64}
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 20), np.float32))
    with pytest.raises(RecipeError, match=r"float32\[1, n\], n = 64\|16\|32"):
        read({"file": "x.npz", "count": 2}, of, tmp_path)
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 32), np.float32))
    assert len(read({"file": "x.npz", "count": 2}, of, tmp_path)) == 2


def test_noise_for_a_stateful_network_is_a_sequence_without_states(tmp_path: Path) -> None:
    of = component({"x": {"shape": [1, 3]}, "h": {"shape": [1, 4], "role": "state", "state_from": "h_next"}})
    sample = read({"noise": True, "count": 1}, of, tmp_path).samples[0]
    assert len(sample.calls) > 1
    assert set(sample.calls[0].inputs) == {"x"}


# --- python ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "e2_user_samples", raising=False)
    code = """
        import numpy as np
        from edgebake.types import Call, Sample

        def make(request):
            rows = range(request.skip, min(request.skip + request.count, request.options.get("there", 99)))
            return [Sample(calls=(Call(inputs={"x": np.full((1, 3), r, np.float32)}),), source=str(r)) for r in rows]

        def wrong(request):
            return [1, 2, 3]

        def without_end(request):
            while True:
                yield from make(request)

        def none(request):
            return None

        def raising(request):
            raise KeyError("no such corpus")
    """
    (tmp_path / "e2_user_samples.py").write_text(textwrap.dedent(code), encoding="utf-8")
    return tmp_path


def test_a_callable_beside_the_recipe_gets_count_skip_and_options(user_module: Path) -> None:
    found = read({"python": "e2_user_samples:make", "count": 2, "skip": 3}, VECTOR, user_module)
    assert [s.source for s in found] == ["3", "4"]
    with pytest.raises(RecipeError, match="returned 1 samples, the recipe asks for 2 after skipping 3"):
        spec = {"python": "e2_user_samples:make", "count": 2, "skip": 3, "options": {"there": 4}}
        read(spec, VECTOR, user_module)


@pytest.mark.parametrize("given", [".", "sub/..", "link"])
def test_a_callable_is_found_from_a_folder_given_in_any_way(
    user_module: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (user_module / "sub").mkdir()
    (user_module / "link").symlink_to(user_module)
    monkeypatch.chdir(user_module)
    found = read({"python": "e2_user_samples:make", "count": 1}, VECTOR, Path(given))
    assert [s.source for s in found] == ["0"]


def test_a_linked_module_counts_as_one_beside_the_recipe(user_module: Path) -> None:
    recipes = user_module / "recipes"
    recipes.mkdir()
    (recipes / "e2_linked_samples.py").symlink_to(user_module / "e2_user_samples.py")
    assert len(read({"python": "e2_linked_samples:make", "count": 1}, VECTOR, recipes)) == 1


def test_two_recipes_with_sample_modules_of_one_name_get_their_own(user_module: Path) -> None:
    other = user_module / "other"
    other.mkdir()
    code = (user_module / "e2_user_samples.py").read_text("utf-8").replace("source=str(r)", "source='other'")
    (other / "e2_user_samples.py").write_text(code, encoding="utf-8")
    spec = {"python": "e2_user_samples:make", "count": 1}
    assert [read(spec, VECTOR, base).samples[0].source for base in (user_module, other, user_module)] == [
        "0",
        "other",
        "0",
    ]


def test_a_sample_module_that_fails_to_import_says_why(user_module: Path) -> None:
    (user_module / "e2_broken_samples.py").write_text("import no_such_library", encoding="utf-8")
    said = "importing e2_broken_samples failed: ModuleNotFoundError: No module named 'no_such_library'"
    with pytest.raises(StageFailed, match=said):
        read({"python": "e2_broken_samples:make", "count": 1}, VECTOR, user_module)


def test_callables_that_do_not_exist_or_return_other_things_are_refused(user_module: Path) -> None:
    for name, said in (
        ("e2_user_samples:wrong", "returned a int"),
        ("e2_user_samples:none", "returned NoneType"),
        ("e2_user_samples:nothing", "no callable 'nothing'"),
        ("e2_no_such_module:make", "no Python module"),
        ("not a module", "does not name a callable"),
    ):
        with pytest.raises(RecipeError, match=said):
            read({"python": name, "count": 1}, VECTOR, user_module)


def test_a_generator_need_not_end(user_module: Path) -> None:
    found = read({"python": "e2_user_samples:without_end", "count": 3}, VECTOR, user_module)
    assert [s.source for s in found] == ["0", "1", "2"]


def test_what_a_callable_raises_is_said_with_its_line(user_module: Path) -> None:
    with pytest.raises(StageFailed, match=r"e2_user_samples.py:\d+: e2_user_samples:raising raised KeyError: 'no such"):
        read({"python": "e2_user_samples:raising", "count": 3}, VECTOR, user_module)


def test_states_given_by_a_callable_are_refused(user_module: Path) -> None:
    of = component({"x": {"shape": [1, 3], "role": "state", "state_from": "y"}, "z": {"shape": [1]}})
    with pytest.raises(RecipeError, match="has the inputs x, the recipe declares z"):
        read({"python": "e2_user_samples:make", "count": 1}, of, user_module)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def fingerprint(spec: dict[str, Any], base: Path) -> dict[str, str]:
    full = Component.model_validate({"model": MODEL, "samples": {"evaluation": spec}}).samples.evaluation
    assert full is not None
    return dict(samples.fingerprint(full, base, sha256_file))


def test_a_fingerprint_follows_every_file_and_no_folder(tmp_path: Path, user_module: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
    before = fingerprint({"text": "a.txt"}, tmp_path)
    (tmp_path / "a.txt").write_text("two\n", encoding="utf-8")
    assert fingerprint({"text": "a.txt"}, tmp_path) != before
    assert not any(str(tmp_path) in name for name in before)
    code = fingerprint({"python": "e2_user_samples:make"}, user_module)
    (user_module / "helper.py").write_text("A = 1\n", encoding="utf-8")
    assert fingerprint({"python": "e2_user_samples:make"}, user_module) != code
    assert "e2_user_samples" not in sys.modules
    assert fingerprint({"noise": True}, tmp_path) == {}


def test_the_fingerprint_of_a_callable_holds_the_packages_it_declares(tmp_path: Path) -> None:
    found = fingerprint({"python": "edgebake.models.zoo.speech:speech"}, tmp_path)
    assert found["distribution/espeakng-loader"] == "0.2.4"
    assert "code/espeak.py" in found


def test_a_package_that_a_callable_declares_and_that_is_missing_is_named(user_module: Path) -> None:
    with (user_module / "e2_user_samples.py").open("a", encoding="utf-8") as module:
        module.write("DISTRIBUTIONS = ('no-such-thing',)")
    with pytest.raises(
        RecipeError, match=r"needs the package 'no-such-thing', .*\n.*pip install --no-deps no-such-thing"
    ):
        fingerprint({"python": "e2_user_samples:make"}, user_module)


def test_reading_samples_needs_no_torch(tmp_path: Path) -> None:
    import subprocess

    code = "import sys, edgebake.samples, edgebake.samples_images, edgebake.samples_text, edgebake.samples_files, "
    code += "edgebake.samples_noise, edgebake.samples_python, edgebake.reference, edgebake.reference_run; "
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env())
    assert done.stdout.strip() == "[]"


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_images_in_eight_bits_are_what_the_network_gets() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    image = Image8(pixels=pixels, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0)).to_float32()
    expected = (pixels / 255 - 0.5) / np.array([0.25, 0.5, 1.0])[:, None, None]
    np.testing.assert_allclose(image[0], expected, atol=1e-6)
