"""Prediction and selection: which neurons of an FFN, or rows of a head, are worth computing.

Shape suffixes: N rows (tokens), D width, F neurons, M predictor outputs (gate rows then up rows,
or up rows alone), C candidates, K kept, R rank, I input channels read, S scored units (neurons,
or groups of neurons).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

# One bit plane holds one bit of eight neighbouring codes in a byte, lowest bit first.
_BITS_IN_BYTE = 8
# What 4-bit codes stand for where levels are not even: dense around zero, as weights lie, with a
# step more on one side, so that a block's scale, of either sign, turns the wide side to its largest
# weight (as IQ4_NL of llama.cpp does; these have 7 bits and fit the models of docs/log.md).
NORMAL_LEVELS = (-63, -51, -40, -31, -24, -17, -11, -5, 1, 6, 12, 18, 25, 33, 42, 55)
LONGEST_NORMAL_BLOCK = 2**16  # sums of levels times digits over a block are 32 bits wide
FFN_PARTS = ("predictor", "candidates", "kept", "unselected")  # what `layer_bytes` tells apart

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


def eager_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether no graph is being made and looking at values waits for no device."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def kth_score(score_NS: torch.Tensor, num: int) -> torch.Tensor:
    """The `num`-th largest score of each row, [N, 1]."""
    if not eager_on_cpu(score_NS):
        return score_NS.topk(num, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    place = score_NS.shape[-1] - num  # numpy's is ten times as fast as torch.topk
    parted_NS = np.partition(score_NS.detach().numpy(), place, axis=-1)
    return torch.from_numpy(parted_NS[..., place, None].copy())


def best(score_NS: torch.Tensor, num: int) -> torch.Tensor:
    """bool [N, S]: the `num` largest scores of each row; what ties with the last stays too."""
    return score_NS >= kth_score(score_NS, num)


def top_k_mask(score_NS: torch.Tensor, num: int) -> torch.Tensor:
    """bool [N, S]: the members of `top_k_indices`, found faster than their indices.

    What is above the last value that goes in, then as many that equal it, from the lowest index.
    """
    if num == score_NS.shape[-1]:
        return torch.ones_like(score_NS, dtype=torch.bool)
    last_N1 = kth_score(score_NS, num)
    mask_NS = score_NS >= last_N1
    if eager_on_cpu(score_NS) and bool((mask_NS.float().sum(-1) == num).all()):
        return mask_NS  # no ties
    above_NS, equal_NS = score_NS > last_N1, score_NS == last_N1
    open_N1 = num - above_NS.sum(-1, keepdim=True)
    return above_NS | (equal_NS & (equal_NS.cumsum(-1, dtype=torch.int32) <= open_N1))


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
    kth_N1 = kth_score(score_NF, num_kept)
    hits_N = (chosen_NF & (score_NF >= kth_N1)).sum(-1).clamp(max=num_kept)
    return hits_N.float() / num_kept


# --------------------------------------------------------------------------- predictor


def unpack_planes(planes: torch.Tensor, length: int) -> torch.Tensor:
    """Codes uint8 [rows, length] from bit planes uint8 [bits, rows, ceil(length / 8)]."""
    shift = torch.arange(_BITS_IN_BYTE, device=planes.device, dtype=torch.uint8)
    codes = torch.zeros(planes.shape[1], length, dtype=torch.uint8, device=planes.device)
    for bit, plane in enumerate(planes):
        ones = ((plane[..., None] >> shift) & 1).flatten(-2)[:, :length]
        codes |= ones << bit
    return codes


def has_normal_levels(spec: Mapping[str, Any]) -> bool:
    """Whether codes stand for NORMAL_LEVELS, not for evenly spaced levels."""
    return spec.get("levels", "even") == "normal"


def decode_blocks(
    tensors: Mapping[str, torch.Tensor], spec: Mapping[str, Any], length: int
) -> torch.Tensor:
    """The quantized copy in float32, as stored: [M, D], or channel-major [D, M]."""
    codes = unpack_planes(tensors["planes"], length)
    block = min(spec["block"], length)
    if has_normal_levels(spec):
        scale_AG = tensors["scale_codes"].float() * tensors["scale_unit"].float()[:, None]
        level_16 = torch.tensor(NORMAL_LEVELS, dtype=torch.float32, device=codes.device)
        scale = scale_AG.repeat_interleave(block, dim=1)[:, :length]
        return level_16[codes.int()] * scale
    codes = codes.float()
    scale = tensors["scale"].float().repeat_interleave(block, dim=1)[:, :length]
    if spec["symmetric"]:
        return (codes - (2 ** spec["bits"] - 1) / 2) * scale
    offset = tensors["offset"].float().repeat_interleave(block, dim=1)[:, :length]
    return codes * scale + offset


def decode_down(
    tensors: Mapping[str, torch.Tensor], spec: Mapping[str, Any], width: int
) -> torch.Tensor:
    """float32 [F, D]: the low-bit copy of the output vectors, for neurons that are not selected."""
    prefix = "down_"
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    return decode_blocks(own, spec, width)


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
        # None where the kind of predictor has no such part.
        self.copy: Any = None
        self.loudness_D: Any = None
        self.inverse_scale_D: Any = None
        if spec["kind"] in ("q", "qlr"):
            length = num_outputs if self.channel_major else width
            self.copy = decode_blocks(tensors, spec, length)
            self.inverse_scale_D = 1.0 / tensors["column_scale"].float()
            if self.channel_major:
                self.loudness_D = self.copy.norm(dim=1)
        self.factor_in_RD: Any = None
        self.factor_out_MR: Any = None
        if spec["kind"] in ("lr", "qlr"):
            bits, rank = spec["factor_bits"], spec["rank"]
            self.factor_in_RD = decode_factor(tensors, "factor_in", bits, width)
            self.factor_out_MR = decode_factor(tensors, "factor_out", bits, rank)
        self.soft_M: Any = tensors["soft"].float() if spec.get("soften") else None

    @property
    def softens(self) -> bool:
        """Whether sizes are other than those of the estimated values."""
        return self.soft_M is not None

    def estimate(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Estimated outputs float32 [N, M] for inputs [N, D]."""
        centred_ND = x_ND.float() - self.mean_D
        z_NM = self.bias_M.expand(x_ND.shape[0], -1)
        if self.copy is not None:
            z_NM = self._quantized(centred_ND * self.inverse_scale_D)
        if self.factor_in_RD is not None:
            z_NM = z_NM + F.linear(F.linear(centred_ND, self.factor_in_RD), self.factor_out_MR)
        return z_NM

    @staticmethod
    def values(z_NM: torch.Tensor, act: Any, *, gated: bool) -> torch.Tensor:
        """Hidden values float32 [N, F] of neurons whose first matrices gave the estimates."""
        if not gated:
            return act(z_NM)
        gate_NF, up_NF = z_NM.chunk(2, dim=-1)
        return act(gate_NF) * up_NF

    def ranked(
        self, z_NM: torch.Tensor, act: Any, layer: Mapping[str, Any], *, gated: bool
    ) -> torch.Tensor:
        """What candidates are ranked by, before output vectors' lengths: sizes, or errors."""
        if layer["score"] == "error":
            rest_error = layer["unselected"]["error"]
            return expected_errors(z_NM, self.soft_M, act, rest_error, gated=gated)
        return self.sizes(z_NM, act, gated=gated)

    def sizes(self, z_NM: torch.Tensor, act: Any, *, gated: bool) -> torch.Tensor:
        """Sizes float32 [N, F] of the hidden values that go with the estimates.

        Softened, they are the root mean squares over estimates one typical error above and below:
        an estimate near zero does not mean a small value, only an unknown one.
        """
        if self.soft_M is None:
            return self.values(z_NM, act, gated=gated).abs()
        if not gated:
            return _two_point_size(act(z_NM + self.soft_M), act(z_NM - self.soft_M))
        gate_NF, up_NF = z_NM.chunk(2, dim=-1)
        soft_gate_F, soft_up_F = self.soft_M.chunk(2)
        gate_NF = _two_point_size(act(gate_NF + soft_gate_F), act(gate_NF - soft_gate_F))
        return gate_NF * _two_point_size(up_NF + soft_up_F, up_NF - soft_up_F)

    def _quantized(self, scaled_ND: torch.Tensor) -> torch.Tensor:
        """The bias and what the copy makes of the input."""
        if not self.channel_major:
            return F.linear(scaled_ND, self.copy, self.bias_M)
        loud_NI = top_k_indices((scaled_ND * self.loudness_D).abs().nan_to_num(), self.num_inputs)
        if scaled_ND.shape[0] == 1:
            return self.bias_M + scaled_ND[:, loud_NI[0]] @ self.copy[loud_NI[0]]
        loud_ND = scaled_ND * members_mask(loud_NI, scaled_ND.shape[1])
        return torch.addmm(self.bias_M, loud_ND, self.copy)


@dataclass(frozen=True)
class Widened:
    """What the PyTorch path reads beside the weights, in types that products take."""

    predictor: Predictor
    down_FD: torch.Tensor  # the output vectors by rows
    estimate_FD: Any  # their low-bit copy for neurons that are not selected, or None

    @classmethod
    def build(
        cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], down_FD: torch.Tensor
    ) -> "Widened":
        """The copies for one layer: 12 bytes for each weight of `down_FD` or more."""
        width, rest = down_FD.shape[1], spec.get("unselected")
        # Gradients pass through them: inference tensors cannot serve those.
        with torch.inference_mode(False), torch.no_grad():
            return cls(
                Predictor(spec["predictor"], tensors, width),
                down_FD.detach().contiguous(),
                None if rest is None else decode_down(tensors, rest, width),
            )


def expected_errors(
    z_NM: torch.Tensor, soft_M: torch.Tensor, act: Any, rest_error: float, *, gated: bool
) -> torch.Tensor:
    """Typical errors float32 [N, F] of hidden values that count by the estimates `z_NM`.

    Root of the sum of squares of what is due to the gate's typical error (`soft_M` [M]), to up's,
    and to the copy of the output vector, which is off by `rest_error` of its length.
    """
    if not gated:
        active_NF = act(z_NM)
        part_NF = act(z_NM + soft_M) - active_NF
        return (part_NF.square() + (active_NF * rest_error).square()).sqrt()
    (gate_NF, up_NF), (soft_F, soft_up_F) = z_NM.chunk(2, dim=-1), soft_M.chunk(2)
    active_NF = act(gate_NF)
    by_gate_NF = (act(gate_NF + soft_F) - active_NF) * up_NF
    square_NF = by_gate_NF.square() + (active_NF * soft_up_F).square()
    return (square_NF + (active_NF * up_NF * rest_error).square()).sqrt()


def relative_scores(score_NF: torch.Tensor, size_NF: torch.Tensor) -> torch.Tensor:
    """Scores [N, F] as shares of the root of the sum of squares of a row's estimated sizes [N, F].

    A size being the length of what the neuron adds to the output, that is the output's length were
    all neurons' output vectors at right angles.
    """
    return score_NF / size_NF.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def column_norms(weight_DF: torch.Tensor) -> torch.Tensor:
    """float32 [F], some rows at a time: a copy of the matrix in float32 would cost more than it."""
    return torch.stack([c.float().square().sum(0) for c in weight_DF.split(64)]).sum(0).sqrt()


def _two_point_size(above_NF: torch.Tensor, below_NF: torch.Tensor) -> torch.Tensor:
    """Root mean square of two values that are equally likely."""
    return ((above_NF.square() + below_NF.square()) / 2).sqrt()


def predictor_bytes(spec: Mapping[str, Any], width: int, num_outputs: int) -> int:
    """Bytes of predictor tensors read for one row (loud channels only, everything else in full)."""
    total = 4 * (width + num_outputs)  # mean and bias
    if spec["kind"] in ("q", "qlr"):
        rows, length = (
            (spec["num_inputs"], num_outputs)
            if spec["num_inputs"] < width
            else (num_outputs, width)
        )
        total += rows * _low_bit_row_bytes(spec, length) + 4 * width
    if spec["kind"] in ("lr", "qlr"):
        rank, bits = spec["rank"], spec["factor_bits"]
        total += rank * (width + num_outputs) * bits // _BITS_IN_BYTE
        total += 0 if bits == 16 else 4 * (rank + num_outputs)
    return total + (2 * num_outputs if spec.get("soften") else 0)


def _low_row_bytes(copy: Mapping[str, Any], width: int) -> int:
    """Bytes that a refined row adds to its row of the copy: codes and one scale a block."""
    return _low_bit_row_bytes({"bits": copy["bits"], "block": copy["block"], "symmetric": 1}, width)


def _low_bit_row_bytes(spec: Mapping[str, Any], width: int) -> int:
    """Bytes of one row of a low-bit copy with its scales."""
    codes, blocks = int(spec["bits"]) * math.ceil(width / _BITS_IN_BYTE), width / spec["block"]
    if has_normal_levels(spec):
        return codes + math.ceil(blocks) + 4  # a unit of the row's scales
    return codes + (2 if spec["symmetric"] else 4) * math.ceil(blocks)


def varies(spec: Mapping[str, Any]) -> bool:
    """Whether a layer keeps another number of neurons for each row."""
    return spec.get("selection") is not None


def is_relative(spec: Mapping[str, Any]) -> bool:
    """Whether a row's scores count by their share of what its neurons add up to."""
    return varies(spec) and spec["selection"]["rule"] == "relative"


def is_refined(spec: Mapping[str, Any]) -> bool:
    """Whether a layer's weights are its 4-bit copies and a few bits more."""
    return spec.get("rows", "stored") == "refined"


def is_copied(spec: Mapping[str, Any]) -> bool:
    """Whether a layer's weights are its 4-bit copies, by which every neuron counts."""
    return spec.get("rows", "stored") == "copies"


def is_rounded(spec: Mapping[str, Any]) -> bool:
    """Whether a layer's weights are others than the model's it was made from."""
    return is_refined(spec) or is_copied(spec)


def num_active(spec: Mapping[str, Any]) -> int:
    """Neurons of a layer whose output counts: the kept ones (their mean), or every candidate."""
    if varies(spec):
        return int(spec["selection"]["mean_kept"] + 0.5)
    return int(spec["num_kept" if spec["keep"] == "top_k" else "num_candidates"])


def keeps_all(spec: Mapping[str, Any]) -> bool:
    """Whether every neuron of a layer is kept in every row."""
    return not varies(spec) and num_active(spec) == int(spec["num_neurons"])


def layer_bytes(
    spec: Mapping[str, Any], width: int, num_matrices: int, weight_bytes: int
) -> dict[str, int]:
    """Bytes one row reads: predictor, candidates' first matrices, down rows; and dense.

    Down rows are those of the kept neurons and, where the others count by estimate, the low-bit
    rows of the rest; of 4 bits those of all, which the kernels read as they lie. Refined rows are
    the low-bit ones and what these left over, copied ones the low-bit ones alone. Where the number
    of neurons kept varies, the bytes of the mean.
    """
    units = (
        spec["num_neurons"] // spec["group_size"]
        if spec["predictor"]["groups"]
        else spec["num_neurons"]
    )
    outputs = units if spec["predictor"]["groups"] else units * (num_matrices - 1)
    row = width * weight_bytes
    exact = num_active(spec) if spec["keep"] == "candidates" else spec["num_candidates"]
    unselected = spec.get("unselected")
    all_rest = unselected is not None and unselected["bits"] == 4
    rest = spec["num_neurons"] - (0 if all_rest else num_active(spec))
    first = last = row
    if is_refined(spec):
        first, last = (_low_row_bytes(spec[key], width) for key in ("predictor", "unselected"))
    if is_copied(spec):
        first = last = 0
    return {
        "predictor": predictor_bytes(spec["predictor"], width, outputs),
        "unselected": 0 if unselected is None else rest * _low_bit_row_bytes(unselected, width),
        "candidates": exact * (num_matrices - 1) * first,
        "kept": num_active(spec) * last,
        "dense": spec["num_neurons"] * num_matrices * row,
    }


def head_copy_bytes(shape_VD: Sequence[int], bits: int) -> tuple[int, int]:
    """(bytes read of every row together, of one row read on) of a head's copy for the kernels.

    A sixteenth of the columns has 8 bits a weight, the others `bits`: of 8 the high nibble is read
    of every row, the low one of rows read on. Each row has two scales and a bound, then a bound.
    """
    rows, width = shape_VD
    loud = num_loud(width)
    quiet = width - loud
    every = -(-loud // 4) * 4 + -(-quiet // 8) * 4 + 6
    rest = quiet % 128
    low = quiet // 128 * 64 + (64 if rest > 64 else 32 if rest else 0)
    return rows * every, low + 2 if bits == 8 else 0


def num_loud(width: int) -> int:
    """Columns of a head's copy kept in 8 bits: a sixteenth, in fours."""
    return min(width, -(-width // 64) * 4)
