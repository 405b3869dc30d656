"""A quality gate: limits in gate.yaml on the figures of an evaluation, and what breaches them.

A limit on a figure that was not measured is breached too: silence is not a pass. Shares are
numbers, not percentages: `perplexity_increase: {max: 0.01}` is one per cent, a task's
`min: -0.005` half a point.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hireconvert.figures import SCOPES, figure
from hireconvert.sections import In, Problem, Section
from hireconvert.strict_yaml import build, read_mapping

ENDS = ("point", "low", "high")
# Figures of a text that belong to no scope: key of the gate, path in the JSON of `eval`.
SINGLE = {
    "recall_mean": ("selection", "recall_mean"),
    "recall_worst": ("selection", "recall_worst"),
    "kept": ("selection", "kept_overall"),
    "head_top1_agreement": ("head", "top1_agreement_reference"),
    "head_kl_mean": ("head", "kl_mean"),
}
Finite = Annotated[float, In(-math.inf, open_low=True)]
Share = Annotated[float, In(0, 1)]
Results = Mapping[str, Any]


class Most(Section):
    """The largest value allowed."""

    max: Finite = Field(description="largest value allowed")


class Least(Section):
    """The smallest value allowed."""

    min: Finite = Field(description="smallest value allowed")


class Band(Section):
    """Both ends: fewer neurons than planned are as wrong as more."""

    min: Share = Field(description="smallest share allowed")
    max: Share = Field(description="largest share allowed")

    def _problems(self) -> Iterator[Problem]:
        if self.min > self.max:
            yield "min", f"{self.min:g} is above max, {self.max:g}"


class Increase(Section):
    """A limit on what grows."""

    max: Finite | None = Field(default=None, description="largest measured value allowed")
    high: Finite | None = Field(
        default=None, description="largest upper end of the 95 % interval allowed"
    )

    def _problems(self) -> Iterator[Problem]:
        if self.max is None and self.high is None:
            yield "", "holds no limit; give max, high or both"


class Difference(Section):
    """A limit on accuracy minus the baseline's, in shares of the items."""

    min: Finite | None = Field(default=None, description="smallest measured value allowed")
    low: Finite | None = Field(
        default=None, description="smallest lower end of the 95 % interval allowed"
    )

    def _problems(self) -> Iterator[Problem]:
        if self.min is None and self.low is None:
            yield "", "holds no limit; give min, low or both"


class SomeTasks(Difference):
    """A limit on tasks that are not named one by one."""

    kind: Literal["generated", "likelihood", "lm_eval"] | None = Field(
        default=None, description="tasks of this kind only; null: all"
    )


class EveryTask(SomeTasks):
    """A limit on each task that the baseline is good enough at to lose something."""

    if_baseline_reaches: Share = Field(
        default=0.0, description="tasks where the baseline is less accurate are left out"
    )


class Gate(Section):
    """Limits; those on text hold for each text, in the worse of the scopes all and all_prefix."""

    perplexity_increase: Increase | None = Field(
        default=None, description="perplexity over the baseline's, minus 1"
    )
    perplexity: Most | None = Field(default=None, description="perplexity itself")
    kl_mean: Most | None = Field(
        default=None, description="mean KL divergence from the baseline, nats"
    )
    kl_p99: Most | None = Field(default=None, description="its 99th percentile, nats")
    top1_agreement: Least | None = Field(
        default=None, description="share of positions with the baseline's most likely token"
    )
    recall_mean: Least | None = Field(
        default=None, description="share of the true top k that is kept, mean over layers"
    )
    recall_worst: Least | None = Field(default=None, description="the same in the worst layer")
    kept: Band | None = Field(
        default=None, description="share of neurons kept, dense layers and rows counted in full"
    )
    dense_rows: Most = Field(
        default=Most(max=0.0), description="rows that ran dense for being NaN or inf; always held"
    )
    head_top1_agreement: Least | None = Field(
        default=None, description="share of positions where the sparse head's best token is right"
    )
    head_kl_mean: Most | None = Field(
        default=None, description="mean KL divergence of the sparse head from the dense one, nats"
    )
    tasks: dict[str, Difference] = Field(default={}, description="limits on tasks by name")
    tasks_mean: SomeTasks | None = Field(default=None, description="mean over the tasks measured")
    every_task: EveryTask | None = Field(
        default=None, description="a limit on each task that `tasks` does not name"
    )
    speed_ratio: Least | None = Field(
        default=None, description="the baseline's time per decoded token over the model's"
    )

    def _problems(self) -> Iterator[Problem]:
        given = {name for name in self.model_fields_set if getattr(self, name)}
        if given <= {"dense_rows"}:
            yield "", "holds no limit; give at least one, for example kl_mean: {max: 0.05}"


@dataclass(frozen=True)
class Check:
    """One limit and the figure it was held against; `found` None: not measured."""

    limit: str  # as in gate.yaml, for example perplexity_increase.high
    subject: str  # the text or the task; empty where there is one figure only
    found: float | None
    least: float | None = None
    most: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the figure was measured, is a number, and lies within the limit."""
        if self.found is None or not math.isfinite(self.found):
            return False
        above = self.least is None or self.found >= self.least
        return above and (self.most is None or self.found <= self.most)

    @property
    def wanted(self) -> str:
        """The limit in words."""
        ends = (("at least", self.least), ("at most", self.most))
        return ", ".join(f"{word} {end:g}" for word, end in ends if end is not None)

    @property
    def measured(self) -> str:
        """The figure in words."""
        return "not measured" if self.found is None else f"{self.found:.6g}"

    def to_dict(self) -> dict[str, Any]:
        """The check ready for JSON."""
        return {**vars(self), "passed": self.passed}


Breach = Check  # a check that did not pass


def load_gate(path: Path) -> Gate:
    """Return the gate in a YAML file. Raises UsageError listing every problem with its key."""
    tree = read_mapping(path, "gate", "perplexity_increase, kl_mean, kept")
    return build(Gate, tree, str(path), "gate")


def check(gate: Gate, results: Results) -> list[Breach]:
    """Return the limits that an evaluation (the JSON of `hireconvert eval`) does not keep."""
    return [each for each in checks(gate, results) if not each.passed]


def checks(gate: Gate, results: Results) -> list[Check]:
    """Return every limit with its figure, in the order of gate.yaml's schema."""
    texts = results.get("texts") or {"": {}}
    found = [each for name, text in texts.items() for each in _text_checks(gate, name, text)]
    found += _task_checks(gate, results.get("tasks") or {})
    if gate.speed_ratio is not None:
        ratio = figure(results, "speed", "ratio")
        found.append(Check("speed_ratio", "", ratio, least=gate.speed_ratio.min))
    return found


# --------------------------------------------------------------------------- figures


def _worse(values: list[float | None], *, least: bool) -> float | None:
    """The worse of the scopes' figures; None unless each scope has a number."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return (min if least else max)(known)


def _text_checks(gate: Gate, name: str, text: Results) -> Iterator[Check]:
    grown = gate.perplexity_increase
    for limit, end in (("max", "point"), ("high", "high")):
        most = getattr(grown, limit, None)
        if most is not None:
            values = [figure(text, "increase", scope, end) for scope in SCOPES]
            found = _worse(values, least=False)
            yield Check(f"perplexity_increase.{limit}", name, found, most=most)
    for key in ("perplexity", "kl_mean", "kl_p99", "top1_agreement"):
        values = [figure(text, scope, key) for scope in SCOPES]
        yield from _plain(gate, key, name, _worse(values, least=key == "top1_agreement"))
    for key, path in SINGLE.items():
        yield from _plain(gate, key, name, figure(text, *path))
    yield from _plain(gate, "dense_rows", name, _dense_rows(text))


def _plain(gate: Gate, key: str, subject: str, found: float | None) -> Iterator[Check]:
    limit = getattr(gate, key)
    if limit is not None:
        least, most = getattr(limit, "min", None), getattr(limit, "max", None)
        yield Check(key, subject, found, least, most)


def _dense_rows(text: Results) -> float | None:
    """Rows that should have selected and did not; None where nothing is sparse at all."""
    if text.get("all") is None and text.get("head") is not None:
        return 0.0
    return _worse([figure(text, scope, "nonfinite_rows") for scope in SCOPES], least=False)


def _task_checks(gate: Gate, tasks: Results) -> Iterator[Check]:
    for name, limit in gate.tasks.items():
        yield from _difference(f"tasks.{name}", "", limit, tasks.get(name))
    if gate.tasks_mean is not None:
        meant = _of_kind(tasks, gate.tasks_mean)
        yield from _difference("tasks_mean", "", gate.tasks_mean, mean_difference(meant))
    every = gate.every_task
    if every is None:
        return
    strong = {
        name: task
        for name, task in _of_kind(tasks, every).items()
        if name not in gate.tasks and _reaches(task, every.if_baseline_reaches)
    }
    for name, task in strong.items():
        yield from _difference("every_task", name, every, task)
    if not strong:
        yield from _difference("every_task", "", every, None)


def _reaches(task: Any, share: float) -> bool:
    """Whether the baseline is accurate enough; one that is unknown is no reason to leave out."""
    found = figure(task, "baseline")
    return found is None or found >= share


def _of_kind(tasks: Results, limit: SomeTasks) -> Results:
    return {k: task for k, task in tasks.items() if limit.kind in (None, task.get("kind"))}


def _difference(key: str, subject: str, limit: Difference, task: Any) -> Iterator[Check]:
    if limit.min is not None:
        found = figure(task, "difference", "point")
        yield Check(f"{key}.min", subject, found, least=limit.min)
    if limit.low is not None:
        found = figure(task, "difference", "low")
        yield Check(f"{key}.low", subject, found, least=limit.low)


def mean_difference(tasks: Results) -> dict[str, dict[str, float]] | None:
    """Return the mean over tasks in the form of one task; None unless each has its difference.

    Tasks share no item, so the ends of the interval add in squares.
    """
    ends = [[figure(task, "difference", end) for end in ENDS] for task in tasks.values()]
    rows = [[end for end in task if end is not None] for task in ends]
    if not rows or min(map(len, rows)) < len(ENDS):
        return None
    point = sum(row[0] for row in rows) / len(rows)
    down, up = (sum((row[i] - row[0]) ** 2 for row in rows) ** 0.5 / len(rows) for i in (1, 2))
    return {"difference": {"point": point, "low": point - down, "high": point + up}}
