"""Stand-ins for MediaTek's two closed packages, with the calls that ExecuTorch makes of them.

They hold what they were given instead of machine code, so that tests see what NeuroPilot would be asked to compile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_FILES = {
    "mtk_converter/__init__.py": """
class PyTorchV2Converter:
    @classmethod
    def from_exported_program(cls, program):
        self = cls()
        self.program = program
        return self

    def convert_to_mlir(self):
        calls = [n for n in self.program.graph.nodes if n.op == "call_function"]
        return "\\n".join(f"{n.target.__name__} {getattr(n.meta['val'], 'dtype', '')}" for n in calls)
""",
    "mtk_converter/python/__init__.py": "",
    "mtk_converter/python/converters/__init__.py": "",
    "mtk_converter/python/converters/pytorch/__init__.py": "",
    "mtk_converter/python/converters/pytorch/importer_v2.py": """
def is_fx_node_supported(node):
    return "softmax" not in node.target.__name__
""",
    "mtk_neuron/__init__.py": """
def compile(text, options):
    return f"{options}\\n{text}".encode()

def extract_shared_data(models, options):
    return b"shared", models
""",
}


@contextmanager
def neuropilot(folder: Path) -> Iterator[None]:
    """Both packages importable from ``folder``; afterwards as if they had never been there."""
    for name, text in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        try:
            yield
        finally:
            for name in [n for n in sys.modules if n.startswith(("mtk_", "executorch.backends.mediatek"))]:
                del sys.modules[name]
