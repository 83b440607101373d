"""What ExecuTorch's Ethos-U backend keeps of a compiled part: Vela's commands and weights, and the memory they work in.

Layout: blocks of a name in 16 bytes, a length in 16, and the data, filled up to 16 (vela_compile in ExecuTorch 1.4's
backends/arm/arm_vela.py). The commands open with a driver header (driver_actions.py of Vela 5.2): ``COP1``, then a word
of configuration behind its tag, in which bits 0-3 are log2 of the multiply-accumulates per cycle and 28-31 the product.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgebake_targets.inspectors._flatbuffers import Malformed, integer

BACKEND = "EthosUBackend"
_FIRST, _LAST = "vela_bin_stream", "vela_end_stream"
_PRODUCTS = {0: "u55", 1: "u65", 2: "u85"}
_HEADER = 32


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One part: the accelerator that it runs on, and bytes of its commands, its weights and the memory it works in."""

    accelerator: str
    command_bytes: int
    weight_bytes: int
    scratch_bytes: int


def read(blob: memoryview) -> Stream:
    """The stream in ``blob``; Malformed when it is none or is cut short."""
    blocks = _blocks(blob)
    names = list(blocks)
    absent = {"cmd_data", "weight_data", "scratch_size"} - set(names)
    if absent or (names[:1], names[-1:]) != ([_FIRST], [_LAST]):
        raise Malformed(f"a stream of Vela with the blocks {', '.join(names) or 'none'}")
    commands = blocks["cmd_data"]
    if bytes(commands[:4]) != b"COP1":
        raise Malformed(f"Vela's commands open with {bytes(commands[:4])!r}, not with the driver's mark")
    word = integer(commands, 8, "I")
    product = _PRODUCTS.get(word >> 28)
    if product is None:
        raise Malformed(f"product {word >> 28} is no Ethos-U that is known here")
    return Stream(
        accelerator=f"ethos-{product}-{1 << (word & 15)}",
        command_bytes=len(commands),
        weight_bytes=len(blocks["weight_data"]),
        scratch_bytes=integer(blocks["scratch_size"], 0, "I"),
    )


def _blocks(blob: memoryview) -> dict[str, memoryview]:
    found: dict[str, memoryview] = {}
    start = 0
    while start < len(blob):
        name = bytes(blob[start : start + 16]).rstrip(b"\0").decode("ascii", "replace")
        size, begin = integer(blob, start + 16, "i"), start + _HEADER
        if size < 0 or begin + size > len(blob):
            raise Malformed(f"block {name!r} of a Vela stream reaches beyond its {len(blob)} bytes")
        found[name] = blob[begin : begin + size]
        start = begin + -(-size // 16) * 16 if size else begin
    return found
