"""A model in training that selects: hooks that zero what a layer would not keep when decoding.

The hook sits before the down projection, whose input is act(gate x) * up x in every layout, so no
family needs code of its own; another behind it adds what neurons left out count by estimate. The
first neurons are the common ones and groups are contiguous, as the export stores them.

Shape suffixes: N rows (tokens), D width, F neurons, S selectable units, T tokens of a window.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hireconvert.families import Layout, base_model, ffn_parts, num_layers
from hireconvert.lowbit import LiveCopies
from hireconvert.runtime.hire_ffn import FfnParts
from hireconvert.runtime.hire_predict import (
    Predictor,
    best,
    is_relative,
    num_active,
    relative_scores,
    unit_scores,
    varies,
)
from hireconvert.runtime.hire_select import LEVEL_RULES, candidate_mask, kept_mask
from hireconvert.scoring import round_half_up


def trained_weights(
    model: PreTrainedModel, layout: Layout, parameters: str
) -> list[tuple[nn.Module, str]]:
    """(module, parameter name) of every weight that the recipe trains, in the model's order."""
    ffn_modules = {
        part.module
        for index in range(num_layers(model))
        for part in ffn_parts(model, layout, index).matrices()
    }
    found = []
    for module in base_model(model).modules():
        norm = "norm" in type(module).__name__.lower()  # LayerNorm, LlamaRMSNorm, LayerNorm1P
        wanted = module in ffn_modules or (norm and parameters == "ffn_and_norms")
        # Learned positions are embeddings too; the output head lies outside the base model.
        other = parameters == "all_but_embeddings" and not isinstance(module, nn.Embedding)
        if wanted or other:
            found += [(module, name) for name, _ in module.named_parameters(recurse=False)]
    return found


@dataclass
class Selection:
    """What every layer of the student keeps in this step.

    `progress` in [0, 1] leads from the share `start` to what each layer will keep in the end. The
    first `dense_prefix` tokens of a window of `window` run dense, as prompts do.
    """

    start: float
    window: int
    progress: float = 1.0
    dense_prefix: int = 0

    def count(self, target: int, num_neurons: int) -> int:
        """Neurons active now in a layer that will keep `target` of them."""
        start = max(target, round_half_up(self.start * num_neurons))
        return round_half_up(start + (target - start) * self.progress)


class _StraightThrough(torch.autograd.Function):
    """The value given, with gradients as if it were the live tensor."""

    @staticmethod
    def forward(_context: Any, _live: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class LayerStudent:
    """The selection of one layer; by exact scores or copies' expected errors, then by `predictor`.

    A rule that keeps another number at each row needs its predictor and the end of the annealing;
    until then rows keep the mean number, of rules by a level on the mean of the rows at hand. With
    `copies`, neurons left out count by estimate, by that of the predictor once there is one;
    gradients are those of the dense model.
    """

    def __init__(
        self,
        parts: FfnParts,
        counts: Mapping[str, Any],
        selection: Selection,
        copies: LiveCopies | None = None,
    ) -> None:
        self.parts, self.counts, self.selection = parts, dict(counts), selection
        self.copies = copies
        self.rest: torch.Tensor | None = None  # hidden values of the neurons left out, on their way
        self.predictor: Predictor | None = None
        self.norm_F = torch.empty(0)
        self.input_ND: torch.Tensor | None = None  # what the FFN got last, while wanted
        self.wants_input = False
        self.rows = 0
        self.kept_sum = 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the norms of the output vectors, and the low-bit copies, as the weights are now."""
        norm_F = self.parts.down_FD().norm(dim=1)
        self.norm_F = torch.ones_like(norm_F) if self.counts["score"] == "plain" else norm_F
        if self.copies is not None:
            self.copies.refresh()

    def predict_by(self, predictor: Predictor, counts: Mapping[str, Any]) -> None:
        """Select, and estimate, by a predictor from now on."""
        self.predictor, self.counts = predictor, dict(counts)
        if self.copies is not None:
            self.copies.release_first()

    def see_input(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Pre-hook of the up projection."""
        if self.predictor is not None or self.copies is not None or self.wants_input:
            self.input_ND = args[0].detach().flatten(0, -2).float()

    def mask_hidden(
        self, _module: nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Pre-hook of the down projection."""
        h = args[0]
        with torch.no_grad():
            h_NF = h.detach().flatten(0, -2).float()
            unit_NS, value_NF = self._estimated()
            if unit_NS is None:  # by exact scores
                unit_NS = self._named(h_NF, h_NF if value_NF is None else value_NF)
            mask_NF, candidate_NF = self._masks(h_NF.abs() * self.norm_F, unit_NS)
            mask_NF = self._with_prefix(mask_NF)
            self.rows += len(mask_NF)
            self.kept_sum += float(mask_NF.sum())
            if value_NF is not None:
                value_NF = torch.where(candidate_NF, h_NF, value_NF).to(h.dtype)
        mask = mask_NF.view(h.shape)
        if value_NF is not None:
            self.rest = _StraightThrough.apply(h, value_NF.view(h.shape)) * ~mask
        return (h * mask, *args[1:])

    def add_rest(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Hook behind the down projection."""
        if self.copies is None or self.rest is None:
            return None
        down_FD = _StraightThrough.apply(self.parts.down_FD(), self.copies.down_FD)
        rest, self.rest = self.rest, None
        return output + rest @ down_FD

    def _masks(
        self, score_NF: torch.Tensor, unit_NS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [N, F] each: the neurons kept, and those computed exactly.

        From exact scores, and the units' scores by which candidates are named.
        """
        counts, selection = self.counts, self.selection
        if self.predictor is not None and varies(counts) and selection.progress == 1:
            candidate_NF = candidate_mask(counts, unit_NS)
            return kept_mask(counts, candidate_NF, unit_NS, score_NF), candidate_NF
        kept = selection.count(num_active(counts), counts["num_neurons"])
        candidates = selection.count(counts["num_candidates"], counts["num_neurons"])
        # Without estimates nobody asks which were candidates.
        if counts["keep"] == "candidates" or (self.predictor is None and self.copies is None):
            mask_NS = self._best(unit_NS, kept, by_level=self._by_level)
            if self._by_level and counts["keep"] == "candidates":
                mask_NS = mask_NS & self._best(unit_NS, candidates)
            mask_NF = self._neurons(mask_NS)
            return mask_NF, mask_NF
        exact_NS, chosen_NS = self._units(score_NF), self._best(unit_NS, candidates)
        mask_NS = self._best(exact_NS.where(chosen_NS, -1.0), kept, by_level=self._by_level)
        return self._neurons(mask_NS), self._neurons(chosen_NS)

    @property
    def _by_level(self) -> bool:
        return varies(self.counts) and self.counts["selection"]["rule"] in LEVEL_RULES

    def _neurons(self, mask_NS: torch.Tensor) -> torch.Tensor:
        """A mask of units as one of neurons, the common ones in front."""
        common, group = self.counts["num_common"], self.counts["group_size"]
        mask_NF = mask_NS.repeat_interleave(group, dim=1) if group > 1 else mask_NS
        if common:
            mask_NF = torch.cat([mask_NF.new_ones(len(mask_NF), common), mask_NF], dim=1)
        return mask_NF

    def _with_prefix(self, mask_NF: torch.Tensor) -> torch.Tensor:
        if not self.selection.dense_prefix:
            return mask_NF
        position_N = torch.arange(len(mask_NF), device=mask_NF.device) % self.selection.window
        return mask_NF | (position_N < self.selection.dense_prefix)[:, None]

    def _units(self, score_NF: torch.Tensor) -> torch.Tensor:
        return unit_scores(score_NF[:, self.counts["num_common"] :], self.counts["group_size"])

    def _estimated(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(predicted scores of the units, or None; estimated hidden values, or None)."""
        predictor, copies, gated = self.predictor, self.copies, self.parts.gate is not None
        if predictor is None and copies is None:
            return None, None
        assert self.input_ND is not None
        if predictor is None:
            assert copies is not None
            value_NF, error_NF = copies.estimated(self.input_ND)
            return None if error_NF is None else self._named(error_NF, value_NF), value_NF
        z_NM = predictor.estimate(self.input_ND)
        if self.counts["predictor"]["groups"]:
            return z_NM[:, self.counts["num_common"] // self.counts["group_size"] :], None
        size_NF = predictor.ranked(z_NM, self.parts.act, self.counts, gated=gated)
        value_NF = size_NF
        if copies is not None or is_relative(self.counts):
            value_NF = predictor.values(z_NM, self.parts.act, gated=gated)
        return self._named(size_NF, value_NF), None if copies is None else value_NF

    def _named(self, size_NF: torch.Tensor, value_NF: torch.Tensor) -> torch.Tensor:
        """The units' scores of sizes (or errors) that go with these hidden values."""
        score_NF = size_NF.abs() * self.norm_F
        if is_relative(self.counts):
            score_NF = relative_scores(score_NF, value_NF.abs() * self.norm_F)
        return self._units(score_NF)

    def _best(self, unit_NS: torch.Tensor, count: int, *, by_level: bool = False) -> torch.Tensor:
        """The mask of the best units of every row, or as many on average of all rows together."""
        number = (count - self.counts["num_common"]) // self.counts["group_size"]
        if number >= unit_NS.shape[1]:
            return torch.ones_like(unit_NS, dtype=torch.bool)
        if by_level:
            return best(unit_NS.reshape(1, -1), number * len(unit_NS)).view_as(unit_NS)
        return best(unit_NS, number)  # ties do not matter to training


@dataclass
class Student:
    """The layers of a model in training and the outputs of its decoder layers."""

    layers: list[LayerStudent]
    selection: Selection
    outputs: list[torch.Tensor] = field(default_factory=list)

    def kept_share(self) -> float:
        """Mean share of neurons kept since the last call, over layers and rows."""
        shares = []
        for layer in self.layers:
            shares.append(layer.kept_sum / (layer.rows * layer.counts["num_neurons"]))
            layer.kept_sum, layer.rows = 0.0, 0
        return sum(shares) / len(shares)


@contextmanager
def selecting(
    model: PreTrainedModel,
    layout: Layout,
    specs: list[dict[str, Any]],
    selection: Selection,
    *,
    copies: Sequence[LiveCopies] = (),
) -> Iterator[Student]:
    """The model selects inside the block, in every layer, at every row past the dense prefix.

    `copies` (one a layer, output vectors included) belong to specs with `unselected`.
    """
    hooks, layers = [], []
    for index, counts in enumerate(specs):
        parts = ffn_parts(model, layout, index)
        own = copies[index] if counts.get("unselected") else None
        layer = LayerStudent(parts, counts, selection, own)
        layer.refresh()
        hooks.append(parts.up.module.register_forward_pre_hook(layer.see_input))
        hooks.append(parts.down.module.register_forward_pre_hook(layer.mask_hidden))
        hooks.append(parts.down.module.register_forward_hook(layer.add_rest))
        layers.append(layer)
    student = Student(layers, selection)
    try:
        with layer_outputs(model, layout, student.outputs):
            yield student
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def layer_outputs(
    model: PreTrainedModel, layout: Layout, outputs: list[torch.Tensor]
) -> Iterator[None]:
    """Every decoder layer's output is appended to `outputs`, [N, D]; the caller empties it."""

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        outputs.append(hidden.flatten(0, -2))

    blocks: Any = base_model(model).get_submodule(layout["layers"])
    hooks = [blocks[index].register_forward_hook(keep) for index in range(num_layers(model))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
