"""Rounds a network as executorch-qnn does, by each way to choose ranges: ``python qnn_rounding.py REQUEST``.

REQUEST: what ``_qnn_lowering.asked`` says, as JSON. ``found.json``: method to the signal to noise in dB of the rounded
network in torch, on the inputs in ``probe.npz`` against what the float network makes of them.

A program of its own: the vendor's libraries are found by the environment that Python starts in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from edgebake_targets._qnn_lowerer import calls_in, rounded
from edgebake_targets._ranges import METHODS


def measured(request: dict[str, Any], probe: Path) -> float:
    given = request["methods"]["forward"]
    program = torch.export.load(given["program"])
    made, _ = rounded(program.module(check_guards=False), request, given)
    signal = noise = 0.0
    with torch.no_grad():
        for inputs in calls_in(probe, ["x"]):
            (wanted,), (got,) = program.module()(*inputs), made(*inputs)
            signal += float((wanted**2).sum())
            noise += float(((wanted - got) ** 2).sum())
    return float(10 * torch.log10(torch.tensor(signal / noise)))


if __name__ == "__main__":
    path = Path(sys.argv[1])
    asked = json.loads(path.read_text())
    probe = path.with_name("probe.npz")
    found = {name: measured({**asked, "activation_range": name}, probe) for name in ("histogram", *METHODS)}
    path.with_name("found.json").write_text(json.dumps(found))
