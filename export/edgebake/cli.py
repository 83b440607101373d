"""The command line: `edgebake VERB`. Verbs are thin here; each one's work is a file under commands/."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgebake.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EdgebakeError

app = typer.Typer(
    name="edgebake",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One recipe in; verified ExecuTorch, ONNX and Core ML artifacts out.\n\n"
    "Start with `edgebake build minilm-l6`, or `edgebake init MODEL_FOLDER` for a recipe of your own.",
    epilog="Exit codes: 0 no limit failed, 1 internal error, 2 recipe or arguments, 3 toolchain missing, "
    "4 a stage failed, 5 a limit not met, 6 not measured (with --strict), 130 interrupted.",
)

Recipes = Annotated[list[str], typer.Argument(help="recipe files, names of shipped recipes, or globs")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key: compress.scheme=w8")
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder for artifacts")]
StoreRoot = Annotated[Path | None, typer.Option("--store", help="store folder (or EDGEBAKE_STORE)")]
Trust = Annotated[bool, typer.Option("--trust", help="allow .pt2 programs and other files that count as code")]
Only = Annotated[list[str], typer.Option("--only", metavar="GLOB", help="only artifacts like 'minilm*@onnx-*'")]
Strict = Annotated[bool, typer.Option("--strict", help="exit 6 when a limit was not measured")]


def _run(verb: str, **arguments: Any) -> None:
    code = importlib.import_module(f"edgebake.commands.{verb}").run(**arguments)
    raise typer.Exit(code or 0)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        from edgebake import __version__

        typer.echo(f"edgebake {__version__}")
        raise typer.Exit


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="model folder, pkg://package/folder, or hub id")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="recipe to write; default <name>.yaml")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite an existing recipe")] = False,
) -> None:
    """Write a commented recipe for a model."""
    _run("init", model=model, output=output, force=force)


@app.command()
def check(recipes: Recipes, settings: Settings = [], trust: Trust = False, as_json: Json = False) -> None:
    """Refuse everything that can be refused before a weight is read."""
    _run("check", recipes=recipes, settings=settings, trust=trust, as_json=as_json)


@app.command()
def plan(
    recipes: Recipes,
    settings: Settings = [],
    only: Only = [],
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Show the fully resolved recipe and what would run."""
    _run("plan", recipes=recipes, settings=settings, only=only, trust=trust, as_json=as_json)


@app.command()
def build(
    recipes: Annotated[list[str], typer.Argument(help="recipes, shipped names, globs; or a model folder or hub id")],
    target: Annotated[list[str], typer.Option("--target", help="one-shot build of a model: its targets")] = [],
    scheme: Annotated[str | None, typer.Option("--scheme", help="one-shot build of a model: its scheme")] = None,
    settings: Settings = [],
    only: Only = [],
    out: Out = Path("dist"),
    store: StoreRoot = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="components built at once")] = 1,
    fail_fast: Annotated[bool, typer.Option("--fail-fast/--keep-going", help="stop at the first failure")] = False,
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="seconds a stage may take")] = None,
    memory: Annotated[float | None, typer.Option("--memory", min=1, help="MiB a worker may use")] = None,
    check_files: Annotated[bool, typer.Option("--check", help="hash every stored and delivered file")] = False,
    trust: Trust = False,
    strict: Strict = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the table")] = False,
    report: Annotated[list[Path], typer.Option("--report", help="also write .json, .md, .xml (JUnit) or .html")] = [],
    as_json: Json = False,
) -> None:
    """Build, run and judge artifacts."""
    _run(
        "build",
        recipes=recipes,
        targets=target,
        scheme=scheme,
        settings=settings,
        only=only,
        out=out,
        store=store,
        jobs=jobs,
        fail_fast=fail_fast,
        timeout=timeout,
        memory=memory,
        check_files=check_files,
        trust=trust,
        strict=strict,
        quiet=quiet,
        reports=report,
        as_json=as_json,
    )


@app.command()
def verify(
    folders: Annotated[list[Path], typer.Argument(help="artifact folders, or a folder that holds some (dist)")],
    strict: Strict = False,
    report: Annotated[list[Path], typer.Option("--report", help="also write .json, .md, .xml (JUnit) or .html")] = [],
    as_json: Json = False,
) -> None:
    """Judge existing artifacts again: digests, then outputs against the recorded reference."""
    _run("verify", folders=folders, strict=strict, reports=report, as_json=as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="a .pte, .onnx, .mlpackage or artifact folder, whoever made it")],
    as_json: Json = False,
) -> None:
    """Show inputs, outputs, operators, delegates and the precision of weights."""
    _run("inspect", path=path, as_json=as_json)


@app.command()
def bench(
    folders: Annotated[list[Path], typer.Argument(help="artifact folders, or a folder that holds some (dist)")],
    repetitions: Annotated[int, typer.Option("--repetitions", "-n", min=3, help="timed runs")] = 50,
    as_json: Json = False,
) -> None:
    """Time artifacts here and weigh their memory."""
    _run("bench", folders=folders, repetitions=repetitions, as_json=as_json)


@app.command()
def bundle(
    recipes: Recipes, settings: Settings = [], out: Out = Path("dist"), store: StoreRoot = None, trust: Trust = False
) -> None:
    """Pack built artifacts for app developers."""
    _run("bundle", recipes=recipes, settings=settings, out=out, store=store, trust=trust)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="dist, or artifact folders")] = [Path("dist")],
    report: Annotated[list[Path], typer.Option("--report", help="write .json, .md, .xml (JUnit) or .html")] = [],
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Show again what was measured when the artifacts were built."""
    _run("report", folders=folders, reports=report, strict=strict, as_json=as_json)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="artifact folder, dist, or a JSON report")],
    new: Annotated[Path, typer.Argument(help="the same, to compare with")],
    as_json: Json = False,
) -> None:
    """Compare two results: what got better, worse, larger or slower."""
    _run("diff", old=old, new=new, as_json=as_json)


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="a recipe")],
    scheme: Annotated[
        list[str], typer.Option("--scheme", help="schemes to try; default all that the targets support")
    ] = [],
    target: Annotated[list[str], typer.Option("--target", help="targets; default the recipe's")] = [],
    settings: Settings = [],
    out: Out = Path("dist"),
    store: StoreRoot = None,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the table")] = False,
    as_json: Json = False,
) -> None:
    """Build one recipe in several schemes: which meet the limits, size against agreement."""
    _run(
        "sweep", recipe=recipe, schemes=scheme, targets=target, settings=settings, out=out, store=store, trust=trust,
        quiet=quiet, as_json=as_json,
    )  # fmt: skip


@app.command()
def explain(
    recipes: Recipes,
    settings: Settings = [],
    only: Only = [],
    out: Out = Path("dist"),
    store: StoreRoot = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Say which stages would run again and what changed since they last ran."""
    _run("explain", recipes=recipes, settings=settings, only=only, out=out, store=store, trust=trust, as_json=as_json)


@app.command()
def targets(as_json: Json = False) -> None:
    """List targets, the schemes each supports, and whether its toolchain is here."""
    _run("targets", as_json=as_json)


@app.command(name="devices")
def devices_(
    name: Annotated[str | None, typer.Argument(help="one device in full")] = None, as_json: Json = False
) -> None:
    """List device profiles."""
    _run("devices", name=name, as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    _run("schema")


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="make private toolchain folders where a target needs one")] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, what is missing for which target, and the exact remedy."""
    _run("doctor", fix=fix, as_json=as_json)


@app.command()
def clean(
    max_gib: Annotated[float | None, typer.Option("--max-gib", min=0, help="keep at most this much")] = None,
    older_than_days: Annotated[
        float | None, typer.Option("--older-than-days", min=0, help="remove what is older")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="empty the store")] = False,
    store: StoreRoot = None,
    as_json: Json = False,
) -> None:
    """Free space in the store."""
    _run("clean", max_gib=max_gib, older_than_days=older_than_days, everything=everything, store=store, as_json=as_json)


def main() -> None:
    """Entry point: prints every failure a user can cause as what, where, what to do; never a traceback for those."""
    try:
        app()
    except EdgebakeError as error:
        from edgebake.commands._shared import print_problems

        print_problems(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(EXIT_INTERNAL)
