"""The tables of `hireconvert eval`: texts, selection, tasks, speed and what breached the gate."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hireconvert.figures import ABSENT, interval, number, worse_scope
from hireconvert.gate import Check

Result = Mapping[str, Any]


def assessment(result: Result) -> RenderableType:
    """Everything measured, against the baseline it names."""
    parts: list[RenderableType] = [Text(f"baseline: {result['baseline']['source']}"), Text("")]
    parts += [_texts(result["texts"]), Text(""), _selection(result["texts"])]
    if result["tasks"]:
        parts += [Text(""), _tasks(result["tasks"])]
    if result["speed"]:
        speed = result["speed"]
        times = [f"{name} {speed[name]['median_ms']:.1f}" for name in ("dense", "converted")]
        line = f"ms per token: {', '.join(times)}; speed ratio {speed['ratio']:.2f}"
        parts += [Text(""), Text(line)]
    if result.get("gate"):
        checks = result["gate"]["checks"]
        breached = sum(not each["passed"] for each in checks)
        parts += [Text(""), Text(f"gate: {len(checks) - breached} of {len(checks)} limits kept")]
    return Group(*parts)


def breaches(found: Sequence[Check]) -> RenderableType:
    """What was measured and what was wanted, for each limit that was breached."""
    table = _table("breached limit", "of", "measured", "wanted")
    for each in found:
        table.add_row(*map(Text, (each.limit, each.subject, each.measured, each.wanted)))
    return table


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _texts(texts: Result) -> Table:
    table = _table(
        *("text", "tokens", "baseline", "perplexity", "increase, 95 % interval"),
        *("KL mean", "p99", "top-1"),
    )
    for name, text in texts.items():
        scope = worse_scope(text)
        view = text[scope or "dense"]
        table.add_row(
            Text(name),
            f"{text['num_scored']:,}",
            number(text["baseline_perplexity"], ".3f"),
            number(view["perplexity"], ".3f"),
            interval(text["increase"].get(scope)),
            number(view["kl_mean"], ".4f"),
            number(view["kl_p99"], ".3f"),
            number(view["top1_agreement"], ".1%"),
        )
    return table


def _selection(texts: Result) -> Table:
    table = _table(
        *("text", "recall", "worst layer", "neurons kept", "dense rows", "head top-1", "rescored")
    )
    for name, text in texts.items():
        chosen, head = text["selection"], text["head"]
        cells = [ABSENT] * 5
        if chosen is not None:
            worst = f"{number(chosen['recall_worst'], '.4f')} ({chosen['recall_worst_layer']})"
            rows = max(text[scope]["nonfinite_rows"] for scope in ("all", "all_prefix"))
            cells[:3] = [number(chosen["recall_mean"], ".4f"), worst]
            cells[2:4] = [number(chosen["kept_overall"], ".1%"), str(rows)]
        if head is not None:
            cells[4:] = [number(head["top1_agreement_reference"], ".1%")]
            cells.append(number(head["rescored_median"], ".0f"))
        table.add_row(Text(name), *cells)
    return table


def _tasks(tasks: Result) -> Table:
    table = _table("task", "items", "baseline", "converted", "difference, 95 % interval")
    for name, task in tasks.items():
        table.add_row(
            Text(name),
            str(task["num_items"]),
            number(task["baseline"], ".1%"),
            number(task["converted"], ".1%"),
            interval(task["difference"]),
        )
    return table
