"""Tasks, both models on the same items: what each solves, and the paired difference."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hireconvert.answers import Answers, Task
from hireconvert.decoding import GeneratedTask
from hireconvert.errors import UsageError
from hireconvert.likelihood import read_task
from hireconvert.lmeval import find_tasks
from hireconvert.paired import mcnemar, mean_difference
from hireconvert.suite import TASKS, build_items

Progress = Callable[[int, int], None]
# Gives a task's answers of the baseline, from what was kept or by the call; and what happened.
Keeper = Callable[[Task, Callable[[], Answers]], tuple[Answers, str]]

SUITE = "suite"
LM_EVAL = "lm_eval:"
DEFAULT_LIMIT = 100  # generated items, of which there is no end
DEFAULT_MAX_LENGTH = 1024
_KNOWN = f"tasks are {', '.join(TASKS)}, {SUITE}, a .jsonl or .jsonl.gz file, {LM_EVAL}NAME"


@dataclass(frozen=True)
class TaskRequest:
    """Which tasks and which of their items, as `open_tasks` takes them."""

    names: Sequence[str]
    limit: int | None = None
    seed: int = 0
    max_length: int = DEFAULT_MAX_LENGTH


def run_tasks(
    model: Any,
    baseline: Any | None,
    tokenizer: Any,
    request: TaskRequest,
    *,
    keeper: Keeper | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """`{"tasks": {name: figures}}` of a HiRE model against a baseline (None: its dense view).

    Errors are those of `open_tasks`. With a `keeper` figures say what it did (`baseline_cache`).
    `progress` is called with items answered and items in all, those of both models. RuntimeError
    when the sparse path did not run.
    """
    tasks = open_tasks(**vars(request), tokenizer=tokenizer)
    if any(isinstance(task, GeneratedTask) for task in tasks):
        _check_length(request.max_length, [model, baseline])
    total, done = 2 * sum(task.num_items for task in tasks), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    dense_model = model if baseline is None else baseline
    results, due = {}, 0
    for task in tasks:
        answer = partial(task.answer, dense_model, tokenizer, sparse=False, tick=tick)
        dense, state = (answer(), None) if keeper is None else keeper(task, answer)
        due += task.num_items
        while done < due:  # answers that were kept
            tick()
        converted = task.answer(model, tokenizer, sparse=True, tick=tick)
        due += task.num_items
        results[task.name] = compare(task, dense, converted, seed=request.seed)
        results[task.name]["baseline_cache"] = state
    return {"tasks": results}


def open_tasks(
    names: Sequence[str],
    tokenizer: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_length: int = DEFAULT_MAX_LENGTH,
) -> list[Task]:
    """The tasks named: those of the suite, `suite` for all, a `.jsonl[.gz]` path, `lm_eval:NAME`.

    `limit` items are drawn of each with the seed; None takes all of a file and 100 generated ones.
    `max_length` is the longest generated item in tokens, prompt and answer. Raises UsageError for
    unknown or repeated names, else what opening the task raises.
    """
    if limit is not None and limit < 2:
        raise UsageError(f"{limit} items a task allow no interval; take at least 2.")
    tasks: list[Task] = []
    for name in names:
        tasks += _open(name, tokenizer, limit=limit, seed=seed, max_length=max_length)
    if not tasks:
        raise UsageError(f"no task is named; {_KNOWN}.")
    found = [task.name for task in tasks]
    for name in found:
        if found.count(name) > 1:
            raise UsageError(f"two tasks are called '{name}'; name each once.")
    return tasks


def compare(task: Task, dense: Answers, converted: Answers, *, seed: int = 0) -> dict[str, Any]:
    """Mean scores, their paired difference with its interval, and McNemar's p of 0/1 scores."""
    scores = np.concatenate([dense.score_N, converted.score_N])
    binary = bool(np.isin(scores, (0.0, 1.0)).all())
    return {
        "kind": task.kind,
        "metric": task.metric,
        "num_items": task.num_items,
        "items_sha256": task.fingerprint,
        "baseline": float(dense.score_N.mean()),
        "converted": float(converted.score_N.mean()),
        "difference": asdict(mean_difference(converted.score_N, dense.score_N, seed=seed)),
        "p_mcnemar": mcnemar(converted.score_N, dense.score_N).p if binary else None,
        "sparse_rows": converted.sparse_rows,
    }


def _open(
    name: str, tokenizer: Any, *, limit: int | None, seed: int, max_length: int
) -> Sequence[Task]:
    if name.startswith(LM_EVAL):
        return find_tasks(name.removeprefix(LM_EVAL), limit=limit, seed=seed)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return [read_task(Path(name), limit=limit, seed=seed)]
    if name != SUITE and name not in TASKS:
        raise UsageError(f"task '{name}' is unknown; {_KNOWN}.")
    count = DEFAULT_LIMIT if limit is None else limit
    return [
        GeneratedTask(
            task, build_items(task, tokenizer, num_items=count, max_length=max_length, seed=seed)
        )
        for task in (TASKS if name == SUITE else (name,))
    ]


def _check_length(max_length: int, models: Sequence[Any]) -> None:
    for model in models:
        config = None if model is None else model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if most is not None and max_length > most:
            raise UsageError(
                f"items of {max_length} tokens were asked for, but the model has {most} positions; "
                "allow no longer ones (--max-length)."
            )
