"""Every operator there is, by its MIL name: the tables of the modules in ``ops``, joined."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache

from edgebake_targets.mil import ops
from edgebake_targets.mil.call import Operator


@lru_cache
def operators() -> Mapping[str, Operator]:
    """The joined table; two modules that implement the same operator are a mistake of ours."""
    joined: dict[str, Operator] = {}
    for module in pkgutil.iter_modules(ops.__path__):
        if module.name.startswith("_"):
            continue
        table: Mapping[str, Operator] = importlib.import_module(f"{ops.__name__}.{module.name}").OPERATORS
        twice = sorted(joined.keys() & table.keys())
        assert not twice, f"{module.name} implements {twice[0]} a second time"
        joined.update(table)
    return joined
