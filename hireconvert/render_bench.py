"""The tables of `hireconvert bench`: arms, what bytes allow, parts of a token, memory, growth."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hireconvert.figures import ABSENT, number, size
from hireconvert.plots import SpeedPoint, quality_against_speed

Result = Mapping[str, Any]
_KEPT = {"hit": "as measured before (delete to measure again)", "stored": "kept for this machine"}


def bench(result: Result) -> RenderableType:
    """Everything measured."""
    machine, settings = result["machine"], result["settings"]
    stream = machine["stream"]
    title = (
        f"{machine['processor']}, {settings['threads']} threads, {settings['dtype']}; memory "
        f"streams {stream['gb_per_s']:.1f} GB/s over {size(stream['num_bytes'])}"
    )
    parts: list[RenderableType] = [Text(title), Text(""), _arms(result["arms"]), Text("")]
    parts += [_bound(result["byte_bound"]), Text(""), _breakdown(result["breakdown"]), Text("")]
    parts += [_subjects(result["subjects"]), Text(""), *map(_runs_by, result["subjects"])]
    if len(result["growth"]) > 1:
        parts += [Text(""), _growth(result["growth"]), Text(overtaking(result["growth"]))]
    parts += [Text(""), Text(sampling(result["sampling"]))]
    parts += [Text(""), _rows(result["overtaking"]), Text(rows_advice(result["overtaking"]))]
    for name, reason in result["skipped"].items():
        parts.append(Text(f"left out: {name} ({reason})"))
    return Group(*parts)


def plot(result: Result) -> str:
    """The arms as SVG. Raises InputError without matplotlib."""
    points = [
        SpeedPoint(
            name=arm["name"].removeprefix("llama.cpp "),
            series=_series(arm["name"]),
            joined=False,
            ms=arm["ms"]["median_ms"],
            bytes_per_token=arm["bytes_per_token"],
            kl=arm["kl"],
        )
        for arm in result["arms"]
    ]
    return quality_against_speed(points, result["machine"]["stream"]["gb_per_s"])


def _series(name: str) -> str:
    if name.startswith("llama.cpp"):
        return "llama.cpp"
    return "hireconvert" if name.startswith("converted") else "PyTorch"


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _arms(arms: list[Result]) -> Table:
    table = _table(
        *("arm", "ms per token", "range", "first token, ms", "threads"),
        *("bytes per token", "GB/s", "of the stream", "KL", "same top 1"),
    )
    for arm in arms:
        ms = arm["ms"]
        mark = f" ({arm['unsteady_rounds']} unsteady)" if arm["unsteady_rounds"] else ""
        table.add_row(
            Text(arm["name"]),
            f"{ms['median_ms']:.2f}",
            f"{ms['low_ms']:.2f} to {ms['high_ms']:.2f}{mark}",
            f"{arm['first_ms']:.0f}",
            str(arm["threads"]),
            size(arm["bytes_per_token"]),
            f"{arm['gb_per_s']:.1f}",
            f"{arm['roofline']:.0%}",
            number(arm["kl"], ".4f"),
            number(arm["top1"], ".1%"),
        )
    return table


def _bound(bound: Result) -> Text:
    lines = [
        f"bytes bound the gain over '{name}' at {each['ratio']:.2f}; {each['reached']:.2f} was "
        f"reached, {each['share']:.0%} of it"
        for name, each in bound.items()
    ]
    return Text("\n".join(lines))


def _breakdown(breakdown: Result) -> Table:
    table = _table("ms of a token of the converted model", "all", "FFNs", "head", "rest")
    for name, part in breakdown.items():
        cells = [number(part[key], ".2f") for key in ("token_ms", "ffn_ms", "head_ms", "rest_ms")]
        table.add_row(Text(name), *cells)
    return table


def _subjects(subjects: list[Result]) -> Table:
    table = _table("process", "load, s", "memory", "peak")
    for each in subjects:
        memory = [ABSENT if each[key] is None else size(each[key]) for key in ("resident", "peak")]
        table.add_row(Text(each["name"]), f"{each['load_ms'] / 1000:.1f}", *memory)
    return table


def _runs_by(subject: Result) -> Text:
    """Which code decodes a process's model, and for which instructions it was built."""
    path = subject.get("path") or subject.get("system") or "PyTorch"
    version = f"llama.cpp {subject['version']}, " if "version" in subject else ""
    return Text(f"{subject['name']}: {version}{path.strip(' |')}")


def _growth(rows: list[Result]) -> Table:
    names = list(rows[0]["ms"])
    table = _table("ms per step at context, batch", *names)
    for row in rows:
        cells = [f"{row['ms'][name]:.2f}" for name in names]
        table.add_row(f"{row['context']}, {row['batch']}", *cells)
    return table


def overtaking(rows: list[Result]) -> str:
    """Where dense becomes as fast as the converted model, in one line."""
    for row in rows:
        if row["ms"]["dense"] <= row["ms"]["converted"]:
            return f"dense overtakes at context {row['context']}, batch {row['batch']}"
    return "dense overtakes at none of these"


def sampling(found: Result) -> str:
    """What a sampled token takes, in one line."""
    settings = ", ".join(f"{name} {value:g}" for name, value in found["settings"].items())
    whose = "the folder's own settings" if found["own"] else "usual settings"
    dense, converted = found["ms"]["dense"], found["ms"]["converted"]
    times = f"dense {dense:.2f}, converted {converted:.2f} ms a token"
    return f"sampled with {whose} ({settings}): {times}"


def _rows(found: Result) -> Table:
    heads = [f"{name}, {kind}" for kind in found["ms"] for name in found["ms"][kind]]
    table = _table("ms of a step of so many rows", *heads)
    columns = [times for kind in found["ms"].values() for times in kind.values()]
    for rows, *cells in zip(found["rows"], *columns, strict=True):
        table.add_row(str(rows), *(f"{cell:.2f}" for cell in cells))
    return table


def rows_advice(found: Result) -> str:
    """From how many rows on dense is faster, and what to set, in some lines."""
    most = found["rows"][-1]
    lines = [
        f"dense overtakes at {end} rows ({kind})"
        if end is not None
        else f"dense overtakes at no number up to {most} rows ({kind})"
        for kind, end in found["from_rows"].items()
    ]
    best, own = found["fastest_up_to"], found["max_sparse_rows"]
    if best < most and best < own:
        lines.append(
            f"more than max_sparse_rows {own} run dense; faster here: {best} (recipe "
            "decode.max_sparse_rows, in config.json hire.max_sparse_rows)"
        )
    lines.append(f"rows: {_KEPT.get(found['cache'], found['cache'])}: {found['path']}")
    return "\n".join(lines)
