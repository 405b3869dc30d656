"""Figures of quality: of log-probabilities, of what sparse layers select, of the sparse head.

Shape suffixes: N rows (scored positions), D width, F neurons, S selectable units, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hireconvert.errors import InputError
from hireconvert.families import base_model, hidden_activations, num_layers, read_ffn_weights
from hireconvert.runtime.hire_ffn import SparseFfn
from hireconvert.runtime.hire_predict import (
    members_mask,
    recall_at,
    top_k_indices,
    unit_scores,
    varies,
)
from hireconvert.runtime.hire_select import candidate_mask, kept_mask
from hireconvert.scoring import as_many_best, shares

# Logits held at once, in elements; a handful of float32 tensors of this size live together.
LOGITS_AT_ONCE = 2**23
_HEAD_ROWS_AT_ONCE = 16384
_REFERENCE_POSITIONS_AT_ONCE = 64
_RECALL_ROWS_PER_WINDOW = 64
CURVE = (1.0, 1.1, 1.2, 1.35, 1.5, 2.0)  # over_select at which recall is measured
# The model's logits and those of `head_logits` come from the same operations.
_PROOF_TOKENS, _PROOF_TOLERANCE = 16, 1e-3


@dataclass(frozen=True)
class ViewReport:
    """One way to run the model; `kl` is KL(dense || view) in nats, agreement that of arg-maxes.

    `nonfinite_rows` counts rows that ran dense because of NaN or inf, summed over layers.
    `nll_N` (nats, one a scored token) is for paired statistics and not serialised.
    """

    perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    nonfinite_rows: int
    nll_N: torch.Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class LayerSelection:
    """What one sparse layer chose."""

    layer: int
    recall: float
    kept: float


@dataclass(frozen=True)
class CurvePoint:
    """Recall of the true top k among `over_select` times as many candidates, over the layers."""

    over_select: float
    recall_mean: float
    recall_worst: float


@dataclass(frozen=True)
class SelectionReport:
    """What the sparse FFN layers chose, averaged over layers and in the worst of them.

    Recall is the share of the true top k among the kept; a row's true top k follows from exact
    scores of the inputs that the layer really had in scope `all`. `kept_overall` is the share kept
    over all decoder layers and rows, those that ran dense counted in full.
    """

    recall_mean: float
    recall_worst: float
    recall_worst_layer: int
    kept_mean: float
    kept_worst: float
    kept_worst_layer: int
    kept_overall: float
    num_rows: int
    layers: tuple[LayerSelection, ...]
    recall_curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class HeadReport:
    """The sparse head on dense hidden states, against the dense head and the reference head.

    The reference sums exact products in float64 and rounds once to float32, ties going to the
    lowest id. `kl_mean` is None where unselected logits are -inf.
    """

    certified: bool
    top1_agreement: float
    top1_agreement_reference: float
    kl_mean: float | None
    rescored_median: float
    rescored_p99: float
    rescored_max: int
    num_positions: int


# --------------------------------------------------------------------------- views and logits


def hire_layers(model: Any) -> dict[int, SparseFfn]:
    """The sparse FFN of each converted decoder layer."""
    layers: dict[int, SparseFfn] = base_model(model).hire_layers  # type: ignore[assignment]
    return layers


@contextmanager
def hire_scope(
    model: Any, scope: str, *, dense_prefix: int = 0, head: bool = False
) -> Iterator[None]:
    """Run the block in a scope, the LM head dense unless `head`; the scope before is restored."""
    state = model.hire_state
    before = (state.scope, state.dense_prefix, state.sparse_head)
    model.set_hire_scope(scope, dense_prefix=dense_prefix, head=head)
    try:
        yield
    finally:
        model.set_hire_scope(before[0], dense_prefix=before[1], head=before[2])


def scale_and_cap(model: Any, z: torch.Tensor) -> torch.Tensor:
    """What models do to logits after the head: Cohere and Granite scale, Gemma caps."""
    config = model.config.get_text_config()
    z = z * (getattr(config, "logit_scale", None) or 1.0)
    z = z / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return z if cap is None else torch.tanh(z / cap) * cap


def head_logits(model: Any, x_ND: torch.Tensor) -> torch.Tensor:
    """The model's logits float32 [N, V] for what its head receives, [N, D]."""
    return scale_and_cap(model, model.get_output_embeddings()(x_ND)).float()


def logit_chunks(num_rows: int, vocabulary: int, at_once: int) -> list[slice]:
    """Runs of rows whose logits hold `at_once` elements at most, and one row at least."""
    size = max(1, at_once // vocabulary)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


@torch.no_grad()
def prove_logits(model: Any, ids_WT: torch.Tensor) -> None:
    """Raise InputError unless `head_logits` gives what the model's own forward does."""
    ids_1T = ids_WT[:1, :_PROOF_TOKENS].to(model.device)
    expected_NV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    hidden_ND = base_model(model)(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    error = float((head_logits(model, hidden_ND) - expected_NV).abs().max())
    if not error <= _PROOF_TOLERANCE * float(expected_NV.abs().max()):
        raise InputError(
            f"model_type '{model.config.model_type}': its logits are not its head's output, "
            "scaled and soft-capped as known models do. It cannot be evaluated."
        )


# --------------------------------------------------------------------------- log-probabilities


@dataclass
class PairedFigures:
    """Per-position figures of one view, gathered while chunks of positions go by."""

    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    agree: list[torch.Tensor] = field(default_factory=list)

    def add(self, dense_NV: torch.Tensor, view_NV: torch.Tensor, target_N: torch.Tensor) -> None:
        """Take log-probabilities of one chunk."""
        self.nll.append(-view_NV.gather(1, target_N[:, None])[:, 0].cpu())
        # Rounding can make the sum slightly negative, which a divergence never is.
        self.kl.append((dense_NV.exp() * (dense_NV - view_NV)).sum(-1).clamp(min=0).cpu())
        self.agree.append((dense_NV.argmax(-1) == view_NV.argmax(-1)).cpu())

    def report(self, nonfinite_rows: int) -> ViewReport:
        """The figures over all chunks."""
        nll_N, kl_N = torch.cat(self.nll), torch.cat(self.kl)
        return ViewReport(
            perplexity=float(nll_N.double().mean().exp()),
            kl_mean=float(kl_N.double().mean()),
            kl_p99=quantile(kl_N, 0.99),
            top1_agreement=float(torch.cat(self.agree).double().mean()),
            nonfinite_rows=nonfinite_rows,
            nll_N=nll_N,
        )


def quantile(values_N: torch.Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered_N = values_N.double().sort().values
    return float(ordered_N[max(0, math.ceil(share * len(ordered_N)) - 1)])


# --------------------------------------------------------------------------- selection figures


@contextmanager
def layer_inputs(model: Any) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Evenly spaced inputs of every sparse FFN while the block runs, each [N, D] on the CPU."""
    caught: dict[int, list[torch.Tensor]] = {}
    hooks = []
    for index, layer in hire_layers(model).items():
        rows = caught.setdefault(index, [])

        def catch(_module: nn.Module, args: Any, rows: list[torch.Tensor] = rows) -> None:
            stride = max(1, args[0].shape[0] // _RECALL_ROWS_PER_WINDOW)
            rows.append(args[0][::stride].detach().cpu().clone())

        hooks.append(layer.register_forward_pre_hook(catch))
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Recall:
    """One layer's recall: of what it keeps, and of the best estimates at each of CURVE."""

    kept: float
    curve: tuple[float, ...]


def _layer_recall(model: Any, index: int, x_ND: torch.Tensor) -> _Recall:
    """Share of the true top k, in selectable units, that the layer finds for these inputs.

    Where the number kept varies, what is kept is compared with as many of the true best.
    """
    layer = hire_layers(model)[index]
    spec, weights = layer.spec, read_ffn_weights(model, model.config.hire["layout"], index)
    group, common = spec["group_size"], spec["num_common"]
    score_NF = layer.scores(hidden_activations(weights, x_ND), weights.down_FD.norm(dim=1))
    estimate_NS = layer.estimated(x_ND.to(model.device))[0].cpu().nan_to_num()
    kept_NF = kept_mask(spec, candidate_mask(spec, estimate_NS), estimate_NS, score_NF)
    kept_NS = kept_NF[:, common:].unflatten(-1, (-1, group))[..., 0]
    exact_NS = unit_scores(score_NF[:, common:], group)
    num, num_units = (spec["num_kept"] - common) // group, exact_NS.shape[1]
    found = [kept_NS]
    for ratio in CURVE:
        best_NC = top_k_indices(estimate_NS, min(num_units, math.ceil(ratio * num)))
        found.append(members_mask(best_NC, num_units))
    kept, *curve = (float(recall_at(exact_NS, each, num).double().mean()) for each in found)
    if varies(spec):
        kept = float(shares(as_many_best(exact_NS, kept_NS), kept_NS).double().mean())
    return _Recall(kept, tuple(curve))


def selection_report(model: Any, inputs: dict[int, list[torch.Tensor]]) -> SelectionReport:
    """Recall from caught inputs, kept fraction from the counters of the view that just ran."""
    found = {index: _layer_recall(model, index, torch.cat(rows)) for index, rows in inputs.items()}
    recall = {index: each.kept for index, each in found.items()}
    kept, read = {}, [1.0] * (num_layers(model) - len(recall))
    for index, counts in model.hire_stats()["layers"].items():
        neurons = hire_layers(model)[index].spec["num_neurons"]
        kept[index] = counts["kept"] / (counts["rows"] - counts["dense_rows"]) / neurons
        read.append((counts["kept"] / neurons + counts["dense_rows"]) / counts["rows"])
    low, high = min(recall, key=recall.__getitem__), max(kept, key=kept.__getitem__)
    points = zip(CURVE, zip(*(each.curve for each in found.values()), strict=True), strict=True)
    return SelectionReport(
        recall_mean=sum(recall.values()) / len(recall),
        recall_worst=recall[low],
        recall_worst_layer=low,
        kept_mean=sum(kept.values()) / len(kept),
        kept_worst=kept[high],
        kept_worst_layer=high,
        kept_overall=sum(read) / len(read),
        num_rows=len(torch.cat(next(iter(inputs.values())))),
        layers=tuple(LayerSelection(index, recall[index], kept[index]) for index in recall),
        recall_curve=tuple(CurvePoint(x, sum(y) / len(y), min(y)) for x, y in points),
    )


# --------------------------------------------------------------------------- head figures


def _reference_top1(model: Any, x_ND: torch.Tensor) -> torch.Tensor:
    """The reference head's best id per row, int64 [N]; the weight is read once for all rows."""
    head = model.get_output_embeddings()
    pieces = []
    for start in range(0, head.weight.shape[0], _HEAD_ROWS_AT_ONCE):
        rows = slice(start, start + _HEAD_ROWS_AT_ONCE)
        bias = None if head.bias is None else head.bias[rows].double()
        z_NV = nn.functional.linear(x_ND.double(), head.weight[rows].double(), bias)
        pieces.append(scale_and_cap(model, z_NV.float()))
    return top_k_indices(torch.cat(pieces, dim=1), 1)[:, 0]


def head_report(model: Any, hidden_ND: torch.Tensor, num_positions: int) -> HeadReport:
    """Run the sparse head on evenly spaced rows of dense hidden states."""
    head = model.get_output_embeddings()
    position_N = torch.linspace(0, len(hidden_ND) - 1, min(num_positions, len(hidden_ND))).long()
    sums, rescored, best = PairedFigures(), [], []
    head.hire.prepare(head)
    for position in position_N.tolist():
        x_1D = hidden_ND[position][None]
        with hire_scope(model, "off"):
            dense_1V = head_logits(model, x_1D)
        model.hire_stats(reset=True)
        with hire_scope(model, "all", head=True):
            sparse_1V = head_logits(model, x_1D)
        counts = model.hire_stats()["head"]
        if counts["rows"] != 1 or counts["dense_rows"]:
            raise RuntimeError(
                f"the head counted {counts} for one row: its sparse path did not run, so its "
                "quality was not measured"
            )
        rescored.append(counts["rescored"])
        best.append(top_k_indices(sparse_1V, 1)[0].cpu())
        first_1 = dense_1V.argmax(-1)
        sums.add(dense_1V.log_softmax(-1), sparse_1V.log_softmax(-1), first_1)
    report, rescored_N = sums.report(0), torch.tensor(rescored, dtype=torch.float64)
    pieces = position_N.split(_REFERENCE_POSITIONS_AT_ONCE)
    reference_N = torch.cat([_reference_top1(model, hidden_ND[p]).cpu() for p in pieces])
    return HeadReport(
        certified=bool(head.hire.spec["certified"]),
        top1_agreement=report.top1_agreement,
        top1_agreement_reference=float((torch.cat(best) == reference_N).double().mean()),
        kl_mean=None if head.hire.spec["unselected"] == "-inf" else report.kl_mean,
        rescored_median=quantile(rescored_N, 0.5),
        rescored_p99=quantile(rescored_N, 0.99),
        rescored_max=int(rescored_N.max()),
        num_positions=len(position_N),
    )
