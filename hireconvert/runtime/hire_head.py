"""Sparse LM head: estimate every logit cheaply, rescore the best rows exactly, certify if asked.

Shape suffixes: N rows (positions), D width, V vocabulary, R rank, C rescored rows.

The reference head, to which a certificate refers: products of the stored weight row and hidden
state in float64 (exact for float32 and narrower), summed in float64 by halves (`exact_rows`; from
another order another float32 may follow), rounded once to float32; ties go to the lowest id. With
e_i >= ||W_i - Wq_i|| + gamma ||Wq_i||, gamma covering the rounding of the float32 estimate,

    |W_i x - estimate_i| <= e_i ||x||

so a row whose estimate + e_i ||x|| stays below the n-th best exactly known logit is not among the
best n. Soft-capping and rounding are monotone; the comparison is made after both, with a margin.

This is the PyTorch path. `hire_head_native` takes quantized heads on a CPU where it can, with
another copy and another bound (native/head.h of hireconvert) and the same promise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import hire_head_native
from .hire_ffn import content_stamp, weight_stamp
from .hire_predict import top_k_indices

COUNTER_NAMES = (
    "calls",
    "rows",
    "rescored",
    "dense_rows",
    "uncertified_rows",
    "overflow_rows",
    "refined",
)
_FLOAT32_UNIT = 2.0**-24
_HALF_MAX = 65504.0
# Numbers below this may become zero, in x, in a product or in a sum. As gamma covers as many
# roundings of 2^-24 as there are such losses, bound * _LOST covers those that the copy multiplies.
_SMALLEST = 2.0**-126
_LOST = 2.0**-100
# Rows whose capped upper bound comes this close to the threshold (relative) are rescored too. It
# covers rounding to float32 and a tanh that is accurate, but not monotone, to a few units.
_MARGIN = 16 * 2.0**-23
# Rescored rows a compiled graph has room for, as a multiple of certify_top and a floor.
_COMPILED_ROWS_PER_TOP, _COMPILED_MIN_ROWS = 24, 512
_CHUNK_ROWS = 16384
# Codes widened to float32 at once, small enough to stay in a core's cache, and hidden states that
# share one pass over them.
_CACHE_ELEMENTS, _ROWS_AT_ONCE = 2**18, 32


@dataclass
class PreparedHead:
    """Estimator and bounds derived from the live weight; valid while `stamp` matches it.

    Beside a native head the tensors below it are there once something has asked for them.
    """

    stamp: tuple[Any, ...]
    content: tuple[float, ...]
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    native: Any  # what hire_head_native packed, or None
    codes_VD: torch.Tensor | None = None
    scale_V: torch.Tensor | None = None
    copy_VD: torch.Tensor | None = None
    basis_RD: torch.Tensor | None = None
    factor_VR: torch.Tensor | None = None
    bound_V: torch.Tensor | None = None
    outside_V: torch.Tensor | None = None


def exact_rows(
    x_D: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor | None
) -> torch.Tensor:
    """Reference logits float32 [C] of some rows, before soft-capping (see the top of this file).

    By halves: zeros fill D up to a power of two n, then p[j] + p[j + n / 2] until one is left.
    """
    product_CD = weight_CD.double() * x_D.double()
    half = 1 << (x_D.shape[0] - 1).bit_length()
    product_CD = F.pad(product_CD, (0, half - x_D.shape[0]))
    while half > 1:
        half //= 2
        product_CD = product_CD[:, :half] + product_CD[:, half:]
    z_C = product_CD[:, 0]
    return (z_C if bias_C is None else z_C + bias_C.double()).float()


def _full_precision(device: torch.device) -> bool:
    """Whether matrix products of float32 really run in float32, which the bounds assume.

    `torch.set_float32_matmul_precision` and `allow_tf32` can make them TF32 or bfloat16.
    """
    backend: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", backend), "fp32_precision", None)
    if setting is None:
        return torch.get_float32_matmul_precision() == "highest"
    return setting in ("none", "ieee")


def _float32_linear(x_ND: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Products float32 [N, V]; row by row where matrix products would be rounded further."""
    if torch.compiler.is_compiling() or not _full_precision(x_ND.device):
        return torch.stack([(weight_VD * x_D).sum(-1) for x_D in x_ND])
    return F.linear(x_ND, weight_VD)


def _int8_linear(x_ND: torch.Tensor, codes_VD: torch.Tensor) -> torch.Tensor:
    """Products float32 [N, V] with int8 rows, whose bytes alone are read from memory.

    On a CPU the codes are widened piece by piece in the cache; `_weight_int8pack_mm` takes three
    times as long for one row and fifty times for 64. A compiled graph fuses product and sum.
    """
    if torch.compiler.is_compiling():
        return _float32_linear(x_ND, codes_VD)
    if x_ND.device.type != "cpu":
        return _float32_linear(x_ND, codes_VD.float())
    pieces = codes_VD.split(max(1, _CACHE_ELEMENTS // codes_VD.shape[1]))
    return torch.cat([_float32_linear(x_ND, piece.float()) for piece in pieces], dim=1)


def soft_cap(z: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits after the model's soft-capping, in float32 and in the model's order of operations."""
    return z if cap is None else torch.tanh(z / cap) * cap


class SparseHead(nn.Module):
    """Estimation, rescoring and certificate of one LM head; sits beside its weight as `hire`."""

    counts: torch.Tensor

    def __init__(self, spec: Mapping[str, Any], cap: float | None) -> None:
        super().__init__()
        self.spec = dict(spec)
        self.cap = cap
        self.predictor_tensors: dict[str, torch.Tensor] = {}
        self.prepared: Any = None  # PreparedHead, once the weights are there
        # Rows not rescored in the last call, for the -inf convention after soft-capping.
        self.unselected: torch.Tensor | None = None
        self.register_buffer(
            "counts", torch.zeros(len(COUNTER_NAMES), dtype=torch.int64), persistent=False
        )

    # ----------------------------------------------------------------- derived tensors

    @torch.no_grad()
    def prepare(self, head: Any, thorough: bool = True) -> None:
        """Build the estimator and its bounds from the live weight, or rebuild after a change.

        A write through `.data` is seen only when `thorough`.
        """
        stamp = weight_stamp([head])
        same = self.prepared is not None and self.prepared.stamp == stamp
        if same and (not thorough or self.prepared.content == content_stamp([head])):
            return
        self.prepared = PreparedHead(
            stamp,
            content_stamp([head]),
            head.weight.detach(),
            None if head.bias is None else head.bias.detach(),
            hire_head_native.pack(self.spec, head),
        )
        if self.prepared.native is None:
            self._prepare_copy()

    @torch.no_grad()
    def _prepare_copy(self) -> None:
        """Build what the PyTorch path reads."""
        weight_VD = self.prepared.weight_VD
        self.prepared.bound_V = torch.zeros(weight_VD.shape[0], device=weight_VD.device)
        build = self._prepare_low_rank if self.spec["kind"] == "lr" else self._prepare_quantized
        build(self.prepared)

    def _prepare_quantized(self, prepared: PreparedHead) -> None:
        weight_VD, spec = prepared.weight_VD, self.spec
        num_rows, width = weight_VD.shape
        levels = 2 ** (spec["bits"] - 1) - 1
        block = min(spec["block"] or width, width)
        scales, codes, copies = [], [], []
        for start in range(0, num_rows, _CHUNK_ROWS):
            chunk = weight_VD[start : start + _CHUNK_ROWS].float()
            padded = F.pad(chunk, (0, -width % block)).unflatten(1, (-1, block))
            scale = padded.abs().amax(-1) / levels
            code = (padded / scale.clamp(min=1e-30)[..., None]).round().clamp(-levels, levels)
            if spec["block"] == 0:
                codes.append(code[:, 0].to(torch.int8))
                scales.append(scale[:, 0])
                copy_CD = codes[-1].double() * scale.double()
            else:
                copy = (code * scale[..., None]).flatten(1)[:, :width]
                copies.append(copy.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16))
                copy_CD = copies[-1].double()
            self._row_bounds(prepared, start, chunk, copy_CD)
        if spec["block"] == 0:
            prepared.codes_VD, prepared.scale_V = torch.cat(codes), torch.cat(scales)
        else:
            prepared.copy_VD = torch.cat(copies)

    def _row_bounds(
        self, prepared: PreparedHead, start: int, chunk: torch.Tensor, copy_CD: torch.Tensor
    ) -> None:
        """Store e_i, rounded up, for the rows of one chunk and the copy as it is stored."""
        error = (chunk.double() - copy_CD).norm(dim=1)
        gamma = (chunk.shape[1] + 8) * _FLOAT32_UNIT * 1.01
        bound = error * (1 + 1e-9) + gamma * copy_CD.norm(dim=1) + 1e-30
        assert prepared.bound_V is not None
        prepared.bound_V[start : start + chunk.shape[0]] = (bound * (1 + 1e-6)).float()

    def _prepare_low_rank(self, prepared: PreparedHead) -> None:
        """Factors from the live weight: W x is estimated by (W M)(A x), M and A as stored.

        Written as B (Q x) with orthonormal Q spanning the rows of A and B rounded to bfloat16,
        |W x - B Q x| <= ||(W - B Q) Q^T|| ||Q x|| + ||(W - B Q)(I - Q^T Q)|| ||x - Q^T Q x||.
        """
        if "head.factor_in" not in self.predictor_tensors:
            raise RuntimeError(
                "hire: predictor tensors are not loaded; load the checkpoint with from_pretrained"
            )
        weight_VD = prepared.weight_VD
        stored = {k: v.double().to(weight_VD.device) for k, v in self.predictor_tensors.items()}
        basis_DR, mixing_RR = torch.linalg.qr(stored["head.factor_in"].t())
        basis_RD = basis_DR.t().float().contiguous()
        lift_DR = stored["head.lift"] @ mixing_RR.t()
        # A x in float32 is off by at most (D + 8) u ||x|| in each of its R entries.
        rank, width = basis_RD.shape
        gamma = ((width + 8) * rank**0.5 + rank + 8) * _FLOAT32_UNIT * 1.01
        factors, inside, outside = [], [], []
        for start in range(0, weight_VD.shape[0], _CHUNK_ROWS):
            chunk = weight_VD[start : start + _CHUNK_ROWS].double()
            factor = (chunk @ lift_DR).to(torch.bfloat16)
            rest = chunk - factor.double() @ basis_RD.double()
            within = rest @ basis_DR
            # Rounding grows with ||x|| <= ||Q x|| + ||x - Q^T Q x||, so it is part of both.
            rounding = gamma * factor.double().norm(dim=1) + 1e-30
            inside.append((within.norm(dim=1) + rounding) * (1 + 1e-6))
            beyond = (rest - within @ basis_DR.t()).norm(dim=1)
            outside.append((beyond + rounding) * (1 + 1e-6))
            factors.append(factor)
        prepared.basis_RD, prepared.factor_VR = basis_RD, torch.cat(factors).float()
        prepared.bound_V, prepared.outside_V = torch.cat(inside).float(), torch.cat(outside).float()

    # ----------------------------------------------------------------- one row

    def _estimate(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Estimated logits float32 [N, V]; one pass over the copy serves all rows."""
        prepared, x_ND = self.prepared, x_ND.float()
        if prepared.codes_VD is not None:
            z_NV = _int8_linear(x_ND, prepared.codes_VD) * prepared.scale_V
        elif prepared.copy_VD is not None:
            z_NV = _float32_linear(x_ND, prepared.copy_VD.float())
        else:
            inner_NR = _float32_linear(x_ND, prepared.basis_RD)
            z_NV = _float32_linear(inner_NR, prepared.factor_VR)
        return z_NV if prepared.bias_V is None else z_NV + prepared.bias_V.float()

    def _upper(self, x_D: torch.Tensor, z_V: torch.Tensor) -> torch.Tensor:
        """Upper bounds float32 [V] of the reference logits, before soft-capping."""
        prepared, x = self.prepared, x_D.double()
        if prepared.outside_V is None:
            slack_V = prepared.bound_V * (x.norm() * (1 + 1e-6) + _LOST).float()
        else:
            inner = prepared.basis_RD.double() @ x
            outer = (x - prepared.basis_RD.double().t() @ inner).norm()
            # The basis is orthonormal only to float32: a share of ||x|| covers the difference.
            slack_V = prepared.bound_V * (inner.norm() + 1e-5 * x.norm() + _LOST).float()
            slack_V = slack_V + prepared.outside_V * (outer + 1e-5 * x.norm()).float()
        lost = (x.shape[0] + 8) * _SMALLEST
        return z_V + (slack_V * (1 + 1e-6) + 4 * _FLOAT32_UNIT * z_V.abs() + lost)

    def _rescore(self, x_D: torch.Tensor, index_C: torch.Tensor) -> torch.Tensor:
        prepared = self.prepared
        bias_C = None if prepared.bias_V is None else prepared.bias_V[index_C]
        return exact_rows(x_D, prepared.weight_VD[index_C], bias_C)

    def _needed(self, x_D: torch.Tensor, z_V: torch.Tensor, top: int) -> torch.Tensor:
        """Mask [V] of the rows that may be among the best `top` of the reference."""
        first_C = top_k_indices(z_V.nan_to_num()[None], min(top, z_V.shape[0]))[0]
        threshold = soft_cap(self._rescore(x_D, first_C), self.cap).min()
        upper_V = soft_cap(self._upper(x_D, z_V), self.cap)
        # An estimate beyond float32 is NaN: all that is not surely below the threshold is needed.
        needed_V = ~(upper_V < threshold - _MARGIN * (threshold.abs() + 1e-30))
        return needed_V.index_fill(0, first_C, True)

    def certified_row(
        self, x_D: torch.Tensor, z_V: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits float32 [V], the best `top` the reference's, and the rescored mask."""
        if torch.compiler.is_compiling():
            return self._certified_row_fixed(x_D, z_V, top)
        needed_V = self._needed(x_D, z_V, top)
        index_C = needed_V.nonzero()[:, 0]
        return z_V.index_put((index_C,), self._rescore(x_D, index_C)), needed_V

    def _certified_row_fixed(
        self, x_D: torch.Tensor, z_V: torch.Tensor, top: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with room for a fixed number of rows, as a compiled graph needs it.

        More rows than fit, or NaN or inf among the inputs: every logit is computed exactly from
        the stored weight, and counted.
        """
        needed_V = self._needed(x_D, z_V, top)
        room = max(_COMPILED_MIN_ROWS, _COMPILED_ROWS_PER_TOP * top)
        room = min(room, z_V.shape[0])
        finite = x_D.isfinite().all()
        overflow = finite & (needed_V.sum() > room)
        order_V = torch.where(needed_V, z_V.nan_to_num().clamp_min(-2e38), -3e38)
        index_C = top_k_indices(order_V[None], room)[0]
        scored_V = z_V.index_put((index_C,), self._rescore(x_D, index_C))
        self.count(overflow_rows=overflow, dense_rows=~finite)
        weight_VD, bias_V = self.prepared.weight_VD, self.prepared.bias_V

        def everything(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return exact_rows(x, weight_VD, bias_V)

        def rescored(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return z.clone()

        return torch.cond(overflow | ~finite, everything, rescored, (x_D, scored_V)), needed_V

    def estimated_row(
        self, x_D: torch.Tensor, z_V: torch.Tensor, num: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits float32 [V], the best `num` exact and all others clamped below them."""
        z_V = z_V.nan_to_num()
        index_C = top_k_indices(z_V[None], min(num, z_V.shape[0]))[0]
        exact_C = self._rescore(x_D, index_C)
        lowest = exact_C.min()
        below = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
        z_V = torch.minimum(z_V, below).index_put((index_C,), exact_C)
        rescored_V = torch.zeros_like(z_V, dtype=torch.bool).index_fill(0, index_C, True)
        return z_V, rescored_V

    # ----------------------------------------------------------------- all rows

    def count(self, **increments: Any) -> None:
        """Add to the counters of these names, Python numbers or tensors."""
        more, device = [increments.get(name, 0) for name in COUNTER_NAMES], self.counts.device
        if any(isinstance(number, torch.Tensor) for number in more):
            zero = torch.zeros((), dtype=torch.int64, device=device)
            self.counts.add_(torch.stack([zero + number for number in more]))
        else:
            self.counts.add_(torch.tensor(more, device=device))

    def count_dense(self, rows: int) -> None:
        """Count rows that the dense head serves although they were due here."""
        self.count(calls=1, rows=rows, dense_rows=rows)

    def forward(
        self, x_ND: torch.Tensor, head: Any, certify: bool, top: int | None = None
    ) -> torch.Tensor:
        """Full-size float32 logits [N, V]; a row with NaN or inf goes through the dense head.

        `certify`: the best `top` (None: `certify_top`) are certified.
        """
        if not torch.compiler.is_compiling() and self.prepared is None:
            self.prepare(head)
        num = self._number(certify, top)
        self.unselected = None
        if hire_head_native.serves(self.prepared.native, x_ND):
            return hire_head_native.run(self, head, x_ND, certify, num)
        if self.prepared.bound_V is None:
            self._prepare_copy()
        return self._rows(x_ND, head, certify, num)

    def _number(self, certify: bool, top: int | None) -> int:
        if not certify:
            return int(self.spec["num_candidates"])
        return int(top or self.spec["certify_top"])

    def row(self, certify: bool, top: int | None) -> Any:
        """`forward` for one row as a call of the library, or None where PyTorch has a part."""
        if self.prepared is None or self.spec["unselected"] == "-inf":
            return None
        return hire_head_native.row(self, certify, self._number(certify, top))

    def _rows(self, x_ND: torch.Tensor, head: Any, certify: bool, num: int) -> torch.Tensor:
        row = self.certified_row if certify else self.estimated_row
        logits, masks = [], []
        dense_rows = 0
        for rows_ND in x_ND.split(_ROWS_AT_ONCE):
            for x_D, z_V in zip(rows_ND, self._estimate(rows_ND), strict=True):
                if not torch.compiler.is_compiling() and not bool(x_D.isfinite().all()):
                    z_V = F.linear(x_D, head.weight, head.bias).float()
                    rescored_V = torch.ones_like(z_V, dtype=torch.bool)
                    dense_rows += 1
                else:
                    z_V, rescored_V = row(x_D, z_V, num)
                logits.append(z_V)
                masks.append(rescored_V)
        rescored_NV = torch.stack(masks)
        rows = x_ND.shape[0]
        self.count(
            calls=1,
            rows=rows,
            rescored=rescored_NV.sum(),
            dense_rows=dense_rows,
            uncertified_rows=0 if certify else rows - dense_rows,
        )
        if self.spec["unselected"] == "-inf":
            self.unselected = ~rescored_NV
        return torch.stack(logits)

    @torch.no_grad()
    def reference(self, x_ND: torch.Tensor, head: Any) -> torch.Tensor:
        """Reference logits float32 [N, V], before soft-capping; slow, for tests and evidence."""
        rows = []
        for x_D in x_ND:
            chunks = [
                exact_rows(
                    x_D,
                    head.weight[s : s + _CHUNK_ROWS],
                    None if head.bias is None else head.bias[s : s + _CHUNK_ROWS],
                )
                for s in range(0, head.weight.shape[0], _CHUNK_ROWS)
            ]
            rows.append(torch.cat(chunks))
        return torch.stack(rows)
