"""The command line: arguments to calls, results to stdout, the rest to stderr, errors to codes.

The only file that prints and that catches HireError. Verbs import what they need when they run,
because Transformers takes seconds to import and `--help` should not.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from hireconvert import render, render_eval
from hireconvert.errors import GateError, HireError, UsageError
from hireconvert.version import __version__

EPILOG = (
    "Exit codes: 0 ok, 1 a bug in hireconvert, 2 usage or recipe, 3 quality limit missed, "
    "4 model, text or machine cannot be used, 5 Hub or network, 130 interrupted."
)
app = typer.Typer(
    name="hireconvert",
    help="Convert a pretrained causal language model into one that reads fewer bytes per token.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes", rich_help_panel="Recipes")

INPUT, RUN, SAMPLING = "Input", "How it runs", "Sampling"
MEASURED, JUDGED = "What is measured", "The gate"

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="A converted model's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    _quiet_libraries()
    try:
        app()
    except HireError as error:
        render.fail(_err(), str(error))
        sys.exit(error.exit_code)
    raise AssertionError("typer exits by itself")


def _quiet_libraries() -> None:
    # Read when these libraries are imported, so set before any verb imports them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")


def _err() -> Console:
    width = None if sys.stderr.isatty() else render.PLAIN_WIDTH
    return Console(stderr=True, width=width, highlight=False)


def _show(result: Mapping[str, Any], as_json: bool, draw: Callable[..., Any]) -> None:
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        render.out_console().print(draw(result))


def _version(asked: bool) -> None:
    if asked:
        print(f"hireconvert {__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Models", epilog=EPILOG)
def convert(
    model: Annotated[
        str,
        typer.Argument(help="Hub id, folder of safetensors, or GGUF file.", metavar="MODEL"),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create.", metavar="OUT")],
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", help="Shipped name or YAML file.", rich_help_panel=INPUT),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change one recipe key.", rich_help_panel=INPUT
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel=INPUT),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run modeling code that comes with MODEL.",
            rich_help_panel=INPUT,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue where an earlier run stopped.", rich_help_panel=RUN
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace OUT, once the new one is complete.", rich_help_panel=RUN
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan; read nothing but headers.", rich_help_panel=RUN
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert MODEL into OUT, a folder that AutoModelForCausalLM loads.

    [bold]Examples[/bold]

      hireconvert convert HuggingFaceTB/SmolLM2-135M out --recipe smollm2-135m
      hireconvert convert ./model.gguf out -r lossless
      hireconvert convert ./model out -r balanced --set data.source=notes.txt --dry-run
    """
    from hireconvert.pipeline import Job
    from hireconvert.pipeline import convert as run
    from hireconvert.planning import make_plan
    from hireconvert.recipe import load_recipe

    job = Job(
        model=model,
        out=out,
        recipe=load_recipe(recipe, overrides or []),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        plan = make_plan(model, job.recipe, revision=revision, trust_remote_code=trust_remote_code)
        _show(plan, as_json, render.plan)
        return
    reporter = render.make_reporter(_err())
    try:
        report = run(job, reporter, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        reporter.close()
        _err().print("interrupted; the same command with --resume continues")
        raise typer.Exit(130) from None
    finally:
        reporter.close()
    _show(report, as_json, render.conversion(out))


@app.command("eval", rich_help_panel="Models", epilog=EPILOG)
def evaluate(
    out: OutArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text file; may be repeated. Without it, text that Python carries.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of each text.", rich_help_panel=MEASURED)
    ] = 8192,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with this model; without it, with OUT's own dense view.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time decoding as well.", rich_help_panel=MEASURED)
    ] = False,
    gate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Exit 3 when a limit is breached.", rich_help_panel=JUDGED
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the gate's outcome as XML.", rich_help_panel=JUDGED
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep nothing of the baseline between runs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what OUT lost: perplexity, KL, agreement, recall; fail where a gate says so.

    [bold]Examples[/bold]

      hireconvert eval out --text notes.txt --text code.txt
      hireconvert eval out --baseline HuggingFaceTB/SmolLM2-135M --gate gate.yaml --junit gate.xml
    """
    from hireconvert.assessment import Request, assess
    from hireconvert.gate import checks, load_gate
    from hireconvert.junit import write_junit

    if junit is not None and gate is None:
        raise UsageError("--junit reports on a gate: give --gate FILE as well.")
    limits = None if gate is None else load_gate(gate)
    request = Request(
        texts=tuple(text or ()),
        num_tokens=tokens,
        baseline=baseline,
        speed=speed,
        use_cache=not no_cache,
    )
    reporter = render.make_reporter(_err())
    try:
        result = assess(out, request, reporter)
    finally:
        reporter.close()
    found = [] if limits is None else checks(limits, result)
    breached = [each for each in found if not each.passed]
    if limits is not None:
        result["gate"] = {"passed": not breached, "checks": [each.to_dict() for each in found]}
    if junit is not None:
        write_junit(junit, found, seconds=result["seconds"])
    _show(result, as_json, render_eval.assessment)
    if breached:
        _err().print(render_eval.breaches(breached))
        raise GateError(f"{len(breached)} of {len(found)} limits of {gate} were breached.")


@app.command(rich_help_panel="Models")
def generate(
    out: OutArgument,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text, or - to read stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=SAMPLING)] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 is greedy.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.", rich_help_panel=SAMPLING)] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, rich_help_panel=SAMPLING)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=SAMPLING)] = 0,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Do not use the chat template.")
    ] = False,
) -> None:
    """Stream text from OUT; a chat template is used when there is one.

    [bold]Example[/bold]

      hireconvert generate out -p "Why is the sky blue?" --temperature 0.7 --top-p 0.9
    """
    from hireconvert.generation import Sampling, stream

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    stream(out, text, partial(print, end="", flush=True), sampling=sampling, chat=not no_chat)
    print()


@app.command(rich_help_panel="Models")
def inspect(out: OutArgument, as_json: JsonOption = False) -> None:
    """Show per layer what OUT keeps, how it predicts, its recall and the bytes it reads."""
    from hireconvert.inspection import inspect_checkpoint

    _show(inspect_checkpoint(out), as_json, render.inspection)


@app.command(rich_help_panel="Models")
def verify(out: OutArgument, as_json: JsonOption = False) -> None:
    """Check OUT: checksums, shipped code, tensors, and that a fresh process decodes sparsely."""
    from hireconvert.inspection import verify_checkpoint

    _show(verify_checkpoint(out), as_json, render.verification)


@recipes_app.command("ls")
def recipes_ls(as_json: JsonOption = False) -> None:
    """List the shipped recipes."""
    from hireconvert.recipe import load_recipe, shipped_recipes

    table = {name: load_recipe(name).description for name in shipped_recipes()}
    _show(table, as_json, render.recipes)


@recipes_app.command("show")
def recipes_show(
    recipe: Annotated[str, typer.Argument(help="Shipped name or YAML file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Print a recipe as resolved, every key with its value."""
    from hireconvert.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, overrides or [])), end="")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="Shipped name.")],
    target: Annotated[Path, typer.Argument(help="File or folder to write.")],
) -> None:
    """Copy a shipped recipe, to edit it."""
    from hireconvert.recipe import shipped_recipes

    shipped = shipped_recipes()
    if name not in shipped:
        raise UsageError(f"no shipped recipe {name!r}; there are: {', '.join(shipped)}.")
    path = target / f"{name}.yaml" if target.is_dir() else target
    if path.exists():
        raise UsageError(f"{path} exists; remove it or name another file.")
    try:
        shutil.copyfile(shipped[name], path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}.") from error
    print(path)


@recipes_app.command("validate")
def recipes_validate(
    recipe: Annotated[str, typer.Argument(help="Shipped name or YAML file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Check a recipe and print its name."""
    from hireconvert.recipe import load_recipe

    print(f"{load_recipe(recipe, overrides or []).name}: valid")


@app.command(rich_help_panel="Recipes")
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from hireconvert.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
