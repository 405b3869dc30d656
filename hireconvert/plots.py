"""Plots of a report as SVG text: budgets, recall against candidates, quality against bytes.

matplotlib comes with the extra `report` and is imported when the first plot is drawn.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hireconvert.errors import InputError

BLUE, PALE, RED, GREY = "#2563a8", "#b9d2ea", "#c2492f", "#8a8f98"
_SERIES = (BLUE, RED, "#3f8f4f", "#8d5fa8", "#b8860b", "#2a8c8c")
_LABEL_LENGTH = 40
_LARGEST = 1e6
_LEAST_KL = 1e-5
_STYLE: Any = {
    "svg.hashsalt": "hireconvert",  # the same page for the same figures
    "svg.fonttype": "path",
    "text.parse_math": False,  # names are not formulas
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class LayerBudget:
    """What one layer keeps and computes, as shares of its neurons; None: the layer is dense."""

    layer: int
    kept: float | None
    candidates: float | None
    recall: float | None


@dataclass(frozen=True)
class SpeedPoint:
    """One way to decode a model. `kl` None: quality was not measured.

    Points of one `series` share a colour; `joined`, they are settings of one dial and a line.
    """

    name: str
    series: str
    joined: bool
    ms: float
    bytes_per_token: float
    kl: float | None


@dataclass(frozen=True)
class QualityPoint:
    """One checkpoint on one text: bytes read as a share of dense, what perplexity rose by."""

    name: str
    text: str
    bytes_share: float
    increase: float
    low: float | None
    high: float | None


def layer_budgets(layers: Sequence[LayerBudget]) -> str:
    """Bars of kept and candidate neurons for each layer, recall below them."""
    with _figure(7.6, 3.6, rows=2) as (figure, (top, bottom)):
        places = [each.layer for each in layers]
        top.bar(places, [_percent(each.candidates) for each in layers], color=PALE)
        top.bar(places, [_percent(each.kept) for each in layers], color=BLUE)
        names = ("candidates (computed exactly)", "kept")
        top.legend(names, fontsize=8, frameon=False, ncols=2, loc="upper right")
        top.set_ylabel("% of neurons")
        top.set_ylim(0, 118)
        known = [(each.layer, _percent(each.recall)) for each in layers if each.recall is not None]
        bottom.plot(*_columns(known), color=RED, marker=".")
        bottom.set_ylabel("recall, %")
        bottom.set_xlabel("layer")
        return _svg(figure)


def recall_against_candidates(
    curve: Sequence[tuple[float, float, float]], layers: Sequence[Sequence[tuple[float, float]]]
) -> str:
    """Recall of the true top k against candidates over k.

    `curve` holds (ratio, mean recall, worst recall) as evaluated, `layers` for each layer its
    (ratio, recall) as fitted.
    """
    with _figure(7.6, 3.2) as (figure, (axes,)):
        for points in layers:
            axes.plot(
                *_columns([(x, _percent(y)) for x, y in points]), color=GREY, lw=0.6, alpha=0.6
            )
        if layers:
            axes.plot([], [], color=GREY, lw=0.6, label="each layer, when fitted")
        for place, name, color in ((1, "mean over layers", BLUE), (2, "worst layer", RED)):
            points = [(row[0], _percent(row[place])) for row in curve]
            if points:
                axes.plot(*_columns(points), color=color, marker="o", ms=3, label=name)
        axes.set_xlabel("candidates / k")
        axes.set_ylabel("recall of the true top k, %")
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        return _svg(figure)


def quality_against_bytes(points: Sequence[QualityPoint]) -> str:
    """Perplexity increase with its interval against bytes read, a series for each text."""
    with _figure(7.6, 3.6) as (figure, (axes,)):
        texts = list(dict.fromkeys(point.text for point in points))
        for index, text in enumerate(texts):
            color = _SERIES[index % len(_SERIES)]
            found = sorted((p for p in points if p.text == text), key=lambda p: p.bytes_share)
            x, y = _columns([(_percent(p.bytes_share), _percent(p.increase)) for p in found])
            axes.plot(x, y, color=color, marker="o", ms=4, label=_label(text))
            for p in found:
                if p.low is not None and p.high is not None:
                    ends = (_percent(p.low), _percent(p.high))
                    axes.vlines(_percent(p.bytes_share), *ends, color=color, lw=1)
        named = {(p.name, p.bytes_share): p.increase for p in points}
        for (name, share), increase in named.items():
            place = (_percent(share), _percent(increase))
            offset: Mapping[str, Any] = {"textcoords": "offset points", "xytext": (5, 5)}
            axes.annotate(_label(name), place, fontsize=7, color="#444", **offset)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.margins(x=0.12)
        axes.set_xlabel("bytes read per token, % of dense")
        axes.set_ylabel("perplexity increase, %")
        axes.legend(fontsize=8, frameon=False)
        return _svg(figure)


def quality_against_speed(points: Sequence[SpeedPoint], gb_per_s: float) -> str:
    """KL against ms and against bytes per token; without any KL, ms against bytes.

    `gb_per_s` draws how long reading the bytes takes at least, where both are shown.
    """
    measured = [point for point in points if point.kl is not None]
    with _figure(11.0, 5.5, columns=2 if measured else 1) as (figure, axes):
        if not measured:
            _scatter(axes[0], [(p, p.bytes_per_token / 1e6, p.ms) for p in points])
            most = max(point.bytes_per_token for point in points)
            axes[0].plot([0, most / 1e6], [0, most / gb_per_s / 1e6], color=GREY, lw=0.8)
            axes[0].set_xlabel("MB read per token; the grey line is what memory allows")
            axes[0].set_ylabel("ms per token")
            return _svg(figure)
        _scatter(axes[0], [(p, p.ms, _visible(p.kl)) for p in measured])
        _scatter(axes[1], [(p, p.bytes_per_token / 1e6, _visible(p.kl)) for p in measured])
        axes[0].set_xlabel("ms per token")
        axes[1].set_xlabel("MB read per token")
        for panel in axes:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("KL from the original, nats (lower is better)")
        return _svg(figure)


def _visible(kl: float | None) -> float:
    """On a logarithmic axis, what is equal lies at the bottom."""
    return max(_LEAST_KL, kl or 0.0)


def _scatter(axes: Any, places: Sequence[tuple[SpeedPoint, float, float]]) -> None:
    """Named points, each series in its colour."""
    for index, series in enumerate(dict.fromkeys(point.series for point, _, _ in places)):
        color = _SERIES[index % len(_SERIES)]
        found = sorted((x, y) for point, x, y in places if point.series == series)
        joined = any(point.joined for point, _, _ in places if point.series == series)
        line = {"lw": 0.9 if joined else 0.0, "marker": "o", "ms": 4.5}
        axes.plot(*_columns(found), color=color, label=_label(series), **line)
    offset: Mapping[str, Any] = {"textcoords": "offset points", "xytext": (5, 3)}
    for point, x, y in places:
        place = (_drawable(x), _drawable(y))
        axes.annotate(_label(point.name), place, fontsize=6.5, color="#444", **offset)
    axes.margins(x=0.12, y=0.1)
    axes.legend(fontsize=8, frameon=False)


# --------------------------------------------------------------------------- the canvas


@contextmanager
def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """A figure in inches and its axes from the top down or side by side, in the style of all."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need matplotlib, which is not installed: pip install 'hireconvert[report]'."
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        shape: Mapping[str, Any] = {"squeeze": False, "height_ratios": (2, 1)[:rows]}
        axes = figure.subplots(rows, columns, sharex=columns == 1, **shape)
        yield figure, tuple(axes.flatten())


def _svg(figure: Any) -> str:
    page = io.StringIO()
    figure.savefig(page, format="svg", metadata={"Date": None, "Creator": None})
    return page.getvalue()


def _percent(share: float | None, otherwise: float = 100.0) -> float:
    return otherwise if share is None else 100 * _drawable(share)


def _drawable(value: float) -> float:
    """The value, or the largest that axes are drawn for: files can hold anything."""
    return max(-_LARGEST, min(_LARGEST, value))


def _columns(rows: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [_drawable(row[0]) for row in rows], [_drawable(row[1]) for row in rows]


def _label(name: str) -> str:
    """A name that the font can draw, not too long; an underscore in front would hide it."""
    plain = "".join(letter if " " <= letter <= "~" else "?" for letter in name[:_LABEL_LENGTH])
    return plain.lstrip("_") or "?"
