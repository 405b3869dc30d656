"""The dense model with selection laid over it, scored against itself: KL and likelihood of windows.

No converted model is built: a hook zeroes the hidden values that would not be kept, another adds
what they count by estimate where they do, so a whole model with any number of neurons in each layer
costs one forward pass.

Shape suffixes: W windows, T tokens of a window, N rows (scored positions), D width, F neurons,
V vocabulary, L layers, S selections to weigh.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hireconvert.families import Layout, base_model, ffn_parts, num_layers
from hireconvert.levels import ScoreLevels
from hireconvert.lowbit import LiveCopies
from hireconvert.marginal import Marginal, Pass
from hireconvert.measures import LOGITS_AT_ONCE, head_logits, logit_chunks, prove_logits
from hireconvert.recipe import FfnRecipe
from hireconvert.runtime.hire_predict import best, relative_scores
from hireconvert.runtime.hire_select import LEVEL_RULES, zeroed
from hireconvert.second_order import (
    Flow,
    Ranked,
    effects_of,
    squared_effect,
    squared_effects,
    watched,
)

PROBABILITIES_KEPT = 2**27  # elements of dense probabilities kept in memory; beyond, computed anew
Active = tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What a selection costs on windows of text: one mean over positions for each window.

    `kl_W` is KL(dense || selecting) in nats, `nll_W` the negative log-likelihood of the next token,
    `kept_W` how many neurons were kept, in all layers together.
    """

    kl_W: tuple[float, ...]
    nll_W: tuple[float, ...]
    kept_W: tuple[float, ...] = ()

    @property
    def kl(self) -> float:
        """The mean over windows."""
        return sum(self.kl_W) / len(self.kl_W)

    @property
    def nll(self) -> float:
        """The mean over windows."""
        return sum(self.nll_W) / len(self.nll_W)

    @property
    def kept(self) -> float:
        """The mean over windows."""
        return sum(self.kept_W) / len(self.kept_W)


@dataclass
class Trace:
    """What every decoder layer returned in one pass; one that differs in later layers reuses it."""

    active: Active
    outputs: list[list[Any]] = field(default_factory=list)  # one list a window
    kept: list[dict[int, int]] = field(default_factory=list)  # neurons by layer, one a window


@dataclass(frozen=True)
class _Dense:
    """The dense model on one window: hidden states, entropies, and probabilities where they fit."""

    hidden_ND: torch.Tensor
    entropy_N: torch.Tensor
    nll: float
    probs: list[torch.Tensor]  # one a chunk of positions; empty when they are computed anew


class MaskedModel:
    """A dense model whose FFNs keep, for every token, the `active` best neurons of each layer.

    Use as a context: hooks are removed when it ends. Best is by exact score, unless `copies` (one a
    layer, which several models of the same weights may share) name candidates; neurons left out
    count as zero, unless the copies hold output vectors. With `levels`, kept is instead whatever
    reaches the score that so many reach on average, at most `most` times as many in a row, and with
    `relative` scores are those of the selection of that name. A layer with `active` equal to its
    neurons runs dense. Windows run one at a time, so a window's figures do not depend on which
    others are measured.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        ids_WT: torch.Tensor,
        *,
        score: str = "norm",
        copies: Sequence[LiveCopies] = (),
        relative: bool = False,
        most: float = math.inf,
    ) -> None:
        self.model, self.layout, self.ids_WT = model, layout, ids_WT
        self.copies, self._relative, self._most = copies, relative, most
        self.levels: ScoreLevels | None = None  # as `fit_levels` gives them
        self.layers: Any = base_model(model).get_submodule(layout["layers"])
        parts = [ffn_parts(model, layout, index) for index in range(num_layers(model))]
        self.neurons: Active = tuple(part.down_FD().shape[0] for part in parts)
        self._parts, self._plain = parts, score == "plain"
        self._norms = [part.down_FD().detach().float().norm(dim=1) for part in parts]
        self._active: Active = self.neurons
        self._watch: Callable[[int, Pass], None] | None = None
        self._kept: dict[int, int] = {}  # neurons of the window now running, by layer
        self._inputs: dict[int, torch.Tensor] = {}
        self._rest: dict[int, torch.Tensor] = {}  # what the layer now running adds by estimate
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._dense: list[_Dense] = []
        self._resumes = False

    @classmethod
    def of(
        cls,
        model: Any,
        layout: Layout,
        ids_WT: torch.Tensor,
        ffn: FfnRecipe,
        copies: Sequence[LiveCopies],
    ) -> "MaskedModel":
        """The model as the recipe selects; for levels see `as_selected`."""
        return cls(
            model,
            layout,
            ids_WT,
            score=ffn.score,
            copies=copies,
            relative=ffn.selection == "relative",
            most=ffn.over_select,
        )

    @torch.no_grad()
    def __enter__(self) -> "MaskedModel":
        prove_logits(self.model, self.ids_WT)
        for index, part in enumerate(self._parts):
            down = part.down.module
            self._hooks.append(down.register_forward_pre_hook(self._masking(index)))
            if self.copies:
                up = part.up.module
                self._hooks.append(up.register_forward_pre_hook(self._catching(index)))
                self._hooks.append(down.register_forward_hook(self._adding(index)))
        kept = self.ids_WT.numel() * self._vocabulary <= PROBABILITIES_KEPT
        self._dense = [self._dense_window(ids_T, kept) for ids_T in self.ids_WT]
        self._resumes = self._resuming_is_exact()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def dense_nll_W(self) -> tuple[float, ...]:
        """Negative log-likelihood of the dense model, one mean a window."""
        return tuple(window.nll for window in self._dense)

    @torch.no_grad()
    def fit_levels(self) -> ScoreLevels:
        """The levels of these windows, along the inputs of the dense model's layers."""
        levels = ScoreLevels(len(self.neurons))
        for ids_T in self.ids_WT:
            with watched(self._parts) as flows:
                self._run(ids_T, self.neurons, [])
            for index, flow in enumerate(flows):
                levels.note(index, self._order(self._ranked_in(index, flow)))
        return levels

    @torch.no_grad()
    def measure(
        self,
        active: Active,
        *,
        num_windows: int | None = None,
        near: Trace | None = None,
        traced: bool = True,
    ) -> tuple[Score, Trace]:
        """The score of a selection on the first windows, and its trace (empty unless `traced`).

        With `near`, the trace of a similar selection on at least these windows, layers before the
        first that differs are not run again.
        """
        windows = self.ids_WT[:num_windows]
        first = 0
        if near is not None and self._resumes:
            differs = [a != b for a, b in zip(active, near.active, strict=True)]
            first = differs.index(True) if any(differs) else len(active)
        trace, kl, nll, kept = Trace(active), [], [], []
        for number, ids_T in enumerate(windows):
            start = near.outputs[number][:first] if near is not None and first else []
            self._kept = {**near.kept[number]} if near is not None and first else {}
            hidden_ND, outputs = self._run(ids_T, active, start)
            kept.append(sum(self._kept.values()) / len(ids_T))
            if traced:
                trace.outputs.append(outputs)
                trace.kept.append(self._kept.copy())
            window_kl, window_nll = self._compare(number, ids_T, hidden_ND)
            kl.append(window_kl)
            nll.append(window_nll)
        return Score(tuple(kl), tuple(nll), tuple(kept)), trace

    def slopes(self, active: Active, step: Active) -> tuple[float, ...]:
        """How much KL a layer's last `step` neurons save, to first order, [one float a layer].

        The gradient of the KL with respect to each hidden value, times that value (less what the
        neuron counts by estimate when it is left out), is the effect of one neuron of one token; it
        is summed over the `step` best that are left out and the `step` worst that are kept, and
        halved. One pass forward and back serves every layer.
        """
        marginal = Marginal(self._num_candidates, self._chosen, active, step)
        self._watch = marginal.note
        try:
            with self._weights_fixed():
                for number, ids_T in enumerate(self.ids_WT):
                    hidden_ND, _ = self._run(ids_T, active, [])
                    hidden_ND.backward(self._kl_gradient(number, hidden_ND))
                    marginal.gather()
        finally:
            self._watch = None
        rows = self.ids_WT.shape[0] * (self.ids_WT.shape[1] - 1)
        return tuple(value / (2 * rows) for value in marginal.saved)

    def costs(self, number: int, active_LS: Sequence[Active], seed: int) -> list[list[float]]:
        """What selections in one layer cost one window to second order, in nats a position.

        One list a layer, as long as its numbers of active neurons in `active_LS`, all other layers
        dense (`second_order`). Next tokens are drawn from the dense model by the seed. One pass
        forward and back serves every layer and number.
        """
        rows, costs = self.ids_WT.shape[1] - 1, []
        with self._passed_back(number, seed) as flows:
            for index, (flow, active_S) in enumerate(zip(flows, active_LS, strict=True)):
                ranked = self._ranked_in(index, flow)
                down_FD = self._parts[index].down_FD()
                copy_FD = self.copies[index].down_FD if self.copies else None
                effects = effects_of(ranked, flow.gradient_ND, down_FD, copy_FD)
                if self.levels is not None:
                    masks = (self._picked(index, ranked, active) for active in active_S)
                    sums = [squared_effect(effects, *both) for both in masks]
                else:
                    counts = [(active, self._num_candidates(index, active)) for active in active_S]
                    sums = squared_effects(ranked, effects, counts)
                costs.append([value / (2 * rows) for value in sums])
        return costs

    def pulls(self, number: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(exact scores [N, F], squared lengths [N] of gradients at the output) of each layer.

        Of one window, the model dense; the gradients are those of -log p of next tokens, drawn by
        the seed.
        """
        rows = self.ids_WT.shape[1] - 1
        with self._passed_back(number, seed) as flows:
            for index, flow in enumerate(flows):
                pull_N = flow.gradient_ND.double().square().sum(1)
                yield self._score(index, flow.h_NF)[:rows], pull_N[:rows]

    @contextmanager
    def _passed_back(self, number: int, seed: int) -> Iterator[list[Flow]]:
        """What every FFN did in one window of the dense model, and gradients of drawn tokens."""
        generator = torch.Generator(self.model.device).manual_seed(seed)
        with watched(self._parts) as flows, self._weights_fixed():
            hidden_ND, _ = self._run(self.ids_WT[number], self.neurons, [])
            hidden_ND.backward(self._drawn_gradient(hidden_ND, generator))
        with torch.no_grad():
            yield flows

    @contextmanager
    def _weights_fixed(self) -> Iterator[None]:
        """Gradients, but none of weights."""
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)

    # ----------------------------------------------------------------------- running

    def _run(
        self, ids_T: torch.Tensor, active: Active, start: Sequence[Any]
    ) -> tuple[torch.Tensor, list[Any]]:
        """Hidden states [N, D] that predict a token of the window, and what each layer returned.

        `start` holds what the first layers return; they are not run.
        """
        outputs, hooks = list(start), []

        def catch(_layer: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(output)

        for index, layer in enumerate(self.layers):
            if index >= len(start):
                hooks.append(layer.register_forward_hook(catch))
            else:  # nothing reads what a layer before the last of `start` returns
                layer.forward = _returning(start[-1])
        self._active = active
        try:
            ids_1T = ids_T[None].to(self.model.device)
            hidden = base_model(self.model)(input_ids=ids_1T, use_cache=False).last_hidden_state
        finally:
            self._active = self.neurons
            for hook in hooks:
                hook.remove()
            for layer in self.layers[: len(start)]:
                del layer.forward
        return hidden[0, :-1], outputs

    def _resuming_is_exact(self) -> bool:
        """Whether a pass that starts in the middle gives the very states of a whole one."""
        ids_T = self.ids_WT[0]
        whole_ND, outputs = self._run(ids_T, self.neurons, [])
        if len(outputs) != len(self.layers):
            return False
        part_ND, _ = self._run(ids_T, self.neurons, outputs[: (len(outputs) + 1) // 2])
        return torch.equal(whole_ND, part_ND)

    # ----------------------------------------------------------------------- selection

    def _masking(self, index: int) -> Callable[..., Any]:
        def mask(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
            active, x_ND = self._active[index], self._inputs.pop(index, None)
            h = args[0]
            if active >= self.neurons[index]:
                self._kept[index] = h.numel()
                return None
            made = self._selected(index, h.reshape(-1, h.shape[-1]), x_ND, active)
            if self._watch is not None:
                self._watch(index, made)
            if made.rest_NF is not None:
                self._rest[index] = made.rest_NF
            return (made.kept_NF.view_as(h),)

        return mask

    def _catching(self, index: int) -> Callable[..., None]:
        def catch(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._inputs[index] = args[0].reshape(-1, args[0].shape[-1])

        return catch

    def _adding(self, index: int) -> Callable[..., Any]:
        def add(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
            rest_NF, down_FD = self._rest.pop(index, None), self.copies[index].down_FD
            if rest_NF is None or down_FD is None:
                return None
            return output + (rest_NF @ down_FD).view_as(output)

        return add

    def _selected(
        self, index: int, h_NF: torch.Tensor, x_ND: torch.Tensor | None, num_kept: int
    ) -> Pass:
        ranked = self._ranked(index, h_NF, x_ND)
        named_NF, value_NF = ranked.named_NF, ranked.value_NF
        keep_NF, candidate_NF = self._picked(index, ranked, num_kept)
        self._kept[index] = int(keep_NF.sum())
        order_NF = self._order(ranked)
        kept_NF = zeroed(h_NF, keep_NF)
        if value_NF is None:
            return Pass(h_NF, kept_NF, order_NF, named_NF)
        rest_NF = zeroed(value_NF, ~candidate_NF)
        if keep_NF is not candidate_NF:
            rest_NF = rest_NF + zeroed(h_NF, candidate_NF & ~keep_NF)
        return Pass(h_NF, kept_NF, order_NF, named_NF, value_NF, rest_NF)

    def _picked(
        self, index: int, ranked: Ranked, num_kept: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The masks of the neurons kept and of the candidates, one mask where they are the same."""
        order_NF = self._order(ranked)
        if not self.over_selects:
            mask_NF = self._chosen(index, order_NF, num_kept)
            return mask_NF, mask_NF
        candidate_NF = best(ranked.named_NF, self._num_candidates(index, num_kept))
        order_NF = order_NF.masked_fill(~candidate_NF, -1.0)
        return self._chosen(index, order_NF, num_kept), candidate_NF

    def _order(self, ranked: Ranked) -> torch.Tensor:
        """What the neurons kept are the best by."""
        return ranked.score_NF if self.over_selects else ranked.named_NF

    @property
    def over_selects(self) -> bool:
        """Whether exact scores choose among candidates."""
        return bool(self.copies) and self.copies[0].estimate.over_select > 1

    def _chosen(self, index: int, score_NF: torch.Tensor, num: int) -> torch.Tensor:
        """The mask of the best `num` of every row, or of what reaches the level of that mean."""
        if self.levels is None or num >= self.neurons[index]:
            return best(score_NF, num)
        mask_NF = score_NF >= self.levels.of(index, num)
        most = self._most * num
        if most < self.neurons[index]:
            mask_NF = mask_NF & best(score_NF, math.ceil(most - 1e-9))
        return mask_NF

    def _ranked_in(self, index: int, flow: Flow) -> Ranked:
        """As `_ranked`, of a layer that was watched."""
        return self._ranked(index, flow.h_NF, flow.x_ND if self.copies else None)

    def _ranked(self, index: int, h_NF: torch.Tensor, x_ND: torch.Tensor | None) -> Ranked:
        """What one layer's candidates and kept neurons are the best by; inputs with copies."""
        score_NF = self._score(index, h_NF)
        if x_ND is None:
            if self._relative:
                score_NF = relative_scores(score_NF, score_NF)
            return Ranked(h_NF, score_NF, score_NF)
        estimate = self.copies[index].estimate
        value_NF, error_NF = self.copies[index].estimated(x_ND)
        named_NF = score_NF
        if error_NF is not None:
            named_NF = self._score(index, error_NF)
        elif estimate.selects:
            named_NF = self._score(index, value_NF)
        if self._relative:
            named_NF = relative_scores(named_NF, self._score(index, value_NF))
        return Ranked(h_NF, score_NF, named_NF, None if estimate.down is None else value_NF)

    def _num_candidates(self, index: int, num_kept: int) -> int:
        over_select = self.copies[index].estimate.over_select if self.copies else 1.0
        return min(math.ceil(num_kept * over_select - 1e-9), self.neurons[index])

    def _score(self, index: int, h_NF: torch.Tensor) -> torch.Tensor:
        magnitude_NF = h_NF.detach().abs().float().nan_to_num()
        return magnitude_NF if self._plain else magnitude_NF * self._norms[index]

    # ----------------------------------------------------------------------- figures

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])

    def _chunks(self, num_rows: int) -> list[slice]:
        return logit_chunks(num_rows, self._vocabulary, LOGITS_AT_ONCE)

    def _dense_window(self, ids_T: torch.Tensor, kept: bool) -> _Dense:
        hidden_ND, _ = self._run(ids_T, self.neurons, [])
        target_N, entropy, probs, nll = ids_T[1:].to(hidden_ND.device), [], [], 0.0
        for chunk in self._chunks(len(hidden_ND)):
            z_NV = head_logits(self.model, hidden_ND[chunk])
            dense_NV = z_NV.softmax(-1)
            cross_N, nll_N = _cross(dense_NV, z_NV, target_N[chunk])
            entropy.append(cross_N)
            nll += float(nll_N.double().sum())
            if kept:
                probs.append(dense_NV)
        return _Dense(hidden_ND, torch.cat(entropy), nll / len(hidden_ND), probs)

    def _dense_probs(self, number: int, place: int, chunk: slice) -> torch.Tensor:
        dense = self._dense[number]
        if dense.probs:
            return dense.probs[place]
        return head_logits(self.model, dense.hidden_ND[chunk]).softmax(-1)

    def _kl_gradient(self, number: int, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The gradient of the summed KL of one window with respect to its hidden states."""
        leaf_ND = hidden_ND.detach().requires_grad_()
        for place, chunk in enumerate(self._chunks(len(leaf_ND))):
            with torch.no_grad():
                dense_NV = self._dense_probs(number, place, chunk)
            z_NV = head_logits(self.model, leaf_ND[chunk])
            (z_NV.logsumexp(-1) - torch.linalg.vecdot(dense_NV, z_NV)).sum().backward()
        assert leaf_ND.grad is not None
        return leaf_ND.grad

    def _drawn_gradient(self, hidden_ND: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The gradient of the summed -log p of next tokens drawn by what the states predict."""
        leaf_ND = hidden_ND.detach().requires_grad_()
        for chunk in self._chunks(len(leaf_ND)):
            z_NV = head_logits(self.model, leaf_ND[chunk])
            drawn_N1 = torch.multinomial(z_NV.detach().softmax(-1), 1, generator=generator)
            F.cross_entropy(z_NV, drawn_N1[:, 0], reduction="sum").backward()
        assert leaf_ND.grad is not None
        return leaf_ND.grad

    def _compare(
        self, number: int, ids_T: torch.Tensor, hidden_ND: torch.Tensor
    ) -> tuple[float, float]:
        """Mean KL and mean negative log-likelihood of one window."""
        dense, kl, nll = self._dense[number], 0.0, 0.0
        target_N = ids_T[1:].to(hidden_ND.device)
        for place, chunk in enumerate(self._chunks(len(hidden_ND))):
            dense_NV = self._dense_probs(number, place, chunk)
            z_NV = head_logits(self.model, hidden_ND[chunk])
            cross_N, nll_N = _cross(dense_NV, z_NV, target_N[chunk])
            # Rounding can make the difference slightly negative, which a divergence never is.
            kl += float((cross_N - dense.entropy_N[chunk]).clamp(min=0).double().sum())
            nll += float(nll_N.double().sum())
        return kl / len(hidden_ND), nll / len(hidden_ND)


def as_selected(ffn: FfnRecipe, models: Sequence[MaskedModel]) -> None:
    """Let the models go by levels where the recipe does, fitted on the text of the first.

    Selections by a row's mean and spread or by its mass are simulated with a fixed number, and so
    are those of exact scores among candidates.
    """
    if ffn.selection in LEVEL_RULES and not models[0].over_selects:
        levels = models[0].fit_levels()
        for model in models:
            model.levels = levels


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _cross(
    dense_NV: torch.Tensor, z_NV: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of logits against dense probabilities, and against the next tokens, [N]."""
    lse_N = z_NV.logsumexp(-1)
    expected_N = torch.linalg.vecdot(dense_NV, z_NV)
    return lse_N - expected_N, lse_N - z_NV.gather(1, target_N[:, None])[:, 0]
