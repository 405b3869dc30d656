"""Linear algebra and training behind the predictors: moments, low rank, loud inputs, order.

Shape suffixes: N rows (tokens), D width, F neurons, M predictor outputs, R rank, B rows of a batch.
Nothing here knows a recipe or a tensor format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

RIDGE = 1e-3
SHARPNESS_RATE = 0.02
CLUSTER_CANDIDATE_FLOOR = 1e-2
Loss = Literal["bce", "regression", "listwise"]


@dataclass(frozen=True)
class Moments:
    """Second moments of the centred inputs x and of their loud part m (zero elsewhere).

    `full_DD` = E[x x'], `cross_DD` = E[x m'], `loud_DD` = E[m m'], `loud_mean_D` = E[m]. All
    float64; with every channel read the three are one.
    """

    mean_D: torch.Tensor
    rest_D: torch.Tensor  # E[x]: zero when centred
    full_DD: torch.Tensor
    cross_DD: torch.Tensor
    loud_DD: torch.Tensor
    loud_mean_D: torch.Tensor


def loud_part(x_ND: torch.Tensor, loudness_D: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """x [N, D] with all but the `num_inputs` largest |x_j| * loudness_j of each row set to zero."""
    if num_inputs >= x_ND.shape[1]:
        return x_ND
    amount_ND = (x_ND * loudness_D).abs()
    place = x_ND.shape[1] - num_inputs  # torch.topk takes ten times as long
    kth_N = np.partition(amount_ND.numpy(), place, axis=1)[:, place]
    return x_ND * (amount_ND >= torch.from_numpy(kth_N).unsqueeze(1))


def input_moments(
    inputs_ND: torch.Tensor, loudness_D: torch.Tensor, num_inputs: int, *, centre: bool
) -> Moments:
    """The moments of calibration inputs [N, D] read through their loudest channels."""
    mean_D = inputs_ND.mean(0) if centre else torch.zeros(inputs_ND.shape[1])
    x_ND = inputs_ND - mean_D
    rows = x_ND.shape[0]
    full_DD = (x_ND.T @ x_ND).double() / rows
    rest_D = x_ND.double().mean(0)
    if num_inputs >= x_ND.shape[1]:
        return Moments(mean_D, rest_D, full_DD, full_DD, full_DD, rest_D)
    m_ND = loud_part(x_ND, loudness_D, num_inputs)
    cross_DD = (x_ND.T @ m_ND).double() / rows
    loud_DD = (m_ND.T @ m_ND).double() / rows
    return Moments(mean_D, rest_D, full_DD, cross_DD, loud_DD, m_ND.double().mean(0))


def ridged(moment_DD: torch.Tensor, share: float = RIDGE) -> torch.Tensor:
    """A definite matrix: the moment plus `share` of its mean diagonal."""
    ridge = max(float(moment_DD.diagonal().mean()) * share, 1e-12)
    return moment_DD + ridge * torch.eye(moment_DD.shape[0], dtype=moment_DD.dtype)


def regressed_on_loud(weight_MD: torch.Tensor, moments: Moments) -> torch.Tensor:
    """The matrix [M, D] whose product with the loud part is nearest to W x in least squares."""
    if moments.loud_DD is moments.full_DD:
        return weight_MD
    # E[x m'] E[m m']^-1, the ridge pulling towards the plain matrix and not towards zero.
    gain_DD = torch.linalg.solve(
        ridged(moments.loud_DD, 1e-2), (moments.cross_DD - moments.loud_DD).T
    ).T
    return weight_MD + (weight_MD.double() @ gain_DD).float()


def residual_coefficients(
    weight_MD: torch.Tensor, copy_MD: torch.Tensor | None, moments: Moments
) -> torch.Tensor:
    """The matrix [M, D] on x that best explains W x - copy m; W itself without a copy."""
    if copy_MD is None:
        return weight_MD
    if moments.loud_DD is moments.full_DD:
        return weight_MD - copy_MD
    read_DD = torch.linalg.solve(ridged(moments.full_DD), moments.cross_DD).T
    return weight_MD - (copy_MD.double() @ read_DD).float()


def low_rank(
    matrix_MD: torch.Tensor, second_moment_DD: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (in [R, D], out [M, R]) of least E||(matrix - out in) x||^2.

    The singular value decomposition of the matrix times the root of the second moment: directions
    in which inputs vary count more. The rows of `factor_in` give outputs of unit variance.
    """
    values, vectors = torch.linalg.eigh(ridged(second_moment_DD.double()))
    values = values.clamp_min(1e-18)
    root_DD = (vectors * values.sqrt()) @ vectors.T
    inverse_DD = (vectors / values.sqrt()) @ vectors.T
    weighted_MD = matrix_MD.double() @ root_DD
    _, directions = torch.linalg.eigh(weighted_MD.T @ weighted_MD)
    top_DR = directions[:, -rank:].flip(1)
    return (top_DR.T @ inverse_DD).float(), (weighted_MD @ top_DR).float()


def least_squares(
    inputs_ND: torch.Tensor, targets_NM: torch.Tensor, mean_D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix [M, D], constant [M]) of the ridge regression of targets on centred inputs."""
    x_ND = inputs_ND - mean_D
    offset_D, constant_M = x_ND.mean(0), targets_NM.mean(0)
    x_ND = x_ND - offset_D
    moment_DD = (x_ND.T @ x_ND).double()
    product_DM = (x_ND.T @ (targets_NM - constant_M)).double()
    matrix_MD = torch.linalg.solve(ridged(moment_DD, 1e-2), product_DM).T.float()
    return matrix_MD, constant_M - matrix_MD @ offset_D


def grouped_order(scores_NF: torch.Tensor, group_size: int) -> torch.Tensor:
    """int64 [F]: an order in which neurons active together lie in the same group.

    Greedy: the first open neuron founds a group and draws in, one at a time, the open neuron
    whose log scores correlate most with those already in it. F must be a multiple of the size.
    """
    level = scores_NF.median().clamp_min(1e-20) * CLUSTER_CANDIDATE_FLOOR
    logs_NF = (scores_NF + level).log()
    logs_NF = logs_NF - logs_NF.mean(0)
    logs_NF /= logs_NF.norm(dim=0).clamp_min(1e-12)
    likeness_FF = logs_NF.T @ logs_NF
    open_F = torch.ones(scores_NF.shape[1], dtype=torch.bool)
    order: list[int] = []
    for _ in range(scores_NF.shape[1] // group_size):
        chosen = int(open_F.nonzero()[0, 0])
        affinity_F = torch.zeros_like(likeness_FF[0])
        for _ in range(group_size):
            order.append(chosen)
            open_F[chosen] = False
            affinity_F = affinity_F + likeness_FF[chosen]
            chosen = int(affinity_F.masked_fill(~open_F, -torch.inf).argmax())
    return torch.tensor(order, dtype=torch.int64)


@dataclass(frozen=True)
class Batch:
    """Some calibration rows: centred inputs, what a copy already contributes (or zero), true log
    scores of the units, and the k-th of each row."""

    x_BD: torch.Tensor
    base_BM: torch.Tensor
    truth_BS: torch.Tensor
    threshold_B1: torch.Tensor


@dataclass(frozen=True)
class Training:
    """What the training of factors needs to know besides the data."""

    loss: Loss
    steps: int
    batch_rows: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Trained:
    """The best factors met in training, and what was measured on the way."""

    factor_in_RD: torch.Tensor
    factor_out_MR: torch.Tensor
    bias_M: torch.Tensor
    held_recall: list[float]
    losses: list[float]


def ranking_loss(
    loss: Loss,
    estimate_BS: torch.Tensor,
    truth_BS: torch.Tensor,
    threshold_B1: torch.Tensor,
    sharpness: torch.Tensor,
) -> torch.Tensor:
    """The loss of estimated log scores [B, S] against true ones and each row's true threshold.

    `bce` membership of the true top set, `listwise` cross-entropy of the softmaxes of estimated
    and true log scores, `regression` squared error of the log scores. `sharpness` (an exponent
    and an offset, trained along) says how far estimates can be trusted.
    """
    if loss == "regression":
        return (estimate_BS - truth_BS).square().mean()
    estimate_BS = estimate_BS * sharpness[0].exp()
    if loss == "listwise":
        return -(truth_BS.softmax(1) * F.log_softmax(estimate_BS, dim=1)).sum(1).mean()
    logits_BS = estimate_BS - threshold_B1 * sharpness[0].exp() + sharpness[1]
    return F.binary_cross_entropy_with_logits(logits_BS, (truth_BS >= threshold_B1).float())


def train_factors(
    start: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    batch: Callable[[torch.Tensor], Batch],
    log_scores: Callable[[torch.Tensor], torch.Tensor],
    *,
    num_rows: int,
    held_recall: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float],
    training: Training,
) -> Trained:
    """Factors trained on rows of the calibration inputs, the best on held-out rows kept.

    `start` is (factor_in, factor_out, bias); `batch(rows)` gives the data of some rows,
    `log_scores` turns outputs [B, M] into log scores. The start itself is a contender, so training
    never returns anything worse on the held-out rows.
    """
    generator = torch.Generator().manual_seed(training.seed)
    parameters = [tensor.clone().requires_grad_(True) for tensor in start]
    sharpness = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam(
        [
            {"params": parameters, "lr": training.learning_rate},
            {"params": [sharpness], "lr": SHARPNESS_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(training.steps, 1))
    best = [tensor.detach().clone() for tensor in parameters]
    recalls, losses = [held_recall(*best)], []
    every = max(training.steps // 8, 1)
    for step in range(training.steps):
        rows = torch.randint(num_rows, (min(training.batch_rows, num_rows),), generator=generator)
        data = batch(rows)
        factor_in, factor_out, bias = parameters
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            z_BM = data.base_BM + F.linear(F.linear(data.x_BD, factor_in), factor_out) + bias
            loss = ranking_loss(
                training.loss, log_scores(z_BM), data.truth_BS, data.threshold_B1, sharpness
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0:
            now = [tensor.detach().clone() for tensor in parameters]
            losses.append(float(loss.detach()))
            recalls.append(held_recall(*now))
            if recalls[-1] >= max(recalls):
                best = now
    return Trained(best[0], best[1], best[2], recalls, losses)
