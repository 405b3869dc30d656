"""Options of the verbs that have many: `convert`, `eval`, `bench`, `generate` and `report`."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from hireconvert.errors import UsageError

DEFAULT_MAX_KL = 0.05
_RUN, _SAMPLING, _ARMS = "How it runs", "Sampling", "What is run"

RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="Shipped name or YAML file.", rich_help_panel="Input"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one recipe key.", rich_help_panel="Input"
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id.", rich_help_panel="Input")
]
RemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run modeling code that comes with MODEL.",
        rich_help_panel="Input",
    ),
]
AutoOption = Annotated[
    bool,
    typer.Option(
        "--auto",
        help="Instead of --recipe: try shipped settings on MODEL and take what reads least.",
        rich_help_panel="Input",
    ),
]
MaxKlOption = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="X",
        help=f"With --auto: largest mean KL to the dense model in nats; {DEFAULT_MAX_KL}.",
        rich_help_panel="Input",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Continue where an earlier run stopped.", rich_help_panel=_RUN),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace OUT, once the new one is complete.", rich_help_panel=_RUN
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan; without --auto nothing but headers is read.",
        rich_help_panel=_RUN,
    ),
]


_MEASURED, _TASKS, _GATE = "What is measured", "Tasks", "The gate"

TextOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text; may be repeated. Without it, text that Python carries.",
        rich_help_panel=_MEASURED,
    ),
]
TokensOption = Annotated[
    int, typer.Option(min=2, help="Tokens of each text.", rich_help_panel=_MEASURED)
]
BaselineOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Compare with this model; without it, with OUT's own dense view.",
        rich_help_panel=_MEASURED,
    ),
]
SpeedOption = Annotated[
    bool, typer.Option("--speed", help="Time decoding as well.", rich_help_panel=_MEASURED)
]
NoCacheOption = Annotated[
    bool,
    typer.Option(
        "--no-cache",
        help="Keep nothing of the baseline between runs.",
        rich_help_panel=_MEASURED,
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Generated task, `suite` for all of them, a .jsonl file of multiple choice, or "
        "lm_eval:NAME; may be repeated or hold commas.",
        rich_help_panel=_TASKS,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(min=2, help="Items of each task.", rich_help_panel=_TASKS)
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the items.", rich_help_panel=_TASKS)]
MaxLengthOption = Annotated[
    int,
    typer.Option(min=64, help="Tokens of the longest generated item.", rich_help_panel=_TASKS),
]
GateOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Exit 3 when a limit is breached.", rich_help_panel=_GATE),
]
JunitOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the outcome as JUnit XML.", rich_help_panel=_GATE),
]
RivalOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="GGUF file that llama.cpp runs beside OUT; may be repeated. Needs what "
        "`python benchmarks/fetch_llama.py` builds.",
        rich_help_panel=_ARMS,
    ),
]
NoCompileOption = Annotated[
    bool,
    typer.Option(
        "--no-compile",
        help="Leave out dense through torch.compile, which takes minutes.",
        rich_help_panel=_ARMS,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16 or float16; as stored without.",
        rich_help_panel=_ARMS,
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="All cores without.", rich_help_panel=_ARMS)
]
BatchOption = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        max=64,
        help="Sequences at once, 1 without; repeated: the others show growth.",
        rich_help_panel=_ARMS,
    ),
]
ContextOption = Annotated[
    list[int] | None,
    typer.Option(
        min=2,
        help="Tokens of the prompt, 64 without; repeated: the others show growth.",
        rich_help_panel=_ARMS,
    ),
]
DecodedOption = Annotated[
    int, typer.Option(min=3, help="Tokens decoded in a run.", rich_help_panel=_MEASURED)
]
RoundsOption = Annotated[
    int, typer.Option(min=1, help="Rounds of all arms in turn.", rich_help_panel=_MEASURED)
]
KlTokensOption = Annotated[
    int,
    typer.Option(
        min=0, help="Tokens that quality is measured on; 0: none.", rich_help_panel=_MEASURED
    ),
]
OneTextOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text to decode after and to measure quality on.",
        rich_help_panel=_MEASURED,
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the arms in an SVG file.")
]

PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="Text, or - to read stdin.")]
NewTokensOption = Annotated[int, typer.Option(min=1, rich_help_panel=_SAMPLING)]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="0 is greedy.", rich_help_panel=_SAMPLING)
]
TopKOption = Annotated[int, typer.Option(min=0, help="0 is off.", rich_help_panel=_SAMPLING)]
TopPOption = Annotated[float, typer.Option(min=0.0, max=1.0, rich_help_panel=_SAMPLING)]
SampleSeedOption = Annotated[int, typer.Option(min=0, rich_help_panel=_SAMPLING)]
NoChatOption = Annotated[bool, typer.Option("--no-chat", help="Do not use the chat template.")]

EvaluationsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        help="JSON that `eval --json` printed, of OUT or of others; may be repeated.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The page; OUT_report.html without."),
]


def check_plot(target: Path) -> None:
    """Raise UsageError for a file that could not be written after minutes of measuring."""
    if target.suffix != ".svg":
        raise UsageError(f"--plot {target}: plots are SVG files, so name one that ends in .svg.")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"--plot {target}: its folder does not exist.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'hireconvert[report]'.")


def kl_limit(recipe: str | None, auto: bool, max_kl: float | None) -> float:
    """The limit for --auto. Raises UsageError unless the options name a recipe or ask for one."""
    if recipe is None and not auto:
        raise UsageError("no recipe: give --recipe NAME (see `hireconvert recipes ls`) or --auto")
    if recipe is not None and auto:
        raise UsageError(f"--auto chooses a recipe, and --recipe {recipe} names one; give one")
    if max_kl is not None and not auto:
        raise UsageError("--max-kl is a limit for --auto; without it a recipe says what is kept")
    if max_kl is not None and not max_kl > 0:
        raise UsageError(f"--max-kl {max_kl:g} is not above 0; 0.05 is a visible loss, 0.01 little")
    return DEFAULT_MAX_KL if max_kl is None else max_kl
