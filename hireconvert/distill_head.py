"""Stage: for a low-rank head, the subspace that its hidden states live in.

Shape suffixes: N rows, D width, V vocabulary, R rank, C candidates.
"""

from typing import Any

import torch

from hireconvert.schema import HeadRecipe

_RIDGE = 1e-4
_CHUNK_ROWS = 128


def distill_head(
    weight_VD: torch.Tensor, fit_ND: torch.Tensor, held_ND: torch.Tensor, recipe: HeadRecipe
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a low-rank head and what they reach on held-out hidden states.

    With second moment S = L L^T of the hidden states and the leading right singular vectors U of
    W L, A = U^T L^-1 and M = L U minimise E||W x - (W M)(A x)||^2. A certificate needs the part of
    x outside the rows of A to be small, not the expected error, so there M = A^+ (orthogonal
    projection). The report holds recall of the arg-max at `num_candidates`.
    """
    x_ND = fit_ND.double()
    moment_DD = x_ND.t() @ x_ND / x_ND.shape[0]
    moment_DD += _RIDGE * moment_DD.diagonal().mean() * torch.eye(moment_DD.shape[0])
    lower_DD = torch.linalg.cholesky(moment_DD)
    gram_DD = torch.zeros_like(moment_DD)
    for rows in weight_VD.split(65536):
        gram_DD += rows.double().t() @ rows.double()
    inner_DD = lower_DD.t() @ gram_DD @ lower_DD
    vectors_DR = torch.linalg.eigh(inner_DD).eigenvectors.flip(-1)[:, : recipe.rank]
    factor_RD = torch.linalg.solve_triangular(lower_DD.t(), vectors_DR, upper=True).t()
    lift_DR = torch.linalg.pinv(factor_RD) if recipe.certified else lower_DD @ vectors_DR
    tensors = {
        "head.factor_in": factor_RD.float().contiguous(),
        "head.lift": lift_DR.float().contiguous(),
    }
    return tensors, {"argmax_recall": _argmax_recall(weight_VD, held_ND, tensors, recipe)}


def _argmax_recall(
    weight_VD: torch.Tensor,
    held_ND: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    recipe: HeadRecipe,
) -> float:
    """Share of held-out states whose exact arg-max is among the predicted candidates."""
    weight_VD = weight_VD.float()
    factor_VR = weight_VD @ tensors["head.lift"]
    hits = 0
    for x_ND in held_ND.float().split(_CHUNK_ROWS):
        best_N1 = (x_ND @ weight_VD.t()).argmax(-1, keepdim=True)
        estimate_NV = x_ND @ tensors["head.factor_in"].t() @ factor_VR.t()
        better_N = (estimate_NV > estimate_NV.gather(1, best_N1)).sum(-1)
        hits += int((better_N < recipe.num_candidates).sum())
    return hits / max(1, held_ND.shape[0])
