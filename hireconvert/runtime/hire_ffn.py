"""Sparse feed-forward layers: predict, over-select, compute exactly, keep the exact top k.

Shape suffixes: N rows (tokens), D width, F neurons, M predictor outputs (gate rows then up rows,
or up rows alone), C candidates, K kept, R rank, S scored units (neurons, or groups of neurons).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

COUNTER_NAMES = ("calls", "rows", "kept", "candidates", "dense_rows")
# One bit plane holds one bit of eight neighbouring codes in a byte, lowest bit first.
_BITS_IN_BYTE = 8


# --------------------------------------------------------------------------- selection


def top_k_indices(score_NS: torch.Tensor, num: int) -> torch.Tensor:
    """The `num` largest scores of each row as ascending indices; ties go to the lowest index.

    `torch.topk` leaves the order of ties open, so the index is packed under the score: float32
    bits mapped to a signed integer that orders like the float, then 2^32 - 1 - index below it.
    Scores must not be NaN. Returns int64 [N, num].
    """
    bits_NS = (score_NS.float() + 0.0).view(torch.int32).to(torch.int64)
    ordered_NS = bits_NS ^ ((bits_NS >> 31) & 0x7FFFFFFF)
    low_S = 0xFFFFFFFF - torch.arange(score_NS.shape[-1], device=score_NS.device)
    key_NS = (ordered_NS << 32) | low_S
    return key_NS.topk(num, dim=-1, sorted=False).indices.sort(dim=-1).values


def members_mask(index_NK: torch.Tensor, num: int) -> torch.Tensor:
    """A bool mask [N, num] that is true at the given indices."""
    mask_NS = torch.zeros(*index_NK.shape[:-1], num, dtype=torch.bool, device=index_NK.device)
    return mask_NS.scatter_(-1, index_NK, True)


def unit_scores(score_NF: torch.Tensor, group_size: int) -> torch.Tensor:
    """Scores of the selectable units [N, F / g]: the L2 norm over each group of neurons."""
    if group_size == 1:
        return score_NF
    return score_NF.unflatten(-1, (-1, group_size)).norm(dim=-1)


def expand_units(index_NS: torch.Tensor, group_size: int, num_common: int) -> torch.Tensor:
    """Neuron indices of the chosen units: the common neurons first, then members of each group."""
    if group_size > 1:
        member_G = torch.arange(group_size, device=index_NS.device)
        index_NS = (index_NS[..., None] * group_size + member_G).flatten(-2)
    if num_common == 0:
        return index_NS
    common_NC = torch.arange(num_common, device=index_NS.device).expand(*index_NS.shape[:-1], -1)
    return torch.cat([common_NC, index_NS + num_common], dim=-1)


def select_neurons(
    unit_NS: torch.Tensor, num: int, group_size: int, num_common: int
) -> torch.Tensor:
    """Ascending neuron indices [N, num]: the common ones and the best units of the rest."""
    num_units = (num - num_common) // group_size
    return expand_units(top_k_indices(unit_NS, num_units), group_size, num_common)


def recall_at(score_NF: torch.Tensor, chosen_NF: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Share of each row's true top `num_kept` that `chosen_NF` holds, float32 [N].

    Every neuron that scores at least the k-th score counts as a member of the top k, so ties
    neither help nor hurt.
    """
    kth_N1 = score_NF.topk(num_kept, dim=-1).values[..., -1:]
    hits_N = (chosen_NF & (score_NF >= kth_N1)).sum(-1).clamp(max=num_kept)
    return hits_N.float() / num_kept


# --------------------------------------------------------------------------- where the parts lie


@dataclass(frozen=True)
class Part:
    """One matrix of an FFN inside a module: a Linear, a Conv1D or a slice of a fused Linear."""

    module: nn.Module
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
        """Whether the module is a plain layer whose weight may be read row by row."""
        return isinstance(self.module, nn.Linear | Conv1D)

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
    act: Callable[[torch.Tensor], torch.Tensor]

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


def weight_stamp(modules: list[nn.Module]) -> tuple[Any, ...]:
    """A value that changes when a weight does: identity, version counter and sampled content.

    The version counter misses writes through `.data` (LoRA merging does that), so about a
    thousand elements spread over each tensor are summed as integers as well.
    """
    stamp: list[Any] = []
    for module in modules:
        weight = module.weight.detach()
        stride = max(1, weight.numel() // 1009)
        sample = weight.reshape(-1)[::stride].double()
        weights = torch.arange(1, sample.numel() + 1, dtype=torch.float64, device=sample.device)
        content = float((sample * weights).sum())
        stamp.append(
            (
                weight.data_ptr(),
                module.weight._version,
                weight.dtype,
                str(weight.device),
                tuple(weight.shape),
                content,
            )
        )
    return tuple(stamp)


# --------------------------------------------------------------------------- predictor


def unpack_planes(planes: torch.Tensor, length: int) -> torch.Tensor:
    """Codes uint8 [rows, length] from bit planes uint8 [bits, rows, ceil(length / 8)]."""
    shift = torch.arange(_BITS_IN_BYTE, device=planes.device, dtype=torch.uint8)
    codes = torch.zeros(planes.shape[1], length, dtype=torch.uint8, device=planes.device)
    for bit, plane in enumerate(planes):
        ones = ((plane[..., None] >> shift) & 1).flatten(-2)[:, :length]
        codes |= ones << bit
    return codes


def decode_blocks(
    tensors: Mapping[str, torch.Tensor], spec: Mapping[str, Any], length: int
) -> torch.Tensor:
    """The quantized copy in float32, as stored: [M, D], or channel-major [D, M]."""
    codes = unpack_planes(tensors["planes"], length).float()
    block = spec["block"]
    scale = tensors["scale"].float().repeat_interleave(block, dim=1)[:, :length]
    if spec["symmetric"]:
        return (codes - (2 ** spec["bits"] - 1) / 2) * scale
    offset = tensors["offset"].float().repeat_interleave(block, dim=1)[:, :length]
    return codes * scale + offset


def decode_factor(
    tensors: Mapping[str, torch.Tensor], name: str, factor_bits: int, columns: int
) -> torch.Tensor:
    """A low-rank factor in float32 from its 16-, 8- or 4-bit form."""
    if factor_bits == 16:
        return tensors[name].float()
    codes = tensors[f"{name}_codes"]
    if factor_bits == 4:
        low, high = codes.bitwise_and(0xF), codes.view(torch.uint8) >> 4
        codes = (
            torch.stack([low.view(torch.uint8), high], dim=-1)
            .flatten(-2)[:, :columns]
            .to(torch.int16)
            - 8
        )
    return codes.float() * tensors[f"{name}_scale"].float()[:, None]


class Predictor:
    """Estimates what the FFN's first matrices would give, from far fewer bytes.

    Holds float32 tensors ready for matrix products; the tensors on disk stay what they are.
    """

    def __init__(
        self, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], width: int
    ) -> None:
        self.num_inputs: int = spec["num_inputs"]
        self.mean_D = tensors["mean"].float()
        self.bias_M = tensors["bias"].float()
        num_outputs = self.bias_M.shape[0]
        self.channel_major = self.num_inputs < width
        self.copy: torch.Tensor | None = None
        self.loudness_D: torch.Tensor | None = None
        self.inverse_scale_D: torch.Tensor | None = None
        if spec["kind"] in ("q", "qlr"):
            length = num_outputs if self.channel_major else width
            self.copy = decode_blocks(tensors, spec, length)
            self.inverse_scale_D = 1.0 / tensors["column_scale"].float()
            if self.channel_major:
                self.loudness_D = self.copy.norm(dim=1)
        self.factor_in_RD: torch.Tensor | None = None
        self.factor_out_MR: torch.Tensor | None = None
        if spec["kind"] in ("lr", "qlr"):
            bits, rank = spec["factor_bits"], spec["rank"]
            self.factor_in_RD = decode_factor(tensors, "factor_in", bits, width)
            self.factor_out_MR = decode_factor(tensors, "factor_out", bits, rank)

    def estimate(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Estimated outputs float32 [N, M] for inputs [N, D]."""
        centred_ND = x_ND.float() - self.mean_D
        z_NM = self.bias_M.expand(x_ND.shape[0], -1)
        if self.copy is not None:
            z_NM = z_NM + self._quantized(centred_ND * self.inverse_scale_D)
        if self.factor_in_RD is not None:
            z_NM = z_NM + F.linear(F.linear(centred_ND, self.factor_in_RD), self.factor_out_MR)
        return z_NM

    def _quantized(self, scaled_ND: torch.Tensor) -> torch.Tensor:
        if not self.channel_major:
            return F.linear(scaled_ND, self.copy)
        loud_NI = top_k_indices((scaled_ND * self.loudness_D).abs().nan_to_num(), self.num_inputs)
        if scaled_ND.shape[0] == 1:
            return scaled_ND[:, loud_NI[0]] @ self.copy[loud_NI[0]]
        return (scaled_ND * members_mask(loud_NI, scaled_ND.shape[1])) @ self.copy


def predictor_bytes(spec: Mapping[str, Any], width: int, num_outputs: int) -> int:
    """Bytes of predictor tensors read for one row (loud channels only, everything else in full)."""
    total = 4 * (width + num_outputs)  # mean and bias
    if spec["kind"] in ("q", "qlr"):
        rows, length = (
            (spec["num_inputs"], num_outputs)
            if spec["num_inputs"] < width
            else (num_outputs, width)
        )
        blocks = math.ceil(length / spec["block"])
        scales = 2 if spec["symmetric"] else 4
        total += (
            rows * (spec["bits"] * math.ceil(length / _BITS_IN_BYTE) + scales * blocks) + 4 * width
        )
    if spec["kind"] in ("lr", "qlr"):
        rank, bits = spec["rank"], spec["factor_bits"]
        total += rank * (width + num_outputs) * bits // _BITS_IN_BYTE
        total += 0 if bits == 16 else 4 * (rank + num_outputs)
    return total


def layer_bytes(
    spec: Mapping[str, Any], width: int, num_matrices: int, weight_bytes: int
) -> dict[str, int]:
    """Bytes one row reads: predictor, candidates' first matrices, kept down rows; and dense."""
    units = (
        spec["num_neurons"] // spec["group_size"]
        if spec["predictor"]["groups"]
        else spec["num_neurons"]
    )
    outputs = units if spec["predictor"]["groups"] else units * (num_matrices - 1)
    row = width * weight_bytes
    return {
        "predictor": predictor_bytes(spec["predictor"], width, outputs),
        "candidates": spec["num_candidates"] * (num_matrices - 1) * row,
        "kept": (spec["num_kept"] if spec["keep"] == "top_k" else spec["num_candidates"]) * row,
        "dense": spec["num_neurons"] * num_matrices * row,
    }


# --------------------------------------------------------------------------- the sparse layer


@dataclass
class Prepared:
    """Tensors derived from the live weights, valid while `stamp` matches them."""

    stamp: tuple[Any, ...]
    gate_FD: torch.Tensor | None
    up_FD: torch.Tensor
    down_FD: torch.Tensor
    norm_F: torch.Tensor
    predictor: Predictor


class SparseFfn(nn.Module):
    """Selection and sparse arithmetic of one layer; sits beside the dense weights as `hire`."""

    def __init__(
        self, spec: Mapping[str, Any], parts: FfnParts, dense: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        self.spec = dict(spec)
        # Plain containers keep the parts out of the module tree: their names must not change.
        self._parts = (parts,)
        self._dense = dense
        self.predictor_tensors: dict[str, torch.Tensor] = {}
        self.prepared: Prepared | None = None
        self.register_buffer(
            "counts", torch.zeros(len(COUNTER_NAMES), dtype=torch.int64), persistent=False
        )

    @property
    def parts(self) -> FfnParts:
        """The layer's matrices; read anew so that a replaced weight is seen."""
        return self._parts[0]

    def usable(self) -> bool:
        """Whether the weights are plain layers; serving engines put fused or sharded ones there."""
        return all(part.known for part in self.parts.matrices())

    @torch.no_grad()
    def prepare(self) -> None:
        """Build the derived tensors, or rebuild them when a weight has changed."""
        parts = self.parts
        modules = [part.module for part in parts.matrices()]
        stamp = weight_stamp(modules)
        if self.prepared is not None and self.prepared.stamp == stamp:
            return
        if not self.predictor_tensors:
            raise RuntimeError(
                "hire: predictor tensors are not loaded; load the checkpoint with from_pretrained"
            )
        up_FD = parts.up.weight_out_in().detach().contiguous()
        down_FD = parts.down_FD().detach().contiguous()
        moved = {name: tensor.to(up_FD.device) for name, tensor in self.predictor_tensors.items()}
        self.prepared = Prepared(
            stamp=stamp,
            gate_FD=None
            if parts.gate is None
            else parts.gate.weight_out_in().detach().contiguous(),
            up_FD=up_FD,
            down_FD=down_FD,
            norm_F=down_FD.float().norm(dim=1),
            predictor=Predictor(self.spec["predictor"], moved, up_FD.shape[1]),
        )

    def scores(self, h_NF: torch.Tensor, norm_F: torch.Tensor) -> torch.Tensor:
        """Neuron scores |h| * ||down_i|| (recipe `norm`) or |h| (`plain`), float32."""
        magnitude_NF = h_NF.detach().abs().float()
        return magnitude_NF * norm_F if self.spec["score"] == "norm" else magnitude_NF

    def estimated_units(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Predicted scores of the selectable units, the common neurons left out."""
        prepared, spec = self.prepared, self.spec
        z_NM = prepared.predictor.estimate(x_ND)
        if spec["predictor"]["groups"]:
            return z_NM[:, spec["num_common"] // spec["group_size"] :]
        if prepared.gate_FD is None:
            h_NF = self.parts.act(z_NM)
        else:
            gate_NF, up_NF = z_NM.chunk(2, dim=-1)
            h_NF = self.parts.act(gate_NF) * up_NF
        score_NF = self.scores(h_NF, prepared.norm_F)
        return unit_scores(score_NF[:, spec["num_common"] :], spec["group_size"])

    def count(self, num_rows: int, dense_rows: torch.Tensor) -> None:
        """Add one call to the counters; rows that ran dense count as such and not as kept."""
        spec = self.spec
        sparse_rows = num_rows - dense_rows
        kept = spec["num_kept"] if spec["keep"] == "top_k" else spec["num_candidates"]
        one = torch.ones_like(dense_rows)
        self.counts.add_(
            torch.stack(
                [
                    one,
                    one * num_rows,
                    sparse_rows * kept,
                    sparse_rows * spec["num_candidates"],
                    dense_rows,
                ]
            ).to(self.counts.device)
        )

    def forward(self, x_ND: torch.Tensor, dense_rows_N: torch.Tensor | None) -> torch.Tensor:
        """The FFN output [N, D] with selection at every row not marked in `dense_rows_N`."""
        if not torch.compiler.is_compiling() and (self.prepared is None or self.training):
            self.prepare()
        if x_ND.shape[0] == 1 and dense_rows_N is None and not torch.is_grad_enabled():
            return self.gathered(x_ND)
        return self.masked(x_ND, dense_rows_N)

    def masked(self, x_ND: torch.Tensor, dense_rows_N: torch.Tensor | None = None) -> torch.Tensor:
        """The slow twin: all neurons computed, those not selected set to zero; any number of rows.

        Differentiable in the weights; the selection itself is not.
        """
        parts = self.parts
        h_NF = self._hidden(x_ND)
        with torch.no_grad():
            unit_NS = self.estimated_units(x_ND)
            score_NF = self.scores(h_NF, self.prepared.norm_F)
            dense_N = ~(unit_NS.isfinite().all(-1) & score_NF.isfinite().all(-1))
            num_bad = dense_N.sum()
            keep_NF = self.kept_mask(unit_NS.nan_to_num(), score_NF.nan_to_num())
            if dense_rows_N is not None:
                dense_N = dense_N | dense_rows_N
                num_bad = dense_N.sum()
            keep_NF = keep_NF | dense_N[:, None]
            self.count(x_ND.shape[0], num_bad)
        return parts.down.run(torch.where(keep_NF, h_NF, torch.zeros_like(h_NF)))

    def kept_mask(self, unit_NS: torch.Tensor, score_NF: torch.Tensor) -> torch.Tensor:
        """The mask [N, F] of active neurons from estimated unit scores and exact neuron scores."""
        spec = self.spec
        group, common, total = spec["group_size"], spec["num_common"], spec["num_neurons"]
        candidate_NC = select_neurons(unit_NS, spec["num_candidates"], group, common)
        candidate_NF = members_mask(candidate_NC, total)
        if spec["keep"] == "candidates":
            return candidate_NF
        exact_NF = torch.where(candidate_NF, score_NF, torch.full_like(score_NF, -1.0))
        exact_NS = exact_NF[:, common:]
        if group > 1:
            # Members of a group are candidates together, so a negative entry marks a whole group.
            outside_NS = exact_NS.unflatten(-1, (-1, group))[..., 0] < 0
            exact_NS = unit_scores(exact_NS, group).masked_fill(outside_NS, -1.0)
        kept_NK = select_neurons(exact_NS, spec["num_kept"], group, common)
        return members_mask(kept_NK, total)

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
        prepared, spec, parts = self.prepared, self.spec, self.parts
        unit_1S = self.estimated_units(x_1D)
        finite = unit_1S.isfinite().all()
        if not torch.compiler.is_compiling() and not bool(finite):
            return self._dense_row(x_1D)
        index_C = select_neurons(
            unit_1S.nan_to_num(), spec["num_candidates"], spec["group_size"], spec["num_common"]
        )[0]
        h_1C = _linear_rows(x_1D, prepared.up_FD, parts.up.bias(), index_C)
        if parts.gate is not None:
            h_1C = (
                parts.act(_linear_rows(x_1D, prepared.gate_FD, parts.gate.bias(), index_C)) * h_1C
            )
        else:
            h_1C = parts.act(h_1C)
        score_1C = self.scores(h_1C, prepared.norm_F[index_C])
        finite = finite & score_1C.isfinite().all()
        if not torch.compiler.is_compiling() and not bool(finite):
            return self._dense_row(x_1D)
        if spec["keep"] == "top_k" and spec["num_kept"] < spec["num_candidates"]:
            chosen_K = self._best_candidates(score_1C.nan_to_num())
            h_1C, index_C = h_1C[:, chosen_K], index_C[chosen_K]
        y_1D = self._down(h_1C, index_C)
        self.count(1, (~finite).to(torch.int64))
        if torch.compiler.is_compiling():
            # A graph cannot branch on data: a row with NaN or inf is recomputed densely in a
            # conditional that does nothing for other rows.
            y_1D = torch.cond(
                finite, lambda x, y: y.clone(), lambda x, y: self._dense(x).view_as(y), (x_1D, y_1D)
            )
        return y_1D

    def _best_candidates(self, score_1C: torch.Tensor) -> torch.Tensor:
        """Positions within the candidates of the kept neurons, ascending."""
        spec = self.spec
        common, group = spec["num_common"], spec["group_size"]
        unit_1S = unit_scores(score_1C[:, common:], group)
        return select_neurons(unit_1S, spec["num_kept"], group, common)[0]

    def _down(self, h_1K: torch.Tensor, index_K: torch.Tensor) -> torch.Tensor:
        down, prepared = self.parts.down, self.prepared
        if index_K.shape[0] == prepared.down_FD.shape[0]:
            return down.run(h_1K)
        offset = torch.zeros(1, dtype=torch.int64, device=h_1K.device)
        y_1D = F.embedding_bag(
            index_K,
            prepared.down_FD,
            offset,
            mode="sum",
            per_sample_weights=h_1K[0].to(prepared.down_FD.dtype),
        )
        bias = down.bias()
        return y_1D if bias is None else y_1D + bias

    def _dense_row(self, x_1D: torch.Tensor) -> torch.Tensor:
        self.count(1, torch.ones((), dtype=torch.int64))
        return self._dense(x_1D)


def _linear_rows(
    x_1D: torch.Tensor, weight_FD: torch.Tensor, bias_F: torch.Tensor | None, index_C: torch.Tensor
) -> torch.Tensor:
    """Products of the input with the chosen rows, [1, C]."""
    bias_C = None if bias_F is None else bias_F[index_C]
    return F.linear(x_1D, weight_FD.index_select(0, index_C), bias_C)
