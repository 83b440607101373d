"""Which units are lowered from the files of their model, tensor by tensor: nothing is loaded, nothing traced."""

from __future__ import annotations

from edgebake.target import MODELS, find_target, support_of
from edgebake.units import Unit


def streams(unit: Unit) -> bool:
    """Whether ``unit`` can be lowered so: its target and its model source can, and nothing asked needs the network.

    Recipe steps and schemes that a method applies work on the network; pickles and a model's own code have to be
    loaded, and so has a network of which the first layers are taken. Of a unit that passed the check.
    """
    model, compress = unit.spec.model, unit.spec.compress
    target = find_target(unit.target)
    able = getattr(target, "STREAMS", False) and hasattr(MODELS.find(model.source), "describe")
    loads = model.pickles or model.remote_code is not None or model.layers is not None or compress.steps
    if not able or model.context is None or loads:
        return False
    rows = [support_of(target, scheme) for scheme in (unit.scheme, *compress.modules.values())]
    return not any(row.method for row in rows if row is not None)
