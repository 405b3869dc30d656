"""Slow twins of the runtime's decoders, written apart from them, for what `quantize` encodes.

Shape suffixes: A, B, L any rows and columns, M predictor outputs, D width.
"""

from collections.abc import Mapping

import torch

from hireconvert.quantize import Grid, GridFormat, decode_codes


def unpack_planes(planes: torch.Tensor, length: int) -> torch.Tensor:
    """uint8 codes [A, length] from planes [bits, A, ceil(length/8)]."""
    bits, rows, width = planes.shape
    codes_AL = torch.zeros(rows, width * 8, dtype=torch.uint8)
    for p in range(bits):
        bits_A8 = (planes[p].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        codes_AL |= bits_A8.view(rows, width * 8) << p
    return codes_AL[:, :length].contiguous()


def decode_matrix(
    tensors: Mapping[str, torch.Tensor], form: GridFormat, shape_MD: tuple[int, int]
) -> torch.Tensor:
    """float32 [M, D], the matrix that `encode_matrix` wrote."""
    length = shape_MD[0] if form.channel_major else shape_MD[1]
    codes = unpack_planes(tensors["planes"], length)
    if form.levels == "normal":
        decoded = _normal(codes, tensors, min(form.block, length))
        return decoded.T if form.channel_major else decoded
    grid = Grid(form, tensors["scale"], None if form.symmetric else tensors["offset"])
    return decode_codes(codes.T if form.channel_major else codes, grid)


def _normal(codes: torch.Tensor, tensors: Mapping[str, torch.Tensor], block: int) -> torch.Tensor:
    """docs/format.md, `levels`: a code's level times its block's scale and its row's unit."""
    level = torch.tensor([-63.0, -51, -40, -31, -24, -17, -11, -5, 1, 6, 12, 18, 25, 33, 42, 55])
    scales = tensors["scale_codes"].float() * tensors["scale_unit"][:, None]
    rows = [
        torch.cat([
            level[part.long()] * scale
            for part, scale in zip(row.split(block), own, strict=True)
        ])
        for row, own in zip(codes, scales, strict=True)
    ]  # fmt: skip
    return torch.stack(rows)


def decode_factor(
    tensors: Mapping[str, torch.Tensor], bits: int, name: str, *, width: int
) -> torch.Tensor:
    """float32 [A, width], the factor that `encode_factor` wrote."""
    if bits == 16:
        return tensors[name].float()
    codes = tensors[f"{name}_codes"]
    if bits == 4:
        codes = _unpack_nibbles(codes, width)
    return codes.float() * tensors[f"{name}_scale"].float().unsqueeze(1)


def _unpack_nibbles(packed: torch.Tensor, width: int) -> torch.Tensor:
    stored = packed.view(torch.uint8)
    pairs = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)[:, :width]
    return pairs.to(torch.int16) - 8
