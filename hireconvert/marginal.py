"""First-order effects of the neurons on either side of what a layer keeps.

Shape suffixes: N rows (tokens), F neurons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pass:
    """One layer in one pass: hidden values of all neurons, and what of them goes into the output.

    `order_NF` is what those kept are the best by, `named_NF` what candidates are. By estimate:
    `value_NF` are the estimated values, `rest_NF` those of the neurons left out (exact where they
    were candidates), which count through the copy of the output vectors.
    """

    h_NF: torch.Tensor
    kept_NF: torch.Tensor
    order_NF: torch.Tensor
    named_NF: torch.Tensor
    value_NF: torch.Tensor | None = None
    rest_NF: torch.Tensor | None = None


class Marginal:
    """Sums over tokens of what the last `step` neurons of each layer save, from gradients.

    `num_candidates` tells how many neurons of a layer are computed exactly where so many are
    active; `chosen` is the mask of so many of a layer's by their scores.
    """

    def __init__(
        self,
        num_candidates: Callable[[int, int], int],
        chosen: Callable[[int, torch.Tensor, int], torch.Tensor],
        active: Sequence[int],
        step: Sequence[int],
    ) -> None:
        self._num_candidates, self._chosen = num_candidates, chosen
        self._active, self._step = active, step
        self._seen: dict[int, Pass] = {}
        self.saved = [0.0] * len(active)

    def note(self, index: int, made: Pass) -> None:
        """Ask for the gradients of one layer in the pass now running."""
        for given_NF in (made.kept_NF, made.rest_NF):
            if given_NF is not None:
                if not given_NF.requires_grad:  # the first layer: nothing before it needs one
                    given_NF.requires_grad_()
                given_NF.retain_grad()
        self._seen[index] = made

    @torch.no_grad()
    def gather(self) -> None:
        """Add the effects of the pass whose gradients were just taken.

        A neuron that is taken in counts by its own output vector instead of the copy; one that
        becomes a candidate counts by its exact value instead of the estimate.
        """
        for index, made in self._seen.items():
            gain_NF = made.kept_NF.grad
            if gain_NF is None:
                continue
            named, neurons = 0.0, made.h_NF.shape[1]
            more = min(self._active[index] + self._step[index], neurons)
            fewer = max(self._active[index] - self._step[index], 1)
            if made.rest_NF is not None and made.value_NF is not None:
                by_copy_NF = made.rest_NF.grad
                assert by_copy_NF is not None
                gain_NF = gain_NF - by_copy_NF
                edges = (self._num_candidates(index, count) for count in (more, fewer))
                error_NF = made.h_NF - made.value_NF
                named = _total(by_copy_NF * error_NF * self._band(index, made.named_NF, *edges))
            kept = _total(gain_NF * made.h_NF * self._band(index, made.order_NF, more, fewer))
            self.saved[index] -= kept + named
        self._seen.clear()

    def _band(self, index: int, score_NF: torch.Tensor, more: int, fewer: int) -> torch.Tensor:
        """bool [N, F]: the neurons among the best `more` but not among the best `fewer`."""
        return self._chosen(index, score_NF, more) & ~self._chosen(index, score_NF, fewer)


def _total(value_NF: torch.Tensor) -> float:
    return float(value_NF.double().sum())
