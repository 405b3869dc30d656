"""Levels of score for any number of neurons kept on average, from counts over calibration rows.

Shape suffixes: N rows, F neurons, B bins.
"""

from functools import cache

import torch

_DROPPED = 15  # low bits of a score that its bin leaves open: bins are 0.4 % of it wide
_BINS = 2 ** (31 - _DROPPED)
LEAST_LEVEL = 1e-30  # a neuron of score 0 (ReLU has many) adds nothing and need not be kept


class ScoreLevels:
    """How often scores of each layer fall into fine bins, which grow with the scores' size."""

    def __init__(self, num_layers: int) -> None:
        self._counts = [torch.zeros(_BINS, dtype=torch.int64) for _ in range(num_layers)]
        self._weights = [torch.zeros(_BINS, dtype=torch.float64) for _ in range(num_layers)]
        self._rows = [0] * num_layers
        self.of = cache(self._of)

    def note(
        self, index: int, score_NF: torch.Tensor, weight_NF: torch.Tensor | None = None
    ) -> None:
        """Count scores of one layer: float32, none negative or NaN; with weights, float64."""
        # Bits of such floats order as the floats do; what has a sign is taken for zero.
        bin_M = (score_NF.contiguous().view(torch.int32) >> _DROPPED).clamp_min(0).flatten()
        self._counts[index] += bin_M.bincount(minlength=_BINS).cpu()
        if weight_NF is not None:
            self._weights[index] += bin_M.bincount(weight_NF.flatten(), minlength=_BINS).cpu()
        self._rows[index] += len(score_NF)

    def below(self, index: int, num_kept: int) -> float:
        """The weights a row of the scores that do not reach the level of `num_kept`."""
        bin_, share = self._place(index, num_kept)
        if bin_ < 0:
            return 0.0
        weights_B = self._weights[index]
        return float(weights_B[:bin_].sum() + share * weights_B[bin_]) / self._rows[index]

    def _of(self, index: int, num_kept: int) -> float:
        """The score that `num_kept` neurons of a layer reach on the mean of the rows noted."""
        bin_, share = self._place(index, num_kept)
        if bin_ < 0:
            return LEAST_LEVEL
        edges = (torch.tensor([bin_, bin_ + 1], dtype=torch.int32) << _DROPPED).view(torch.float32)
        low, high = edges.tolist()
        return max(low + (high - low) * share, LEAST_LEVEL)

    def _place(self, index: int, num_kept: int) -> tuple[int, float]:
        """The bin in which the level lies and the share of it that lies below; -1: below all."""
        counts_B, wanted = self._counts[index], num_kept * self._rows[index]
        reaching_B = counts_B.flip(0).cumsum(0).flip(0)
        bin_ = int((reaching_B >= wanted).sum()) - 1  # the last that so many reach
        if bin_ < 0:
            return bin_, 0.0
        return bin_, float(reaching_B[bin_] - wanted) / max(int(counts_B[bin_]), 1)
