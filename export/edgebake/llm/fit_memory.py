"""Memory and speed of a decoder on a device, and what its export takes here: formulas with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgebake.llm.fit_shape import Decoder
from edgebake.llm.fit_size import FileSize
from edgebake.mapped import LEAST
from edgebake.scheme import parse

MIB, GIB = 1 << 20, 1 << 30
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


class Cache(NamedTuple):
    """How keys and values are kept: bytes of a number, and bytes beside the numbers of a head of a token."""

    dtype: str
    width: int
    beside: int = 0


# By format and option, or by target. XNNPACK and ONNX Runtime's CPU provider compute in float32, Core ML keeps states
# in float16. ExecuTorch's int8 cache has a float32 scale and an int8 zero point for each head of a token.
CACHES: Mapping[str, Cache] = {
    "pte": Cache("float32", 4),
    "pte int8": Cache("int8", 1, beside=5),
    "onnx": Cache("float32", 4),
    "mlpackage": Cache("float16", 2),
    "executorch-coreml": Cache("float16", 2),
}
FLOAT = CACHES["onnx"]

# What a process holds beside weights, cache and activations: the runtime's code, the tokenizer, buffers of kernels.
# Fitted to the resident memory that Meta published for Llama 3.2 1B and 3B, bf16 and SpinQuant, run by ExecuTorch on a
# OnePlus 12 with 2048 tokens of context (model card of Llama 3.2, section "Quantized models"): each within 3 %.
RUNTIME_BYTES = 530 * MIB

# The share of a device's memory that one application gets before the system ends it. Nobody promises a number; these
# are assumptions: Android and iOS end foreground applications at about half of the memory (iOS gives more with the
# increased-memory-limit entitlement), Metal recommends working sets of up to three quarters on a Mac.
USABLE = {"android": 0.5, "ios": 0.5, "macos": 0.75}


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Predicted resident bytes on a device at their most."""

    weights: int
    cache: int
    activations: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations + self.runtime


def cache_bytes(decoder: Decoder, context: int, cache: Cache) -> int:
    """Keys and values of ``context`` tokens: 2 · layers · heads of the cache · (head width · bytes of one + beside).

    Shazeer 2019, "Fast Transformer Decoding", section 2.4, with the heads of grouped-query attention (Ainslie 2023).
    """
    return 2 * decoder.layers * decoder.kv_heads * (decoder.head_dim * cache.width + cache.beside) * context


def activation_bytes(decoder: Decoder, tokens: int) -> int:
    """float32 values that live at once while ``tokens`` are read in one call.

    In a layer's MLP: its input, residual and output, gate and up; in attention queries, keys, values and output. The
    widest of both counts, and the logits of the last token.
    """
    inner = max(w.shape[0] for w in decoder.weights if w.part == "mlp")
    heads = (2 * decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
    widest = max(2 * decoder.hidden + 2 * inner, 2 * decoder.hidden + heads)
    return 4 * (tokens * (widest + 2 * decoder.hidden) + decoder.vocabulary)


def device_memory(decoder: Decoder, file_bytes: int, cache: Cache, context: int, prompt: int) -> DeviceMemory:
    """Of an artifact of ``file_bytes`` with ``context`` tokens of cache that reads ``prompt`` tokens in one call."""
    return DeviceMemory(
        weights=file_bytes,
        cache=cache_bytes(decoder, context, cache),
        activations=activation_bytes(decoder, prompt),
    )


def longest_context(decoder: Decoder, file_bytes: int, cache: Cache, prompt: int, budget: int) -> int:
    """The most tokens of context with which the artifact stays within ``budget`` bytes; 0 when it never does."""
    empty = device_memory(decoder, file_bytes, cache, 0, prompt).total
    return max(0, min(decoder.positions, (budget - empty) // cache_bytes(decoder, 1, cache)))


def bytes_per_token(decoder: Decoder, size: FileSize, cache: Cache, context: int) -> int:
    """What decoding one token reads: every weight once, one row of the embedding, the cache of ``context`` tokens.

    The head's weights are read in full; where they are the embedding's own copy, that copy is.
    """
    embedding = size.parts["embedding"].total
    row = embedding // decoder.vocabulary
    shared = decoder.tied and size.parts["head"].total == 0
    read = sum(part.total for part in size.parts.values()) - (0 if shared else embedding - row)
    return read + cache_bytes(decoder, context, cache)


def decode_tokens_s(bytes_read: int, bandwidth_gb_s: float) -> float:
    """The most tokens a second: bandwidth over bytes read per token.

    The memory roof of the roofline model (Williams 2009): decoding one sequence does two operations per weight read, so
    that memory, not arithmetic, bounds it (Pope 2022, "Efficiently Scaling Transformer Inference", section 2).
    """
    return bandwidth_gb_s * 1e9 / bytes_read


# --- this machine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StagePeak:
    """Peak of a stage: ``base``, what the libraries take, + ``of_float`` · float32 weights + ``of_file`` · artifact."""

    base: int
    of_float: float
    of_file: float = 0.0


# Fitted to builds of decoders of 12 and 241 MiB of float32 weights, each in a process of its own; tests/llm holds them
# against builds. Tracing computes a gradient of every weight, to find idle modules.
TRACE = StagePeak(base=440 * MIB, of_float=2.9)
LOWER: Mapping[str, StagePeak] = {
    "pte": StagePeak(base=600 * MIB, of_float=1.8, of_file=1.0),
    "onnx": StagePeak(base=500 * MIB, of_float=4.3),
}
# Their backends hold copies of their own, of which too few builds were measured.
NOT_FITTED = ("executorch-coreml", "executorch-mlx", "executorch-qnn")


def export_peak_bytes(decoder: Decoder, file_bytes: int, format_: str) -> int | None:
    """Most resident bytes of the process that builds the artifact; None for formats that were not fitted."""
    if format_ not in LOWER:
        return None
    weights = 4 * decoder.parameters
    return max(round(s.base + s.of_float * weights + s.of_file * file_bytes) for s in (TRACE, LOWER[format_]))


def is_mapped(decoder: Decoder, format_: str, schemes: Mapping[str, str]) -> bool:
    """Whether a build from mapped float weights holds integers alone, as far as that was measured.

    That is a large network for a .pte, whose layers are 4 bits in groups and whose embedding and head are integers too.
    """
    inside = {schemes.get(w.name) for w in decoder.weights if w.part in ("attention", "mlp") and w.kind == "linear"}
    around = [parse(schemes.get(w.name, "fp32")) for w in decoder.weights if w.part in ("embedding", "head")]
    integers = inside == {"w4g32a8d"} and all(scheme.family != "float" for scheme in around)
    return format_ == "pte" and integers and 4 * decoder.parameters >= LEAST


# Fitted to a whole build of the Llama 3.2 1B shape at w4g32a8d, 8 bits in embedding and head. Integers of 4 bits take a
# byte each until the backend packs them, an eighth more their scales; beside them are the largest matrix in float32 and
# what quantising takes for it, or the file as the backend made it and as it is written.
MAPPED_BASE = 440 * MIB
OF_INTEGERS = 1.125
OF_MATRIX = 2.0
OF_FILE = 2.0


def mapped_peak_bytes(decoder: Decoder, file_bytes: int) -> int:
    """Most resident bytes of the process that builds a .pte of integers from mapped float weights."""
    matrices = [w.values for w in decoder.weights if w.kind != "norm"]
    beside = max(OF_MATRIX * 4 * max(matrices), OF_FILE * file_bytes)
    return MAPPED_BASE + round(OF_INTEGERS * sum(matrices) + beside)


# Measured on builds of the Llama 3.2 1B shape: torch and transformers, which describe the network, and some rows of
# weights; a float32 matrix is held whole, as it is read and as MatMul wants it.
STREAM_BASE = 440 * MIB
FLOAT_MATRICES = 3
RUN_OF_FILE = 2.0  # ONNX Runtime packs matrices anew for its kernels while it has the file's


def stream_peak_bytes(decoder: Decoder, schemes: Mapping[str, str]) -> int:
    """Most resident bytes of a process that lowers the decoder from its files: as much for any size."""
    matrices = [w for w in decoder.weights if w.kind == "linear"]
    floats = (w.values for w in matrices if parse(schemes.get(w.name, "fp32")).family == "float")
    return STREAM_BASE + FLOAT_MATRICES * 4 * max(floats, default=0)


def run_peak_bytes(file_bytes: int, cache: int) -> int:
    """Most resident bytes of a process that runs an ONNX artifact of ``file_bytes`` with so much ``cache``."""
    return STREAM_BASE + round(RUN_OF_FILE * file_bytes) + cache


def float_peak_bytes(decoder: Decoder, context: int, run_peak: int) -> int:
    """Most resident bytes of a process that runs the float32 network with its cache, and then the artifact beside it.

    While weights are read, the checkpoint's pages are resident, too: half as much again. ``run_peak``: of a process
    that runs the artifact alone.
    """
    weights = 4 * decoder.parameters
    return max(TRACE.base + round(1.5 * weights), weights + run_peak) + cache_bytes(decoder, context, FLOAT)


def export_disk_bytes(decoder: Decoder, file_bytes: int, *, traced: bool = True) -> int:
    """What a build writes: the store's entry, its copy below ``dist``, and a ``traced`` program's float32 weights."""
    return 2 * file_bytes + (4 * decoder.parameters if traced else 0)


def host_memory_bytes(asked_mib: float | None) -> int:
    """What a worker may use here: this machine's memory, a control group's limit or ``--memory``, the least of them."""
    import psutil

    bounds = [int(psutil.virtual_memory().total)]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = file.read_text().strip() if file.is_file() else ""
        bounds += [int(text)] if text.isdecimal() else []
    return min([*bounds, *([int(asked_mib * MIB)] if asked_mib else [])])
