"""Sparse feed-forward layers: predict, over-select, compute exactly, keep the best.

Shape suffixes: N rows (tokens), D width, F neurons, M predictor outputs, C candidates, K kept,
S scored units (neurons, or groups of neurons).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .hire_native import pack as pack_native
from .hire_native import run as run_native
from .hire_native import serves as serves_native
from .hire_predict import (
    Widened,
    column_norms,
    is_copied,
    is_relative,
    keeps_all,
    num_active,
    relative_scores,
    unit_scores,
    varies,
)
from .hire_select import (
    candidate_mask,
    finite_rows,
    kept_mask,
    linear_rows,
    number_of,
    replaced,
    row_candidates,
    row_kept,
    zeroed,
)

COUNTER_NAMES = ("calls", "rows", "kept", "candidates", "dense_rows")


@dataclass(frozen=True)
class Part:
    """One matrix of an FFN inside a module: a Linear, a Conv1D or a slice of a fused Linear."""

    module: Any  # a Linear or Conv1D, or (not known) whatever an adapter put there
    index: int
    pieces: int

    @classmethod
    def resolve(cls, owner: nn.Module, path: str) -> "Part":
        """The part named `module.path` or `module.path:i/n` (the i-th of n stacked matrices)."""
        name, _, piece = path.partition(":")
        index, _, pieces = piece.partition("/")
        return cls(owner.get_submodule(name), int(index or 0), int(pieces or 1))

    @property
    def known(self) -> bool:
        """Whether the module is a plain layer whose weight may be read row by row.

        Adapters wrap it, quantizers put packed, sharded or offloaded tensors there.
        """
        if not isinstance(self.module, nn.Linear | Conv1D):
            return False
        weight = self.module.weight
        plain = type(weight.data) is torch.Tensor and weight.device.type != "meta"
        return plain and weight.dim() == 2 and weight.is_floating_point()

    def _slice(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.shape[0] // self.pieces
        return tensor[self.index * size : (self.index + 1) * size]

    def weight_out_in(self) -> torch.Tensor:
        """The weight as [outputs, inputs], a view."""
        weight = self.module.weight
        return self._slice(weight.t() if isinstance(self.module, Conv1D) else weight)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The module's native output, all pieces; `module(x)` may be a class of ours."""
        native = Conv1D if isinstance(self.module, Conv1D) else nn.Linear
        return native.forward(self.module, x)

    def bias(self) -> torch.Tensor | None:
        """The bias of this part, a view, or None."""
        bias = self.module.bias
        return None if bias is None else self._slice(bias)


@dataclass(frozen=True)
class FfnParts:
    """The matrices and the activation of one FFN, found through a layout (docs/format.md)."""

    gate: Part | None
    up: Part
    down: Part
    act: Any

    @classmethod
    def resolve(cls, owner: nn.Module, layout: Mapping[str, Any]) -> "FfnParts":
        """The parts below `owner`: the FFN module, or the decoder layer when it has none."""
        gate = Part.resolve(owner, layout["gate"]) if layout["gate"] else None
        up, down = Part.resolve(owner, layout["up"]), Part.resolve(owner, layout["down"])
        return cls(gate, up, down, owner.get_submodule(layout["act"]))

    def matrices(self) -> list[Part]:
        """Gate (when there is one), up and down."""
        return [part for part in (self.gate, self.up, self.down) if part is not None]

    def down_FD(self) -> torch.Tensor:
        """Row i is the output vector of neuron i, a view."""
        return self.down.weight_out_in().t()


def weight_stamp(modules: list[Any]) -> tuple[Any, ...]:
    """A value that changes when a weight or bias is replaced, moved, converted or written to."""
    tensors = [t for module in modules for t in (module.weight, module.bias) if t is not None]
    # Weights made under inference_mode cannot be written to outside it and have no counter.
    versions = [None if t.is_inference() else t._version for t in tensors]
    places = [(t.data_ptr(), t.dtype, t.device, t.shape) for t in tensors]
    return (*versions, *places)


def content_stamp(modules: list[Any]) -> tuple[float, ...]:
    """A value that changes with the weights' content, which a write through `.data` leaves alone.

    Merging LoRA adapters writes like that. About a thousand elements of each tensor are summed.
    """
    sums = []
    for module in modules:
        weight = module.weight.detach()
        sample = weight.reshape(-1)[:: max(1, weight.numel() // 1009)].double().nan_to_num()
        factor = torch.arange(1, sample.numel() + 1, dtype=torch.float64, device=sample.device)
        sums.append(float((sample * factor).sum()))
    return tuple(sums)


@dataclass
class Prepared:
    """Tensors derived from the live weights, valid while `stamp` matches them."""

    stamp: tuple[Any, ...]
    content: tuple[float, ...]
    gate_FD: torch.Tensor | None
    up_FD: torch.Tensor
    norm_F: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    counts: Any = None  # the numbers of neurons, and kind of rows, that `native` was made for
    native: Any = None  # the layer as the native kernels read it, or None
    packed: Any = None  # the last of those: other numbers of neurons share its memory
    widened: Any = None  # Widened, once the PyTorch path runs


class SparseFfn(nn.Module):
    """Selection and sparse arithmetic of one layer; sits beside the dense weights as `hire`."""

    counts: torch.Tensor

    def __init__(
        self,
        spec: Mapping[str, Any],
        owner: nn.Module,
        layout: Mapping[str, Any],
        parts: FfnParts,
    ) -> None:
        super().__init__()
        self.spec = dict(spec)
        # Plain containers keep modules out of the module tree: their names must not change.
        self._owner, self._layout, self._parts = (owner,), dict(layout), (parts,)
        self.predictor_tensors: dict[str, torch.Tensor] = {}
        self.prepared: Any = None  # Prepared, once the weights are there
        self.register_buffer(
            "counts", torch.zeros(len(COUNTER_NAMES), dtype=torch.int64), persistent=False
        )

    @property
    def parts(self) -> FfnParts:
        """The layer's matrices and activation."""
        return self._parts[0]

    def find_parts(self) -> bool:
        """Look the matrices up anew; false when something else than plain layers lies there."""
        known = all(part.known for part in self.parts.matrices())
        if self._layout["ffn"]:
            fresh = FfnParts.resolve(self._owner[0], self._layout)
            known = all(part.known for part in fresh.matrices())
            self._parts = (fresh,)
        return known

    @torch.no_grad()
    def prepare(self, thorough: bool = True) -> None:
        """Build the derived tensors, or rebuild them when a weight has changed.

        A write through `.data` is seen only when `thorough`. Raises RuntimeError without
        predictor tensors.
        """
        parts, prepared = self.parts, self.prepared
        modules = [part.module for part in parts.matrices()]
        stamp = weight_stamp(modules)
        same = prepared is not None and prepared.stamp == stamp
        if same and (not thorough or prepared.content == content_stamp(modules)):
            self._serve()
            return
        if not self.predictor_tensors:
            raise RuntimeError(
                "hire: predictor tensors are not loaded; load the checkpoint with from_pretrained"
            )
        up_FD = parts.up.weight_out_in().detach().contiguous()
        moved = {name: tensor.to(up_FD.device) for name, tensor in self.predictor_tensors.items()}
        self.prepared = Prepared(
            stamp=stamp,
            content=content_stamp(modules),
            gate_FD=None
            if parts.gate is None
            else parts.gate.weight_out_in().detach().contiguous(),
            up_FD=up_FD,
            norm_F=column_norms(parts.down.weight_out_in().detach()),
            tensors=moved,
        )
        self._serve()

    def _serve(self) -> None:
        """Let whatever runs the layer compute as many neurons as the spec says now."""
        prepared, spec = self.prepared, self.spec
        level = spec["selection"]["level"] if varies(spec) else None
        counts = (spec["num_candidates"], num_active(spec), is_copied(spec), level)
        if prepared.counts == counts:
            return
        prepared.counts = counts
        prepared.native = pack_native(
            spec, self.parts, prepared.tensors, prepared.norm_F, prepared.packed
        )
        prepared.packed = prepared.native or prepared.packed
        if prepared.native is None and not keeps_all(spec):
            self.widened()

    def widened(self) -> Widened:
        """What the PyTorch path reads, built when it first runs: the kernels never need it."""
        prepared = self.prepared
        if prepared.widened is None:
            prepared.widened = Widened.build(self.spec, prepared.tensors, self.parts.down_FD())
        found: Widened = prepared.widened
        return found

    def scores(self, h_NF: torch.Tensor, norm_F: torch.Tensor) -> torch.Tensor:
        """Neuron scores |h| * ||down_i||, or |h| (recipe `plain`), float32."""
        magnitude_NF = h_NF.detach().abs().float()
        return magnitude_NF if self.spec["score"] == "plain" else magnitude_NF * norm_F

    def estimated(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scores of the selectable units, the common neurons left out; hidden values [N, F]).

        Values are float32, and None where neurons that are not selected count as zero.
        """
        prepared, widened, spec = self.prepared, self.widened(), self.spec
        gated, predictor = prepared.gate_FD is not None, widened.predictor
        z_NM = predictor.estimate(x_ND)
        if spec["predictor"]["groups"]:
            return z_NM[:, spec["num_common"] // spec["group_size"] :], None
        value_NF = None
        if widened.estimate_FD is not None:
            value_NF = predictor.values(z_NM, self.parts.act, gated=gated)
        if value_NF is None or predictor.softens:
            size_NF = predictor.ranked(z_NM, self.parts.act, spec, gated=gated)
        else:
            size_NF = value_NF  # scores take its absolute value
        score_NF = self.scores(size_NF, prepared.norm_F)
        if is_relative(spec):
            whole_NF = value_NF
            if whole_NF is None:
                whole_NF = predictor.values(z_NM, self.parts.act, gated=gated)
            score_NF = relative_scores(score_NF, self.scores(whole_NF, prepared.norm_F))
        return unit_scores(score_NF[:, spec["num_common"] :], spec["group_size"]), value_NF

    def count(
        self, num_rows: int, dense_rows: torch.Tensor, *, kept: Any = 0, candidates: Any = 0
    ) -> None:
        """Add one call to the counters; neurons are those of the rows that did not run dense."""
        one = torch.ones_like(dense_rows)
        added = [one, one * num_rows, one * kept, one * candidates, dense_rows]
        self.counts.add_(torch.stack(added).to(self.counts.device))

    def forward(self, x_ND: torch.Tensor, dense_rows_N: torch.Tensor | None) -> torch.Tensor:
        """The FFN output [N, D] with selection at every row not marked in `dense_rows_N`."""
        if not torch.compiler.is_compiling() and self.prepared is None:
            self.prepare()
        if dense_rows_N is None and serves_native(self.prepared.native, x_ND):
            return run_native(self, x_ND)
        if keeps_all(self.spec):
            return self._every(x_ND, dense_rows_N)
        if dense_rows_N is None and x_ND.shape[0] == 1 and not torch.is_grad_enabled():
            return self.gathered(x_ND)
        return self.masked(x_ND, dense_rows_N)

    def _every(self, x_ND: torch.Tensor, dense_rows_N: torch.Tensor | None) -> torch.Tensor:
        """The output where every neuron is kept, so that nothing is to be estimated."""
        h_NF = self._hidden(x_ND)
        dense_N = ~h_NF.detach().isfinite().all(-1)
        if dense_rows_N is not None:
            dense_N = dense_N | dense_rows_N
        number = h_NF.shape[1] * (~dense_N).sum()
        self.count(x_ND.shape[0], dense_N.sum(), kept=number, candidates=number)
        return self.parts.down.run(h_NF)

    def masked(self, x_ND: torch.Tensor, dense_rows_N: torch.Tensor | None = None) -> torch.Tensor:
        """The slow twin: all neurons computed, those not selected replaced; any number of rows.

        Differentiable in the weights; the selection itself is not.
        """
        h_NF = self._hidden(x_ND)
        with torch.no_grad():
            unit_NS, value_NF = self.estimated(x_ND)
            candidate_NF = candidate_mask(self.spec, unit_NS)
            score_NF = zeroed(self.scores(h_NF, self.prepared.norm_F), candidate_NF)
            dense_N = ~(finite_rows(unit_NS) & finite_rows(score_NF))
            if dense_rows_N is not None:
                dense_N = dense_N | dense_rows_N
            chosen_NF = kept_mask(self.spec, candidate_NF, unit_NS, score_NF)
            self._count_masks(dense_N, chosen_NF, candidate_NF)
            dense_N1 = dense_N[:, None]
            keep_NF = chosen_NF | dense_N1
        y_ND = self.parts.down.run(zeroed(h_NF, keep_NF))
        if value_NF is None:
            return y_ND
        rest_NF = zeroed(value_NF, ~(candidate_NF | dense_N1))
        if chosen_NF is not candidate_NF:
            rest_NF = rest_NF + zeroed(h_NF.float(), candidate_NF & ~keep_NF)
        return self._with_rest(y_ND, rest_NF)

    def _count_masks(
        self, dense_N: torch.Tensor, chosen_NF: torch.Tensor, candidate_NF: torch.Tensor
    ) -> None:
        spec, sparse_N = self.spec, ~dense_N
        number = sparse_N.sum()
        kept, candidates = num_active(spec) * number, spec["num_candidates"] * number
        if varies(spec):
            kept, candidates = (
                (mask_NF & sparse_N[:, None]).sum() for mask_NF in (chosen_NF, candidate_NF)
            )
        self.count(len(dense_N), dense_N.sum(), kept=kept, candidates=candidates)

    def _with_rest(self, y_ND: torch.Tensor, rest_NF: torch.Tensor) -> torch.Tensor:
        """The output with what the neurons left out add by the low-bit copy."""
        return y_ND + (rest_NF @ self.widened().estimate_FD).to(y_ND.dtype)

    def _hidden(self, x_ND: torch.Tensor) -> torch.Tensor:
        parts = self.parts
        if parts.gate is None:
            return parts.act(parts.up.run(x_ND))
        if parts.gate.module is parts.up.module:
            pieces = parts.up.run(x_ND).chunk(parts.up.pieces, dim=-1)
            return parts.act(pieces[parts.gate.index]) * pieces[parts.up.index]
        return parts.act(parts.gate.run(x_ND)) * parts.up.run(x_ND)

    def gathered(self, x_1D: torch.Tensor) -> torch.Tensor:
        """The fast path for one row: reads candidate rows of gate and up, kept rows of down."""
        spec, compiling = self.spec, torch.compiler.is_compiling()
        unit_1S, rest_1F = self.estimated(x_1D)
        finite = unit_1S.isfinite().all()
        if not compiling and not bool(finite):
            return self._dense_row(x_1D)
        unit_1S = unit_1S.nan_to_num()
        index_C, counts_C = row_candidates(spec, unit_1S)
        h_1C = zeroed(self._hidden_rows(x_1D, index_C), counts_C)
        score_1C = self.scores(h_1C, self.prepared.norm_F[index_C])
        finite = finite & score_1C.isfinite().all()
        if not compiling and not bool(finite):
            return self._dense_row(x_1D)
        candidates = kept = number_of(index_C, counts_C)
        if rest_1F is not None:
            rest_1F = replaced(rest_1F, index_C, h_1C.float(), counts_C)
        counts_K = counts_C
        fewer = varies(spec) or spec["num_kept"] < spec["num_candidates"]
        if spec["keep"] == "top_k" and fewer:
            chosen_K, counts_K = row_kept(spec, unit_1S, score_1C.nan_to_num())
            h_1C, index_C = zeroed(h_1C[:, chosen_K], counts_K), index_C[chosen_K]
            kept = number_of(chosen_K, counts_K)
        y_1D = self._down(h_1C, index_C)
        if rest_1F is not None:
            zero_1K = torch.zeros_like(h_1C, dtype=torch.float32)
            y_1D = self._with_rest(y_1D, replaced(rest_1F, index_C, zero_1K, counts_K))
        sparse = finite.to(torch.int64)
        self.count(1, 1 - sparse, kept=kept * sparse, candidates=candidates * sparse)
        if compiling:
            # A graph cannot branch on data: a row with NaN or inf is recomputed densely in a
            # conditional that does nothing for other rows.
            y_1D = torch.cond(
                finite, lambda x, y: y.clone(), lambda x, y: self.dense(x).view_as(y), (x_1D, y_1D)
            )
        return y_1D

    def _hidden_rows(self, x_1D: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        prepared, parts = self.prepared, self.parts
        if index_C.shape[0] == prepared.up_FD.shape[0]:
            return self._hidden(x_1D)  # all of them, in order: nothing to gather
        up_1C = linear_rows(x_1D, prepared.up_FD, parts.up.bias(), index_C)
        if parts.gate is None:
            return parts.act(up_1C)
        gate_1C = linear_rows(x_1D, prepared.gate_FD, parts.gate.bias(), index_C)
        return parts.act(gate_1C) * up_1C

    def _down(self, h_1K: torch.Tensor, index_K: torch.Tensor) -> torch.Tensor:
        down, down_FD = self.parts.down, self.widened().down_FD
        if index_K.shape[0] == down_FD.shape[0]:
            return down.run(h_1K)
        offset = torch.zeros(1, dtype=torch.int64, device=h_1K.device)
        y_1D = F.embedding_bag(
            index_K,
            down_FD,
            offset,
            mode="sum",
            per_sample_weights=h_1K[0].to(down_FD.dtype),
        )
        bias = down.bias()
        return y_1D if bias is None else y_1D + bias

    def dense(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The FFN with every neuron, from the same parts."""
        return self.parts.down.run(self._hidden(x_ND))

    def _dense_row(self, x_1D: torch.Tensor) -> torch.Tensor:
        self.count(1, torch.ones((), dtype=torch.int64))
        return self.dense(x_1D)
