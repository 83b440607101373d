"""Options of a recipe step: each with its default, its type and its bounds, all faults told at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgebake.errors import Problem, RecipeError
from edgebake.target import Option
from edgebake.wording import did_you_mean, said


def filled(method: str, options: Sequence[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of ``method`` with its value; RecipeError for names and values that it does not take."""
    found = list(problems(method, options, given))
    if found:
        raise RecipeError(found)
    chosen = {option.name: given.get(option.name, option.default) for option in options}
    return {o.name: float(chosen[o.name]) if isinstance(o.default, float) else chosen[o.name] for o in options}


def problems(method: str, options: Sequence[Option], given: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the options ``given`` to the step ``method``; ``where`` is the option's name."""
    known = {option.name: option for option in options}
    for name, value in given.items():
        if name not in known:
            yield Problem(
                what=f"the step {method} has no option {said(name)}", where=name, fix=did_you_mean(name, known)
            )
        elif wrong := _misfit(known[name], value):
            yield Problem(what=f"{method}: {name} {wrong}", where=name, fix=f"{name}: {known[name].help}")


def _misfit(option: Option, value: Any) -> str:
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type(option.default)]
    if type(value) is not type(option.default) and not (isinstance(option.default, float) and type(value) is int):
        return f"must be {kind}, not {said(value)}"
    if not isinstance(value, bool | str) and value < 0:
        return f"must not be negative, and is {said(value)}"
    if option.choices and value not in option.choices:
        return f"must be one of {', '.join(str(choice) for choice in option.choices)}, not {said(value)}"
    return ""
