"""The command line: arguments to calls, results to stdout, the rest to stderr, errors to codes.

The only file that prints and that catches HireError. Verbs import what they need when they run,
because Transformers takes seconds to import and `--help` should not.
"""

import io
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

from hireconvert import cli_options as options
from hireconvert import render, render_bench, render_eval
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

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="A converted model's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    _quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what folders hold may be no text
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
    recipe: options.RecipeOption = None,
    auto: options.AutoOption = False,
    max_kl: options.MaxKlOption = None,
    overrides: options.SetOption = None,
    revision: options.RevisionOption = None,
    trust_remote_code: options.RemoteCodeOption = False,
    resume: options.ResumeOption = False,
    overwrite: options.OverwriteOption = False,
    dry_run: options.DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert MODEL into OUT, a folder that AutoModelForCausalLM loads.

    [bold]Examples[/bold]

      hireconvert convert HuggingFaceTB/SmolLM2-135M out --recipe smollm2-135m
      hireconvert convert ./model.gguf out -r lossless
      hireconvert convert ./model out -r balanced --set data.source=notes.txt --dry-run
      hireconvert convert ./model out --auto --max-kl 0.02
    """
    from hireconvert.pipeline import Job
    from hireconvert.pipeline import convert as run
    from hireconvert.planning import make_plan
    from hireconvert.recipe import load_recipe
    from hireconvert.workspace import check_out_folder

    limit = options.kl_limit(recipe, auto, max_kl)
    source, changes = (model, revision, trust_remote_code), overrides or []
    reporter = render.make_reporter(_err())
    try:
        if recipe is None:
            if not dry_run:  # minutes of trying come before what `run` checks
                check_out_folder(out.expanduser(), resume=resume, overwrite=overwrite)
            chosen = _chosen(source, changes, reporter, max_kl=limit, out=out)
        else:
            chosen = load_recipe(recipe, changes)
        if dry_run:
            plan = make_plan(model, chosen, revision=revision, trust_remote_code=trust_remote_code)
            _show(plan, as_json, render.plan)
            return
        job = Job(model, out, chosen, revision, trust_remote_code)
        report = run(job, reporter, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        reporter.close()
        _err().print("interrupted; the same command with --resume continues")
        raise typer.Exit(130) from None
    finally:
        reporter.close()
    _show(report, as_json, render.conversion(out))


def _chosen(
    source: tuple[str, str | None, bool], overrides: list[str], reporter: Any, **options: Any
) -> Any:
    """The recipe that --auto chooses; what was tried goes to stderr."""
    from hireconvert.auto import Source, choose

    choice = choose(Source(*source), overrides, reporter, **options)
    _err().print(render.choice(choice.facts()))
    return choice.recipe


@app.command("eval", rich_help_panel="Models", epilog=EPILOG)
def evaluate(
    out: OutArgument,
    text: options.TextOption = None,
    tokens: options.TokensOption = 8192,
    baseline: options.BaselineOption = None,
    speed: options.SpeedOption = False,
    no_cache: options.NoCacheOption = False,
    tasks: options.TasksOption = None,
    limit: options.LimitOption = None,
    seed: options.SeedOption = 0,
    max_length: options.MaxLengthOption = 1024,
    gate: options.GateOption = None,
    junit: options.JunitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what OUT lost: perplexity, KL, agreement, recall, tasks; fail where a gate says so.

    [bold]Examples[/bold]

      hireconvert eval out --text notes.txt --text code.txt --tasks suite
      hireconvert eval out --baseline HuggingFaceTB/SmolLM2-135M --gate gate.yaml --junit gate.xml
    """
    from hireconvert.assessment import Request, assess
    from hireconvert.gate import checks, load_gate
    from hireconvert.junit import check_target, write_junit

    if junit is not None and gate is None:
        raise UsageError("--junit reports on a gate: give --gate FILE as well.")
    if junit is not None:
        check_target(junit)
    limits = None if gate is None else load_gate(gate)
    request = Request(
        texts=tuple(text or ()),
        num_tokens=tokens,
        baseline=baseline,
        tasks=tuple(name.strip() for names in tasks or () for name in names.split(",")),
        limit=limit,
        seed=seed,
        max_length=max_length,
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
    _show(result, as_json, render_eval.assessment)
    if breached:
        _err().print(render_eval.breaches(breached))
    if junit is not None:
        write_junit(junit, found, seconds=result["seconds"])
    if breached:
        raise GateError(f"{len(breached)} of {len(found)} limits of {gate} were breached.")


@app.command(rich_help_panel="Models", epilog=EPILOG)
def bench(
    out: OutArgument,
    baseline: options.BaselineOption = None,
    rival: options.RivalOption = None,
    threads: options.ThreadsOption = None,
    dtype: options.DtypeOption = None,
    batch: options.BatchOption = None,
    context: options.ContextOption = None,
    tokens: options.DecodedOption = 32,
    rounds: options.RoundsOption = 5,
    kl_tokens: options.KlTokensOption = 1024,
    text: options.OneTextOption = None,
    no_compile: options.NoCompileOption = False,
    plot: options.PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time decoding of OUT beside dense PyTorch and llama.cpp, and what the bytes allow.

    [bold]Examples[/bold]

      hireconvert bench out --threads 2 --plot speed.svg
      hireconvert bench out --rival model-Q4_K_M.gguf --rival model-Q8_0.gguf --json
      hireconvert bench out --no-compile --batch 1 --batch 4 --context 64 --context 2048
    """
    from hireconvert.bench import bench as run
    from hireconvert.session import Request

    if plot is not None:
        options.check_plot(plot)
    request = Request(
        baseline=baseline,
        rivals=tuple(rival or ()),
        threads=threads,
        dtype=dtype,
        batches=tuple(batch or (1,)),
        contexts=tuple(context or (64,)),
        num_tokens=tokens,
        rounds=rounds,
        kl_tokens=kl_tokens,
        text=text,
        compiled=not no_compile,
    )
    reporter = render.make_reporter(_err())
    try:
        result = run(out, request, reporter)
    finally:
        reporter.close()
    _show(result, as_json, render_bench.bench)
    if plot is not None:
        plot.write_text(render_bench.plot(result), encoding="utf-8")


@app.command(rich_help_panel="Models")
def generate(
    out: OutArgument,
    prompt: options.PromptOption,
    max_new_tokens: options.NewTokensOption = 128,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 50,
    top_p: options.TopPOption = 1.0,
    seed: options.SampleSeedOption = 0,
    no_chat: options.NoChatOption = False,
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


@app.command(rich_help_panel="Models")
def report(
    out: OutArgument,
    evaluations: options.EvaluationsOption = None,
    output: options.OutputOption = None,
) -> None:
    """Gather what is known of OUT in one HTML page; runs no model.

    [bold]Example[/bold]

      hireconvert eval out --json > eval.json
      hireconvert report out --eval eval.json -o report.html
    """
    from hireconvert.report import write_report

    target = output or Path(f"{out.resolve().name}_report.html")
    write_report(out, evaluations or [], target)
    print(target)


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
