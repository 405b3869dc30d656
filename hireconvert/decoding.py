"""Generated tasks: items of the suite answered greedily through `generate`, as a user runs it.

Prefill is dense by design; every token after the first is a decode step and must run sparse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from hireconvert.answers import Answers, Tick, require_sparse, view
from hireconvert.suite import Item, fingerprint, grade
from hireconvert.timing import GREEDY


@dataclass(frozen=True)
class GeneratedTask:
    """A task of the suite; an item scores 1 when its answer is right, else 0."""

    name: str
    items: Sequence[Item]
    kind: str = "generated"
    metric: str = "solved"

    @property
    def num_items(self) -> int:
        """How many items there are."""
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the items."""
        return fingerprint(self.items)

    def answer(self, model: Any, tokenizer: Any, *, sparse: bool, tick: Tick) -> Answers:
        """1 for each item that is right; RuntimeError when `sparse` and a step ran otherwise."""
        score_N = np.zeros(len(self.items))
        with view(model, "decode" if sparse else None):
            steps = 0
            for batch in _batches(self.items, model):
                texts, taken = _generate(model, tokenizer, [self.items[index] for index in batch])
                steps += taken * len(batch)
                for index, text in zip(batch, texts, strict=True):
                    score_N[index] = grade(self.items[index], text)
                    tick()
            rows = require_sparse(model, steps) if sparse else 0
        return Answers(score_N, rows)


def _batches(items: Sequence[Item], model: Any) -> list[list[int]]:
    """Places of items to decode together, of similar length: one on a CPU, where rows are gathered.

    An accelerator takes as many as its sparse path does; native models are batched alike.
    """
    size = 1
    if model.device.type != "cpu":
        size = getattr(getattr(model, "hire_state", None), "max_sparse_rows", 8)
    order = sorted(range(len(items)), key=lambda index: len(items[index].prompt))
    return [order[start : start + size] for start in range(0, len(order), size)]


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, items: list[Item]) -> tuple[list[str], int]:
    """The answers, each cut at its first stop, and the decode steps that were taken."""
    rows = [tokenizer(item.prompt, verbose=False).input_ids for item in items]
    ends = _end_ids(model, tokenizer)
    length = max(len(row) for row in rows)
    ids_NT = torch.zeros(len(rows), length, dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    for place, row in enumerate(rows):
        ids_NT[place, length - len(row) :] = torch.tensor(row)
        mask_NT[place, length - len(row) :] = 1
    criterion = _AnswersEnd(tokenizer, length, [item.stops for item in items], ends)
    output_NT = model.generate(
        input_ids=ids_NT.to(model.device),
        attention_mask=mask_NT.to(model.device),
        max_new_tokens=max(item.max_new_tokens for item in items),
        # The criterion sees end tokens: no token has this id. The first token comes from the
        # prefill, so an answer may not end there, or it would prove nothing about decoding.
        eos_token_id=model.config.get_text_config().vocab_size,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([criterion]),
        **GREEDY,
    )
    new_NT = output_NT[:, length:].tolist()
    texts = [criterion.text(new, item.stops) for new, item in zip(new_NT, items, strict=True)]
    return texts, len(new_NT[0]) - 1


class _AnswersEnd(StoppingCriteria):
    """Ends a row at a stop of its item or an end token, at the second new token at the earliest."""

    def __init__(
        self, tokenizer: Any, length: int, stops: list[tuple[str, ...]], ends: frozenset[int]
    ) -> None:
        self._tokenizer, self._length, self._stops, self._ends = tokenizer, length, stops, ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each row is done, bool [N]."""
        new_NT = input_ids[:, self._length :].tolist()
        done = [
            len(new) > 1 and self._ended(new, stops)
            for new, stops in zip(new_NT, self._stops, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def _ended(self, new: list[int], stops: tuple[str, ...]) -> bool:
        return any(token in self._ends for token in new) or self.text(new, stops) != self._raw(new)

    def _raw(self, new: list[int]) -> str:
        text: str = self._tokenizer.decode(new, clean_up_tokenization_spaces=False)
        return text

    def text(self, new: list[int], stops: tuple[str, ...]) -> str:
        """The new tokens' text up to the first stop or end token."""
        ends = [place for place, token in enumerate(new) if token in self._ends]
        text = self._raw(new[: ends[0]] if ends else new)
        cuts = [text.find(stop) for stop in stops]
        return text[: min([cut for cut in cuts if cut >= 0], default=len(text))]


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    given = model.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    return frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None)
