"""The slow twin of native/pack.c: layers packed by PyTorch, byte for byte the same.

Shape suffixes: D width, F neurons, P parts (gate and up, or up alone), T tiles of 16 neurons,
L lanes, G blocks of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hireconvert._packing import (
    _MOST,
    _MOST_WIDTH,
    ACTIVATIONS,
    LANES,
    LOW_BITS,
    PREDICTOR_BITS,
    REST_BITS,
    STRIDE,
    TYPES,
    _number,
    _one_of,
    _Tensors,
)
from hireconvert.runtime.hire_predict import (
    NORMAL_LEVELS,
    decode_blocks,
    decode_down,
    unpack_planes,
)

_ROUNDED = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


# --------------------------------------------------------------------------- packing


def _lane_bytes(codes: int, bits: int) -> int:
    if codes == 0:
        return 0
    return 1 if codes <= 8 // bits else 2 if codes <= 16 // bits else 4


def pack_lanes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., bytes] from codes [..., n, 16]: the n codes of each of 16 lanes, lane by lane.

    As many whole codes as fit lie in 32-bit words, [word][lane]; what is left over takes the
    narrowest of 8, 16 and 32 bits a lane.
    """
    per_word, pieces = 32 // bits, []
    for start in range(0, codes.shape[-2], per_word):
        some = codes[..., start : start + per_word, :].to(torch.int64)
        shift = torch.arange(some.shape[-2])[:, None] * bits
        word = (some << shift).sum(-2)
        size = 4 if some.shape[-2] == per_word else _lane_bytes(some.shape[-2], bits)
        octets = (word[..., None] >> (8 * torch.arange(size))) & 255
        pieces.append(octets.to(torch.uint8).flatten(-2))
    return torch.cat(pieces, dim=-1)


def pack_quads(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., bytes] from codes [..., n, 16]: the n codes of each of 16 lanes, n filled up.

    A unit is one word of 32 bits a lane ([unit][lane]) of eight 4-bit or sixteen 2-bit codes; of 3
    bits two such words of 32 codes' low bits and one of their high bits. Quad q of a unit, four
    codes, lies in the word's four bytes, `bits` q bits up.
    """
    if bits == 3:
        low, high = pack_quads(_filled(codes & 3, 32), 2), pack_quads(_filled(codes >> 2, 32), 1)
        pair = low.unflatten(-1, (-1, 2 * 4 * LANES)), high.unflatten(-1, (-1, 4 * LANES))
        return torch.cat(pair, dim=-1).flatten(-2)
    byte = _filled(codes, 32 // bits).unflatten(-2, (-1, 8 // bits, 4))  # unit, quad, byte, lane
    shift = torch.arange(8 // bits)[:, None, None] * bits
    return (byte.int() << shift).sum(-3).to(torch.uint8).transpose(-1, -2).flatten(-3)


def _filled(codes: torch.Tensor, unit: int) -> torch.Tensor:
    """The codes with zeros behind them, [..., n, L] in whole units."""
    missing = -codes.shape[-2] % unit
    return torch.cat([codes, codes.new_zeros(*codes.shape[:-2], missing, codes.shape[-1])], dim=-2)


def _whole(rows: torch.Tensor, unit: int) -> torch.Tensor:
    """Zeros behind the last dimension, up to whole units."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % unit))


def _octets(halves: torch.Tensor) -> torch.Tensor:
    return halves.to(torch.float16).contiguous().view(torch.uint8)


def _by_tile(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """[T, P, 16, columns] from [P * F, columns]; neurons that fill the last tile are zeros."""
    part = rows.unflatten(0, (parts, -1))
    padded = part.new_zeros(parts, -(-part.shape[1] // LANES) * LANES, part.shape[2])
    padded[:, : part.shape[1]] = part
    return padded.unflatten(1, (-1, LANES)).transpose(0, 1)


def _tiles(
    codes: torch.Tensor, scales: list[torch.Tensor], parts: int, bits: int, block: int
) -> torch.Tensor:
    """uint8 [T, bytes]: for each block the codes, then scales, then offsets.

    Units of the parts' codes take turns.
    """
    code_TPLD = _by_tile(codes, parts)
    scale_TPLG = [_by_tile(scale, parts) for scale in scales]
    pieces = []
    for index, start in enumerate(range(0, codes.shape[1], block)):
        lanes = code_TPLD[..., start : start + block].transpose(-1, -2)
        unit_TPUB = pack_quads(lanes, bits).unflatten(-1, (-1, 3 * 64 if bits == 3 else 64))
        pieces.append(unit_TPUB.transpose(1, 2).flatten(1))
        pieces += [_octets(scale[..., index]).flatten(1) for scale in scale_TPLG]
    return torch.cat(pieces, dim=1).contiguous()


def _lines(octets: torch.Tensor) -> torch.Tensor:
    """The bytes [T, n] with zeros behind them, in whole lines of 64."""
    return torch.nn.functional.pad(octets, (0, -octets.shape[1] % 64))


def _scale_octets(scale_codes: torch.Tensor) -> torch.Tensor:
    """Scales of normal levels as the kernels read them: bytes, 128 more than the codes."""
    return (scale_codes.to(torch.int16) + 128).to(torch.uint8)


def _normal_tiles(
    codes: torch.Tensor, scales: torch.Tensor, parts: int, block: int
) -> torch.Tensor:
    """uint8 [T, bytes] of normal levels: a line of scales before the codes of its blocks."""
    code_TPLD, scale_TPLG = _by_tile(codes, parts), _scale_octets(_by_tile(scales, parts))
    blocks, together, pieces = scales.shape[1], 64 // (16 * parts), []
    for index in range(blocks):
        if index % together == 0:
            some = scale_TPLG[..., index : index + together].permute(0, 3, 1, 2).flatten(1)
            pieces.append(_lines(some))
        lanes = code_TPLD[..., index * block : (index + 1) * block].transpose(-1, -2)
        unit_TPUB = pack_quads(lanes, 4).unflatten(-1, (-1, 64))
        pieces.append(unit_TPUB.transpose(1, 2).flatten(1))
    return torch.cat(pieces, dim=1).contiguous()


def _padded(codes_MD: torch.Tensor, length: int) -> torch.Tensor:
    """The codes with zeros behind each row, uint8 [M, length]."""
    return torch.nn.functional.pad(codes_MD, (0, length - codes_MD.shape[1]))


def _rest_rows(
    codes_FD: torch.Tensor, scales: list[torch.Tensor], bits: int, stride: int
) -> torch.Tensor:
    """uint8 [F, bytes]: codes with 16 outputs side by side, then scales, then offsets."""
    packed = pack_lanes(_padded(codes_FD, stride).unflatten(1, (-1, LANES)), bits)
    return torch.cat([packed, *[_octets(scale) for scale in scales]], dim=1)


def _rest_tiles(codes_FD: torch.Tensor, scales: list[torch.Tensor], stride: int) -> torch.Tensor:
    """uint8 [T, bytes] of 4-bit codes: as native/rest_body.h has a tile of 16 neurons."""
    code_TLD = _by_tile(_padded(codes_FD, stride), 1)[:, 0]
    # Tile, four neurons, neuron, 32 outputs, half, output; bytes lie by output, then neuron.
    code = code_TLD.unflatten(2, (-1, 2, LANES)).unflatten(1, (-1, 4))
    packed = (code[..., 0, :] | code[..., 1, :] << 4).permute(0, 3, 1, 4, 2).flatten(1)
    by_block = [_by_tile(scale, 1)[:, 0].transpose(1, 2).flatten(1) for scale in scales]
    if by_block[0].dtype == torch.int8:  # normal levels
        return torch.cat([_lines(_scale_octets(by_block[0])), packed], dim=1).contiguous()
    return torch.cat([*[_octets(scale) for scale in by_block], packed], dim=1).contiguous()


# --------------------------------------------------------------------------- checked input


class _Given(_Tensors):
    """The same checks; codes unpacked."""

    def named(self, *names: str) -> dict[str, torch.Tensor]:
        """Those of the tensors that were given."""
        found = {name: self._tensors.get(name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def unpacked(self, name: str, bits: int, rows: int, length: int) -> torch.Tensor:
        """The codes of bit planes, uint8 [rows, length]."""
        return unpack_planes(self.planes(name, bits, rows, -(-length // 8)), length)


def _scales(
    given: _Given, prefix: str, symmetric: bool, rows: int, blocks: int
) -> list[torch.Tensor]:
    names = ["scale"] if symmetric else ["scale", "offset"]
    return [given.floats(prefix + name, rows, blocks) for name in names]


def _pad_parts(values: torch.Tensor, parts: int) -> torch.Tensor:
    """float32 [P, Fp] from [P * F]."""
    return _by_tile(values[:, None], parts).transpose(0, 1).reshape(parts, -1).contiguous()


def _predictor(
    given: _Given, numbers: dict[str, int], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    width, neurons, parts = numbers["width"], numbers["num_neurons"], 1 + numbers["gated"]
    outputs, bits = parts * neurons, PREDICTOR_BITS[_one_of(settings, "bits", PREDICTOR_BITS)]
    block = min(_number(settings, "block", 1, _MOST), width)
    symmetric = bool(_one_of(settings, "symmetric", (False, True)))
    codes, blocks = given.unpacked("planes", bits, outputs, width), -(-width // block)
    normal, own = settings.get("levels") == "normal", {}
    if normal:
        tiles = _normal_tiles(codes, given.codes("scale_codes", outputs, blocks), parts, block)
        own["unit"] = _pad_parts(given.floats("scale_unit", outputs), parts)
    else:
        tiles = _tiles(codes, _scales(given, "", symmetric, outputs, blocks), parts, bits, block)
    numbers |= {"bits": bits, "block": block, "symmetric": symmetric, "normal": normal}
    numbers["tile_bytes"] = tiles.shape[1]
    tensors = own | {
        "tiles": tiles,
        "mean": given.floats("mean", width),
        "inverse_scale": 1.0 / given.floats("column_scale", width),
        "bias": _pad_parts(given.floats("bias", outputs), parts),
        "norm": _pad_parts(given.floats("norm", neurons), 1),
    }
    if given.has("soft"):
        tensors["soft"] = _pad_parts(given.floats("soft", outputs), parts)
        if given.has("rest_error"):
            tensors["rest_error"] = given.floats("rest_error", 1)
    return tensors


def _rest(
    given: _Given, numbers: dict[str, int], rest: Mapping[str, Any] | None
) -> dict[str, torch.Tensor]:
    if rest is None:
        return {}
    width, neurons = numbers["width"], numbers["num_neurons"]
    bits = REST_BITS[_one_of(rest, "bits", REST_BITS)]
    block = min(_number(rest, "block", 1, _MOST), width)
    if block % LANES and block < width:
        raise ValueError(f"native: block of down rows is {block}, no multiple of {LANES}")
    symmetric = bool(_one_of(rest, "symmetric", (False, True)))
    codes, blocks = given.unpacked("down_planes", bits, neurons, width), -(-width // block)
    normal, own = rest.get("levels") == "normal", {}
    if normal:
        scales = [given.codes("down_scale_codes", neurons, blocks)]
        own["rest_unit"] = _pad_parts(given.floats("down_scale_unit", neurons), 1)
    else:
        scales = _scales(given, "down_", symmetric, neurons, blocks)
    if bits == 4:
        rows = _rest_tiles(codes, scales, numbers["stride"])
    else:
        rows = _rest_rows(codes, scales, bits, numbers["stride"])
    numbers |= {"rest_bits": bits, "rest_block": block, "rest_symmetric": symmetric}
    numbers |= {"rest_normal": normal, "rest_bytes": rows.shape[1]}
    return {"rest": rows, **own}


def _refined(
    given: _Given, numbers: dict[str, int], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor] | None:
    """The weights as codes beyond those of the copies; None where they are no such codes.

    They are not where blocks are cut through, or weights were trained or merged since.
    """
    width, neurons, parts = numbers["width"], numbers["num_neurons"], 1 + numbers["gated"]
    if (numbers["bits"], numbers.get("rest_bits")) != (4, 4):
        raise ValueError("native: refined rows without 4-bit copies")
    names, block, down_block = ("gate", "up")[2 - parts :], numbers["block"], numbers["rest_block"]
    if block % LANES and block < width:
        return None
    first_MD = torch.cat([given.floats(name, neurons, width) for name in names])
    down_FD, factor_D = given.floats("down", neurons, width), given.floats("column_scale", width)
    low_M = _low(
        first_MD * factor_D,
        decode_blocks(
            given.named("planes", "scale", "offset", "scale_codes", "scale_unit"), settings, width
        ),
        given.floats("low_scale", parts * neurons, -(-width // block)),
        block,
    )
    names = ("planes", "scale", "offset", "scale_codes", "scale_unit")
    copy = given.named(*(f"down_{name}" for name in names))
    low_F = _low(
        down_FD,
        decode_down(copy, settings["rest"], width),
        given.floats("down_low_scale", neurons, -(-width // down_block)),
        down_block,
    )
    value_MD, dtype = low_M.value_MD / factor_D, TYPES[numbers["weight_type"]]
    pairs = ((value_MD, first_MD), (low_F.value_MD, down_FD))
    if not all(_is_rounded(value, weight, dtype) for value, weight in pairs):
        return None
    codes, scales = zip(_first_rows(low_M, parts, block), low_F.lines(), strict=True)
    low = torch.cat([*codes, *scales], dim=1)
    low = _whole(low, 64).contiguous()
    numbers["low_bytes"] = low.shape[1]
    bias_M = value_MD.double() @ given.floats("mean", width).double()
    bias_M -= given.floats("bias", parts * neurons)
    biases = _biases(given, numbers)
    if "row_bias" in biases:
        bias_M += biases.pop("row_bias").flatten()
    return {"low": low, "low_bias": _pad_parts(bias_M.float(), parts), **biases}


@dataclass(frozen=True)
class _Low:
    """What a copy left of a matrix: codes [M, D], scales [M, G], and the values with the copy's."""

    code_MD: torch.Tensor
    scale_MG: torch.Tensor
    value_MD: torch.Tensor

    def lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [M, bytes] of codes in lines of 128 outputs (native/low_rows.h), and of scales."""
        code = _whole(self.code_MD, 128).unflatten(1, (-1, 2, 4, 4, 4))  # halves, r, q, i
        packed = (code[:, :, 0] | code[:, :, 1] << LOW_BITS).transpose(2, 3)
        return packed.flatten(1), _octets(self.scale_MG)


def _first_rows(low_M: _Low, parts: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up as native/low_rows.h has them: uint8 [F, bytes] of codes, and of scales."""
    lanes, words = 16 // parts, -(-block // 8)
    code_MGB = torch.stack([_whole(each, block) for each in low_M.code_MD.split(block, 1)], 1)
    code = _whole(code_MGB, 8).unflatten(2, (words, 2, 4))
    word_MGW4 = code[:, :, :, 0] | code[:, :, :, 1] << LOW_BITS
    codes, scales = [], []
    for word, scale in zip(word_MGW4.split(lanes, 1), low_M.scale_MG.split(lanes, 1), strict=True):
        each = min(lanes // word.shape[1], words)  # lanes to a block
        word = _whole(word.transpose(2, 3), each).unflatten(3, (-1, each))  # [M, G, 4, depth, each]
        word = word.permute(0, 3, 2, 1, 4).flatten(3)
        codes.append(torch.cat(_whole(word, lanes).chunk(parts), 3).transpose(2, 3).flatten(1))
        scale = scale if 2 * scale.shape[1] <= lanes else _whole(scale, lanes)
        scales.append(_octets(torch.cat(scale.chunk(parts), 1)))
    return torch.cat(codes, 1), torch.cat(scales, 1)


def _low(
    weight_MD: torch.Tensor, copy_MD: torch.Tensor, scale_MG: torch.Tensor, block: int
) -> _Low:
    width, middle = weight_MD.shape[1], (2**LOW_BITS - 1) / 2
    scale_MD = scale_MG.repeat_interleave(block, dim=1)[:, :width]
    code_MD = ((weight_MD - copy_MD) / scale_MD + middle).round().clamp(0, 2 * middle)
    return _Low(code_MD.to(torch.uint8), scale_MG, copy_MD + scale_MD * (code_MD - middle))


def _is_rounded(value_MD: torch.Tensor, weight_MD: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether weights are the values, rounded to their type."""
    largest = value_MD.abs().amax(1, keepdim=True)
    # Of the larger: a value below a power of two may have been rounded up to it.
    allowed = _ROUNDED[dtype] * torch.maximum(value_MD.abs(), weight_MD.abs()) + 2.0**-20 * largest
    near_MD = (weight_MD - value_MD).abs() <= allowed
    return bool((near_MD & weight_MD.isfinite()).all())


def _weights(given: _Given, numbers: dict[str, int], up: torch.Tensor) -> dict[str, torch.Tensor]:
    width, neurons, gated = numbers["width"], numbers["num_neurons"], numbers["gated"]
    names = ["gate", "up"] if gated else ["up"]
    matrices = [given.get(name, neurons, width) for name in [*names, "down"]]
    if any(matrix.dtype != up.dtype for matrix in matrices):
        raise ValueError(f"native: matrices are {[str(m.dtype) for m in matrices]}")
    rows = torch.zeros(neurons, len(matrices), numbers["stride"], dtype=up.dtype)
    for place, matrix in enumerate(matrices):
        rows[:, place, :width] = matrix
    return {"rows": rows, **_biases(given, numbers)}


def _biases(given: _Given, numbers: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Those that the layer has: `row_bias` [P, F] and `down_bias` [D]."""
    width, neurons = numbers["width"], numbers["num_neurons"]
    names, tensors = ["gate", "up"] if numbers["gated"] else ["up"], {}
    if any(given.has(f"{name}_bias") for name in names):
        tensors["row_bias"] = torch.stack(
            [
                given.floats(f"{name}_bias", neurons)
                if given.has(f"{name}_bias")
                else torch.zeros(neurons)
                for name in names
            ]
        )
    if given.has("down_bias"):
        tensors["down_bias"] = given.floats("down_bias", width)
    return tensors


def _copies(
    given: _Given, settings: Mapping[str, Any], packed: dict[str, torch.Tensor], up: torch.Tensor
) -> dict[str, torch.Tensor] | None:
    """What is left of a layer whose weights are its copies; None where they are others."""
    neurons, width = up.shape
    names, left_out = ["gate", "up"] if given.has("gate") else ["up"], ("soft", "rest_error")
    first_MD = torch.cat([given.floats(name, neurons, width) for name in names])
    parts = ("planes", "scale", "offset", "scale_codes", "scale_unit")
    value_MD = decode_blocks(given.named(*parts), settings, width)
    value_MD = value_MD / given.floats("column_scale", width)
    copy = given.named(*(f"down_{name}" for name in parts))
    down_FD = decode_down(copy, settings["rest"], width)
    pairs = ((value_MD, first_MD), (down_FD, given.floats("down", neurons, width)))
    if not all(_is_rounded(value, weight, up.dtype) for value, weight in pairs):
        return None
    numbers = {"width": width, "num_neurons": neurons, "gated": int(given.has("gate"))}
    biases = _biases(given, numbers)
    bias_M = biases.pop("row_bias", torch.zeros(len(first_MD))).flatten()
    packed = {name: tensor for name, tensor in packed.items() if name not in left_out}
    own = {"mean": torch.zeros(width), "bias": _pad_parts(bias_M, len(names))}
    return packed | own | biases


def pack(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None]
) -> tuple[dict[str, int], dict[str, torch.Tensor]] | None:
    """(numbers, tensors) of hire_layer in native/kernels.h, or None; see FfnLayer.pack.

    Raises ValueError.
    """
    given, up = _Given(tensors), tensors.get("up")
    if up is None or up.dim() != 2 or up.dtype not in TYPES or not up.numel():
        raise ValueError("native: up is not a matrix of float32, bfloat16 or float16")
    neurons, width = up.shape
    if neurons > _MOST or width > _MOST_WIDTH:
        raise ValueError(f"native: {neurons} x {width} is too large")
    copies = settings["copies"]
    candidates = 0 if copies else _number(settings, "num_candidates", 1, neurons)
    numbers = {
        "width": width,
        "stride": -(-width // STRIDE) * STRIDE,
        "num_neurons": neurons,
        "num_candidates": candidates,
        "num_kept": 0 if copies else _number(settings, "num_kept", 1, candidates),
        "gated": int(given.has("gate")),
        "activation": _one_of(settings, "activation", ACTIVATIONS),
        "weight_type": TYPES.index(up.dtype),
        "relative": int(bool(settings.get("relative"))),
    }
    packed = _predictor(given, numbers, settings) | _rest(given, numbers, settings.get("rest"))
    if copies:
        own = _copies(given, settings, packed, up)
        return None if own is None else (numbers, own)
    refined = _refined(given, numbers, settings) if settings.get("refined") else None
    return numbers, packed | (_weights(given, numbers, up) if refined is None else refined)


# --------------------------------------------------------------------------- attention in codes

TOP_CODE = 127
_CODE_ROUNDED = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def code_tiles(
    codes_OI: torch.Tensor, scale_OG: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [tiles, words, 64], float32 [tiles, G, 16]): codes and scales as kernels read them."""
    more = -len(codes_OI) % LANES
    shifted_OI = torch.nn.functional.pad(codes_OI.to(torch.int16), (0, 0, 0, more)) + 128
    words = [
        torch.nn.functional.pad(part_OB, (0, -part_OB.shape[1] % 4), value=128)
        for part_OB in shifted_OI.split(block, dim=1)
    ]
    tiles = torch.cat(words, dim=1).unflatten(1, (-1, 4)).unflatten(0, (-1, LANES))
    scales = torch.nn.functional.pad(scale_OG, (0, 0, 0, more)).unflatten(0, (-1, LANES))
    return tiles.transpose(1, 2).flatten(2).to(torch.uint8), scales.transpose(1, 2).contiguous()


def codes(weight_OI: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(int8 codes [O, I], float32 scales [O, G]); None where weights do not lie on their grid."""
    inputs = weight_OI.shape[1]
    block = min(block, inputs)
    padded = torch.nn.functional.pad(weight_OI.float(), (0, -inputs % block))
    blocks_OGB = padded.unflatten(1, (-1, block))
    scale_OG1 = blocks_OGB.abs().amax(-1, keepdim=True) / TOP_CODE
    code_OGB = (blocks_OGB / scale_OG1.clamp_min(torch.finfo().tiny)).round()
    away_OGB = (code_OGB * scale_OG1 - blocks_OGB).abs()
    if not bool((away_OGB <= _CODE_ROUNDED[weight_OI.dtype] * blocks_OGB.abs()).all()):
        return None
    return code_OGB.flatten(1)[:, :inputs].to(torch.int8), scale_OG1[..., 0]


def short_weights(codes_OI: torch.Tensor, scale_OG: torch.Tensor, block: int) -> torch.Tensor:
    """float32 [O, I]: what codes of 4 bits and their scales stand for."""
    levels_OI = torch.tensor(NORMAL_LEVELS, dtype=torch.float32)[codes_OI]
    return levels_OI * scale_OG.float().repeat_interleave(block, dim=1)[:, : codes_OI.shape[1]]


def short_code_tiles(codes_OI: torch.Tensor, scale_OG: torch.Tensor, block: int) -> torch.Tensor:
    """uint8 [tiles, words, 64]: codes of 4 bits, a line of bfloat16 scales before two blocks."""
    more = -len(codes_OI) % LANES
    codes_OI = torch.nn.functional.pad(codes_OI, (0, 0, 0, more)).to(torch.uint8)
    scale_OG = torch.nn.functional.pad(scale_OG, (0, scale_OG.shape[1] % 2, 0, more))
    lines_TG2L = scale_OG.unflatten(1, (-1, 2)).unflatten(0, (-1, LANES)).permute(0, 2, 3, 1)
    lines = lines_TG2L.contiguous().view(torch.uint8).flatten(2)  # [T, G / 2, 64]
    parts = []
    for index, part_OB in enumerate(codes_OI.split(block, dim=1)):
        if index % 2 == 0:
            parts.append(lines[:, index // 2 : index // 2 + 1])
        wide_OW24 = torch.nn.functional.pad(part_OB, (0, -part_OB.shape[1] % 8)).unflatten(
            1, (-1, 2, 4)
        )
        word_OW4 = wide_OW24[:, :, 0] | wide_OW24[:, :, 1] << 4
        parts.append(word_OW4.unflatten(0, (-1, LANES)).transpose(1, 2).flatten(2))
    return torch.cat(parts, dim=1)
