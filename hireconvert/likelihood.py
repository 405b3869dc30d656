"""Likelihood tasks from local files: which continuation of a context a model finds likeliest.

A file holds one JSON object a line, `{"id", "ctx", "cont": [...], "gold": index}`, gzipped or not.
Scoring is a prefill, so selection is forced at every position (scope `all`, dense prefix 0): the
shipped decode path alone would score the dense model.

Shape suffixes: R rows of one forward, T tokens, D width, V vocabulary, N positions.
"""

import gzip
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hireconvert.answers import Answers, Tick, require_sparse, view
from hireconvert.errors import InputError
from hireconvert.families import base_model
from hireconvert.measures import (
    LOGITS_AT_ONCE,
    head_logits,
    hire_layers,
    logit_chunks,
    prove_logits,
)
from hireconvert.sampling import adds_bos
from hireconvert.suite import fingerprint

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations and the place of the right one."""

    id: str
    context: str
    continuations: tuple[str, ...]
    gold: int


class Score(NamedTuple):
    """Sum of log-probabilities (nats) of a continuation, and whether greedy decoding writes it."""

    log_likelihood: float
    greedy: bool


class _Request(NamedTuple):
    """Tokens to read, and the tokens to be predicted at the last positions."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class LikelihoodTask:
    """Questions of one file; an item scores 1 when the model's choice is the right one, else 0.

    `metric` is `greedy` (one continuation, which greedy decoding must write), `raw` (likeliest) or
    `per_character` (likeliest for its length).
    """

    name: str
    questions: Sequence[Question]
    metric: str
    kind: str = "likelihood"

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return len(self.questions)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the items."""
        return fingerprint(self.questions)

    def answer(self, model: Any, tokenizer: Any, *, sparse: bool, tick: Tick) -> Answers:
        """1 for each right choice; RuntimeError when `sparse` and a position ran otherwise."""
        if sparse and not hire_layers(model):
            raise InputError(
                f"task '{self.name}' measures sparse FFN layers and this checkpoint has none; its "
                "sparse head is measured by generated tasks."
            )
        scores, rows = score_continuations(model, tokenizer, self.questions, sparse, tick)
        right = [self._right(q, found) for q, found in zip(self.questions, scores, strict=True)]
        return Answers(np.array(right, dtype=np.float64), rows)

    def _right(self, question: Question, scores: list[Score]) -> bool:
        if self.metric == "greedy":
            return scores[0].greedy
        values = [score.log_likelihood for score in scores]
        if self.metric == "per_character":
            values = [v / len(c) for v, c in zip(values, question.continuations, strict=True)]
        return int(np.argmax(values)) == question.gold


# --------------------------------------------------------------------------------- reading a file


def read_task(path: Path, *, limit: int | None = None, seed: int = 0) -> LikelihoodTask:
    """The task in a `.jsonl` or `.jsonl.gz` file, `limit` of its questions drawn with the seed.

    Without choices the metric is `greedy`; where all questions have the same choices (yes and no)
    `raw`, else `per_character`. Raises InputError when a line is not a question.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from error
    questions = [_question(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    metric = _metric(questions)
    if limit is not None and limit < len(questions):
        drawn = sorted(random.Random(seed).sample(range(len(questions)), limit))
        questions = [questions[place] for place in drawn]
    if len(questions) < 2:
        raise InputError(f"{path}: {len(questions)} questions; an interval needs at least two.")
    return LikelihoodTask(path.name.partition(".jsonl")[0], questions, metric)


def _question(row: Any, place: str) -> Question:
    row = row if isinstance(row, dict) else {}
    context, continuations, gold = row.get("ctx"), row.get("cont"), row.get("gold")
    texts = isinstance(context, str) and isinstance(continuations, list)
    if not texts or not all(isinstance(text, str) and text for text in continuations):
        raise InputError(
            f"{place}: expected an object with a text `ctx` and a list `cont` of texts."
        )
    if type(gold) is not int or not 0 <= gold < len(continuations):
        raise InputError(f"{place}: `gold` is {gold!r}, expected a place in `cont`.")
    return Question(str(row.get("id", place)), context, tuple(continuations), gold)


def _metric(questions: list[Question]) -> str:
    if all(len(question.continuations) == 1 for question in questions):
        return "greedy"
    same = len({question.continuations for question in questions}) == 1
    return "raw" if same else "per_character"


# ---------------------------------------------------------------------------------------- scoring


@torch.inference_mode()
def score_continuations(
    model: Any, tokenizer: Any, questions: Sequence[Question], sparse: bool, tick: Tick
) -> tuple[list[list[Score]], int]:
    """Each question's scores in the order of its continuations, and rows that ran sparse.

    Sequences are cut at the front to what the model's positions allow. `tick` is called once a
    question. Raises InputError when the logits are made in an unknown way.
    """
    reader = _Reader(
        tokenizer,
        starts_with_bos=adds_bos(tokenizer),
        most=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    requests = [
        [reader.request(question.context, text) for text in question.continuations]
        for question in questions
    ]
    # One pass serves all continuations of one token after the same context.
    wanted: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for request in (one for each in requests for one in each):
        wanted.setdefault(request.ids, set()).add(request.targets)
    found: dict[_Request, Score] = {}
    with view(model, None):
        prove_logits(model, torch.tensor([max(wanted, key=len)]))
    with view(model, "all" if sparse else None):
        positions, ticked = 0, 0
        for batch in _batches(list(wanted)):
            positions += len(batch) * len(batch[0])
            found.update(_score_batch(model, batch, wanted))
            done = len(found) * len(questions) // sum(len(each) for each in wanted.values())
            for _ in range(done - ticked):
                tick()
            ticked = done
        rows = require_sparse(model, positions) if sparse else 0
    return [[found[request] for request in each] for each in requests], rows


@dataclass(frozen=True)
class _Reader:
    tokenizer: Any
    starts_with_bos: bool
    most: int | None  # positions the model has

    def request(self, context: str, continuation: str) -> _Request:
        """Both tokenized as one text, split where the context's own tokens end."""
        alone, whole = self._ids(context), self._ids(context + continuation)
        # A token that spans the border is predicted as a whole.
        split = min(len(alone), len(whole) - 1)
        while alone[:split] != whole[:split]:
            split -= 1
        first: list[int] = []
        if self.starts_with_bos or split == 0:
            marks = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
            first = [mark for mark in marks if mark is not None][:1]
        if split == 0 and not first:
            raise InputError("a context is empty and the tokenizer has no token to start with.")
        ids, targets = [*first, *whole][:-1], whole[split:]
        if self.most is not None:
            ids = ids[-self.most :]
        return _Request(tuple(ids), tuple(targets[-len(ids) :]))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids


def _batches(rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Rows of one length together, so that no padding is counted as a position."""
    batches: list[list[tuple[int, ...]]] = []
    for row in sorted(rows, key=lambda ids: (len(ids), ids)):
        last = batches[-1] if batches else []
        if last and len(last[0]) == len(row) and (len(last) + 1) * len(row) <= _TOKENS_AT_ONCE:
            last.append(row)
        else:
            batches.append([row])
    return batches


def _score_batch(
    model: Any,
    batch: list[tuple[int, ...]],
    wanted: dict[tuple[int, ...], set[tuple[int, ...]]],
) -> dict[_Request, Score]:
    ids_RT = torch.tensor(batch, device=model.device)
    hidden_RTD = base_model(model)(input_ids=ids_RT, use_cache=False).last_hidden_state
    found = {}
    for row, ids in enumerate(batch):
        for targets in wanted[ids]:
            found[_Request(ids, targets)] = _score(model, hidden_RTD[row, -len(targets) :], targets)
    return found


def _score(model: Any, hidden_ND: torch.Tensor, targets: tuple[int, ...]) -> Score:
    target_N = torch.tensor(targets, device=hidden_ND.device)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    total, greedy = 0.0, True
    for part in logit_chunks(len(targets), vocabulary, LOGITS_AT_ONCE):
        log_NV = head_logits(model, hidden_ND[part]).log_softmax(-1)
        total += float(log_NV.gather(1, target_N[part, None]).double().sum())
        greedy = greedy and bool((log_NV.argmax(-1) == target_N[part]).all())
    return Score(total, greedy)
