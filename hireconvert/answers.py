"""What a model got right, item by item, and the proof that its sparse path gave the answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hireconvert.errors import InputError
from hireconvert.measures import hire_scope

Tick = Callable[[], None]  # one item is done


@dataclass(frozen=True)
class Answers:
    """Scores of the items in their order, and rows that ran sparse in the layer with fewest."""

    score_N: NDArray[np.float64]
    sparse_rows: int


class Task(Protocol):
    """Items that several models answer; both models of a pair meet the same ones."""

    @property
    def name(self) -> str:
        """What results go by."""

    @property
    def kind(self) -> str:
        """`generated`, `likelihood` or `lm_eval`."""

    @property
    def metric(self) -> str:
        """What a score says."""

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the items, in their order."""

    @property
    def num_items(self) -> int:
        """How many items there are."""

    def answer(self, model: Any, tokenizer: Any, *, sparse: bool, tick: Tick) -> Answers:
        """Scores of one model; RuntimeError when `sparse` and the sparse path did not run."""


@contextmanager
def view(model: Any, scope: str | None) -> Iterator[None]:
    """Run the block in `decode` or `all`; None is the dense view, all a native model has.

    Decoding uses the sparse head as the checkpoint ships it; `all` leaves the head dense. Counts
    start at zero.
    """
    if not hasattr(model, "set_hire_scope"):
        assert scope is None, "a native model has no sparse view"
        yield
        return
    model.hire_stats(reset=True)
    with hire_scope(model, scope or "off", head=scope == "decode"):
        yield


def require_sparse(model: Any, expected_rows: int | None) -> int:
    """Rows that ran sparse since the counts were reset, in the layer with fewest.

    `expected_rows` is how many each layer must have met; None where only some are known to be due.
    A sparse head must have run where the view lets it; its rows count without sparse layers.
    Raises RuntimeError when rows are missing or fell back, InputError when all of a layer's ran
    dense for being NaN or inf.
    """
    stats = model.hire_stats()
    counts = {f"layer {index}": each for index, each in stats["layers"].items()}
    if stats["head"] and model.hire_state.sparse_head:
        counts["head"] = stats["head"]
    if not counts or stats["dense_fallbacks"]:
        raise RuntimeError(
            f"{stats['dense_fallbacks']} calls fell back to dense: the sparse path did not run, so "
            "its quality was not measured"
        )
    for name, each in counts.items():
        missed = name != "head" and expected_rows is not None and each["rows"] != expected_rows
        if missed or each["rows"] == 0:
            expected = "some" if expected_rows is None else str(expected_rows)
            raise RuntimeError(
                f"{name} counted {each['rows']} rows, expected {expected}: the sparse path did not "
                "run, so its quality was not measured"
            )
        if each["dense_rows"] >= each["rows"]:
            raise InputError(
                f"{name} selected in no row: its estimates are NaN or inf in all {each['rows']}, "
                "so the model runs dense. Its predictor is damaged; convert again or fetch the "
                "folder again."
            )
    sparse = {name: each["rows"] - each["dense_rows"] for name, each in counts.items()}
    return min((sparse[name] for name in sparse if name != "head"), default=sparse.get("head", 0))
