"""Tasks of lm-evaluation-harness (extra `eval`): by registered name, or a local YAML file.

Its likelihood tasks are prefills, which a model that is sparse in decode steps alone would pass as
if it were dense: they run in scope `all`, tasks that generate in scope `decode`.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hireconvert.answers import Answers, Tick, require_sparse, view
from hireconvert.errors import HubError, InputError

_GENERATES = "generate_until"
_SCORED = (_GENERATES, "multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class LmEvalTask:
    """One leaf task; an item scores what the harness gives it under `metric`, higher is better."""

    name: str
    metric: str
    places: tuple[int, ...]  # of the items among the task's documents
    fingerprint: str
    task: Any  # the harness's own object
    seed: int
    kind: str = "lm_eval"

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return len(self.places)

    def answer(self, model: Any, tokenizer: Any, *, sparse: bool, tick: Tick) -> Answers:
        """The harness's score of each item; RuntimeError when `sparse` and nothing ran sparse."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        generates = self.task.OUTPUT_TYPE == _GENERATES
        # Batched decode steps above max_sparse_rows would run dense.
        batch = 1 if model.device.type == "cpu" or generates else 8
        scope = ("decode" if generates else "all") if sparse else None
        # Both models must be shown the same examples, which the harness draws as it goes.
        self.task.set_fewshot_seed(seed=self.seed)
        with view(model, scope), _quiet():
            results = evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
                task_dict={"tasks": {self.name: self.task}},
                samples={self.name: list(self.places)},
                bootstrap_iters=0,
            )
            rows = require_sparse(model, None) if sparse else 0
        assert results is not None
        for _ in self.places:
            tick()
        return Answers(self._scores(results["samples"][self.name]), rows)

    def _scores(self, samples: list[Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        first = samples[0]["filter"]  # other filters judge the same answers again
        found = {each["doc_id"]: each for each in samples if each["filter"] == first}
        values = [found[place][self.metric] for place in self.places]
        if not all(isinstance(value, int | float | np.number) for value in values):
            raise InputError(
                f"lm_eval task '{self.name}': '{self.metric}' is no number for each item, so two "
                "models cannot be paired on it."
            )
        return np.array(values, dtype=np.float64)


def find_tasks(spec: str, *, limit: int | None = None, seed: int = 0) -> list[LmEvalTask]:
    """The leaf tasks of a registered task, group or tag, or of the YAML file at a path.

    `limit` documents of each are drawn with the seed. Raises InputError without lm_eval, for
    unknown names and for tasks that do not score items; HubError when data cannot be fetched.
    """
    local = spec.endswith((".yaml", ".yml"))
    if local and not Path(spec).is_file():
        raise InputError(f"lm_eval task file {spec} does not exist.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"task 'lm_eval:{spec}' needs lm-evaluation-harness, which is not installed; "
            "pip install 'hireconvert[eval]'"
        ) from error
    manager = TaskManager(
        include_path=str(Path(spec).parent) if local else None, include_defaults=not local
    )
    if not local and spec not in manager.all_tasks:
        raise InputError(f"lm_eval has no task '{spec}'; `lm-eval ls tasks` lists them.")
    try:
        leaves: dict[str, Any] = manager.load([spec])["tasks"]
    except ImportError as error:
        raise InputError(
            f"lm_eval task '{spec}' needs a package that is not installed: {error}"
        ) from error
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        if local:
            raise InputError(f"lm_eval task file {spec} cannot be used: {error}") from error
        raise HubError(f"the data of lm_eval task '{spec}' cannot be fetched: {error}") from error
    return [_leaf(name, task, limit, seed) for name, task in leaves.items()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's warnings about models handed over as objects."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _leaf(name: str, task: Any, limit: int | None, seed: int) -> LmEvalTask:
    better = [metric for metric, higher in task.higher_is_better().items() if higher]
    if task.OUTPUT_TYPE not in _SCORED or not better:
        raise InputError(
            f"lm_eval task '{name}' ({task.OUTPUT_TYPE}) gives no score to each item; name "
            "one that scores choices or answers."
        )
    documents = task.eval_docs
    places = list(range(len(documents)))
    if limit is not None and limit < len(places):
        places = sorted(random.Random(seed).sample(places, limit))
    if len(places) < 2:
        raise InputError(f"lm_eval task '{name}' has {len(places)} items; two are needed.")
    digest = hashlib.sha256()
    for place in places:
        digest.update(json.dumps(documents[place], default=str, sort_keys=True).encode())
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    return LmEvalTask(name, better[0], tuple(places), digest.hexdigest(), task, seed)
