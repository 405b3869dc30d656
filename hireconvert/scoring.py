"""Scores of one FFN's neurons, how many are kept, and what a predictor recalls and costs.

Shape suffixes: N rows (tokens), D width, F neurons, M predictor outputs (gate rows then up rows,
up rows alone, or one row a group), S selectable units (neurons or groups).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from hireconvert.errors import UsageError
from hireconvert.families import FfnWeights
from hireconvert.levels import LEAST_LEVEL
from hireconvert.recipe import FfnRecipe, HeadRecipe, PredictorRecipe
from hireconvert.runtime.hire_predict import (
    FFN_PARTS,
    Predictor,
    is_relative,
    kth_score,
    layer_bytes,
    relative_scores,
    top_k_mask,
    unit_scores,
    varies,
)
from hireconvert.runtime.hire_select import standings
from hireconvert.schema import UnselectedRecipe

ROW_CHUNK = 2048
SAMPLE_ROWS = 4096  # calibration rows that levels and errors of a predictor are taken on
WEIGHT_BYTES = 2  # byte figures are against a bfloat16 FFN
AUTO_BITS = (2, 3, 4)
AUTO_INPUT_KEEP = (1.0, 0.6, 0.5, 0.4)
AUTO_OVER_SELECT = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)


def layer_counts(num_neurons: int, recipe: FfnRecipe, keep_fraction: float) -> dict[str, Any]:
    """LAYER of docs/design.md without its predictor: counts in neurons, multiples of the group.

    The level of a selection that varies is null until it is fitted. Raises UsageError when the
    group does not divide the neurons or the common ones leave no choice.
    """
    group = recipe.group_size
    if num_neurons % group:
        raise UsageError(
            f"ffn.group_size {group} does not divide the {num_neurons} neurons of a layer; "
            "choose a divisor"
        )
    kept = max(round_half_up(keep_fraction * num_neurons / group), 1) * group
    candidates = math.ceil(recipe.over_select * kept / group - 1e-9) * group
    common = round_half_up(recipe.common_path * num_neurons / group) * group
    if common and common >= kept:
        raise UsageError(
            f"ffn.common_path makes {common} neurons always active, but only {kept} are kept; "
            "lower it or raise ffn.keep_fraction"
        )
    counts: dict[str, Any] = {
        "num_neurons": num_neurons,
        "num_kept": min(kept, num_neurons),
        "num_candidates": min(candidates, num_neurons),
        "group_size": group,
        "num_common": common,
        # Of copies nothing is selected, so that no estimate has an error to rank by.
        "score": "norm" if recipe.rows == "copies" else recipe.score,
        "keep": recipe.keep,
    }
    if recipe.selection != "fixed":
        rule = {"rule": recipe.selection, "level": None, "mean_kept": counts["num_kept"]}
        counts["selection"] = rule
    if recipe.unselected is not None:
        counts["unselected"] = copy_spec(recipe.unselected)
    if recipe.rows != "stored":
        counts["rows"] = recipe.rows
    return with_candidates(counts, counts["num_candidates"])


def with_candidates(counts: dict[str, Any], num_candidates: int) -> dict[str, Any]:
    """The counts with another number of candidates; as many as are kept leave nothing to vary."""
    counts = {**counts, "num_candidates": num_candidates}
    if num_candidates == counts["num_kept"]:
        counts.pop("selection", None)
    return counts


def copy_spec(recipe: PredictorRecipe | UnselectedRecipe) -> dict[str, Any]:
    """What a spec says of a low-bit copy; even levels go without saying."""
    spec = {"bits": recipe.bits, "block": recipe.block, "symmetric": recipe.symmetric}
    return {**spec, "levels": recipe.levels} if recipe.levels != "even" else spec


def predictor_spec(
    recipe: PredictorRecipe, width: int, num_matrices: int, counts: dict[str, Any]
) -> dict[str, Any]:
    """PREDICTOR of docs/design.md for an explicit kind. Low-rank factors read every channel."""
    with_copy, with_factors = recipe.kind in ("q", "qlr"), recipe.kind in ("lr", "qlr")
    outputs = counts["num_neurons"] * (num_matrices - 1)
    if recipe.group_scores:
        outputs = counts["num_neurons"] // counts["group_size"]
    inputs = min(max(round_half_up(recipe.input_keep * width), 1), width)
    spec = {
        "kind": recipe.kind,
        **(
            copy_spec(recipe)
            if with_copy
            else {"bits": None, "block": None, "symmetric": recipe.symmetric}
        ),
        "rank": min(recipe.rank, width, outputs) if with_factors else None,
        "factor_bits": recipe.factor_bits,
        "num_inputs": inputs if with_copy else width,
        "groups": recipe.group_scores,
    }
    return {**spec, "soften": True} if recipe.soften or counts["score"] == "error" else spec


def head_spec(recipe: HeadRecipe, vocabulary: int) -> dict[str, Any]:
    """The `config.hire.head` object of docs/format.md."""
    low_rank = recipe.kind == "lr"
    return {
        "kind": recipe.kind,
        "bits": None if low_rank else recipe.bits,
        "block": None if low_rank else recipe.block,
        "rank": recipe.rank if low_rank else None,
        "num_candidates": min(recipe.num_candidates, vocabulary),
        "unselected": recipe.unselected,
        "certified": recipe.certified,
        "certify_top": min(recipe.certify_top, vocabulary),
        "on_uncertified": recipe.on_uncertified,
    }


def score_norms(weights: FfnWeights, score: str) -> torch.Tensor:
    """float32 [F]: the length of each neuron's output vector, or ones for the score `plain`."""
    norm_F = weights.down_FD.norm(dim=1)
    return torch.ones_like(norm_F) if score == "plain" else norm_F


def hidden(weights: FfnWeights, x_ND: torch.Tensor) -> torch.Tensor:
    """The hidden vector act(gate) * up (or act(up)) of every neuron, [N, F]."""
    up_NF = F.linear(x_ND, weights.up_FD, weights.up_bias_F)
    if weights.gate_FD is None:
        return weights.act(up_NF)
    return weights.act(F.linear(x_ND, weights.gate_FD, weights.gate_bias_F)) * up_NF


def hidden_moment(weights: FfnWeights, x_ND: torch.Tensor) -> torch.Tensor:
    """The second moment [F, F] of the hidden values over inputs [N, D]."""
    neurons = weights.up_FD.shape[0]
    moment_FF = torch.zeros(neurons, neurons)
    for rows in x_ND.split(ROW_CHUNK):
        h_NF = hidden(weights, rows)
        moment_FF.addmm_(h_NF.T, h_NF)
    return moment_FF.div_(x_ND.shape[0])


def exact_scores(weights: FfnWeights, x_ND: torch.Tensor, norm_F: torch.Tensor) -> torch.Tensor:
    """float32 [N, F]: |hidden value| * norm_i, the size of each neuron's contribution."""
    return torch.cat([hidden(weights, rows).abs() * norm_F for rows in x_ND.split(ROW_CHUNK)])


def soft_errors(weights: FfnWeights, x_ND: torch.Tensor, predictor: Predictor) -> torch.Tensor:
    """float16 [M]: standard deviation of each error of a predictor, on calibration rows [N, D].

    At most SAMPLE_ROWS of them are used.
    """
    sums = torch.zeros(2, predictor.bias_M.shape[0], dtype=torch.float64)
    x_ND = _sampled(x_ND)
    for rows in x_ND.split(ROW_CHUNK):
        z_NM = F.linear(rows, weights.up_FD, weights.up_bias_F)
        if weights.gate_FD is not None:
            gate_NF = F.linear(rows, weights.gate_FD, weights.gate_bias_F)
            z_NM = torch.cat([gate_NF, z_NM], dim=-1)
        error_NM = (predictor.estimate(rows) - z_NM).double()
        sums += torch.stack([error_NM.sum(0), error_NM.square().sum(0)])
    mean_M, square_M = sums / x_ND.shape[0]
    soft_M = (square_M - mean_M.square()).clamp_min(0).sqrt().nan_to_num()
    return soft_M.clamp_max(torch.finfo(torch.float16).max).half()


def down_error(down_FD: torch.Tensor, copy_FD: torch.Tensor) -> float:
    """Mean over neurons of how far the low-bit output vector is off, as a share of its length."""
    off_F = (down_FD.float() - copy_FD).norm(dim=1)
    length_F = down_FD.float().norm(dim=1)
    share_F = (off_F / length_F)[length_F > 0]
    return float(share_F.mean()) if len(share_F) else 0.0


def _sampled(x_ND: torch.Tensor) -> torch.Tensor:
    """At most SAMPLE_ROWS rows, evenly spaced."""
    return x_ND[:: math.ceil(x_ND.shape[0] / SAMPLE_ROWS)]


def levelled(
    weights: FfnWeights, x_ND: torch.Tensor, spec: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """LAYER with the level at which calibration rows [N, D] keep `num_kept` neurons on average.

    Unchanged where the number kept does not vary.
    """
    if not varies(spec):
        return spec
    predictor = Predictor(spec["predictor"], tensors, weights.up_FD.shape[1])
    norm_F = score_norms(weights, spec["score"])
    x_ND = _sampled(x_ND)
    pieces = []
    for rows in x_ND.split(ROW_CHUNK):
        unit_NS = estimated_units(weights, predictor, rows, norm_F, spec)
        standing_NS = _standings(exact_scores(weights, rows, norm_F).nan_to_num(), unit_NS, spec)
        pieces.append(standing_NS[standing_NS > -torch.inf])
    every = torch.cat(pieces).numpy()
    wanted = x_ND.shape[0] * (spec["num_kept"] - spec["num_common"]) // spec["group_size"]
    place = max(len(every) - wanted, 1)
    parted = np.partition(every, [place - 1, place])
    level = float(parted[place - 1 : place + 1].mean())  # between two, so that none lies on it
    if spec["selection"]["rule"] != "mean_std" and not spec["predictor"]["groups"]:
        level = max(level, LEAST_LEVEL)
    return {**spec, "selection": {**spec["selection"], "level": level}}


def measured(
    weights: FfnWeights, x_ND: torch.Tensor, spec: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Recall, score mass and bytes of one layer on inputs [N, D], through the runtime's code.

    `recall`: share of the true top `num_kept` among the candidates; `recall_at_kept`: the same
    among the first `num_kept` predicted (over-selection 1.0); `score_mass`: squared scores of the
    kept neurons over those of the true top. Means over rows; `bytes` per token. Where the number
    kept varies, the true top is as large as what the row keeps, recall is that of the kept, and
    `kept` tells how many those are: mean, p10, p50, p90 and max.
    """
    width = weights.up_FD.shape[1]
    predictor = Predictor(spec["predictor"], tensors, width)
    norm_F = score_norms(weights, spec["score"])
    totals = torch.zeros(3, dtype=torch.float64)
    numbers = []
    for rows in x_ND.split(ROW_CHUNK):
        score_NF = exact_scores(weights, rows, norm_F).nan_to_num()
        unit_NS = estimated_units(weights, predictor, rows, norm_F, spec)
        figures, kept_N = _selected(score_NF, unit_NS, spec)
        totals += torch.tensor(figures, dtype=torch.float64)
        numbers.append(kept_N)
    recall, at_kept, mass = (totals / x_ND.shape[0]).tolist()
    report = {"recall": recall, "recall_at_kept": at_kept, "score_mass": mass}
    if varies(spec):
        report["kept"] = distribution(torch.cat(numbers))
        spec = with_mean(spec, report["kept"]["mean"])
    matrices = 2 if weights.gate_FD is None else 3
    return {**report, "bytes": layer_bytes(spec, width, matrices, WEIGHT_BYTES)}


def with_mean(spec: dict[str, Any], mean_kept: float) -> dict[str, Any]:
    """LAYER whose selection names the mean number of neurons that were really kept."""
    return {**spec, "selection": {**spec["selection"], "mean_kept": mean_kept}}


def distribution(count_N: torch.Tensor) -> dict[str, float]:
    """Mean, tenths and largest of a number counted for each row."""
    ordered_N = count_N.sort().values
    last = len(ordered_N) - 1
    tenths = {f"p{share}": int(ordered_N[last * share // 100]) for share in (10, 50, 90)}
    mean = float(count_N.double().mean())
    return {"mean": round(mean, 3), **tenths, "max": int(ordered_N[-1])}


def _selected(
    score_NF: torch.Tensor, unit_NS: torch.Tensor, spec: dict[str, Any]
) -> tuple[tuple[float, float, float], torch.Tensor]:
    """((recall, recall at `num_kept`, score mass) summed over rows, neurons kept [N])."""
    kept = spec["num_kept"]
    member_NF = score_NF >= kth_score(score_NF, kept)
    at_kept = _hits(member_NF, _chosen(unit_NS, kept, spec), kept)
    if varies(spec):
        standing_NS = _standings(score_NF, unit_NS, spec)
        found_NF = _spread(standing_NS >= float(spec["selection"]["level"]), spec)
        member_NF = as_many_best(score_NF, found_NF)
        recall = float(shares(member_NF, found_NF).double().sum())
    else:
        candidate_NF = _chosen(unit_NS, spec["num_candidates"], spec)
        recall = _hits(member_NF, candidate_NF, kept)
        within_NF = score_NF * candidate_NF
        found_NF = candidate_NF & (within_NF >= kth_score(within_NF, kept))
    mass_N = (score_NF * member_NF).square().sum(1).clamp_min(1e-30)
    share_N = ((score_NF * found_NF).square().sum(1) / mass_N).clamp_max(1.0)
    return (recall, at_kept, float(share_N.double().sum())), found_NF.sum(1)


def as_many_best(score_NS: torch.Tensor, kept_NS: torch.Tensor) -> torch.Tensor:
    """bool [N, S]: the best of each row, as many as the row keeps (and those that tie)."""
    order_NS = score_NS.sort(dim=1, descending=True).values
    number_N1 = kept_NS.sum(1, keepdim=True)
    least_N1 = order_NS.gather(1, (number_N1 - 1).clamp_min(0))
    return (score_NS >= least_N1) & (number_N1 > 0)


def shares(best_NS: torch.Tensor, kept_NS: torch.Tensor) -> torch.Tensor:
    """float32 [N]: the share of the kept that are among the best; 1 where nothing is kept."""
    number_N = kept_NS.sum(1)
    return ((best_NS & kept_NS).sum(1) / number_N.clamp_min(1)).where(number_N > 0, 1.0)


def _standings(score_NF: torch.Tensor, unit_NS: torch.Tensor, spec: dict[str, Any]) -> torch.Tensor:
    """Standings [N, S] by the layer's rule; -inf for units that are no candidates."""
    common, group = spec["num_common"], spec["group_size"]
    open_NS = top_k_mask(unit_NS, (spec["num_candidates"] - common) // group)
    own_NS = unit_NS
    if spec["keep"] == "top_k":
        own_NS = unit_scores(score_NF[:, common:], group).where(open_NS, 0.0)
    return standings(spec["selection"]["rule"], own_NS, unit_NS).where(open_NS, -torch.inf)


def estimated_units(
    weights: FfnWeights,
    predictor: Predictor,
    x_ND: torch.Tensor,
    norm_F: torch.Tensor,
    spec: dict[str, Any],
) -> torch.Tensor:
    """Predicted scores of the selectable units for inputs [N, D], common ones left out, finite."""
    if spec["predictor"]["groups"]:
        unit_NS = predictor.estimate(x_ND)[:, spec["num_common"] // spec["group_size"] :]
    else:
        gated = weights.gate_FD is not None
        z_NM = predictor.estimate(x_ND)
        score_NF = predictor.ranked(z_NM, weights.act, spec, gated=gated) * norm_F
        if is_relative(spec):
            size_NF = predictor.values(z_NM, weights.act, gated=gated).abs() * norm_F
            score_NF = relative_scores(score_NF, size_NF)
        unit_NS = unit_scores(score_NF[:, spec["num_common"] :], spec["group_size"])
    return unit_NS.nan_to_num()


def _chosen(unit_NS: torch.Tensor, count: int, spec: dict[str, Any]) -> torch.Tensor:
    """bool [N, F]: the common neurons and the best units, `count` neurons in all."""
    units = (count - spec["num_common"]) // spec["group_size"]
    return _spread(top_k_mask(unit_NS, units), spec)


def _spread(mask_NS: torch.Tensor, spec: dict[str, Any]) -> torch.Tensor:
    """A mask of units as one of neurons, the common ones in front."""
    mask_NF = mask_NS.repeat_interleave(spec["group_size"], dim=1)
    return torch.cat([mask_NF.new_ones(mask_NF.shape[0], spec["num_common"]), mask_NF], dim=1)


def _hits(member_NF: torch.Tensor, chosen_NF: torch.Tensor, num: int) -> float:
    """Sum over rows of the recall; every member counts, more than `num` (ties) as `num`."""
    return float((member_NF & chosen_NF).sum(1).clamp(max=num).double().sum() / num)


def cheapest_first(
    recipe: PredictorRecipe, width: int, num_matrices: int, counts: dict[str, Any]
) -> list[tuple[int, PredictorRecipe]]:
    """What kind `auto` tries: (total bytes at over-selection 1, explicit recipe), ascending.

    Kinds, bits and shares of inputs vary; rank, blocks and training come from the recipe.
    """
    base = {"target_recall": None}
    options = [
        {"kind": "q", "bits": bits, "input_keep": keep, "distill": None}
        for bits, keep in itertools.product(AUTO_BITS, AUTO_INPUT_KEEP)
    ]
    options += [
        {"kind": "qlr", "bits": bits, "input_keep": keep}
        for bits, keep in itertools.product(AUTO_BITS[:2], (1.0, 0.5))
    ]
    ranks = sorted({recipe.rank, 2 * recipe.rank})
    options += [{"kind": "lr", "rank": rank} for rank in ranks if rank < width]
    explicit = [recipe.model_copy(update={**base, **option}) for option in options]
    counts = {**counts, "num_candidates": counts["num_kept"]}
    priced = []
    for option in explicit:
        spec = {**counts, "predictor": predictor_spec(option, width, num_matrices, counts)}
        priced.append((total_bytes(layer_bytes(spec, width, num_matrices, WEIGHT_BYTES)), option))
    return sorted(priced, key=lambda pair: pair[0])


def candidate_counts(counts: dict[str, Any]) -> list[int]:
    """Ascending numbers of candidates that kind `auto` tries."""
    group, kept = counts["group_size"], counts["num_kept"]
    tried = {math.ceil(over * kept / group - 1e-9) * group for over in AUTO_OVER_SELECT}
    return sorted({min(count, counts["num_neurons"]) for count in tried})


def total_bytes(read: dict[str, int]) -> int:
    """Bytes per token of a converted layer, all its parts."""
    return sum(read[part] for part in FFN_PARTS)


def round_half_up(value: float) -> int:
    """The nearest integer, halves upwards."""
    return math.floor(value + 0.5)
