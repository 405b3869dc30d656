"""One layer's predictor: order of the neurons, estimate, training, what it recalls and costs.

Shape suffixes: N rows (tokens), D width, F neurons, M predictor outputs (gate rows then up rows,
up rows alone, or one row a group), R rank, S selectable units (neurons or groups).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hireconvert.errors import InputError
from hireconvert.families import FfnWeights, permuted
from hireconvert.fitting import (
    Batch,
    Moments,
    Training,
    grouped_order,
    input_moments,
    least_squares,
    low_rank,
    regressed_on_loud,
    residual_coefficients,
    train_factors,
)
from hireconvert.quantize import (
    GridFormat,
    column_scales,
    decode_codes,
    encode_down,
    encode_factor,
    encode_matrix,
    fitted_codes,
)
from hireconvert.recipe import FfnRecipe, PredictorRecipe
from hireconvert.rounding import low_scales
from hireconvert.runtime.hire_predict import (
    Predictor,
    decode_down,
    is_copied,
    kth_score,
    varies,
)
from hireconvert.scoring import (
    ROW_CHUNK,
    candidate_counts,
    cheapest_first,
    down_error,
    exact_scores,
    hidden,
    hidden_moment,
    layer_counts,
    levelled,
    measured,
    predictor_spec,
    score_norms,
    soft_errors,
    total_bytes,
    with_candidates,
    with_mean,
)


@dataclass(frozen=True)
class LayerResult:
    """What the export needs of one layer, and what was measured while it was made.

    `spec` is LAYER of docs/design.md; `tensors` carry no `layers.{i}.` prefix; `permutation_F`
    (int64, or None) lists old neuron numbers in their new order.
    """

    spec: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    permutation_F: torch.Tensor | None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """One layer with its neurons already in their final order."""

    weights: FfnWeights
    fit_ND: torch.Tensor
    held_ND: torch.Tensor
    norm_F: torch.Tensor  # ones where the recipe scores without the norm of the output vector
    counts: dict[str, Any]  # LAYER without its predictor
    seed: int

    @property
    def width(self) -> int:
        return self.weights.up_FD.shape[1]

    @property
    def num_matrices(self) -> int:
        return 2 if self.weights.gate_FD is None else 3


@torch.no_grad()
def final_order(
    weights: FfnWeights, fit_ND: torch.Tensor, recipe: FfnRecipe, keep_fraction: float
) -> torch.Tensor | None:
    """Old neuron numbers (int64 [F]) in the order that the recipe needs; None where any will do.

    `fit_ND` are float32 inputs of the FFN. Raises what `distill_layer` raises.
    """
    counts = layer_counts(weights.up_FD.shape[0], recipe, keep_fraction)
    if counts["group_size"] == 1 and counts["num_common"] == 0:
        return None
    fit_ND = _finite_rows(fit_ND, "calibration")
    return neuron_order(exact_scores(weights, fit_ND, score_norms(weights, recipe.score)), counts)


@torch.no_grad()
def distill_layer(
    weights: FfnWeights,
    fit_ND: torch.Tensor,
    held_ND: torch.Tensor,
    recipe: FfnRecipe,
    predictor: PredictorRecipe,
    keep_fraction: float,
    *,
    seed: int,
    ordered: bool = False,
) -> LayerResult:
    """The predictor of one FFN, fitted on calibration inputs and judged on held-out ones.

    `fit_ND` and `held_ND` are float32 inputs of the FFN [rows, D]; rows that are not finite are
    left out; `ordered` says that the neurons lie in their final order already. Deterministic for a
    seed and a thread count. Raises InputError when no finite rows remain, UsageError when counts of
    the recipe do not fit the number of neurons.
    """
    fit_ND, held_ND = _finite_rows(fit_ND, "calibration"), _finite_rows(held_ND, "held-out")
    counts = layer_counts(weights.up_FD.shape[0], recipe, keep_fraction)
    norm_F = score_norms(weights, counts["score"])
    if is_copied(counts):  # nothing could add the product with a mean
        predictor = predictor.model_copy(update={"centre": False})
    permutation_F = None if ordered else final_order(weights, fit_ND, recipe, keep_fraction)
    if permutation_F is not None:
        weights, norm_F = permuted(weights, permutation_F), norm_F[permutation_F]
    down: dict[str, torch.Tensor] = {}
    if recipe.unselected is not None:
        form = GridFormat.of(recipe.unselected)
        moment_FF = hidden_moment(weights, fit_ND) if is_copied(counts) else None
        down = encode_down(weights.down_FD, form, moment_FF)
        if counts["score"] == "error":
            copy_FD = decode_down(down, counts["unselected"], weights.down_FD.shape[1])
            counts["unselected"]["error"] = down_error(weights.down_FD, copy_FD)
    job = _Job(weights, fit_ND, held_ND, norm_F, counts, seed)
    if predictor.kind == "auto":
        spec, tensors, report = _cheapest(job, predictor)
    else:
        spec, tensors, report = _fitted(job, predictor)
    tensors |= down
    tensors |= low_scales(weights, spec, tensors)
    return LayerResult(spec, tensors, permutation_F, report)


def neuron_order(scores_NF: torch.Tensor, counts: dict[str, Any]) -> torch.Tensor:
    """int64 [F]: the most often active neurons first, then the rest in co-active groups."""
    kth_N1 = kth_score(scores_NF, counts["num_kept"])
    activity_F = (scores_NF >= kth_N1).sum(0)
    by_activity = torch.argsort(activity_F, descending=True, stable=True)
    common = by_activity[: counts["num_common"]].sort().values
    rest = by_activity[counts["num_common"] :].sort().values
    if counts["group_size"] > 1:
        rest = rest[grouped_order(scores_NF[:, rest], counts["group_size"])]
    return torch.cat([common, rest])


# --------------------------------------------------------------------------- one predictor


def _fitted(
    job: _Job, recipe: PredictorRecipe
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """(LAYER, tensors, report) of one explicit predictor recipe."""
    kind_spec, tensors, losses = _fit(job, recipe)
    spec, report = _judged(job, job.counts, kind_spec, tensors)
    return spec, tensors, {**report, **losses}


def _judged(
    job: _Job, counts: dict[str, Any], kind_spec: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(LAYER, report): the level of a selection that varies is fitted, then all is measured."""
    spec = levelled(job.weights, job.fit_ND, {**counts, "predictor": kind_spec}, tensors)
    report = measured(job.weights, job.held_ND, spec, tensors)
    return with_mean(spec, report["kept"]["mean"]) if varies(spec) else spec, report


def _fit(
    job: _Job, recipe: PredictorRecipe
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """(PREDICTOR, tensors, losses): copy, low-rank part and bias, trained when asked for."""
    mean_D = job.fit_ND.mean(0) if recipe.centre else torch.zeros(job.width)
    target_MD, constant_M = _target(job, recipe, mean_D)
    spec = predictor_spec(recipe, job.width, job.num_matrices, job.counts)
    tensors, moments, copy_MD, factors = _linear_parts(job, recipe, spec, target_MD)
    bias_M = constant_M + (target_MD.double() @ moments.rest_D).float()
    if copy_MD is not None:
        bias_M = bias_M - (copy_MD.double() @ moments.loud_mean_D).float()
    if factors is not None:
        bias_M = bias_M - factors[1] @ (factors[0] @ moments.rest_D.float())
    if is_copied(job.counts):  # the layer's own, to which nothing can be added
        bias_M = constant_M
    losses: dict[str, Any] = {}
    if factors is not None and recipe.distill is not None:
        factors, bias_M, losses = _trained(job, recipe, spec, tensors, (*factors, bias_M))
    if factors is not None:
        for name, factor in zip(("factor_in", "factor_out"), factors, strict=True):
            tensors |= encode_factor(factor, recipe.factor_bits, name)
    tensors = {**tensors, "mean": mean_D, "bias": bias_M.contiguous()}
    if spec.get("soften"):
        hard = Predictor({**spec, "soften": False}, tensors, job.width)
        tensors["soft"] = soft_errors(job.weights, job.fit_ND, hard)
    return spec, tensors, losses


def _target(
    job: _Job, recipe: PredictorRecipe, mean_D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix [M, D], constant [M]) that the predictor approximates on centred inputs."""
    weights = job.weights
    if recipe.group_scores:
        floor = _score_floor(job)
        logs = [
            _log_units(job, hidden(job.weights, rows), floor, first=0)
            for rows in job.fit_ND.split(ROW_CHUNK)
        ]
        return least_squares(job.fit_ND, torch.cat(logs), mean_D)
    parts = [(weights.gate_FD, weights.gate_bias_F), (weights.up_FD, weights.up_bias_F)]
    present = [(matrix, bias) for matrix, bias in parts if matrix is not None]
    matrix_MD = torch.cat([matrix for matrix, _ in present])
    biases = [torch.zeros(matrix.shape[0]) if bias is None else bias for matrix, bias in present]
    return matrix_MD, torch.cat(biases) + matrix_MD @ mean_D


def _linear_parts(
    job: _Job, recipe: PredictorRecipe, spec: dict[str, Any], target_MD: torch.Tensor
) -> tuple[
    dict[str, torch.Tensor],
    Moments,
    torch.Tensor | None,
    tuple[torch.Tensor, torch.Tensor] | None,
]:
    """Copy tensors, moments, the decoded copy on plain inputs, and the factors' start.

    With both parts the factors first take what low rank explains, the copy holds the rest, and
    the factors are fitted again to what rounding (and the quiet inputs) left.
    """
    loudness_D = target_MD.norm(dim=0)
    tensors: dict[str, torch.Tensor] = {}
    copy_MD, factors = None, None
    moments = input_moments(job.fit_ND, loudness_D, spec["num_inputs"], centre=recipe.centre)
    if recipe.kind in ("lr", "qlr"):
        factors = low_rank(target_MD, moments.full_DD, spec["rank"])
    if recipe.kind == "lr":
        return tensors, moments, copy_MD, factors
    rounds = 2 if spec["num_inputs"] < job.width else 1
    for _ in range(rounds):  # the loud channels are chosen by the copy's own norms
        open_MD = target_MD if factors is None else target_MD - factors[1] @ factors[0]
        tensors, copy_MD = _copy(regressed_on_loud(open_MD, moments), moments, recipe, spec)
        if rounds > 1:
            moments = input_moments(
                job.fit_ND, copy_MD.norm(dim=0), spec["num_inputs"], centre=recipe.centre
            )
        if factors is not None:
            residual_MD = residual_coefficients(target_MD, copy_MD, moments)
            factors = low_rank(residual_MD, moments.full_DD, spec["rank"])
    return tensors, moments, copy_MD, factors


def _copy(
    matrix_MD: torch.Tensor, moments: Moments, recipe: PredictorRecipe, spec: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors, float32 [M, D] copy of the matrix as plain inputs see it)."""
    channel_major = spec["num_inputs"] < matrix_MD.shape[1]
    form = GridFormat.of(recipe, channel_major=channel_major)
    # Channel-major every channel has its own scales.
    scale_D = torch.ones(matrix_MD.shape[1])
    if recipe.column_scale and not channel_major:
        scale_D = column_scales(matrix_MD, moments.loud_DD)
    codes, grid = fitted_codes(matrix_MD, form, moments.loud_DD, scale_D)
    tensors = {**encode_matrix(codes, grid), "column_scale": scale_D}
    return tensors, decode_codes(codes, grid) / scale_D


# --------------------------------------------------------------------------- training of factors


def _trained(
    job: _Job,
    recipe: PredictorRecipe,
    spec: dict[str, Any],
    copy_tensors: dict[str, torch.Tensor],
    start: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """(factors, bias, report) after training; the copy stays as it is."""
    assert recipe.distill is not None
    mean_D = job.fit_ND.mean(0) if recipe.centre else torch.zeros(job.width)
    hard_spec = {**spec, "soften": False}  # errors are taken, and levels fitted, after training
    base = None
    if copy_tensors:
        zeros = torch.zeros_like(start[2])
        base = Predictor(
            {**hard_spec, "kind": "q"}, {**copy_tensors, "mean": mean_D, "bias": zeros}, job.width
        )
    floor, common = _score_floor(job), job.counts["num_common"]

    def batch(rows: torch.Tensor) -> Batch:
        x_BD = job.fit_ND[rows]
        base_BM = torch.zeros(()) if base is None else base.estimate(x_BD)
        truth_BS = _log_units(job, hidden(job.weights, x_BD), floor, first=common)
        num = (job.counts["num_kept"] - common) // job.counts["group_size"]
        return Batch(x_BD - mean_D, base_BM, truth_BS, kth_score(truth_BS, num))

    def log_scores(z_BM: torch.Tensor) -> torch.Tensor:
        if spec["groups"]:
            return z_BM[:, common // job.counts["group_size"] :]
        value_BF = Predictor.values(z_BM, job.weights.act, gated=job.weights.gate_FD is not None)
        return _log_units(job, value_BF, floor, first=common)

    held_spec = {**job.counts, "predictor": hard_spec, "selection": None}

    def held_recall(factor_in: torch.Tensor, factor_out: torch.Tensor, bias: torch.Tensor) -> float:
        tensors = {**copy_tensors, "mean": mean_D, "bias": bias}
        for name, factor in (("factor_in", factor_in), ("factor_out", factor_out)):
            tensors |= encode_factor(factor, recipe.factor_bits, name)
        report = measured(job.weights, job.held_ND, held_spec, tensors)
        return float(report["recall"])

    training = Training(**recipe.distill.model_dump(), seed=job.seed)
    rows = job.fit_ND.shape[0]
    result = train_factors(
        start, batch, log_scores, num_rows=rows, held_recall=held_recall, training=training
    )
    report = {"distill_losses": result.losses, "distill_recalls": result.held_recall}
    return (result.factor_in_RD, result.factor_out_MR), result.bias_M, report


def _score_floor(job: _Job) -> float:
    """A tenth of the typical threshold: below it a log score says nothing about the top set."""
    rows = job.fit_ND[: ROW_CHUNK // 2]
    scores_NF = exact_scores(job.weights, rows, job.norm_F)
    kth_N1 = kth_score(scores_NF, job.counts["num_kept"])
    return max(float(kth_N1.median()) / 10, 1e-20)


def _log_units(job: _Job, hidden_NF: torch.Tensor, floor: float, *, first: int) -> torch.Tensor:
    """Log scores of the units from neuron `first` on, flat below the floor, [N, S]."""
    squared_NF = (hidden_NF * job.norm_F).square()[:, first:]
    group = job.counts["group_size"]
    if group > 1:
        squared_NF = squared_NF.unflatten(-1, (-1, group)).sum(-1)
    return 0.5 * (squared_NF + floor * floor).log()


# --------------------------------------------------------------------------- the cheapest kind


def _cheapest(
    job: _Job, recipe: PredictorRecipe
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """The candidate of fewest total bytes that reaches `target_recall` on the held-out rows.

    Predictors are tried from the cheapest on, each at every over-selection; those that could not
    win even with over-selection 1 are never fitted. When none reaches the target, the one with
    the highest recall is taken and `target_reached` is false.
    """
    assert recipe.target_recall is not None
    best: tuple[tuple[bool, float], Any] | None = None
    tried = 0
    for floor_bytes, option in cheapest_first(recipe, job.width, job.num_matrices, job.counts):
        if best is not None and best[0][0] and floor_bytes >= -best[0][1]:
            break
        kind_spec, tensors, losses = _fit(job, option)
        tried += 1
        for candidates in candidate_counts(job.counts):
            counts = with_candidates(job.counts, candidates)
            spec, report = _judged(job, counts, kind_spec, tensors)
            reached = report["recall"] >= recipe.target_recall
            rank = (reached, -total_bytes(report["bytes"]) if reached else report["recall"])
            if best is None or rank > best[0]:
                best = rank, (spec, tensors, {**report, **losses})
            if reached:
                break
    assert best is not None  # there is always something to try
    spec, tensors, report = best[1]
    return spec, tensors, {**report, "target_reached": best[0][0], "tried": tried}


def _finite_rows(x_ND: torch.Tensor, name: str) -> torch.Tensor:
    rows = x_ND[torch.isfinite(x_ND).all(dim=1)].float()
    if rows.shape[0] == 0:
        raise InputError(
            f"no finite {name} row of FFN inputs remains; the model's activations overflow"
        )
    return rows
