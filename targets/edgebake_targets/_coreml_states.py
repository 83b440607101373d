"""States: buffers that the network writes to, and whether the package writes to every one of them too.

A converter that loses such a write gives a package that loads, predicts and forgets: nothing but a second prediction
shows it. So the writes of the package are held against those of the program that it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, RecipeError, StageFailed
from edgebake.types import Verdict, VerdictState, canonical_module_name
from edgebake_targets._coreml_constants import operations
from edgebake_targets._coreml_package import Package

if TYPE_CHECKING:
    import torch

_WRITERS = {"write_state": "input", "coreml_update_state": "state"}  # operator -> parameter that names the state


def states_of(program: torch.export.ExportedProgram, system: str) -> dict[str, str]:
    """Name of the state in the package -> buffer, for each buffer that ``program`` writes to.

    Refused by name: buffers where ``system`` has no states, that do not start at zero as states do, and inputs that
    the network writes to.
    """
    signature = program.graph_signature
    inputs = sorted(set(signature.user_inputs_to_mutate.values()))
    if inputs:
        raise StageFailed(
            f"the network writes to its input {inputs[0]}, which a Core ML package cannot",
            fix="clone it before it is written to, and return the new value",
        )
    buffers = sorted(set(signature.buffers_to_mutate.values()))
    if buffers and system != "iOS18":
        raise RecipeError(
            f"the network writes to its buffer {canonical_module_name(buffers[0])}; packages hold states since iOS 18",
            fix="options: {minimum_os: iOS18}; or pass it as an input with role state and return its new value",
        )
    problems = [
        Problem(
            what=f"the buffer {canonical_module_name(buffer)} does not start at zero, as Core ML's states do",
            fix="let it start at zeros and add what it starts at where it is read",
        )
        for buffer in buffers
        if bool(_stored(program, buffer).any())
    ]
    if problems:
        raise StageFailed(problems)
    return {re.sub(r"\W", "_", buffer): canonical_module_name(buffer) for buffer in buffers}


def coarse(programs: Iterable[torch.export.ExportedProgram], states: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """A line for each buffer of integers among ``states`` (by place: name -> buffer), which float16 does not count."""
    kept = {buffer for named in states.values() for buffer in named.values()}
    held = {
        canonical_module_name(name): value
        for program in programs
        for name, value in {**program.constants, **program.state_dict}.items()
    }
    for buffer in sorted(kept):
        dtype = held[buffer].dtype
        if not dtype.is_floating_point and dtype.itemsize > 1:
            yield (
                f"the buffer {buffer} holds integers, and Core ML's states are float16: beyond 2048 they are not exact"
            )


def name_writes(program: Any) -> None:
    """Number the writes of the MIL ``program``, in place: a pass of coremltools walks a set, and counts as it comes."""
    block = program.functions["main"]
    handed_out = {id(value) for value in block.outputs}
    writes = [operation for operation in block.operations if operation.op_type == "coreml_update_state"]
    for number, operation in enumerate(writes):
        if id(operation.outputs[0]) not in handed_out:  # an output keeps the name that the signature gave it
            operation.name = operation.outputs[0].name = f"{operation.state.name}_update_{number}"


def _stored(program: torch.export.ExportedProgram, buffer: str) -> torch.Tensor:
    found: torch.Tensor = {**program.constants, **program.state_dict}[buffer]
    return found


def written(package: Package) -> set[str]:
    """Names of the states that ``package`` writes to anywhere."""
    found = (_state_of(operation) for operation in operations(package))
    return {name for name in found if name is not None}


def _state_of(operation: Any) -> str | None:
    parameter = _WRITERS.get(str(operation.type))
    if parameter is None or parameter not in operation.inputs:
        return None
    return next((str(argument.name) for argument in operation.inputs[parameter].arguments), None)


def faults(package: Package, declared: Iterable[str], promised: Mapping[str, str]) -> list[str]:
    """What is wrong with the states of ``package``: ``declared`` by it, ``promised`` (name -> buffer) by the build."""
    there, changed = set(declared), written(package)
    said = [f"the buffer {promised[name]} is no state of it" for name in sorted(promised.keys() - there)]
    said += [f"the state {name} is there but was not promised" for name in sorted(there - promised.keys())]
    lost = sorted(promised.keys() & there - changed)
    return said + [f"it never writes to {promised[name]}, so the next prediction would see old values" for name in lost]


def refuse_dropped(package: Package, declared: Iterable[str], promised: Mapping[str, str]) -> None:
    """StageFailed naming each buffer whose write the converter lost."""
    wrong = faults(package, declared, promised)
    fix = "pass the buffer as an input with role state and return its new value"
    if wrong:
        raise StageFailed([Problem(what=what, where=package.path.name, fix=fix) for what in wrong])


def verdict(package: Package, declared: Iterable[str], promised: Mapping[str, str]) -> tuple[Verdict, ...]:
    """``structure.states``; nothing for a package without states that promised none."""
    names = tuple(declared)
    if not names and not promised:
        return ()
    wrong = faults(package, names, promised)
    state: VerdictState = "fail" if wrong else "pass"
    return (Verdict(limit="structure.states", state=state, subject=package.path.name, reason="; ".join(wrong)),)
