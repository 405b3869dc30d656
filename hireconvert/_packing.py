"""FFN layers as the native kernels read them: checked here, packed by the library.

Everything that `native/kernels.h` and `native/pack.h` say about sizes is made true here, and the
library trusts it.

Shape suffixes: D width, F neurons, P parts (gate and up, or up alone), M their rows one after the
other, G blocks of a row.
"""

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import torch

from hireconvert._pages import MEMORY, placed, shapes_of

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2", "gelu_quick")
PREDICTOR_BITS, REST_BITS = (2, 3, 4), (2, 3, 4, 8)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES, STRIDE = 16, 32
LOW_BITS = 4  # of refined rows below those of the copies
_LINE = 64  # bytes; HIRE_LINE of native/kernels.h
_MOST = 2**31 - 64  # indices are 32 bits wide
_MOST_WIDTH = 2**19  # sums of codes times digits over a row are 32 bits wide
LONGEST_NORMAL_BLOCK = 2**16  # and of levels times digits over a block
_COPY_POINTERS = ("planes", "scale", "codes", "unit", "offset", "low")


class _Copy(ctypes.Structure):
    """hire_copy of native/pack.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _COPY_POINTERS),
        *((name, ctypes.c_int64) for name in ("rows", "bits", "block")),
    ]


class _Dense(ctypes.Structure):
    """hire_dense of native/pack.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row_stride", "column_stride")),
    ]


class _Packing(ctypes.Structure):
    """hire_packing of native/pack.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "width", "stride", "num_neurons", "parts", "weight_type", "tile_bytes", "rest_bytes",
            "low_bytes",
        )),
        *((name, _Copy) for name in ("first", "down")),
        ("dense", _Dense * 3),
        *((name, ctypes.c_void_p) for name in (
            "factor", "mean", "tiles", "rest", "low", "rows", "low_sum",
        )),
    ]  # fmt: skip


# --------------------------------------------------------------------------- checked input


class _Tensors:
    """Named tensors handed over with the shapes that they must have. Raises ValueError."""

    def __init__(self, tensors: Mapping[str, torch.Tensor | None]) -> None:
        self._tensors = tensors

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor, detached, on the CPU."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ValueError(f"native: {name} is missing")
        if tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            found = f"{list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"native: {name} is {found}, expected {list(shape)} on the CPU")
        return tensor.detach()

    def floats(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor in float32."""
        tensor = self.get(name, *shape)
        if not tensor.is_floating_point():
            raise ValueError(f"native: {name} is {tensor.dtype}, expected a floating-point type")
        return tensor.float()

    def has(self, name: str) -> bool:
        """Whether the tensor was given."""
        return self._tensors.get(name) is not None

    def halves(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor in float16, contiguous, as docs/format.md has scales."""
        return self.floats(name, *shape).to(torch.float16).contiguous()

    def planes(self, name: str, *shape: int) -> torch.Tensor:
        """The bit planes, contiguous."""
        return self._bytes(name, torch.uint8, *shape)

    def codes(self, name: str, *shape: int) -> torch.Tensor:
        """Scales of 8 bits, contiguous."""
        return self._bytes(name, torch.int8, *shape)

    def _bytes(self, name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        tensor = self.get(name, *shape)
        if tensor.dtype != dtype:
            raise ValueError(f"native: {name} is {tensor.dtype}, expected {dtype}")
        return tensor.contiguous()


def _number(settings: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"native: {key} is {value!r}, expected an integer in [{low}, {high}]")
    return value


def _one_of(settings: Mapping[str, Any], key: str, choices: tuple[Any, ...]) -> int:
    value = settings.get(key)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"native: {key} is {value!r}, expected one of {list(choices)}")
    return choices.index(value)


def _level(settings: Mapping[str, Any]) -> float | None:
    value = settings.get("level")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"native: level is {value!r}, expected a number")
    return float(value)


def _pad_parts(values_M: torch.Tensor, parts: int) -> torch.Tensor:
    """float32 [P, Fp] from [P * F], zeros up to a whole tile."""
    value_PF = values_M.view(parts, -1)
    return torch.nn.functional.pad(value_PF, (0, -value_PF.shape[1] % LANES))


# --------------------------------------------------------------------------- sizes


def _quad_bytes(num: int, bits: int) -> int:
    """Bytes of the codes of `num` inputs of a tile, in whole words of a lane."""
    words = -(-num // 32) * 3 if bits == 3 else -(-num // (32 // bits))
    return 4 * LANES * words


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _tile_bytes(width: int, parts: int, copy: _Copy) -> int:
    whole, last = divmod(width, copy.block)
    codes = whole * _quad_bytes(copy.block, copy.bits) + _quad_bytes(last, copy.bits)
    if copy.codes:
        return _whole_lines(parts * LANES * -(-width // copy.block)) + parts * codes
    scales = 2 * LANES * -(-width // copy.block) * (2 if copy.offset else 1)
    return parts * (codes + scales)


def _lane_bytes(stride: int, bits: int) -> int:
    """Bytes of a row of codes with 16 outputs side by side."""
    words, left = divmod(stride // LANES, 32 // bits)
    narrow = next(size for size in (0, 1, 2, 4) if left * bits <= 8 * size)
    return LANES * (4 * words + narrow)


def _rest_bytes(width: int, stride: int, copy: _Copy) -> int:
    """Bytes of a neuron's low-bit row with its scales; of 4 bits those of a tile of them."""
    if copy.codes:
        return _whole_lines(LANES * -(-width // copy.block)) + LANES * stride // 2
    scales = 2 * -(-width // copy.block) * (2 if copy.offset else 1)
    if copy.bits == 4:
        return LANES * (stride // 2 + scales)
    return _lane_bytes(stride, copy.bits) + scales


# --------------------------------------------------------------------------- one layer


class _Layer:
    """A layer that is checked, and then packed into memory of its own. Raises ValueError."""

    def __init__(
        self, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None]
    ) -> None:
        given, up = _Tensors(tensors), tensors.get("up")
        if up is None or up.dim() != 2 or up.dtype not in TYPES or not up.numel():
            raise ValueError("native: up is not a matrix of float32, bfloat16 or float16")
        neurons, width = up.shape
        if neurons > _MOST or width > _MOST_WIDTH:
            raise ValueError(f"native: {neurons} x {width} is too large")
        copies = bool(settings.get("copies"))  # of which none is computed exactly
        candidates = 0 if copies else _number(settings, "num_candidates", 1, neurons)
        kept = 0 if copies else _number(settings, "num_kept", 1, candidates)
        self.level = _level(settings)
        if self.level is not None and kept < neurons:
            raise ValueError(f"native: a level, but {kept} of {neurons} neurons may be kept")
        self.given, self.settings = given, settings
        self.held: list[torch.Tensor] = []  # what the library is told the addresses of
        self.numbers = {
            "width": width,
            "stride": -(-width // STRIDE) * STRIDE,
            "num_neurons": neurons,
            "num_candidates": candidates,
            "num_kept": kept,
            "gated": int(given.has("gate")),
            "activation": _one_of(settings, "activation", ACTIVATIONS),
            "weight_type": TYPES.index(up.dtype),
            "relative": int(bool(settings.get("relative"))),
        }
        self.parts = 1 + self.numbers["gated"]
        self.packing = _Packing(
            width=width,
            stride=self.numbers["stride"],
            num_neurons=neurons,
            parts=self.parts,
            weight_type=self.numbers["weight_type"],
        )
        self.small = self._predictor() | self._biases()
        self.shapes = self._copies(settings.get("rest"))
        self._dense(up.dtype)

    def _predictor(self) -> dict[str, torch.Tensor]:
        """What belongs to the estimates beside their copy."""
        given, parts = self.given, self.parts
        width, neurons = self.numbers["width"], self.numbers["num_neurons"]
        tensors = {
            "mean": given.floats("mean", width),
            "inverse_scale": 1.0 / given.floats("column_scale", width),
            "bias": _pad_parts(given.floats("bias", parts * neurons), parts),
            "norm": _pad_parts(given.floats("norm", neurons), 1),
        }
        if given.has("soft"):
            tensors["soft"] = _pad_parts(given.floats("soft", parts * neurons), parts)
            if given.has("rest_error"):
                tensors["rest_error"] = given.floats("rest_error", 1)
        if self.level is not None:
            tensors["level"] = torch.tensor([self.level], dtype=torch.float32)
        return tensors

    def _biases(self) -> dict[str, torch.Tensor]:
        """Those that the layer has: `row_bias` [P, F] and `down_bias` [D]."""
        given, tensors = self.given, {}
        width, neurons = self.numbers["width"], self.numbers["num_neurons"]
        names = [f"{name}_bias" for name in ("gate", "up")[2 - self.parts :]]
        if any(given.has(name) for name in names):
            tensors["row_bias"] = torch.stack([
                given.floats(name, neurons) if given.has(name) else torch.zeros(neurons)
                for name in names
            ])  # fmt: skip
        if given.has("down_bias"):
            tensors["down_bias"] = given.floats("down_bias", width)
        return tensors

    def _copies(self, rest: Mapping[str, Any] | None) -> dict[str, Any]:
        """The shapes of tiles and low-bit rows; what the copies are is told to the library."""
        numbers, packing = self.numbers, self.packing
        width, neurons, stride = numbers["width"], numbers["num_neurons"], numbers["stride"]
        tiles, parts = -(-neurons // LANES), self.parts
        symmetric = self._copy(packing.first, "", self.settings, PREDICTOR_BITS)
        packing.tile_bytes = _tile_bytes(width, parts, packing.first)
        numbers |= {"bits": packing.first.bits, "block": packing.first.block}
        numbers |= {"symmetric": symmetric, "normal": int(bool(packing.first.codes))}
        numbers["tile_bytes"] = packing.tile_bytes
        shapes: dict[str, Any] = {"tiles": (torch.uint8, (tiles, packing.tile_bytes))}
        if rest is None:
            return shapes
        symmetric = self._copy(packing.down, "down_", rest, REST_BITS)
        bits, block = packing.down.bits, packing.down.block
        if block % LANES and block < width:
            raise ValueError(f"native: block of down rows is {block}, no multiple of {LANES}")
        packing.rest_bytes = _rest_bytes(width, stride, packing.down)
        numbers |= {"rest_bits": bits, "rest_block": block}
        numbers |= {"rest_symmetric": symmetric, "rest_normal": int(bool(packing.down.codes))}
        numbers["rest_bytes"] = packing.rest_bytes
        rows = tiles if bits == 4 else neurons
        return shapes | {"rest": (torch.uint8, (rows, packing.rest_bytes))}

    def _copy(
        self, copy: _Copy, prefix: str, settings: Mapping[str, Any], choices: tuple[int, ...]
    ) -> int:
        """Tell the library of a copy; returns whether it is symmetric.

        The units of the scales of normal levels join the small tensors.
        """
        width = self.numbers["width"]
        copy.rows = self.numbers["num_neurons"] * (1 if prefix else self.parts)
        copy.bits = choices[_one_of(settings, "bits", choices)]
        copy.block = min(_number(settings, "block", 1, _MOST), width)
        symmetric, blocks = _one_of(settings, "symmetric", (False, True)), -(-width // copy.block)
        planes = self.given.planes(f"{prefix}planes", copy.bits, copy.rows, -(-width // 8))
        copy.planes = self._address(planes)
        if _one_of({"levels": "even", **settings}, "levels", ("even", "normal")):
            if copy.bits != 4 or not symmetric or copy.block > LONGEST_NORMAL_BLOCK:
                raise ValueError("native: normal levels are of 4 bits, symmetric, in short blocks")
            codes = self.given.codes(f"{prefix}scale_codes", copy.rows, blocks)
            unit = self.given.floats(f"{prefix}scale_unit", copy.rows).contiguous()
            copy.codes, copy.unit = self._address(codes), self._address(unit)
            name, parts = ("rest_unit", 1) if prefix else ("unit", self.parts)
            self.small[name] = _pad_parts(unit, parts)
            return symmetric
        copy.scale = self._address(self.given.halves(f"{prefix}scale", copy.rows, blocks))
        if not symmetric:
            copy.offset = self._address(self.given.halves(f"{prefix}offset", copy.rows, blocks))
        return symmetric

    def _dense(self, dtype: torch.dtype) -> None:
        shape = (self.numbers["num_neurons"], self.numbers["width"])
        names = ("gate", "up", "down")[2 - self.parts :]
        matrices = [self.given.get(name, *shape) for name in names]
        if any(matrix.dtype != dtype for matrix in matrices):
            raise ValueError(f"native: matrices are {[str(m.dtype) for m in matrices]}")
        for place, matrix in zip(self.packing.dense, matrices, strict=False):
            place.weight = self._address(matrix)
            place.row_stride, place.column_stride = matrix.stride()

    def _address(self, tensor: torch.Tensor) -> int:
        self.held.append(tensor)
        return tensor.data_ptr()

    def _refined(self, library: Any) -> dict[str, Any]:
        """The shape of refined rows; none where blocks are cut through."""
        numbers, packing, given = self.numbers, self.packing, self.given
        if (numbers["bits"], numbers.get("rest_bits")) != (LOW_BITS, LOW_BITS):
            raise ValueError("native: refined rows without 4-bit copies")
        width = numbers["width"]
        if numbers["block"] % LANES and numbers["block"] < width:
            return {}
        for copy, prefix in ((packing.first, ""), (packing.down, "down_")):
            blocks = -(-width // copy.block)
            copy.low = self._address(given.halves(f"{prefix}low_scale", copy.rows, blocks))
        packing.low_bytes = library.hire_low_bytes(
            width, self.parts, packing.first.block, packing.down.block
        )
        return {"low": (torch.uint8, (numbers["num_neurons"], packing.low_bytes))}

    def refined(self, library: Any, level: int) -> dict[str, torch.Tensor] | None:
        """Packed with the weights as codes beyond those of the copies; None where they are not.

        They are not where blocks are cut through, or weights were trained or merged since.
        """
        low = self._refined(library)
        if not low:
            return None
        small = {**self.small, "low_bias": torch.zeros_like(self.small["bias"])}
        row_bias = small.pop("row_bias", None)
        tensors, piece = placed({**shapes_of(small), **self.shapes, **low})
        sum_M = torch.empty(self.packing.first.rows, dtype=torch.float64)
        factor_D = self.given.floats("column_scale", self.numbers["width"]).contiguous()
        self.packing.low_sum, self.packing.factor = sum_M.data_ptr(), self._address(factor_D)
        if not self._packed(library, level, tensors):
            MEMORY.give_back(piece)
            return None
        bias_M = sum_M - self.given.floats("bias", sum_M.numel())
        if row_bias is not None:
            bias_M += row_bias.flatten()
        small["low_bias"] = _pad_parts(bias_M.float(), self.parts)
        self.numbers["low_bytes"] = self.packing.low_bytes
        return _filled(tensors, small)

    def copies(self, library: Any, level: int) -> dict[str, torch.Tensor] | None:
        """Packed as the copies alone, none where the weights are not what these stand for.

        Estimates are exact then, so they have no mean, no errors, and the layer's own biases.
        """
        if (self.numbers["bits"], self.numbers.get("rest_bits")) != (LOW_BITS, LOW_BITS):
            raise ValueError("native: rows of copies without 4-bit copies")
        left_out = ("soft", "rest_error", "row_bias")
        small = {name: tensor for name, tensor in self.small.items() if name not in left_out}
        small["mean"] = torch.zeros_like(small["mean"])
        small["bias"] = torch.zeros_like(small["bias"])
        if "row_bias" in self.small:
            small["bias"] = _pad_parts(self.small["row_bias"].flatten(), self.parts)
        tensors, piece = placed({**shapes_of(small), **self.shapes})
        factor_D = self.given.floats("column_scale", self.numbers["width"]).contiguous()
        self.packing.factor = self._address(factor_D)
        if not self._packed(library, level, tensors):
            MEMORY.give_back(piece)
            return None
        return _filled(tensors, small)

    def stored(self, library: Any, level: int) -> dict[str, torch.Tensor]:
        """Packed with the weights as they are."""
        numbers = self.numbers
        shape = (numbers["num_neurons"], self.parts + 1, numbers["stride"])
        rows = {"rows": (TYPES[numbers["weight_type"]], shape)}
        tensors, _ = placed({**shapes_of(self.small), **self.shapes, **rows})
        self._packed(library, level, tensors)
        return _filled(tensors, self.small)

    def _packed(self, library: Any, level: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        packing, threads = self.packing, torch.get_num_threads()
        packing.mean = self._address(self.small["mean"].contiguous())
        for name in ("tiles", "rest", "low", "rows"):
            setattr(packing, name, tensors[name].data_ptr() if name in tensors else None)
        address = ctypes.addressof(packing)
        scratch = torch.empty(threads * library.hire_pack_scratch(address), dtype=torch.uint8)
        return bool(library.hire_pack(address, scratch.data_ptr(), threads, level))


def _filled(
    tensors: dict[str, torch.Tensor], small: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    for name, tensor in small.items():
        tensors[name].copy_(tensor)
    return tensors


def pack(
    library: Any,
    level: int,
    settings: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor | None],
) -> tuple[dict[str, int], dict[str, torch.Tensor]] | None:
    """(numbers, tensors) of hire_layer in native/kernels.h, or None; see FfnLayer.pack.

    Raises ValueError.
    """
    layer = _Layer(settings, tensors)
    if settings.get("copies"):
        copies = layer.copies(library, level)
        return None if copies is None else (layer.numbers, copies)
    packed = layer.refined(library, level) if settings.get("refined") else None
    if packed is None:
        packed = layer.stored(library, level)
    return layer.numbers, packed
