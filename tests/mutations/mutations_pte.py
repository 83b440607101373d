"""Defects of .pte files: constants found by what they say and overwritten in place, and programs of a wrong network."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tampering import Edit, Mutation, Outputs, control, recipes_of

FILE = "model.pte"
Change = Callable[[np.ndarray], np.ndarray]
Like = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # float weights by name -> what the constant resembles
ALIGNED = 16  # ExecuTorch aligns constants to at least so many bytes


def run(folder: Path, samples: Mapping[str, np.ndarray]) -> Outputs:
    """Outputs of ``folder``'s program for ``samples`` (inputs in order, first axis = samples), as float64."""
    import executorch.kernels.quantized  # noqa: F401  registers kernels
    import torch
    from executorch.runtime import Runtime, Verification

    program = Runtime.get().load_program(folder / FILE, verification=Verification.InternalConsistency)
    method = program.load_method("forward")
    assert method is not None
    count = len(next(iter(samples.values())))
    rows = [
        [o.clone().numpy() for o in method.execute([torch.from_numpy(v[i : i + 1].copy()) for v in samples.values()])]
        for i in range(count)
    ]
    names = ["output"] if len(rows[0]) == 1 else [f"output.{n}" for n in range(len(rows[0]))]
    return {name: np.concatenate([row[n] for row in rows]).astype(np.float64) for n, name in enumerate(names)}


def locate(data: bytes, like: np.ndarray, dtype: str, *, magnitude: bool) -> int:
    """Offset of the constant that points the way ``like`` does, of its size too where ``magnitude``; exactly one does.

    The direction of a weight is a fingerprint that survives quantization: another constant's cosine is near 0.
    """
    wanted = like.astype(np.float64).ravel()
    size = wanted.size * np.dtype(dtype).itemsize
    found = []
    for offset in range(0, len(data) - size + 1, ALIGNED):
        with np.errstate(invalid="ignore"):  # bytes of something else may read as signalling NaNs
            values = np.frombuffer(data, dtype, wanted.size, offset).astype(np.float64)
        if not (np.isfinite(values).all() and values.any()) or np.abs(values).max() > 1e12:
            continue
        ratio = np.sqrt((values @ values) / (wanted @ wanted))
        if values @ wanted > 0.998 * ratio * (wanted @ wanted) and (not magnitude or 0.9 < ratio < 1.1):
            found.append(offset)
    assert len(found) == 1, f"{len(found)} constants look like the weight"
    return found[0]


def _overwrite(parts: tuple[tuple[Like, str, bool], ...], change: Callable[..., Any], folder: Path) -> None:
    data = bytearray((folder / FILE).read_bytes())
    floats = _floats(folder)
    likes = [like(floats) for like, _, _ in parts]
    places = [locate(bytes(data), x, d, magnitude=m) for x, (_, d, m) in zip(likes, parts, strict=True)]
    values = [
        np.frombuffer(bytes(data), d, x.size, at).reshape(x.shape).copy()
        for x, (_, d, _), at in zip(likes, parts, places, strict=True)
    ]
    made = change(*values)
    for before, after, at in zip(values, made, places, strict=True):
        written = np.ascontiguousarray(after, before.dtype).tobytes()
        assert len(written) == before.nbytes
        data[at : at + len(written)] = written
    assert bytes(data) != (folder / FILE).read_bytes(), "nothing was changed"
    (folder / FILE).write_bytes(data)


def _floats(folder: Path) -> Mapping[str, np.ndarray]:
    """The network's float weights."""
    from safetensors.numpy import load_file

    return load_file(recipes_of(folder) / f"{folder.parents[3].name}.safetensors")


def constant(like: Like, dtype: str, change: Change, *, magnitude: bool = True) -> Edit:
    """An edit of one constant."""
    return partial(_overwrite, ((like, dtype, magnitude),), lambda values: (change(values.copy()),))


def floats(name: str, change: Change) -> Edit:
    """An edit of a float32 constant that is stored as the network has it."""
    return constant(lambda f: f[name], "<f4", change)


def rows_as_int8(name: str) -> Like:
    """What a weight looks like as int8 per row."""
    return lambda f: f[name] / np.abs(f[name]).max(axis=1, keepdims=True) * 127


def row_scales(name: str) -> Like:
    """What the scales of a weight look like."""
    return lambda f: np.abs(f[name]).max(axis=1) / 127


def bias_steps(name: str) -> Like:
    """The direction of a bias in steps of weight scale times input scale."""
    return lambda f: f[f"{name}.bias"] / np.abs(f[f"{name}.weight"]).max(axis=1)


def exchanged(one: Like, other: Like, dtype: str) -> Edit:
    """Two constants of one shape in each other's place."""
    return partial(_overwrite, ((one, dtype, True), (other, dtype, True)), lambda a, b: (b, a))


def row(index: int, factor: float) -> Change:
    """One row multiplied."""

    def change(values: np.ndarray) -> np.ndarray:
        scaled = values[index] * factor
        values[index] = np.clip(scaled, -127, 127) if values.dtype == np.int8 else scaled
        return values

    return change


def put(value: float, *index: int) -> Change:
    """One value replaced."""

    def change(values: np.ndarray) -> np.ndarray:
        values[index] = value
        return values

    return change


def bits_flipped(values: np.ndarray) -> np.ndarray:
    """A quarter of a thousand random bytes inverted."""
    raw = np.ascontiguousarray(values).view(np.uint8).ravel()
    raw[np.random.default_rng(3).choice(raw.size, 256, replace=False)] ^= 0xFF
    return raw.view(values.dtype).reshape(values.shape)


def drawn_again(values: np.ndarray) -> np.ndarray:
    """Values of another seed with the same spread."""
    return np.random.default_rng(7).normal(values.mean(), values.std(), values.shape)


def nudged(values: np.ndarray) -> np.ndarray:
    """The last bit of one value."""
    values[12, 34] = np.nextafter(values[12, 34], np.float32(np.inf))
    return values


def stepped(values: np.ndarray) -> np.ndarray:
    """One step of one int8 value."""
    values[3, 3] += 1 if values[3, 3] < 100 else -1
    return values


def double(before: float, after: float) -> Edit:
    """A float attribute of an operator, wherever the program holds it."""

    def change(folder: Path) -> None:
        data = (folder / FILE).read_bytes()
        assert data.count(struct.pack("<d", before)) == 1
        (folder / FILE).write_bytes(data.replace(struct.pack("<d", before), struct.pack("<d", after)))

    return change


def rebuilt(defect: str) -> Edit:
    """The program of a network with one of digit_nets.DEFECTS in the place of the right one's; none for ``""``."""

    def change(folder: Path) -> None:
        from tampering import nets_in

        nets = nets_in(recipes_of(folder))
        network = nets.trained(folder.parents[3].name, recipes_of(folder))
        if defect:
            nets.DEFECTS[defect](network)
        before = (folder / FILE).read_bytes()
        _lower(network, folder)
        assert not defect or (folder / FILE).read_bytes() != before

    return change


def _lower(network: Any, folder: Path) -> None:
    """Write the .pte of ``network`` into ``folder`` as the target does, in float32."""
    import torch

    from asking import defaults, lower_request
    from edgebake import signatures
    from edgebake.delivery import read_manifest
    from edgebake.target import find_target
    from edgebake.types import Traced

    manifest = read_manifest(folder)
    signature = signatures.from_json(manifest["signature"])
    target: Any = find_target(manifest["target"])
    inputs = tuple(torch.ones(tuple(map(int, spec.shape))) for spec in signature.methods["forward"].inputs)
    program = torch.export.export(network, inputs, strict=False)
    traced = Traced(programs={"forward": program}, signature=signature)
    target.lower(traced, lower_request(folder, defaults(target)))


_SECOND, _THIRD = rows_as_int8("second.weight"), rows_as_int8("third.weight")
MUTATIONS = (
    Mutation("channel-scaled", "layered", "fp32", floats("first.weight", row(9, 1.05))),
    Mutation(
        "weights-swapped",
        "layered",
        "fp32",
        exchanged(lambda f: f["second.weight"], lambda f: f["third.weight"], "<f4"),
    ),
    Mutation("bias-zeroed", "layered", "fp32", floats("third.bias", np.zeros_like)),
    Mutation("sign-flipped", "layered", "fp32", floats("head.weight", row(4, -1))),
    Mutation("weight-transposed", "layered", "fp32", floats("second.weight", np.transpose)),
    Mutation("channels-permuted", "layered", "fp32", floats("third.weight", lambda w: np.roll(w, 1, axis=0))),
    Mutation("other-seed", "layered", "fp32", floats("third.weight", drawn_again)),
    Mutation("nan", "layered", "fp32", floats("head.weight", put(np.nan, 2, 5))),
    Mutation("bits-flipped", "layered", "w8a8", constant(_SECOND, "i1", bits_flipped)),
    Mutation("integers-swapped", "layered", "w8a8", exchanged(_SECOND, _THIRD, "i1")),
    Mutation("weight-scale", "layered", "w8a8", constant(row_scales("first.weight"), "<f4", row(9, 2.0))),
    Mutation(
        "bias-zeroed",
        "layered",
        "w8a8",
        constant(bias_steps("first"), "<i4", np.zeros_like, magnitude=False),
    ),
    Mutation("sign-flipped", "layered", "w8a8d", constant(rows_as_int8("head.weight"), "i1", row(6, -1))),
    Mutation("weight-scale", "layered", "w8a8d", constant(row_scales("head.weight"), "<f4", row(2, 1.5))),
    Mutation("epsilon", "rows", "fp32", double(1e-5, 1e-2)),
    Mutation("output-off", "rows", "fp32", floats("late.bias", lambda b: b + 0.01)),
    Mutation(
        "depthwise-channel",
        "rows",
        "fp32",
        constant(lambda f: f["depth.weight"].transpose(1, 2, 3, 0), "<f4", lambda w: w * np.eye(8)[1] * 0.1 + w),
    ),
    Mutation("weight-transposed", "rows", "w8a8", constant(rows_as_int8("query.weight"), "i1", np.transpose)),
)
WRONG_NETWORKS = tuple(
    Mutation(f"rebuilt-{defect}", network, "fp32", rebuilt(defect))
    for network, defects in {
        "layered": ("sigmoid", "subtract"),
        "rows": ("softmax-axis", "no-mask", "outputs-swapped"),
    }.items()
    for defect in defects
)
CONTROLS = (
    *(control("layered", scheme) for scheme in ("fp32", "w8a8", "w8a8d")),
    *(control("rows", scheme) for scheme in ("fp32", "w8a8")),
    Mutation("rebuilt", "rows", "fp32", rebuilt("")),  # what rebuilds the wrong ones does no harm of its own
)
HARMLESS = (
    Mutation("last-bit", "layered", "fp32", floats("second.weight", nudged)),
    Mutation("one-step", "layered", "w8a8", constant(_THIRD, "i1", stepped)),
)
