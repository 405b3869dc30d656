"""Stage: quality of a converted model, paired against dense on the same windows.

FFN figures use the dense head and every scored position; head figures use dense hidden states, so
the two do not mix. Hidden states are kept for each view and logits exist for a few positions at a
time, because a float32 row of 262,144 logits takes a megabyte.

Shape suffixes: W windows, T tokens of a window, N rows (scored positions), D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pydoc_data import topics
from typing import Any

import torch
from transformers import PreTrainedModel

from hireconvert.data import EvalWindows
from hireconvert.errors import InputError
from hireconvert.families import base_model
from hireconvert.measures import (
    LOGITS_AT_ONCE,
    HeadReport,
    PairedFigures,
    SelectionReport,
    ViewReport,
    head_logits,
    head_report,
    hire_layers,
    hire_scope,
    layer_inputs,
    logit_chunks,
    prove_logits,
    selection_report,
)

Progress = Callable[[int, int], None]
SELECTING = 2  # times a dense window's work that one takes whose rows all select (docs/log.md)


@dataclass(frozen=True)
class EvalReport:
    """Everything measured; views are `dense`, `all` and `all_prefix` (positions >= dense_prefix).

    `selection` and the last two views are None without a sparse FFN, `head` without a sparse head.
    `baseline_nll_N` is what the views' own `nll_N` pair with.
    """

    num_windows: int
    num_scored: int
    text_sha256: str
    dense_prefix: int
    baseline_perplexity: float
    dense: ViewReport
    all: ViewReport | None
    all_prefix: ViewReport | None
    selection: SelectionReport | None
    head: HeadReport | None
    baseline_nll_N: torch.Tensor = field(repr=False, compare=False)

    @property
    def worst(self) -> ViewReport:
        """The sparse view that limits hold for; the dense view without a sparse FFN."""
        sparse = [view for view in (self.all, self.all_prefix) if view is not None]
        return max(sparse or [self.dense], key=lambda view: view.perplexity)

    def to_dict(self) -> dict[str, Any]:
        """Numbers alone, ready for JSON."""
        tree = asdict(self)
        del tree["baseline_nll_N"]
        for name in ("dense", "all", "all_prefix"):
            if tree[name] is not None:
                del tree[name]["nll_N"]
        return tree


# --------------------------------------------------------------------------- running a view


class _Work:
    """What an evaluation takes in multiply-adds, so that the time left is told from its share."""

    def __init__(
        self, model: Any, shape_WT: torch.Size, *, others: int, unseen: bool, progress: Progress
    ) -> None:
        """`others`: models beside this one whose logits are needed; `unseen`: to be run as well."""
        body = sum(weight.numel() for weight in base_model(model).parameters())
        body -= model.get_input_embeddings().weight.numel()
        num_windows, length = shape_WT
        num_rows, sparse_views = num_windows * (length - 1), 2 if hire_layers(model) else 0
        chunks = len(_chunks(num_rows, model))
        head = num_rows * model.get_output_embeddings().weight.numel()
        self.window = length * body
        self.chunk = (1 + sparse_views + others) * head // chunks
        self._total = num_windows * self.window * (1 + unseen + sparse_views * SELECTING)
        self._total += chunks * self.chunk
        self._progress, self._done = progress, 0

    def add(self, amount: int) -> None:
        """So much more of it is done."""
        self._done += amount
        self._progress(self._done, self._total)


def hidden_states(
    model: Any, ids_WT: torch.Tensor, tick: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """What the head receives at every position that predicts a token of the window, [N, D]."""
    rows = []
    for ids_T in ids_WT:
        output = base_model(model)(input_ids=ids_T[None].to(model.device), use_cache=False)
        rows.append(output.last_hidden_state[0, :-1])
        tick()
    return torch.cat(rows)


def _require_sparse(model: Any, shape_WT: torch.Size, dense_prefix: int) -> int:
    """Rows that ran dense for being NaN or inf, of those that were due to select.

    Raises RuntimeError when rows did not come by, InputError when all of a layer's were NaN or inf.
    """
    num_windows, length = shape_WT
    nonfinite, planned = 0, num_windows * min(dense_prefix, length)
    for index, counts in model.hire_stats()["layers"].items():
        if counts["rows"] != num_windows * length or counts["dense_rows"] < planned:
            raise RuntimeError(
                f"layer {index} counted {counts['rows']} rows, {counts['dense_rows']} of them "
                f"dense, expected {num_windows * length} with {planned} dense: the sparse path "
                "did not run, so its quality was not measured"
            )
        if counts["dense_rows"] >= counts["rows"]:
            raise InputError(
                f"layer {index} selected in no row: its estimates or its activations are NaN or "
                "inf in all of them, so the model runs dense. Its predictor is damaged; convert "
                "again or fetch the folder again."
            )
        nonfinite += counts["dense_rows"] - planned
    return nonfinite


# --------------------------------------------------------------------------- FFN figures


def _compare(
    baseline: tuple[PreTrainedModel, torch.Tensor],
    model: Any,
    hidden: dict[str, torch.Tensor],
    target_N: torch.Tensor,
    work: _Work,
) -> tuple[PairedFigures, dict[str, PairedFigures]]:
    """Figures of the baseline and of each view's hidden states [N, D], through the dense head."""
    own, sums = PairedFigures(), {name: PairedFigures() for name in hidden}
    for chunk in _chunks(len(target_N), model):
        target = target_N[chunk].to(model.device)
        dense_NV = head_logits(baseline[0], baseline[1][chunk]).log_softmax(-1).to(model.device)
        own.add(dense_NV, dense_NV, target)
        for name, hidden_ND in hidden.items():
            same = hidden_ND is baseline[1]
            view_NV = dense_NV if same else head_logits(model, hidden_ND[chunk]).log_softmax(-1)
            sums[name].add(dense_NV, view_NV, target)
        work.add(work.chunk)
    return own, sums


def _chunks(num_rows: int, model: Any) -> list[slice]:
    return logit_chunks(num_rows, model.get_output_embeddings().weight.shape[0], LOGITS_AT_ONCE)


# --------------------------------------------------------------------------- the whole


@dataclass
class _Views:
    """Hidden states [N, D] of each view and what running it counted."""

    hidden: dict[str, torch.Tensor] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    selection: SelectionReport | None = None


def _run_views(model: Any, ids_WT: torch.Tensor, dense_prefix: int, work: _Work) -> _Views:
    views = _Views()
    tick = partial(work.add, work.window)
    with hire_scope(model, "off"):
        prove_logits(model, ids_WT)
        views.hidden["dense"] = hidden_states(model, ids_WT, tick)
        views.nonfinite["dense"] = 0
    if not hire_layers(model):
        return views
    tick = partial(work.add, SELECTING * work.window)
    for name, prefix in {"all": 0, "all_prefix": dense_prefix}.items():
        model.hire_stats(reset=True)
        with hire_scope(model, "all", dense_prefix=prefix), layer_inputs(model) as inputs:
            views.hidden[name] = hidden_states(model, ids_WT, tick)
        views.nonfinite[name] = _require_sparse(model, ids_WT.shape, prefix)
        if name == "all":
            views.selection = selection_report(model, inputs)
    return views


@torch.no_grad()
def evaluate_model(
    model: Any,
    baseline: PreTrainedModel | None,
    windows: EvalWindows,
    *,
    baseline_hidden_ND: torch.Tensor | None = None,
    progress: Progress = lambda done, total: None,
    dense_prefix: int = 64,
    num_head_positions: int = 128,
) -> EvalReport:
    """Every figure of a HiRE model, paired against `baseline` (None: its own dense view).

    Each row of `windows.ids_WT` is scored from its second token on; `dense_prefix` is cut to half
    a window. `baseline_hidden_ND` is what `hidden_states` gives for the baseline, where that is
    known already. `progress` is called with multiply-adds done and in all. The model's scope is
    restored. Raises InputError when the logits are made in an unknown way or a layer is NaN or inf
    in every row, RuntimeError when the sparse path did not run (our bug).
    """
    ids_WT = windows.ids_WT
    dense_prefix = min(dense_prefix, ids_WT.shape[1] // 2)
    target_N = ids_WT[:, 1:].flatten()
    unseen = baseline is not None and baseline_hidden_ND is None
    others = int(baseline is not None)
    work = _Work(model, ids_WT.shape, others=others, unseen=unseen, progress=progress)
    views = _run_views(model, ids_WT, dense_prefix, work)
    reference = (model, views.hidden["dense"])
    if baseline is not None:
        if baseline_hidden_ND is None:
            tick = partial(work.add, work.window)
            baseline_hidden_ND = hidden_states(baseline, ids_WT, tick)
        reference = (baseline, baseline_hidden_ND)
    with hire_scope(model, "off"):
        own, sums = _compare(reference, model, views.hidden, target_N, work)
    reports = {name: sums[name].report(views.nonfinite[name]) for name in sums}
    reference_report = own.report(0)
    head = None
    if model.config.hire["head"] is not None:
        head = head_report(model, views.hidden["dense"], num_head_positions)
    return EvalReport(
        num_windows=len(ids_WT),
        num_scored=windows.num_scored,
        text_sha256=windows.sha256,
        dense_prefix=dense_prefix,
        baseline_perplexity=reference_report.perplexity,
        dense=reports["dense"],
        all=reports.get("all"),
        all_prefix=reports.get("all_prefix"),
        selection=views.selection,
        head=head,
        baseline_nll_N=reference_report.nll_N,
    )


def builtin_text() -> str:
    """The reference text that every Python carries; it differs a little between versions."""
    return "\n\n".join(text for _, text in sorted(topics.topics.items()))
