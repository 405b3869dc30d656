"""Options of `convert` that say what is converted and by which recipe, and those of `eval`."""

from pathlib import Path
from typing import Annotated

import typer

from hireconvert.errors import UsageError

DEFAULT_MAX_KL = 0.05

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
