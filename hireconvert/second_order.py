"""What selections of each layer cost to second order, by one pass back, and the cheapest list.

The Hessian of KL(dense || selecting) where nothing is left out is the Fisher information, the mean
over next tokens y drawn from the dense model of g g^T, g the gradient of -log p(y) (Martens, "New
insights and perspectives on the natural gradient method", arXiv 1412.1193). So leaving neurons out,
which adds e to a layer's output, costs about E[(g.e)^2] / 2, and g.e is a sum over neurons. Effects
of layers and of tokens on one another are left out.

Shape suffixes: N rows (tokens), D width, F neurons, C candidates; neurons in the order of their
names to be candidates, from the first.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hireconvert.allocation import Levels, Trades
from hireconvert.runtime.hire_ffn import FfnParts
from hireconvert.runtime.hire_predict import best

# --------------------------------------------------------------------------- the pass


@dataclass
class Flow:
    """What one FFN received [N, D], its hidden values [N, F], its output and the gradient there."""

    x_ND: torch.Tensor = field(init=False)
    h_NF: torch.Tensor = field(init=False)
    output: torch.Tensor = field(init=False)

    @property
    def gradient_ND(self) -> torch.Tensor:
        """The gradient with respect to the output, after the pass back."""
        assert self.output.grad is not None
        return self.output.grad.flatten(0, -2)

    def receive(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook of the first matrix."""
        self.x_ND = args[0].detach().flatten(0, -2)

    def hide(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook of the last matrix, before it runs."""
        self.h_NF = args[0].detach().flatten(0, -2)

    def put_out(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        """Hook of the last matrix, after it ran."""
        if not output.requires_grad:  # the first layer: nothing before it needs a gradient
            output.requires_grad_()
        output.retain_grad()
        self.output = output


def window_seed(seed: int, number: int) -> int:
    """What next tokens of one window are drawn by."""
    return random.Random(f"{seed} {number}").getrandbits(63)


@contextmanager
def watched(parts: Sequence[FfnParts]) -> Iterator[list[Flow]]:
    """One Flow a layer, filled by a dense pass forward and back within the context."""
    flows = [Flow() for _ in parts]
    hooks = []
    for part, flow in zip(parts, flows, strict=True):
        hooks.append(part.up.module.register_forward_pre_hook(flow.receive))
        hooks.append(part.down.module.register_forward_pre_hook(flow.hide))
        hooks.append(part.down.module.register_forward_hook(flow.put_out))
    try:
        yield flows
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Ranked:
    """Hidden values of all neurons of one layer [N, F], and what they are chosen by.

    `score_NF` are exact scores, `named_NF` what candidates are the best by; `value_NF` estimated
    values, None where neurons left out count as zero.
    """

    h_NF: torch.Tensor
    score_NF: torch.Tensor
    named_NF: torch.Tensor
    value_NF: torch.Tensor | None = None


@dataclass(frozen=True)
class Effects:
    """g.e of every neuron alone [N, F], were it left out: no candidate (far), or as one (near).

    It takes h down_i from the output and gives what it counts instead: its estimate through the
    copy's output vector, as a candidate its exact value through it, or zero.
    """

    far_NF: torch.Tensor
    near_NF: torch.Tensor


def effects_of(
    ranked: Ranked, gradient_ND: torch.Tensor, down_FD: torch.Tensor, copy_FD: torch.Tensor | None
) -> Effects:
    """The effects of one layer's neurons by the gradient at its output."""
    exact_NF = ranked.h_NF * (gradient_ND @ down_FD.T)
    far_NF = near_NF = exact_NF
    if ranked.value_NF is not None:
        assert copy_FD is not None
        by_copy_NF = gradient_ND @ copy_FD.T
        far_NF = exact_NF - ranked.value_NF * by_copy_NF
        near_NF = exact_NF - ranked.h_NF * by_copy_NF
    return Effects(far_NF, near_NF)


def squared_effect(effects: Effects, keep_NF: torch.Tensor, candidate_NF: torch.Tensor) -> float:
    """The sum over rows of (g.e)^2 where these neurons are kept and these are candidates."""
    effect_N = (effects.far_NF * ~candidate_NF).sum(1)
    if keep_NF is not candidate_NF:
        effect_N = effect_N + (effects.near_NF * (candidate_NF & ~keep_NF)).sum(1)
    return float(effect_N.double().square().sum())


def squared_effects(
    ranked: Ranked, effects: Effects, counts: Sequence[tuple[int, int]]
) -> list[float]:
    """The same for the best, of each pair (neurons active, candidates).

    All pairs share one order of neurons; where names tie, exactly as many are candidates as said.
    """
    order_NF = ranked.named_NF.argsort(dim=1, descending=True, stable=True)
    far_NF, near_NF, score_NF = (
        t_NF.gather(1, order_NF) for t_NF in (effects.far_NF, effects.near_NF, ranked.score_NF)
    )
    sums = []
    for num_active, num_candidates in counts:
        effect_N = far_NF[:, num_candidates:].sum(1)
        if num_candidates > num_active:
            dropped_NC = ~best(score_NF[:, :num_candidates], num_active)
            effect_N = effect_N + (near_NF[:, :num_candidates] * dropped_NC).sum(1)
        sums.append(float(effect_N.double().square().sum()))
    return sums


# --------------------------------------------------------------------------- the list


def convex_savings(costs: Sequence[float]) -> list[float]:
    """What each step along the lower convex hull of a curve saves, the largest first.

    The curve holds costs at equal steps; the hull's slopes are its own, averaged over runs in which
    they would rise (pool adjacent violators).
    """
    runs: list[tuple[float, int]] = []  # mean saving of a step, steps
    for before, after in pairwise(costs):
        mean, steps = before - after, 1
        while runs and runs[-1][0] < mean:
            earlier, more = runs.pop()
            mean = (mean * steps + earlier * more) / (steps + more)
            steps += more
        runs.append((mean, steps))
    return [mean for mean, steps in runs for _ in range(steps)]


def cheapest(trades: Trades, curves: Sequence[Sequence[float]]) -> Levels:
    """The list of the base's total whose hulls' sum is least, one curve a layer.

    A curve holds costs at the levels of `Trades.reach`. Among layers of one size the steps that
    save most are taken, as many as the base has: no exchange of steps gains any more.
    """
    levels = [trades.reach(layer)[0] for layer in range(len(curves))]
    for size in sorted(set(trades.allocation.neurons)):
        layers = [i for i, neurons in enumerate(trades.allocation.neurons) if neurons == size]
        steps = [
            (-saving, layer, place)
            for layer in layers
            for place, saving in enumerate(convex_savings(curves[layer]))
        ]
        taken = -sum(levels[layer] for layer in layers)  # the base is at level 0 everywhere
        for _, layer, _ in sorted(steps)[:taken]:
            levels[layer] += 1
    return tuple(levels)
