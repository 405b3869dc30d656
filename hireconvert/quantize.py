"""Low-bit copies of matrices in the tensor formats of docs/design.md: codes, scales, factors.

Legend of shape suffixes: M rows (predictor outputs), D columns (input channels), A rows and
B columns of any matrix, L length of the packed axis, G blocks along the packed axis, R rank.

A copy is row-major (`planes` [b, M, D/8], blocks along the inputs) or channel-major (`planes`
[b, D, M/8], blocks along the neurons), the latter so that single input channels can be read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from hireconvert.errors import InputError
from hireconvert.runtime.hire_predict import NORMAL_LEVELS
from hireconvert.schema import PredictorRecipe, UnselectedRecipe

HALF_MIN, HALF_MAX = 2.0**-24, 65504.0
SHRINK_STEPS = 14
LOWEST_SHRINK = {1: 0.25, 2: 0.35, 3: 0.5, 4: 0.6, 8: 0.9}
LOUDNESS_POWER = 0.125  # of inputs in the scales of columns; the weights have the rest of 1
NORMAL_CLIPS = (1.15, 1.085, 1.02, 0.955, 0.89, 0.825, 0.76, 0.7)  # tried of normal levels
NORMAL_WIDE = float(max(abs(level) for level in NORMAL_LEVELS))
SCALE_TOP = 127  # of their scales' codes
_STRETCHES = 2 * 127  # of half a step, over all normal levels and beyond
FEEDBACK_COLUMNS = 64  # columns between two full updates of the error feedback
OUTPUT_DAMPING = 0.03  # of that of output vectors: .3 loses a quarter more


@dataclass(frozen=True)
class GridFormat:
    """How a matrix is cut into blocks and levels; the fields of PREDICTOR in docs/design.md."""

    bits: int
    block: int
    symmetric: bool
    channel_major: bool = False
    levels: str = "even"

    @classmethod
    def of(
        cls, recipe: PredictorRecipe | UnselectedRecipe, *, channel_major: bool = False
    ) -> GridFormat:
        """What a recipe says of a copy."""
        return cls(recipe.bits, recipe.block, recipe.symmetric, channel_major, recipe.levels)

    @property
    def top_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return int(2**self.bits) - 1

    @property
    def middle(self) -> float:
        """The code that stands for zero on a symmetric grid (half-integer: zero is no level)."""
        return self.top_code / 2


@dataclass(frozen=True)
class Grid:
    """A grid fitted to one matrix: float16 scales and, unless symmetric, offsets, per block.

    Both are [M, ceil(D/block)], or [D, ceil(M/block)] channel-major. With normal levels scales are
    int8, in a float32 `unit` of their row, [M] or [D].
    """

    format: GridFormat
    scale: torch.Tensor
    offset: torch.Tensor | None
    unit: torch.Tensor | None = None

    @property
    def scale_AG(self) -> torch.Tensor:
        """The scales in float32."""
        scale = self.scale.float()
        return scale if self.unit is None else scale * self.unit[:, None]

    def to(self, device: torch.device) -> Grid:
        """The grid on a device."""
        offset, unit = (None if t is None else t.to(device) for t in (self.offset, self.unit))
        return Grid(self.format, self.scale.to(device), offset, unit)


def pack_planes(codes_AL: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [bits, A, ceil(L/8)]: plane p holds bit p of every code, little-endian along L."""
    rows, length = codes_AL.shape
    padded = torch.zeros(rows, -(-length // 8) * 8, dtype=torch.uint8)
    padded[:, :length] = codes_AL.to(torch.uint8)
    weight_8 = (1 << torch.arange(8)).to(torch.uint8)
    planes = [
        (((padded >> p) & 1).view(rows, -1, 8) * weight_8).sum(-1, dtype=torch.uint8)
        for p in range(bits)
    ]
    return torch.stack(planes)


def fit_grid(
    weight_MD: torch.Tensor, form: GridFormat, *, importance_D: torch.Tensor | None = None
) -> Grid:
    """The grid with the least rounding error, each column's error weighted by `importance_D`.

    Every block tries `SHRINK_STEPS` clippings of its range, then a least-squares refit. Scales and
    offsets are rounded to float16 before any code is computed, so the error measured is the error
    shipped; normal levels: `_normal_grid`. Raises InputError when the matrix is not finite.
    """
    values_AGB, weights_AGB = _blocks(_finite(weight_MD), form, importance_D)
    if form.levels == "normal":
        return _normal_grid(values_AGB, weights_AGB, form)
    scale_AG, offset_AG = _widest(values_AGB, weights_AGB, form)
    best = _error(values_AGB, weights_AGB, scale_AG, offset_AG, form)
    lowest = LOWEST_SHRINK.get(form.bits, 0.9)
    trials = [1.0 - (1.0 - lowest) * (i + 1) / SHRINK_STEPS for i in range(SHRINK_STEPS)]
    widest_scale, widest_offset = scale_AG, offset_AG
    for trial in [*trials, None]:
        if trial is None:
            new = _refit(values_AGB, weights_AGB, scale_AG, offset_AG, form)
        else:
            middle_AG = widest_offset + widest_scale * form.middle
            new_scale = _half(widest_scale * trial)
            new = new_scale, _half_offset(middle_AG - new_scale * form.middle)
        error = _error(values_AGB, weights_AGB, *new, form)
        better = error < best
        scale_AG = torch.where(better, new[0], scale_AG)
        offset_AG = torch.where(better, new[1], offset_AG)
        best = torch.minimum(best, error)
    kept_offset = None if form.symmetric else offset_AG.to(torch.float16)
    return Grid(form, scale_AG.to(torch.float16), kept_offset)


def round_codes(weight_MD: torch.Tensor, grid: Grid) -> torch.Tensor:
    """uint8 codes [M, D]: every weight at its nearest level."""
    scale_MD, offset_MD = expand_grid(grid, weight_MD.shape)
    return _nearest(weight_MD, scale_MD, offset_MD, grid.format).to(torch.uint8)


def feedback_codes(
    weight_MD: torch.Tensor, grid: Grid, second_moment_DD: torch.Tensor, *, damping: float = 0.3
) -> torch.Tensor:
    """uint8 codes [M, D] with least error of the product W x under the inputs' second moment.

    Columns are rounded one after the other, loudest first; what one loses is made up by those
    still open (optimal brain quantization as GPTQ orders it). `damping` is a share of the mean
    diagonal: it keeps few rows definite, and a high one recalls more on text of another kind
    than the calibration text (docs/log.md).
    """
    scale_MD, offset_MD = expand_grid(grid, weight_MD.shape)
    diagonal_D = second_moment_DD.diagonal()
    order = torch.argsort(diagonal_D, descending=True, stable=True)
    moment = second_moment_DD[order][:, order].double()
    ridge = max(float(diagonal_D.double().mean()) * damping, 1e-10)
    moment += ridge * torch.eye(moment.shape[0], dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper_DD = torch.linalg.cholesky(inverse, upper=True).float()
    open_DM = weight_MD.T[order].contiguous()
    scale_DM, offset_DM = scale_MD.T[order].contiguous(), offset_MD.T[order].contiguous()
    codes_DM = torch.empty(open_DM.shape, dtype=torch.uint8)
    width = open_DM.shape[0]
    for start in range(0, width, FEEDBACK_COLUMNS):
        stop = min(start + FEEDBACK_COLUMNS, width)
        lost = torch.empty(stop - start, open_DM.shape[1])
        for j in range(start, stop):
            codes = _nearest(open_DM[j], scale_DM[j], offset_DM[j], grid.format)
            codes_DM[j] = codes.to(torch.uint8)
            values = _values(codes, scale_DM[j], offset_DM[j], grid.format)
            error = (open_DM[j] - values) / upper_DD[j, j]
            lost[j - start] = error
            open_DM[j + 1 : stop].addr_(upper_DD[j, j + 1 : stop], error, alpha=-1.0)
        open_DM[stop:] -= upper_DD[start:stop, stop:].T @ lost
    codes_MD = torch.empty(weight_MD.shape, dtype=torch.uint8)
    codes_MD[:, order] = codes_DM.T
    return codes_MD


def column_scales(weight_MD: torch.Tensor, moment_DD: torch.Tensor) -> torch.Tensor:
    """float32 [D]: what the columns of W are multiplied by before they are rounded.

    They come to nearly the same size, so that none spoils the grid of its neighbours in a block,
    and loud inputs get slightly finer grids. The powers add up to one: what a norm's weights are
    folded into has the copy that they are not.
    """
    loudness_D = moment_DD.diagonal().clamp_min(1e-20).sqrt()
    size_D = torch.linalg.vector_norm(weight_MD, dim=0, dtype=torch.float64)
    used_D = size_D > 0
    log_D = LOUDNESS_POWER * loudness_D.log() - (1 - LOUDNESS_POWER) * size_D.log()
    log_D = (log_D - log_D[used_D].mean()).masked_fill(~used_D, 0.0)
    return log_D.exp().clamp(1e-3, 1e3).float()


def fitted_codes(
    weight_MD: torch.Tensor, form: GridFormat, moment_DD: torch.Tensor, scale_D: torch.Tensor
) -> tuple[torch.Tensor, Grid]:
    """(codes [M, D], grid) of W times its columns' scales, fitted to inputs' moment.

    The decoded copy divided by the scales stands for W.
    """
    scaled_MD = weight_MD * scale_D
    scaled_DD = moment_DD / torch.outer(scale_D, scale_D)
    grid = fit_grid(scaled_MD, form, importance_D=scaled_DD.diagonal())
    return feedback_codes(scaled_MD, grid, scaled_DD), grid


def encode_matrix(codes_MD: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """The tensors of one copy: `planes`, and `scale` and (not symmetric) `offset`, or, with normal
    levels, `scale_codes` and `scale_unit`.
    """
    codes_AL = codes_MD.T if grid.format.channel_major else codes_MD
    tensors = {"planes": pack_planes(codes_AL, grid.format.bits)}
    if grid.unit is not None:
        return {**tensors, "scale_codes": grid.scale.contiguous(), "scale_unit": grid.unit}
    tensors["scale"] = grid.scale.contiguous()
    if grid.offset is not None:
        tensors["offset"] = grid.offset.contiguous()
    return tensors


def encode_down(
    down_FD: torch.Tensor, form: GridFormat, moment_FF: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a low-bit copy of the neurons' output vectors.

    Every weight is put at its nearest level or, given the second moment of the hidden values, where
    the output errs least under it. Where all neurons count by copies that is worth two thirds of
    the loss; beside estimates it bought nothing, nor did least-squares corrections and shrinking
    neurons by the trust in their estimates (docs/log.md, 2026-11-22).
    """
    down_FD = down_FD.float()
    if moment_FF is None:
        grid = fit_grid(down_FD, form)
        codes = round_codes(down_FD, grid)
    else:  # what the product sums over are the neurons; blocks lie along the outputs
        grid = fit_grid(down_FD.T, replace(form, channel_major=True))
        codes = feedback_codes(down_FD.T, grid, moment_FF, damping=OUTPUT_DAMPING)
    return {f"down_{name}": tensor for name, tensor in encode_matrix(codes, grid).items()}


def decode_codes(codes_MD: torch.Tensor, grid: Grid) -> torch.Tensor:
    """float32 [M, D], the value of every code."""
    scale_MD, offset_MD = expand_grid(grid, codes_MD.shape)
    return _values(codes_MD, scale_MD, offset_MD, grid.format)


def expand_grid(grid: Grid, shape_MD: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 scale and what is added to its multiples, both [M, D] (one entry a weight).

    Evenly spaced, that is the value of code 0; normal levels lie around zero, it is nothing.
    """
    form = grid.format
    scale_AG = grid.scale_AG
    stored = grid.offset
    offset_AG = _true_offset(scale_AG, torch.zeros(()) if stored is None else stored.float(), form)
    length = shape_MD[0] if form.channel_major else shape_MD[1]
    block = min(form.block or length, length)
    wide = [t.repeat_interleave(block, dim=1)[:, :length] for t in (scale_AG, offset_AG)]
    if form.channel_major:
        wide = [t.T for t in wide]
    return wide[0], wide[1]


def encode_factor(matrix_AB: torch.Tensor, bits: int, name: str) -> dict[str, torch.Tensor]:
    """Tensors of one low-rank factor: `name` float16 (16 bits), or `name`_codes and `name`_scale.

    8 bits: int8 codes in [-127, 127]; 4 bits: int8 [A, ceil(B/2)], two codes in [-7, 7] a byte,
    each stored plus 8, the low nibble first. The scale is float32, one a row. Raises InputError
    when the factor is not finite or does not fit float16.
    """
    if not bool(torch.isfinite(matrix_AB).all()) or float(matrix_AB.abs().max()) > HALF_MAX:
        raise InputError(f"the predictor factor {name} holds values outside float16")
    if bits == 16:
        return {name: matrix_AB.to(torch.float16).contiguous()}
    top = 2 ** (bits - 1) - 1
    scale_A1 = _factor_scale(matrix_AB, top)
    codes_AB = (matrix_AB / scale_A1).round().clamp(-top, top).to(torch.int8)
    if bits == 4:
        codes_AB = _pack_nibbles(codes_AB)
    return {f"{name}_codes": codes_AB.contiguous(), f"{name}_scale": scale_A1[:, 0].contiguous()}


def _pack_nibbles(codes_AB: torch.Tensor) -> torch.Tensor:
    rows, width = codes_AB.shape
    stored = torch.full((rows, width + width % 2), 8, dtype=torch.uint8)
    stored[:, :width] = (codes_AB + 8).to(torch.uint8)
    return (stored[:, 0::2] | (stored[:, 1::2] << 4)).view(torch.int8)


def _factor_scale(matrix_AB: torch.Tensor, top: int) -> torch.Tensor:
    """The row scale (float32 [A, 1]) of least squared rounding error among clippings."""
    widest = matrix_AB.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
    best_scale, best_error = widest, None
    for step in range(SHRINK_STEPS):
        scale = widest * (1.0 - 0.5 * step / SHRINK_STEPS)
        rounded = (matrix_AB / scale).round().clamp(-top, top) * scale
        error = (rounded - matrix_AB).square().sum(1, keepdim=True)
        if best_error is None:
            best_error = error
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


def _half(scale: torch.Tensor) -> torch.Tensor:
    """A positive scale as float16 stores it, back in float32."""
    return scale.clamp(HALF_MIN, HALF_MAX).to(torch.float16).float()


def _half_offset(offset: torch.Tensor) -> torch.Tensor:
    return offset.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).float()


def _nearest(
    values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, form: GridFormat
) -> torch.Tensor:
    if form.levels == "normal":
        stretch = (values / scale).mul_(2).ceil_().add_(126).clamp_(0, _STRETCHES - 1)
        stretch.nan_to_num_(0.0)  # of a block of zeros, and of weights that training broke
        return _looked_up(_codes(), stretch)
    return ((values - offset) / scale).round_().clamp_(0, form.top_code)


def _values(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, form: GridFormat
) -> torch.Tensor:
    if form.levels == "normal":
        return _looked_up(_levels(), codes) * scale
    return codes.float() * scale + offset


@functools.cache
def _levels() -> torch.Tensor:
    # Not made on import: processes that fork behind it would find torch's threads started.
    return torch.tensor(NORMAL_LEVELS, dtype=torch.float32)


@functools.cache
def _codes() -> torch.Tensor:
    """The code nearest to each stretch (k / 2, (k + 1) / 2], k from -127 on.

    No border between levels cuts through one; a table is far faster than torch.bucketize.
    """
    cuts = (_levels()[1:] + _levels()[:-1]) / 2
    return torch.bucketize((torch.arange(_STRETCHES) - 126) / 2, cuts).float()


def _looked_up(table: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    found = torch.index_select(table.to(place.device), 0, place.int().flatten())
    return found.view(place.shape)


def short_grid(weight_MD: torch.Tensor, block: int, importance_D: torch.Tensor) -> Grid:
    """Normal levels whose scales, bfloat16 numbers in float32, are not in units of a row.

    Such a number times a level has 14 bits: a reader who knows the block finds the scale again from
    the rounded weights, without being told. Raises InputError when the matrix is not finite.
    """
    form = GridFormat(4, block, symmetric=True, levels="normal")
    values_AGB, weights_AGB = _blocks(_finite(weight_MD), form, importance_D)
    zeros_AG = values_AGB.abs().amax(-1) == 0
    scale_AG = _normal_scales(values_AGB, weights_AGB, form).masked_fill(zeros_AG, 0.0)
    return Grid(form, scale_AG.bfloat16().float(), None)


def _normal_grid(values_AGB: torch.Tensor, weights_AGB: torch.Tensor, form: GridFormat) -> Grid:
    """Scales of normal levels, rounded to 8 bits.

    Only a block of zeros has the scale 0: a small one is better served by the smallest other.
    """
    zeros_AG = values_AGB.abs().amax(-1) == 0
    scale_AG = _normal_scales(values_AGB, weights_AGB, form)
    unit_A1 = scale_AG.abs().amax(1, keepdim=True) / SCALE_TOP
    codes_AG = (scale_AG / unit_A1).round()
    codes_AG = torch.where(codes_AG == 0, scale_AG.sign(), codes_AG).masked_fill(zeros_AG, 0.0)
    return Grid(form, codes_AG.to(torch.int8), None, unit_A1[:, 0].contiguous())


def _normal_scales(
    values_AGB: torch.Tensor, weights_AGB: torch.Tensor, form: GridFormat
) -> torch.Tensor:
    """Scales [A, G] of normal levels: clippings of either sign, refitted."""
    largest_AG = values_AGB.abs().amax(-1).clamp_min(HALF_MIN)
    nothing_AG = torch.zeros_like(largest_AG)
    best = torch.full_like(largest_AG, torch.inf)
    scale_AG = largest_AG / NORMAL_WIDE
    for clip in NORMAL_CLIPS:
        for side in (-1.0, 1.0):  # which of them the wide side of the levels goes to
            trial_AG = largest_AG * (side * clip / NORMAL_WIDE)
            codes = _nearest(values_AGB, trial_AG.unsqueeze(-1), nothing_AG, form)
            level_AGB = _looked_up(_levels(), codes)
            product = (weights_AGB * level_AGB * values_AGB).sum(-1)
            square = (weights_AGB * level_AGB.square()).sum(-1)
            new_AG = product / square.clamp_min(1e-30)
            new_AG = torch.where(new_AG.isfinite() & (new_AG != 0), new_AG, trial_AG)
            error = _error(values_AGB, weights_AGB, new_AG, nothing_AG, form)
            scale_AG = torch.where(error < best, new_AG, scale_AG)
            best = torch.minimum(best, error)
    return scale_AG


def _finite(weight_MD: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(weight_MD).all()):
        raise InputError("a weight matrix to be quantized holds NaN or infinite values")
    return weight_MD


def _blocks(
    weight_MD: torch.Tensor, form: GridFormat, importance_D: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and error weights [A, G, block]; the padding repeats a value and weighs nothing."""
    importance = torch.ones(weight_MD.shape[1]) if importance_D is None else importance_D
    importance = importance.float().clamp_min(1e-12)
    if form.channel_major:
        values, weights = weight_MD.T.float(), importance.unsqueeze(1)
    else:
        values, weights = weight_MD.float(), importance.unsqueeze(0)
    weights = weights.expand(values.shape)
    length = values.shape[1]
    block = min(form.block or length, length)  # a longer one would be padded in memory
    extra = -length % block
    if extra:
        values = torch.cat([values, values[:, -1:].expand(-1, extra)], dim=1)
        weights = torch.cat([weights, torch.zeros(values.shape[0], extra)], dim=1)
    shape = (values.shape[0], -1, block)
    return values.reshape(shape), weights.reshape(shape)


def _widest(
    values_AGB: torch.Tensor, weights_AGB: torch.Tensor, form: GridFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset [A, G] that clip nothing."""
    if form.symmetric:
        scale = _half(values_AGB.abs().amax(-1) / form.middle)
        return scale, -scale * form.middle
    low, high = values_AGB.amin(-1), values_AGB.amax(-1)
    return _half((high - low) / form.top_code), _half_offset(low)


def _error(
    values_AGB: torch.Tensor,
    weights_AGB: torch.Tensor,
    scale_AG: torch.Tensor,
    offset_AG: torch.Tensor,
    form: GridFormat,
) -> torch.Tensor:
    scale, offset = scale_AG.unsqueeze(-1), _true_offset(scale_AG, offset_AG, form).unsqueeze(-1)
    rounded = _values(_nearest(values_AGB, scale, offset, form), scale, offset, form)
    return rounded.sub_(values_AGB).square_().mul_(weights_AGB).sum(-1)


def _true_offset(scale_AG: torch.Tensor, offset_AG: torch.Tensor, form: GridFormat) -> torch.Tensor:
    """A symmetric grid has no stored offset: its value of code 0 follows from the scale."""
    if form.levels == "normal":
        return torch.zeros_like(scale_AG)
    return -scale_AG * form.middle if form.symmetric else offset_AG


def _refit(
    values_AGB: torch.Tensor,
    weights_AGB: torch.Tensor,
    scale_AG: torch.Tensor,
    offset_AG: torch.Tensor,
    form: GridFormat,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale and offset for the codes that the given grid yields."""
    offset = _true_offset(scale_AG, offset_AG, form)
    codes = _nearest(values_AGB, scale_AG.unsqueeze(-1), offset.unsqueeze(-1), form)
    if form.symmetric:
        levels = codes - form.middle
        product = (weights_AGB * levels * values_AGB).sum(-1)
        scale = _half(product / (weights_AGB * levels * levels).sum(-1).clamp_min(1e-30))
        return scale, -scale * form.middle
    total = weights_AGB.sum(-1).clamp_min(1e-30)
    mean_code = (weights_AGB * codes).sum(-1) / total
    mean_value = (weights_AGB * values_AGB).sum(-1) / total
    off_code = codes - mean_code.unsqueeze(-1)
    spread = (weights_AGB * off_code * off_code).sum(-1)
    product = (weights_AGB * off_code * values_AGB).sum(-1)
    usable = spread > 1e-20
    scale = torch.where(usable, product / spread.clamp_min(1e-30), scale_AG)
    scale = _half(scale)
    return scale, _half_offset(mean_value - scale * mean_code)
