"""What Arm's backends share: the quantizer, and TOSA graphs that are kept beside a program with the proof of each.

ExecuTorch lowers a part to a TOSA graph, and a compiler of Arm's turns that into what the device loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import LowerRequest
from edgebake.types import Assignment, Traced
from edgebake_targets import _executorch

if TYPE_CHECKING:
    import torch
    from torchao.quantization.pt2e.quantizer import Quantizer

FOLDER = "tosa"  # beside the program

# A TOSA graph and the flags of its compiler, to what the device loads: same graph and flags, same bytes.
Compiler = Callable[[bytes, Sequence[str]], bytes]


@contextmanager
def kept_parts(folder: Path, backend: Any, name: str, compiled: Compiler) -> Iterator[list[str]]:
    """Within it ``compiled`` does the work of the function ``name`` of ExecuTorch's module ``backend``.

    Each part that is lowered leaves its TOSA graph in ``folder``; yields their names from there.
    """
    names: list[str] = []

    def keeps(tosa: bytes, flags: Sequence[str], *_where: Any, **_how: Any) -> bytes:
        part = compiled(tosa, flags)
        path = _path(folder, part)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tosa)
        names.append(str(path.relative_to(folder).as_posix()))
        return part

    own = getattr(backend, name)
    setattr(backend, name, keeps)
    try:
        yield names
    finally:
        setattr(backend, name, own)


@contextmanager
def told_reasons() -> Iterator[dict[str, str]]:
    """Within it, why Arm's partitioner leaves an operator out, by the name of its node; yields that."""
    from executorch.backends.arm.tosa import partitioner

    reasons: dict[str, str] = {}
    own = partitioner.WhyNoPartitionReporter

    class Telling(own):  # type: ignore[misc, valid-type]  # ExecuTorch's classes are untyped
        def report_reject(self, node: torch.fx.Node, reason: str) -> None:
            # Its words for an operator that it does not know name tables inside of it.
            if not reason.startswith("Not included in"):
                reasons.setdefault(node.name, f"Arm's partitioner: {reason}")
            super().report_reject(node, reason)

    partitioner.WhyNoPartitionReporter = Telling
    try:
        yield reasons
    finally:
        partitioner.WhyNoPartitionReporter = own


def graph_of(part: bytes, folder: Path, again: Callable[[bytes], bytes]) -> bytes:
    """The TOSA graph in ``folder`` that ``part`` was made from: made ``again``, or ArtifactDamaged."""
    path = _path(folder, part)
    rebuild = "build it again: a program is judged with the TOSA graphs that were written beside it"
    if not path.is_file():
        raise ArtifactDamaged(
            f"no TOSA graph lies beside the program for its part {path.stem}", where=str(folder), fix=rebuild
        )
    tosa = path.read_bytes()
    try:
        made = again(tosa)
    except StageFailed as error:
        raise ArtifactDamaged(f"this TOSA graph cannot be converted: {error}", where=str(path), fix=rebuild) from error
    if made != part:
        raise ArtifactDamaged(
            "the program's part is not what this TOSA graph converts to", where=str(path), fix=rebuild
        )
    return tosa


def _path(folder: Path, part: bytes) -> Path:
    """A part's graph is found by the digest of what it was converted to."""
    return folder / FOLDER / f"{sha256(part).hexdigest()[:16]}.tosa"


def refuse_lost_integers(traced: Traced, request: LowerRequest, graphs: Sequence[str]) -> None:
    """StageFailed naming the modules whose integer weights are in no TOSA graph with their bits."""
    from edgebake_targets import _executorch_checks, _tosa

    held = Counter[tuple[str, int]]()
    for name in sorted(set(graphs)):
        held += _tosa.parse((request.folder / name).read_bytes()).constants
    _executorch_checks.refuse_lost_integers(
        request,
        traced,
        fix="Arm's backend takes integer weights of linear layers and convolutions: give these modules fp32",
        inside=held,
    )


def observing(made: Any, configuration: Any, assignment: Assignment, scheme: str) -> Quantizer:
    """Arm's quantizer ``made`` with ``configuration``, kept from modules that have another scheme than ``scheme``."""
    from executorch.backends.arm.quantizer.arm_quantizer_utils import NodeFinder

    floats = set(assignment.kinds) - set(assignment.of(scheme))

    class OfFloatModules(NodeFinder):  # type: ignore[misc]  # ExecuTorch's classes are untyped
        """The operators of modules that the rules leave float."""

        def find_nodes(self, model: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
            return (
                n for n in model.graph.nodes if n.op == "call_function" and _executorch.innermost_module(n) in floats
            )

        def __repr__(self) -> str:
            return f"modules that stay float: {', '.join(sorted(floats))}"

    made.set_global(configuration)
    if floats:
        made.quantizer.set_node_finder(None, OfFloatModules())
    return _spelled(made)


def _spelled(made: Any) -> Quantizer:
    """``made`` behind a rewrite of relu6 as hardtanh(0, 6), the same function.

    Arm's backend knows what its quantizer saw by a mark on the operator; relu6 loses it where it is decomposed, and
    stays outside.
    """
    import torch
    from torchao.quantization.pt2e.quantizer import Quantizer

    aten = torch.ops.aten
    spellings = {aten.relu6.default: aten.hardtanh.default, aten.relu6_.default: aten.hardtanh_.default}

    class Spelled(Quantizer):  # type: ignore[misc]  # torchao's classes are untyped
        """Arm's quantizer."""

        def transform_for_annotation(self, model: torch.fx.GraphModule) -> Any:
            for node in model.graph.nodes:
                if node.target in spellings:
                    node.target, node.args = spellings[node.target], (node.args[0], 0.0, 6.0)
            model.recompile()
            return made.transform_for_annotation(model)

        def annotate(self, model: torch.fx.GraphModule) -> Any:
            return made.annotate(model)

        def validate(self, model: torch.fx.GraphModule) -> None:
            made.validate(model)

    return Spelled()
