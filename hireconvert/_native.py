"""The native library of sparse FFN decoding: layers packed for it, and calls into it.

Importing this raises ImportError where no library was built. Nothing but torch is needed; the
files that ship in checkpoints import this module when it is there (`runtime/hire_native.py`), so
what they use of it may only change together with `ABI`.

Shape suffixes: N rows, D width, F neurons, P parts (gate and up, or up alone), T tiles of 16
neurons, S stride (D with its padding), B inputs of a block.
"""

import contextlib
import ctypes
import importlib.machinery
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ABI = 1
LEVELS = ("portable", "avx2", "avx512")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu2", "gelu_quick")
VARIABLE = "HIRE_NATIVE"  # of the environment: `off`, or the highest level to use
PREDICTOR_BITS, REST_BITS = (2, 3, 4), (2, 3, 4, 8)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LANES, _STRIDE = 16, 32
_PAGE = 2**21
_MOST = 2**31 - 64  # indices are 32 bits wide
_NUMBERS = (
    "width", "stride", "num_neurons", "num_candidates", "num_kept", "gated", "activation",
    "weight_type", "bits", "block", "symmetric", "tile_bytes", "rest_bits", "rest_block",
    "rest_symmetric", "rest_bytes",
)  # fmt: skip
_POINTERS = (
    "tiles", "mean", "inverse_scale", "bias", "soft", "norm", "rows", "row_bias", "down_bias",
    "rest",
)  # fmt: skip


class _Struct(ctypes.Structure):
    """hire_layer of native/kernels.h."""

    _fields_ = [  # noqa: RUF012 (ctypes wants a plain list)
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def _load() -> Any:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        if path.exists():
            return _declared(ctypes.CDLL(str(path)), path)
    raise ImportError("hireconvert was installed without a C compiler and has no native library")


def _declared(library: Any, path: Path) -> Any:
    if library.hire_abi() != ABI:
        raise ImportError(f"{path.name} has ABI {library.hire_abi()}, expected {ABI}")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.hire_scratch_bytes.argtypes = [pointer]
    library.hire_scratch_bytes.restype = size
    library.hire_scratch_places.argtypes = [pointer, pointer]
    library.hire_scratch_places.restype = None
    library.hire_ffn.argtypes = [*[pointer] * 6, size, number, number]
    library.hire_ffn.restype = size
    library.hire_top_k.argtypes = [pointer, size, size, pointer, pointer]
    library.hire_top_k.restype = None
    return library


_LIBRARY = _load()
_LOCAL = threading.local()  # the scratch memory of each thread
_LAYERS: "weakref.WeakValueDictionary[int, FfnLayer]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def level() -> str | None:
    """The level that new layers use: one of LEVELS, None when the environment switches it off.

    Raises ValueError when the variable holds something else.
    """
    wanted = os.environ.get(VARIABLE) or LEVELS[-1]
    if wanted == "off":
        return None
    if wanted not in LEVELS:
        raise ValueError(f"{VARIABLE} is {wanted!r}, expected off or one of {', '.join(LEVELS)}")
    return LEVELS[_LIBRARY.hire_level_at_most(LEVELS.index(wanted))]


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


def _octets(halves: torch.Tensor) -> torch.Tensor:
    return halves.to(torch.float16).contiguous().view(torch.uint8)


def _codes(planes: torch.Tensor, length: int) -> torch.Tensor:
    shift = torch.arange(8, dtype=torch.uint8)
    codes = torch.zeros(planes.shape[1], length, dtype=torch.uint8)
    for bit, plane in enumerate(planes):
        codes |= ((plane[..., None] >> shift) & 1).flatten(-2)[:, :length] << bit
    return codes


def _by_tile(rows: torch.Tensor, parts: int) -> torch.Tensor:
    """[T, P, 16, columns] from [P * F, columns]; neurons that fill the last tile are zeros."""
    part = rows.unflatten(0, (parts, -1))
    padded = part.new_zeros(parts, -(-part.shape[1] // _LANES) * _LANES, part.shape[2])
    padded[:, : part.shape[1]] = part
    return padded.unflatten(1, (-1, _LANES)).transpose(0, 1)


def _tiles(
    codes: torch.Tensor, scales: list[torch.Tensor], parts: int, bits: int, block: int
) -> torch.Tensor:
    """uint8 [T, bytes]: for each block the codes of every part, then scales, then offsets."""
    code_TPLD = _by_tile(codes, parts)
    scale_TPLG = [_by_tile(scale, parts) for scale in scales]
    pieces = []
    for index, start in enumerate(range(0, codes.shape[1], block)):
        lanes = code_TPLD[..., start : start + block].transpose(-1, -2)
        pieces.append(pack_lanes(lanes, bits).flatten(1))
        pieces += [_octets(scale[..., index]).flatten(1) for scale in scale_TPLG]
    return torch.cat(pieces, dim=1).contiguous()


def _rest_rows(
    codes_FD: torch.Tensor, scales: list[torch.Tensor], bits: int, stride: int
) -> torch.Tensor:
    """uint8 [F, bytes]: codes with 16 outputs side by side, then scales, then offsets."""
    padded = torch.zeros(codes_FD.shape[0], stride, dtype=torch.uint8)
    padded[:, : codes_FD.shape[1]] = codes_FD
    lanes = pack_lanes(padded.unflatten(1, (-1, _LANES)), bits)
    return torch.cat([lanes, *[_octets(scale) for scale in scales]], dim=1)


def _memory(size: int) -> torch.Tensor:
    """uint8 [size], in large pages where the system has them: a stream of rows that are read once
    spends a third of its time on the addresses of small ones."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    return memory[start : start + size]


def _together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in one piece of memory, each at a cache line and with one behind it."""
    starts, total = {}, 0
    for name, tensor in tensors.items():
        starts[name] = total
        # Scales are read 16 at a time, beyond the end of the last row.
        total += -(-tensor.nbytes // 64) * 64 + 64
    memory, moved = _memory(total), {}
    for name, tensor in tensors.items():
        piece = memory[starts[name] : starts[name] + tensor.nbytes]
        moved[name] = piece.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return moved


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

    def planes(self, name: str, bits: int, rows: int, length: int) -> torch.Tensor:
        """The codes of bit planes, uint8 [rows, length]."""
        planes = self.get(name, bits, rows, -(-length // 8))
        if planes.dtype != torch.uint8:
            raise ValueError(f"native: {name} is {planes.dtype}, expected torch.uint8")
        return _codes(planes, length)


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


def _scales(
    given: _Tensors, prefix: str, symmetric: bool, rows: int, blocks: int
) -> list[torch.Tensor]:
    names = ["scale"] if symmetric else ["scale", "offset"]
    return [given.floats(prefix + name, rows, blocks) for name in names]


def _pad_parts(values: torch.Tensor, parts: int) -> torch.Tensor:
    """float32 [P, Fp] from [P * F]."""
    return _by_tile(values[:, None], parts).transpose(0, 1).reshape(parts, -1).contiguous()


def _predictor(
    given: _Tensors, numbers: dict[str, int], settings: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    width, neurons, parts = numbers["width"], numbers["num_neurons"], 1 + numbers["gated"]
    outputs, bits = parts * neurons, PREDICTOR_BITS[_one_of(settings, "bits", PREDICTOR_BITS)]
    block = min(_number(settings, "block", 1, _MOST), width)
    symmetric = bool(_one_of(settings, "symmetric", (False, True)))
    codes = given.planes("planes", bits, outputs, width)
    scales = _scales(given, "", symmetric, outputs, -(-width // block))
    tiles = _tiles(codes, scales, parts, bits, block)
    numbers |= {"bits": bits, "block": block, "symmetric": symmetric, "tile_bytes": tiles.shape[1]}
    tensors = {
        "tiles": tiles,
        "mean": given.floats("mean", width),
        "inverse_scale": 1.0 / given.floats("column_scale", width),
        "bias": _pad_parts(given.floats("bias", outputs), parts),
        "norm": _pad_parts(given.floats("norm", neurons), 1),
    }
    if given.has("soft"):
        tensors["soft"] = _pad_parts(given.floats("soft", outputs), parts)
    return tensors


def _rest(
    given: _Tensors, numbers: dict[str, int], rest: Mapping[str, Any] | None
) -> dict[str, torch.Tensor]:
    if rest is None:
        return {}
    width, neurons = numbers["width"], numbers["num_neurons"]
    bits = REST_BITS[_one_of(rest, "bits", REST_BITS)]
    block = min(_number(rest, "block", 1, _MOST), width)
    if block % _LANES and block < width:
        raise ValueError(f"native: block of down rows is {block}, no multiple of {_LANES}")
    symmetric = bool(_one_of(rest, "symmetric", (False, True)))
    codes = given.planes("down_planes", bits, neurons, width)
    scales = _scales(given, "down_", symmetric, neurons, -(-width // block))
    rows = _rest_rows(codes, scales, bits, numbers["stride"])
    numbers |= {"rest_bits": bits, "rest_block": block, "rest_symmetric": symmetric}
    numbers["rest_bytes"] = rows.shape[1]
    return {"rest": rows}


def _weights(given: _Tensors, numbers: dict[str, int], up: torch.Tensor) -> dict[str, torch.Tensor]:
    width, neurons, gated = numbers["width"], numbers["num_neurons"], numbers["gated"]
    names = ["gate", "up"] if gated else ["up"]
    matrices = [given.get(name, neurons, width) for name in [*names, "down"]]
    if any(matrix.dtype != up.dtype for matrix in matrices):
        raise ValueError(f"native: matrices are {[str(m.dtype) for m in matrices]}")
    rows = torch.zeros(neurons, len(matrices), numbers["stride"], dtype=up.dtype)
    for place, matrix in enumerate(matrices):
        rows[:, place, :width] = matrix
    tensors = {"rows": rows}
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


# --------------------------------------------------------------------------- layers


class FfnLayer:
    """One FFN packed for the library. Immutable: a change of weights calls for another one."""

    def __init__(self, numbers: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> None:
        self.numbers, self.tensors = dict(numbers), _together(tensors)
        self.level = level()
        self._level = LEVELS.index(self.level or LEVELS[0])
        pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self._struct = _Struct(**self.numbers, **pointers)
        self._address = ctypes.addressof(self._struct)
        self._scratch_bytes = _LIBRARY.hire_scratch_bytes(self._address)
        self._width = self.numbers["width"]
        self.dtype = TYPES[self.numbers["weight_type"]]
        self.handle = next(_HANDLES)
        _LAYERS[self.handle] = self

    @classmethod
    def pack(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None]
    ) -> "FfnLayer":
        """A layer of weights and predictor tensors (docs/format.md); raises ValueError.

        `settings`: `activation`, `num_candidates`, `num_kept` (as many: none is dropped), the
        predictor's `bits`, `block`, `symmetric`, and `rest` (the same three keys, or None).
        `tensors`: `gate` (or None), `up` and `down` [F, D]; their biases as `gate_bias`, ...;
        `norm` [F], what scores are multiplied by; the predictor's and the low-bit copy's.
        """
        given, up = _Tensors(tensors), tensors.get("up")
        if up is None or up.dim() != 2 or up.dtype not in TYPES or not up.numel():
            raise ValueError("native: up is not a matrix of float32, bfloat16 or float16")
        neurons, width = up.shape
        if neurons > _MOST or width > _MOST:
            raise ValueError(f"native: {neurons} x {width} is too large")
        candidates = _number(settings, "num_candidates", 1, neurons)
        numbers = {
            "width": width,
            "stride": -(-width // _STRIDE) * _STRIDE,
            "num_neurons": neurons,
            "num_candidates": candidates,
            "num_kept": _number(settings, "num_kept", 1, candidates),
            "gated": int(given.has("gate")),
            "activation": _one_of(settings, "activation", ACTIVATIONS),
            "weight_type": TYPES.index(up.dtype),
        }
        packed = _predictor(given, numbers, settings) | _weights(given, numbers, up)
        packed |= _rest(given, numbers, settings.get("rest"))
        return cls(numbers, packed)

    def __deepcopy__(self, memo: Any) -> "FfnLayer":
        return self

    def __reduce__(self) -> Any:
        return FfnLayer, (self.numbers, self.tensors)

    @property
    def down_FD(self) -> torch.Tensor:
        """The output rows, a view."""
        return self.tensors["rows"][:, -1, : self._width]

    def run(
        self, x_ND: torch.Tensor, counts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y [N, D]; None, or the bool mask [N] of the rows that were finite and so were written).

        `counts`, int64 [5] on the CPU, gets calls, rows, kept, candidates and dense rows added.
        Output bits depend neither on the number of threads nor on the other rows. Raises
        ValueError when x is not [N, D] of the weights' type.
        """
        if x_ND.dim() != 2 or x_ND.shape[1] != self._width or x_ND.dtype != self.dtype:
            raise ValueError(f"native: x is {x_ND.dtype} {list(x_ND.shape)}, width {self._width}")
        x_ND, num_rows = x_ND.contiguous(), x_ND.shape[0]
        y_ND, finite_N = torch.empty_like(x_ND), torch.empty(num_rows, dtype=torch.bool)
        bad = _LIBRARY.hire_ffn(
            self._address,
            x_ND.data_ptr(),
            y_ND.data_ptr(),
            finite_N.data_ptr(),
            None if counts is None else counts.data_ptr(),
            _scratch(self._scratch_bytes).data_ptr(),
            num_rows,
            torch.get_num_threads(),
            self._level,
        )
        return y_ND, (finite_N if bad else None)

    def last(self) -> dict[str, torch.Tensor]:
        """What the last row of this thread left in the scratch memory; for tests.

        `z` [P, Fp], `score` [F], `index` [C] and `chosen` [K], the kept among the candidates.
        """
        numbers, places = self.numbers, (ctypes.c_int64 * 4)()
        _LIBRARY.hire_scratch_places(self._address, ctypes.addressof(places))
        scratch = _scratch(self._scratch_bytes)
        start = -scratch.data_ptr() % 64
        neurons = numbers["num_neurons"]
        padded, parts = -(-neurons // _LANES) * _LANES, 1 + numbers["gated"]
        sizes = (parts * padded, neurons, numbers["num_candidates"], numbers["num_kept"])
        z, score, index, chosen = (
            scratch[start + place : start + place + 4 * size].view(torch.int32).clone()
            for place, size in zip(places, sizes, strict=True)
        )
        z_PF = z.view(torch.float32).view(parts, padded)[:, :neurons]
        if numbers["num_kept"] == numbers["num_candidates"]:  # nothing chose among them
            chosen = torch.arange(numbers["num_kept"], dtype=torch.int32)
        return {"z": z_PF, "score": score.view(torch.float32), "index": index, "chosen": chosen}


def _scratch(size: int) -> torch.Tensor:
    """At least `size` bytes of this thread's own."""
    scratch = getattr(_LOCAL, "scratch", None)
    if scratch is None or scratch.numel() < size:
        with torch.inference_mode(False):
            scratch = _LOCAL.scratch = torch.zeros(size, dtype=torch.uint8)
    return scratch


def top_k(score_F: torch.Tensor, num: int) -> torch.Tensor:
    """The `num` largest scores, none negative or NaN, as ascending int32 indices.

    Ties go to the lowest index. Raises ValueError.
    """
    total = score_F.numel()
    if score_F.dtype != torch.float32 or score_F.dim() != 1 or not 1 <= num <= total:
        raise ValueError(f"native: {num} of {score_F.dtype} {list(score_F.shape)}")
    score_F = score_F.contiguous()
    out, spare = torch.zeros(2, total + 1, dtype=torch.int32)
    _LIBRARY.hire_top_k(
        score_F.data_ptr(), total, num, out.data_ptr(), spare.data_ptr()
    )
    return out[:num]


# --------------------------------------------------------------------------- inside graphs

_OPERATORS = torch.library.Library("hire_native", "DEF")
_OPERATORS.define("ffn(Tensor x, int handle) -> (Tensor, Tensor)")


def _ffn(x_ND: torch.Tensor, handle: int) -> tuple[torch.Tensor, torch.Tensor]:
    y_ND, finite_N = _LAYERS[handle].run(x_ND)
    if finite_N is None:
        finite_N = torch.ones(x_ND.shape[0], dtype=torch.bool)
    return y_ND, finite_N


def _ffn_shapes(x_ND: torch.Tensor, handle: int) -> tuple[torch.Tensor, torch.Tensor]:
    del handle
    return torch.empty_like(x_ND), x_ND.new_empty(x_ND.shape[0], dtype=torch.bool)


_OPERATORS.impl("ffn", _ffn, "CPU")
torch.library.register_fake("hire_native::ffn", _ffn_shapes, lib=_OPERATORS)

