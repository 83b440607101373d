"""What a model source is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgebake.recipe import Component, Model
from edgebake.types import Keep


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """All that ``load`` may look at.

    ``keep`` lets a source store a costly conversion once (gguf); without it the conversion lives as long as the call.
    A source that keeps something has ``conversions(model, base)``, which says under which keys. One whose tokenizer
    lies elsewhere than its weights has ``tokenizer(request)``, which gives the folder, or None where it does not.
    ``trust``: the user agreed (``--trust``) that files which count as code may be loaded.
    """

    model: Model
    component: Component
    base: Path
    trust: bool = False
    keep: Keep | None = None
