"""What a row keeps of an FFN: a fixed number of neurons, or all whose score reaches a level.

Every rule turns scores into standings and keeps the candidates whose standing is at least the
layer's level, which was fitted so that `num_kept` neurons are kept on average:

    threshold    the score itself
    relative     its share of the root of the sum of squares of what the row's neurons are estimated
                 to add to the output (estimated scores alone)
    mean_std     the score's distance from the mean of the row's estimated scores, in their
                 standard deviations
    score_mass   the share of the row's squared scores in the unit and all weaker ones; the units
                 kept are the fewest that hold all but the level's share

`keep: top_k` ranks the exact scores of the candidates, `keep: candidates` the estimated scores of
all units. Shape suffixes: N rows (tokens), F neurons, C candidates, K kept, S scored units.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from .hire_predict import eager_on_cpu, select_neurons, top_k_mask, unit_scores, varies

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
LEVEL_RULES = ("threshold", "relative")  # what is kept reaches one score, or share of a row
RULES = (*LEVEL_RULES, "mean_std", "score_mass")
_TINY = 1e-30


def standings(rule: str, score_NS: torch.Tensor, estimate_NS: torch.Tensor) -> torch.Tensor:
    """Standings float32 [N, S] of scores; `estimate_NS` are the estimated scores of all units.

    Those of the rule `relative` are made so where they are estimated.
    """
    if rule in LEVEL_RULES:
        return score_NS
    if rule == "mean_std":
        mean_N1 = estimate_NS.mean(-1, keepdim=True)
        spread_N1 = estimate_NS.std(-1, correction=0, keepdim=True)
        return (score_NS - mean_N1) / spread_N1.clamp_min(_TINY)
    # Divided by the largest before squaring, and summed from the weakest up: one neuron may be
    # thousands of times as strong as the ones that the level decides about.
    largest_N1 = score_NS.amax(-1, keepdim=True).clamp_min(_TINY)
    mass_NS, order_NS = (score_NS / largest_N1).square().sort(dim=-1, stable=True)
    sum_NS = mass_NS.cumsum(-1)
    share_NS = sum_NS / sum_NS[..., -1:].clamp_min(_TINY)
    return torch.empty_like(share_NS).scatter_(-1, order_NS, share_NS)


def _reaches(
    spec: Mapping[str, Any], score_NS: torch.Tensor, estimate_NS: torch.Tensor
) -> torch.Tensor:
    selection = spec["selection"]
    return standings(selection["rule"], score_NS, estimate_NS) >= float(selection["level"])


def _neurons(unit_NS: torch.Tensor, spec: Mapping[str, Any]) -> torch.Tensor:
    """A mask of units (or of candidate units) as one of neurons, the common ones in front."""
    group, common = spec["group_size"], spec["num_common"]
    mask_NF = unit_NS.repeat_interleave(group, dim=-1) if group > 1 else unit_NS
    if common == 0:
        return mask_NF
    return torch.cat([mask_NF.new_ones(*mask_NF.shape[:-1], common), mask_NF], dim=-1)


def _best_neurons(spec: Mapping[str, Any], unit_NS: torch.Tensor, num: int) -> torch.Tensor:
    """The mask [N, F] of `num` neurons: the common ones and the best units."""
    num_units = (num - spec["num_common"]) // spec["group_size"]
    return _neurons(top_k_mask(unit_NS, num_units), spec)


def zeroed(value: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """The values with those that do not count set to zero, NaN and inf included."""
    if counts is None:
        return value
    if value.requires_grad or not eager_on_cpu(value):
        return value.where(counts, 0.0)
    # `where` takes an element at a time on CPUs; their bits times one or zero are eight times as
    # fast.
    return (value.view(_WHOLE[value.element_size()]) * counts).view(value.dtype)


def finite_rows(score_NS: torch.Tensor) -> torch.Tensor:
    """bool [N]: the rows without NaN or inf."""
    return score_NS.abs().amax(-1) < torch.inf


# --------------------------------------------------------------------------- many rows, masks


def candidate_mask(spec: Mapping[str, Any], unit_NS: torch.Tensor) -> torch.Tensor:
    """The mask [N, F] of the neurons to be computed exactly, from estimated unit scores."""
    mask_NF = _best_neurons(spec, unit_NS, spec["num_candidates"])
    if varies(spec) and spec["keep"] == "candidates":
        mask_NF = mask_NF & _neurons(_reaches(spec, unit_NS, unit_NS), spec)
    return mask_NF


def kept_mask(
    spec: Mapping[str, Any],
    candidate_NF: torch.Tensor,
    unit_NS: torch.Tensor,
    score_NF: torch.Tensor,
) -> torch.Tensor:
    """The mask [N, F] of active neurons among the candidates, from exact neuron scores."""
    as_many = spec["num_kept"] == spec["num_candidates"] and not varies(spec)
    if spec["keep"] == "candidates" or as_many:
        return candidate_NF
    group, common = spec["group_size"], spec["num_common"]
    # Members of a group are candidates together, so the first one speaks for the group.
    inside_NS = candidate_NF[:, common:].unflatten(-1, (-1, group))[..., 0]
    exact_NS = unit_scores(score_NF[:, common:], group)
    if varies(spec):
        inside_NS = inside_NS & _reaches(spec, exact_NS.where(inside_NS, 0.0), unit_NS)
        return _neurons(inside_NS, spec)
    return _best_neurons(spec, exact_NS.where(inside_NS, -1.0), spec["num_kept"])


# --------------------------------------------------------------------------- one row, indices


def row_candidates(
    spec: Mapping[str, Any], unit_1S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ascending neuron indices [C] to compute exactly, mask [C] of those that count, or None).

    A graph needs a fixed size: there all `num_candidates` come back and the mask says which count.
    """
    group, common = spec["group_size"], spec["num_common"]
    index_C = select_neurons(unit_1S, spec["num_candidates"], group, common)[0]
    if not varies(spec) or spec["keep"] == "top_k":
        return index_C, None
    counts_C = _neurons(_reaches(spec, unit_1S, unit_1S), spec)[0, index_C]
    return (index_C, counts_C) if torch.compiler.is_compiling() else (index_C[counts_C], None)


def row_kept(
    spec: Mapping[str, Any], unit_1S: torch.Tensor, score_1C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ascending positions [K] among the candidates, mask [K] of those that count, or None)."""
    group, common = spec["group_size"], spec["num_common"]
    exact_1S = unit_scores(score_1C[:, common:], group)
    if not varies(spec):
        return select_neurons(exact_1S, spec["num_kept"], group, common)[0], None
    counts_C = _neurons(_reaches(spec, exact_1S, unit_1S), spec)[0]
    place_C = torch.arange(score_1C.shape[1], device=score_1C.device)
    return (place_C, counts_C) if torch.compiler.is_compiling() else (place_C[counts_C], None)


def replaced(
    value_1F: torch.Tensor,
    index_C: torch.Tensor,
    new_1C: torch.Tensor,
    counts_C: torch.Tensor | None,
) -> torch.Tensor:
    """The values with new ones at the indices that count."""
    if counts_C is not None:
        new_1C = new_1C.where(counts_C, value_1F[:, index_C])
    return value_1F.index_copy(1, index_C, new_1C)


def number_of(index_C: torch.Tensor, counts_C: torch.Tensor | None) -> Any:
    """How many neurons count: all of them, or those of the mask."""
    return index_C.shape[0] if counts_C is None else counts_C.sum()


def linear_rows(
    x_1D: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None, index_C: torch.Tensor
) -> torch.Tensor:
    """Products of the input with the chosen rows, [1, C]."""
    bias_C = None if bias_F is None else bias_F[index_C]
    return F.linear(x_1D, weight_FD.index_select(0, index_C), bias_C)
