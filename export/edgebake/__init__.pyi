from edgebake import api as api
from edgebake.api import build as build
from edgebake.recipe import Recipe as Recipe
from edgebake.result import Result as Result

__version__: str
__all__ = ["Recipe", "Result", "__version__", "api", "build"]
