"""How a verb ends: its exit code, problems as text or JSON, broken pipes, and a log in place of a traceback."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgebake.commands import _shared
from edgebake.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_RECIPE,
    EXIT_STAGE,
    EdgebakeError,
    Problem,
    problem_to_json,
)

if TYPE_CHECKING:
    from typer import BadParameter

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, what shells report of a program whose reader has gone
_OF_THE_SYSTEM = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG}


def run(verb: str, arguments: Mapping[str, Any]) -> int:
    """Run ``verb``; whatever goes wrong is shown here and becomes an exit code."""
    as_json = bool(arguments.get("as_json"))
    _never_fail_on_signs()
    try:
        Path.cwd()
    except FileNotFoundError:
        gone = Problem(what="the current folder is no longer there", fix="change to another one, and run it again")
        return _show([gone], EXIT_RECIPE, as_json)
    try:
        code = importlib.import_module(f"edgebake.commands.{verb}").run(**arguments)
        sys.stdout.flush()
    except EdgebakeError as error:
        return _show(error.problems, error.exit_code, as_json)
    except KeyboardInterrupt as end:
        return _interrupted(str(end), as_json)
    except (BrokenPipeError, SystemExit):  # rich makes the one out of the other; no verb leaves that way itself
        return _reader_gone()
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            return _internal(verb, error, as_json)
        from edgebake.store_files import remedy

        where = str(error.filename or "")
        problem = Problem(what=error.strerror or str(error), where=where, fix=remedy(error))
        return _show([problem], EXIT_STAGE, as_json)
    except Exception as error:  # noqa: BLE001 - a defect of ours: told in one line, kept in full in a log
        return _internal(verb, error, as_json)
    return int(code or 0)


def parsed(call: Callable[..., Any]) -> int:
    """Have the command line parsed and run by ``call``; with --json, what is wrong with the arguments is JSON too."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = call(standalone_mode=not as_json)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the parser's own help: its 1 would mean a defect of ours
            return _reader_gone()
        code = end.code
    except _wrong_arguments() as error:
        text = " ".join(error.format_message().split())
        code = _show([Problem(what=text, fix="edgebake --help")], EXIT_RECIPE, as_json)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_gone()
    return code if isinstance(code, int) else 0


def _wrong_arguments() -> type[BadParameter]:
    """What the parser raises: UsageError of the click that typer brings, which typer shows under no name of its own."""
    import typer

    return cast("type[BadParameter]", typer.BadParameter.__base__)


def _show(problems: Sequence[Problem], code: int, as_json: bool) -> int:
    """Tell people on standard error, and with --json the program that reads standard output, too."""
    try:
        _shared.print_problems(problems)
        if as_json:
            _print_error(problems, code)
    except BrokenPipeError:
        return _reader_gone()
    return code


def _interrupted(kept: str, as_json: bool) -> int:
    """One line, for the one who pressed Ctrl-C knows what happened; ``kept`` is what the verb says of its work."""
    text = f"interrupted; {kept}" if kept else "interrupted"
    try:
        _shared.say_aside(text)
        if as_json:
            _print_error([Problem(what=text)], EXIT_INTERRUPTED)
    except BrokenPipeError:
        return _reader_gone()
    return EXIT_INTERRUPTED


def _print_error(problems: Sequence[Problem], code: int) -> None:
    _shared.print_json({"error": [problem_to_json(p) for p in problems], "exit_code": code})
    sys.stdout.flush()


def _internal(verb: str, error: Exception, as_json: bool) -> int:
    said = " ".join(str(error).split())[:300]
    problem = Problem(
        what=f"internal error in `edgebake {verb}`: {type(error).__name__}" + (f": {said}" if said else ""),
        where=str(_log(verb, error)),
        fix="this is a defect of edgebake, not yours: please report it with that log",
    )
    return _show([problem], EXIT_INTERNAL, as_json)


def _log(verb: str, error: Exception) -> Path:
    import tempfile
    import traceback

    handle, name = tempfile.mkstemp(prefix=f"edgebake-{verb}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(traceback.format_exception(error))
    return Path(name)


def _never_fail_on_signs() -> None:
    """A terminal or pipe in a poorer encoding gets escapes for the signs that it lacks."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _reader_gone() -> int:
    """Nobody reads on (`| head`): no noise, and nothing left for Python to flush at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
    return EXIT_BROKEN_PIPE
