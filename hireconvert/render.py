"""Results as tables for people, and progress on stderr; cli.py prints what these return."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hireconvert.figures import rest, size

# Wide enough for every table, so that nothing is cut off in a file or a pipe.
PLAIN_WIDTH = 160
SILENCE_S = 30.0  # after which a log gets a line
Result = Mapping[str, Any]


def out_console() -> Console:
    """A console on stdout that wraps at the terminal's width only when there is a terminal."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(width=width, highlight=False)


def fail(console: Console, message: str) -> None:
    """Print the one message of an error, unwrapped and without markup."""
    console.print(
        Text.assemble(("error: ", "bold red"), message), soft_wrap=True, overflow="ignore"
    )


# --------------------------------------------------------------------------- progress


class PlainReporter:
    """One line for each stage: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, soft_wrap=True, markup=False)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Announce a stage; the value given is called once for each of `total` steps.

        Steps that come with a detail, such as a loss, are printed now and then, others when
        nothing was for SILENCE_S seconds.
        """
        self.note(title)
        yield _Lines(self.note, title, total or 1)

    def close(self) -> None:
        """Nothing to close."""


class _Lines:
    """Counts the steps of a stage and says now and then how far it is and what time is left.

    A line for each twentieth of the steps with a detail, and for any after a long silence.
    """

    def __init__(self, note: Callable[[str], None], title: str, total: int) -> None:
        self._note, self._title, self._total = note, title, total
        self._done = self._first = 0  # steps in all, steps before the first that took time
        self._start = self._said = time.monotonic()
        self._detailed = False

    def __call__(self, detail: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        if detail and not self._detailed:  # those before it were done by an earlier run
            self._start, self._first, self._detailed = now, self._done, True
        due = now - self._said > SILENCE_S
        if detail:
            due |= self._done * 20 // self._total > (self._done - 1) * 20 // self._total
        if due and self._done > self._first:
            pace_s = (now - self._start) / (self._done - self._first)
            left_min = pace_s * (self._total - self._done) / 60
            said = [f"step {self._done} of {self._total}", detail, f"{left_min:.1f} minutes left"]
            self._note(f"{self._title}: {', '.join(filter(None, said))}")
            self._said = now


class BarReporter(PlainReporter):
    """A progress bar with elapsed and remaining time for each stage."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
        )
        self._progress.start()

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """Show a bar of `total` steps, or a pulsing one when the number is not known."""
        task = self._progress.add_task(title, total=total, detail="")

        def advance(detail: str = "") -> None:
            self._progress.update(task, advance=1, detail=detail)

        yield advance
        self._progress.update(task, total=total or 1, completed=total or 1)

    def close(self) -> None:
        """Stop drawing; calling it twice is fine."""
        self._progress.stop()


def make_reporter(console: Console) -> PlainReporter:
    """Bars on a terminal, lines elsewhere."""
    return BarReporter(console) if console.is_terminal else PlainReporter(console)


# --------------------------------------------------------------------------- results


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _pairs(pairs: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, value in pairs.items():
        table.add_row(key, str(value))
    return table


def _layers(rows: list[Result]) -> RenderableType:
    if not rows:
        return Text("FFN: dense in every layer")
    counts = ("layer", "neurons", "kept", "candidates")
    kinds = ("predictor", "rank", "bits", "inputs", "recall")
    table = _table(*counts, "rest", *kinds, "predictor", "rest", "reads", "dense")
    for row in rows:
        if row["kind"] is None:
            table.add_row(str(row["layer"]), str(row["neurons"] or ""), "dense")
            continue
        cells = [row["layer"], row["neurons"], _kept(row), row["candidates"], rest(row)]
        cells += [row["kind"], row["rank"] or "-", row["bits"] or "-", row["inputs"]]
        recall = row.get("recall")
        cells.append("-" if recall is None else f"{recall:.4f}")
        parts = ("predictor_bytes", "unselected_bytes", "read_bytes", "dense_bytes")
        cells += [size(row[key]) for key in parts]
        table.add_row(*map(str, cells))
    return table


def _kept(row: Result) -> str:
    """Neurons kept; of a number that varies the mean and the range of four tokens in five."""
    per_token = row.get("kept_per_token")
    if per_token is None:
        return str(row["kept"]) if row["selection"] == "fixed" else f"mean {row['kept']}"
    return f"mean {row['kept']} ({per_token['p10']}-{per_token['p90']})"


def _bytes(bytes_per_token: Result) -> RenderableType:
    table = _table("bytes per token", "dense", "converted", "share")
    rows = {"FFN": bytes_per_token["ffn"], "head": bytes_per_token["head"], "all": bytes_per_token}
    for name, row in rows.items():
        if row["dense"]:  # a part left as it is counts in the last row alone
            share = f"{row['converted'] / row['dense']:.1%}"
            table.add_row(name, size(row["dense"]), size(row["converted"]), share)
    bound = f"speed-up bound from bytes: {bytes_per_token['speedup_bound']:.2f}x"
    return Group(table, Text(bound))


def _head(head: Result | None) -> str:
    if head is None:
        return "dense"
    kind = f"{head['bits']} bits" if head["kind"] == "q" else f"rank {head['rank']}"
    if head["certified"]:
        return f"{head['kind']}, {kind}, certified for the best {head['certify_top']}"
    return f"{head['kind']}, {kind}, {head['num_candidates']} rows rescored"


def inspection(result: Result) -> RenderableType:
    """The tables of `inspect`."""
    pairs = {
        "model": f"{result['architecture']} ({result['model_type']})",
        "recipe": result["recipe"],
        "format": f"version {result['format_version']}, runtime {result['runtime']}",
        "head": _head(result["head"]),
    }
    blank = Text("")
    return Group(
        _pairs(pairs), blank, _layers(result["layers"]), blank, _bytes(result["bytes_per_token"])
    )


def plan(result: Result) -> RenderableType:
    """The tables of `convert --dry-run`."""
    pairs = {
        "model": f"{result['architecture']} ({result['model_type']})",
        "recipe": result["recipe"],
        "head": _head(result["head"]),
        "disk needed": size(result["disk_bytes"]),
        "peak memory": f"about {size(result['peak_memory_bytes'])}",
        "time": f"about {result['estimated_seconds'] / 60:.1f} minutes (estimate)",
    }
    blank = Text("")
    notes = [Text(f"note: {note}") for note in result["notes"]]
    body = [_layers(result["layers"]), blank, _bytes(result["bytes_per_token"])]
    return Group(_pairs(pairs), blank, *body, *notes)


def choice(result: Result) -> RenderableType:
    """What --auto tried and took."""
    table = _table("tried", "keep", "bytes per token", "KL", title=f"limit: KL {result['limit']:g}")
    for row in result["tried"]:
        keep = "" if row["keep"] is None else f"{row['keep']:g}"
        name = row["name"] + (" (chosen)" if row["chosen"] else "")
        table.add_row(name, keep, size(row["bytes_per_token"]), f"{row['kl']:.4f}")
    return Group(table, Text(result["advice"]))


def verification(result: Result) -> RenderableType:
    """One line for each check of `verify`; it raised where one failed."""
    return _pairs({f"ok  {check['name']}": check["detail"] for check in result["checks"]})


def recipes(result: Result) -> RenderableType:
    """Names and descriptions."""
    return _pairs(result)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: f"{tree:.6g}" if isinstance(tree, float) else tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def evaluation(result: Result) -> RenderableType:
    """Every measured figure under its key, but those of single layers."""
    flat = {key: value for key, value in _flat(result).items() if value is not None}
    return _pairs({key: value for key, value in flat.items() if not isinstance(value, list)})


def conversion(out: Path) -> Callable[[Result], RenderableType]:
    """What `convert` prints at the end: where the result lies, what it reads, how to load it."""

    def draw(result: Result) -> RenderableType:
        if result["status"] == "already complete":
            return Text(f"{out} is already complete: same model, same recipe. Nothing was done.")
        parts: list[RenderableType] = [_bytes(result["bytes_per_token"])]
        if result["recall"] is not None:
            recall = result["recall"]
            worst = f"worst {recall['worst']:.4f} in layer {recall['worst_layer']}"
            parts.append(Text(f"recall of the true top k: mean {recall['mean']:.4f}, {worst}"))
        if result["evaluation"] is not None:
            parts += [Text(""), evaluation(result["evaluation"])]
        load = (
            "\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)\n"
            f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})"
        )
        return Group(*parts, Text(""), Text(f"written: {out}"), Text(load))

    return draw
