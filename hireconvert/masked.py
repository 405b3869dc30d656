"""The dense model with selection laid over it, scored against itself: KL and likelihood of windows.

No converted model is built: a hook zeroes the hidden values that would not be kept, so a whole
model with any number of neurons in each layer costs one forward pass.

Shape suffixes: W windows, T tokens of a window, N rows (scored positions), D width, F neurons,
V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hireconvert.families import Layout, base_model, ffn_parts, layer_owner, num_layers
from hireconvert.measures import LOGITS_AT_ONCE, head_logits, logit_chunks, prove_logits
from hireconvert.quantize import GridFormat, decode_codes, fit_grid, round_codes
from hireconvert.scoring import kth_score

PROBABILITIES_KEPT = 2**27  # elements of dense probabilities kept in memory; beyond, computed anew
Active = tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What a selection costs on windows of text: one mean over positions for each window.

    `kl_W` is KL(dense || selecting) in nats, `nll_W` the negative log-likelihood of the next token.
    """

    kl_W: tuple[float, ...]
    nll_W: tuple[float, ...]

    @property
    def kl(self) -> float:
        """The mean over windows."""
        return sum(self.kl_W) / len(self.kl_W)

    @property
    def nll(self) -> float:
        """The mean over windows."""
        return sum(self.nll_W) / len(self.nll_W)


@dataclass
class Trace:
    """What every decoder layer returned in one pass; one that differs in later layers reuses it."""

    active: Active
    outputs: list[list[Any]] = field(default_factory=list)  # one list a window


@dataclass(frozen=True)
class _Dense:
    """The dense model on one window: hidden states, entropies, and probabilities where they fit."""

    hidden_ND: torch.Tensor
    entropy_N: torch.Tensor
    nll: float
    probs: list[torch.Tensor]  # one a chunk of positions; empty when they are computed anew


@dataclass(frozen=True)
class Estimate:
    """Low-bit copies, as plain rounding makes them, that name `over_select` candidates for every
    active neuron; at 1 all of them are active, else the best by exact score."""

    bits: int
    block: int
    over_select: float


class MaskedModel:
    """A dense model whose FFNs keep, for every token, the `active` best neurons of each layer.

    Use as a context: hooks are removed when it ends. Best is by exact score, or (`estimate`) by
    rounded copies of the weights. A layer with `active` equal to its neurons runs dense. Windows
    run one at a time, so a window's figures do not depend on which others are measured.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        ids_WT: torch.Tensor,
        *,
        score: str = "norm",
        estimate: Estimate | None = None,
    ) -> None:
        self.model, self.layout, self.ids_WT = model, layout, ids_WT
        self.estimate = estimate
        self.layers: Any = base_model(model).get_submodule(layout["layers"])
        parts = [ffn_parts(model, layout, index) for index in range(num_layers(model))]
        self.neurons: Active = tuple(part.down_FD().shape[0] for part in parts)
        self._parts, self._plain = parts, score == "plain"
        self._norms = [part.down_FD().detach().float().norm(dim=1) for part in parts]
        self._active: Active = self.neurons
        self._watch: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._inputs: dict[int, torch.Tensor] = {}
        self._copies = [] if estimate is None else [_copies(part, estimate) for part in parts]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._dense: list[_Dense] = []
        self._resumes = False

    @torch.no_grad()
    def __enter__(self) -> "MaskedModel":
        prove_logits(self.model, self.ids_WT)
        for index, part in enumerate(self._parts):
            hook = part.down.module.register_forward_pre_hook(self._masking(index))
            self._hooks.append(hook)
            if self.estimate is not None:
                inline = not self.layout["ffn"]
                first = part.up.module if inline else layer_owner(self.model, self.layout, index)
                hook = first.register_forward_pre_hook(self._catching(index), with_kwargs=True)
                self._hooks.append(hook)
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
    def measure(
        self, active: Active, *, num_windows: int | None = None, near: Trace | None = None
    ) -> tuple[Score, Trace]:
        """The score of a selection on the first windows, and its trace.

        With `near`, the trace of a similar selection on at least these windows, layers before the
        first that differs are not run again.
        """
        windows = self.ids_WT[:num_windows]
        first = 0
        if near is not None and self._resumes:
            differs = [a != b for a, b in zip(active, near.active, strict=True)]
            first = differs.index(True) if any(differs) else len(active)
        trace, kl, nll = Trace(active), [], []
        for number, ids_T in enumerate(windows):
            start = near.outputs[number][:first] if near is not None and first else []
            hidden_ND, outputs = self._run(ids_T, active, start)
            trace.outputs.append(outputs)
            window_kl, window_nll = self._compare(number, ids_T, hidden_ND)
            kl.append(window_kl)
            nll.append(window_nll)
        return Score(tuple(kl), tuple(nll)), trace

    def slopes(self, active: Active, step: Active) -> tuple[float, ...]:
        """How much KL a layer's last `step` neurons save, to first order, [one float a layer].

        The gradient of the KL with respect to each hidden value, times that value, is the effect
        of one neuron of one token; it is summed over the `step` best that are left out and the
        `step` worst that are kept, and halved. One pass forward and back serves every layer.
        """
        marginal = _Marginal(self, active, step)
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        try:
            with torch.enable_grad():
                for number, ids_T in enumerate(self.ids_WT):
                    with marginal.watching():
                        hidden_ND, _ = self._run(ids_T, active, [])
                    hidden_ND.backward(self._kl_gradient(number, hidden_ND))
                    marginal.gather()
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
        rows = self.ids_WT.shape[0] * (self.ids_WT.shape[1] - 1)
        return tuple(value / (2 * rows) for value in marginal.saved)

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
            active = self._active[index]
            if active >= self.neurons[index]:
                return None
            h = args[0]
            h_NF = h.reshape(-1, h.shape[-1])
            if self.estimate is None:
                keep_NF = _best(self._score(index, h_NF), active)
            else:
                keep_NF = self._predicted(index, h_NF, active)
            kept_NF = torch.where(keep_NF, h_NF, torch.zeros_like(h_NF))
            if self._watch is not None:
                kept_NF = self._watch(index, h_NF, kept_NF)
            return (kept_NF.view_as(h),)

        return mask

    def _catching(self, index: int) -> Callable[..., None]:
        def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0]
            self._inputs[index] = x.reshape(-1, x.shape[-1])

        return catch

    def _score(self, index: int, h_NF: torch.Tensor) -> torch.Tensor:
        magnitude_NF = h_NF.detach().abs().float().nan_to_num()
        return magnitude_NF if self._plain else magnitude_NF * self._norms[index]

    def _predicted(self, index: int, h_NF: torch.Tensor, num_kept: int) -> torch.Tensor:
        """bool [N, F]: the neurons kept when rounded copies name the candidates."""
        estimate, (gate, up), part = self.estimate, self._copies[index], self._parts[index]
        assert estimate is not None
        x_ND = self._inputs.pop(index)
        up_NF = F.linear(x_ND, up, part.up.bias())
        if gate is None or part.gate is None:
            estimated_NF = part.act(up_NF)
        else:
            estimated_NF = part.act(F.linear(x_ND, gate, part.gate.bias())) * up_NF
        wanted = min(round(num_kept * estimate.over_select), self.neurons[index])
        candidate_NF = _best(self._score(index, estimated_NF), wanted)
        if wanted == num_kept:
            return candidate_NF
        exact_NF = self._score(index, h_NF).masked_fill(~candidate_NF, -1.0)
        return _best(exact_NF, num_kept)

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


class _Marginal:
    """First-order effects of the neurons on either side of what is kept, summed over tokens."""

    def __init__(self, masked: MaskedModel, active: Active, step: Active) -> None:
        self._masked, self._active, self._step = masked, active, step
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.saved = [0.0] * len(active)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the masked hidden values of the passes in the block."""
        self._masked._watch = self._note
        try:
            yield
        finally:
            self._masked._watch = None

    def _note(self, index: int, h_NF: torch.Tensor, kept_NF: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            score_NF = self._masked._score(index, h_NF)
            num, step = self._active[index], self._step[index]
            more = min(num + step, score_NF.shape[1])
            band_NF = _best(score_NF, more) & ~_best(score_NF, max(num - step, 1))
        if not kept_NF.requires_grad:  # the first layer: what comes before it needs no gradient
            kept_NF.requires_grad_()
        kept_NF.retain_grad()
        self._seen[index] = (kept_NF, h_NF.detach(), band_NF)
        return kept_NF

    def gather(self) -> None:
        """Add the effects of the pass whose gradients were just taken."""
        for index, (kept_NF, h_NF, band_NF) in self._seen.items():
            if kept_NF.grad is not None:
                effect_NF = kept_NF.grad * h_NF * band_NF
                self.saved[index] -= float(effect_NF.double().sum())
        self._seen.clear()


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _best(score_NF: torch.Tensor, num: int) -> torch.Tensor:
    """bool [N, F]: the `num` largest scores; neurons that tie with the last stay too."""
    kth_N1 = kth_score(score_NF.cpu(), num).to(score_NF.device)
    return score_NF >= kth_N1


def _cross(
    dense_NV: torch.Tensor, z_NV: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of logits against dense probabilities, and against the next tokens, [N]."""
    lse_N = z_NV.logsumexp(-1)
    expected_N = torch.linalg.vecdot(dense_NV, z_NV)
    return lse_N - expected_N, lse_N - z_NV.gather(1, target_N[:, None])[:, 0]


def _copies(part: Any, estimate: Estimate) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gate and up as a symmetric low-bit grid holds them."""
    form = GridFormat(estimate.bits, estimate.block, symmetric=True)

    def copy(matrix: Any) -> torch.Tensor:
        weight_FD = matrix.weight_out_in().detach().float()
        grid = fit_grid(weight_FD, form)
        return decode_codes(round_codes(weight_FD, grid), grid)

    return None if part.gate is None else copy(part.gate), copy(part.up)
