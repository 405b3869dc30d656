"""Decoder layers for the native decode step: checked, described in place, and run in one call.

Weights are not copied: what is described here points at the tensors given, and holds them. The
file of a checkpoint that imports this is `runtime/hire_step.py`.

Shape suffixes: T tiles of L = 16 outputs, W words of B = 64 bytes, G blocks of a row,
Q new positions, D width, H heads, J key/value heads, E head size, F neurons,
B decoder layers, R ropes.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hireconvert._native import LEVELS, LIBRARY, FfnLayer, level, scratch
from hireconvert._packing import ACTIVATIONS, LANES, TYPES
from hireconvert._pages import placed

MOST_ROWS = 32  # HIRE_STEP_ROWS of native/step.h
PAST_FIELDS = ("keys", "values", "head_stride", "first", "length")
SLACK = 64  # bytes that may be read behind the last key or value
_CODES = {8: len(TYPES), 4: len(TYPES) + 1}  # HIRE_INT8 and HIRE_INT4 of native/step.h, by bits
_ZERO_CODE = 128  # HIRE_ZERO_CODE of native/step.h
_MOST_BLOCK = 1 << 16  # products of codes and digits that fit a sum of 32 bits
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = ("attention_norm", "attended_norm", "ffn_norm", "ffn_out_norm", "q_norm", "k_norm")
_NUMBERS = (
    "width", "heads", "kv_heads", "head_dim", "rotary", "rope", "window", "cache_type",
    "activation",
)  # fmt: skip
_REALS = ("eps", "scaling", "softcap")


class _Matrix(ctypes.Structure):
    """hire_matrix of native/step.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "stride", "type", "block")),
    ]


class _Block(ctypes.Structure):
    """hire_block of native/step.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_double) for name in _REALS),
        *((name, _Matrix) for name in _MATRICES),
        *((name, ctypes.c_void_p) for name in (*_NORMS, "ffn", "counts")),
    ]


_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
LIBRARY.hire_step_scratch.argtypes = [_POINTER, _SIZE, _SIZE, _NUMBER]
LIBRARY.hire_step_scratch.restype = _SIZE
LIBRARY.hire_step_sequences.argtypes = [
    _POINTER, _SIZE, *[_POINTER] * 3, _SIZE, _POINTER, _SIZE, _POINTER, ctypes.c_double, _NUMBER,
    _NUMBER, _POINTER, _SIZE,
]  # fmt: skip
LIBRARY.hire_step_sequences.restype = _SIZE
LIBRARY.hire_matvec_scratch.argtypes = [_POINTER, _SIZE]
LIBRARY.hire_matvec_scratch.restype = _SIZE
LIBRARY.hire_matvec.argtypes = [*[_POINTER] * 3, _SIZE, _POINTER, _NUMBER, _NUMBER]
LIBRARY.hire_matvec.restype = None
LIBRARY.hire_pack_codes.argtypes = [_POINTER, _POINTER, _NUMBER, _NUMBER]
LIBRARY.hire_pack_codes.restype = _NUMBER


# --------------------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class Matrix:
    """A weight [outputs, inputs] where it lies, and its bias."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None = None

    def described(self, held: list[torch.Tensor]) -> _Matrix:
        """The library's view; tensors it points at are added to `held`. Raises ValueError."""
        weight = self.weight_OI.detach()
        if weight.device.type != "cpu" or weight.dim() != 2 or not weight.numel():
            raise ValueError(f"native: a matrix is {list(weight.shape)} on {weight.device}")
        outputs, inputs = weight.shape
        stride = weight.stride(0) if outputs > 1 else inputs
        if (inputs > 1 and weight.stride(1) != 1) or stride < inputs:
            raise ValueError(f"native: a matrix has strides {list(weight.stride())}")
        if weight.dtype not in TYPES:
            raise ValueError(f"native: a matrix is {weight.dtype}")
        described = _Matrix(outputs=outputs, inputs=inputs, stride=stride, block=inputs)
        described.type = TYPES.index(weight.dtype)
        held.append(weight)
        described.rows = weight.data_ptr()
        if self.bias_O is not None:
            described.bias = _floats("bias", self.bias_O, outputs, held)
        return described


@dataclass(frozen=True)
class Codes:
    """The same as codes of 8 or 4 bits, laid out for the kernels (hire_matrix of native/step.h).

    Scales of 8-bit codes lie by themselves, those of 4 bits within the tiles.
    """

    outputs: int
    inputs: int
    block: int
    tiles_TWB: torch.Tensor
    scale_TGL: torch.Tensor | None
    bias_O: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.scale_TGL is None else 8

    def described(self, held: list[torch.Tensor]) -> _Matrix:
        """The library's view; tensors it points at are added to `held`. Raises ValueError."""
        described = _Matrix(
            outputs=self.outputs, inputs=self.inputs, stride=self.inputs, block=self.block
        )
        described.type = _CODES[self.bits]
        held.append(self.tiles_TWB)
        described.rows = self.tiles_TWB.data_ptr()
        if self.scale_TGL is not None:
            held.append(self.scale_TGL)
            described.scale = self.scale_TGL.data_ptr()
        if self.bias_O is not None:
            described.bias = _floats("bias", self.bias_O, self.outputs, held)
        return described


def _code_shapes(
    outputs: int, inputs: int, block: int, bits: int
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """What `tiles_TWB` and `scale_TGL` of such a matrix measure; lines of scales count as words."""
    tiles, blocks, codes = -(-outputs // LANES), -(-inputs // block), 32 // bits
    words = inputs // block * -(-block // codes) + -(-(inputs % block) // codes)
    if bits == 4:
        return (tiles, words + -(-blocks // 2), 4 * LANES), None
    return (tiles, words, 4 * LANES), (tiles, blocks, LANES)


class _Coding(ctypes.Structure):
    """hire_coding of native/pack.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in (
            "row_stride", "outputs", "inputs", "block", "bits", "weight_type",
        )),
        *((name, ctypes.c_void_p) for name in ("codes", "scales")),
    ]  # fmt: skip


def coded(matrices: Sequence[Matrix], block: int, bits: Sequence[int]) -> list[Matrix | Codes]:
    """The same matrices as codes, in one piece of memory, where they lie on their grids.

    `bits`: 8 or 4 for each. The grids are those of docs/format.md (`attention`), by `block`
    neighbours of a row, rounded to the weights' type. A matrix with other weights stays as it is.
    """
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for index, (matrix, own) in enumerate(zip(matrices, bits, strict=True)):
        outputs, inputs = matrix.weight_OI.shape
        if _may_be_coded(matrix.weight_OI, block):
            tiles, scales = _code_shapes(outputs, inputs, min(block, inputs), own)
            shapes[f"tiles{index}"] = (torch.uint8, tiles)
            if scales is not None:
                shapes[f"scale{index}"] = (torch.float32, scales)
    held, _ = placed(shapes)
    found: list[Matrix | Codes] = list(matrices)
    for index, matrix in enumerate(matrices):
        if f"tiles{index}" in held:
            outputs, inputs = matrix.weight_OI.shape
            codes = Codes(outputs, inputs, min(block, inputs), held[f"tiles{index}"],
                          held.get(f"scale{index}"), matrix.bias_O)  # fmt: skip
            if _encode(matrix, codes):
                found[index] = codes
    return found


def _may_be_coded(weight_OI: torch.Tensor, block: int) -> bool:
    inputs = weight_OI.shape[1]
    known = weight_OI.dtype in TYPES and weight_OI.device.type == "cpu" and weight_OI.numel() > 0
    whole = block >= 1 and (block % 32 == 0 or block >= inputs)
    return known and weight_OI.stride(1) == 1 and whole and min(block, inputs) <= _MOST_BLOCK


def _encode(matrix: Matrix, codes: Codes) -> bool:
    """Write the codes and scales; whether every weight lies on its grid."""
    weight_OI, threads = matrix.weight_OI.detach(), torch.get_num_threads()
    if codes.scale_TGL is None:
        codes.tiles_TWB.zero_()
    elif codes.tiles_TWB.numel() > weight_OI.numel():  # else every byte is written
        codes.tiles_TWB.fill_(_ZERO_CODE)
        codes.scale_TGL.zero_()
    coding = _Coding(
        weight=weight_OI.data_ptr(),
        row_stride=weight_OI.stride(0),
        outputs=codes.outputs,
        inputs=codes.inputs,
        block=codes.block,
        bits=codes.bits,
        weight_type=TYPES.index(weight_OI.dtype),
        codes=codes.tiles_TWB.data_ptr(),
        scales=None if codes.scale_TGL is None else codes.scale_TGL.data_ptr(),
    )
    scratch_TI = torch.empty(threads, 2 * codes.inputs)
    number = LEVELS.index(level() or LEVELS[0])
    return bool(
        LIBRARY.hire_pack_codes(ctypes.addressof(coding), scratch_TI.data_ptr(), threads, number)
    )


def _floats(name: str, tensor: torch.Tensor, size: int, held: list[torch.Tensor]) -> int:
    """Where a float32 copy of the vector lies."""
    if tensor.dim() != 1 or tensor.numel() != size or not tensor.is_floating_point():
        raise ValueError(f"native: {name} is {tensor.dtype} {list(tensor.shape)}, not [{size}]")
    copy = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    held.append(copy)
    return copy.data_ptr()


@dataclass(frozen=True)
class Block:
    """One decoder layer, as hire_block of native/step.h has it.

    `matrices`: `q`, `k`, `v`, `o`, `up`, `down` and, for gated FFNs, `gate`. `norms`: what a
    normalized vector is multiplied by, `attention_norm` and `ffn_norm` at least. With `ffn` the
    sparse FFN runs in place of the dense one.
    """

    matrices: Mapping[str, Matrix | Codes]
    norms: Mapping[str, torch.Tensor]
    head_dim: int
    rotary: int
    eps: float
    scaling: float
    activation: str
    rope: int = 0
    window: int = 0
    softcap: float = 0.0
    cache_type: torch.dtype = torch.float32
    ffn: FfnLayer | None = None
    counts: torch.Tensor | None = None

    def described(self, held: list[Any]) -> _Block:
        """The library's view; what it points at is added to `held`. Raises ValueError."""
        block = _Block()
        for name, matrix in self.matrices.items():
            setattr(block, name, matrix.described(held))
        self._check_matrices(block)
        block.width, block.head_dim = block.q.inputs, self.head_dim
        block.heads = block.q.outputs // self.head_dim
        block.kv_heads = block.k.outputs // self.head_dim
        if not 0 <= self.rotary <= self.head_dim or self.rotary % 2 or self.rope < 0:
            raise ValueError(f"native: {self.rotary} of {self.head_dim} numbers are turned")
        if self.window < 0 or not self.eps >= 0 or not self.softcap >= 0:
            raise ValueError(f"native: window {self.window}, eps {self.eps}")
        if self.activation not in ACTIVATIONS or self.cache_type not in TYPES:
            raise ValueError(f"native: {self.activation!r}, cache of {self.cache_type}")
        block.rotary, block.rope, block.window = self.rotary, self.rope, self.window
        block.cache_type = TYPES.index(self.cache_type)
        block.activation = ACTIVATIONS.index(self.activation)
        block.eps, block.scaling, block.softcap = self.eps, self.scaling, self.softcap
        for name in _NORMS:
            if name in self.norms:
                size = self.head_dim if name in ("q_norm", "k_norm") else block.width
                setattr(block, name, _floats(name, self.norms[name], size, held))
        if block.attention_norm is None or block.ffn_norm is None:
            raise ValueError("native: a norm is missing")
        self._add_ffn(block, held)
        return block

    def _check_matrices(self, block: _Block) -> None:
        missing = {"q", "k", "v", "o", "up", "down"} - set(self.matrices)
        if missing or self.head_dim < 1:
            raise ValueError(f"native: {sorted(missing)} missing, head size {self.head_dim}")
        width, heads, pairs = block.q.inputs, block.q.outputs, block.k.outputs
        neurons = block.up.outputs
        expected = {
            "q": (heads, width), "k": (pairs, width), "v": (pairs, width), "o": (width, heads),
            "up": (neurons, width), "down": (width, neurons),
        }  # fmt: skip
        if "gate" in self.matrices:
            expected["gate"] = (neurons, width)
        codes = set(_CODES.values())
        blocks = {m.block for m in (block.q, block.k, block.v) if m.type in codes}
        if len(blocks) > 1 or codes & {block.gate.type, block.up.type, block.down.type}:
            raise ValueError(f"native: codes in blocks of {sorted(blocks)}, or of an FFN")
        for name, shape in expected.items():
            matrix = getattr(block, name)
            if (matrix.outputs, matrix.inputs) != shape:
                found = [matrix.outputs, matrix.inputs]
                raise ValueError(f"native: {name} is {found}, expected {list(shape)}")
        if heads % self.head_dim or pairs % self.head_dim or heads % pairs:
            raise ValueError(f"native: {heads} and {pairs} outputs, heads of {self.head_dim}")

    def _add_ffn(self, block: _Block, held: list[Any]) -> None:
        if self.counts is not None:
            counts = self.counts
            if counts.dtype != torch.int64 or counts.shape != (5,) or counts.device.type != "cpu":
                raise ValueError(f"native: counts are {counts.dtype} {list(counts.shape)}")
            held.append(counts)
            block.counts = counts.data_ptr()
        if self.ffn is not None:
            shape = (self.ffn.numbers["num_neurons"], self.ffn.numbers["width"])
            if shape != (block.up.outputs, block.width):
                raise ValueError(f"native: the sparse FFN is {list(shape)}")
            held.append(self.ffn)
            block.ffn = self.ffn.address


# --------------------------------------------------------------------------- calls


@dataclass
class Step:
    """Decoder layers that run in one call. Raises ValueError when they do not fit together.

    `last_norm`: what a vector, normalized with that epsilon, is multiplied by behind all layers.
    """

    blocks: Sequence[Block]
    last_norm: tuple[torch.Tensor, float] | None = None
    held: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        described = [block.described(self.held) for block in self.blocks]
        if not described or len({block.width for block in described}) > 1:
            raise ValueError(f"native: layers of width {sorted({b.width for b in described})}")
        self._array = (_Block * len(described))(*described)
        self._address = ctypes.addressof(self._array)
        self.width: int = described[0].width
        self.heads = [(int(block.kv_heads), int(block.head_dim)) for block in described]
        self.rotary: dict[int, int] = {}
        for block in described:
            if self.rotary.setdefault(block.rope, block.rotary) != block.rotary:
                raise ValueError("native: layers of one rope turn different numbers")
        self._last: tuple[int | None, float] = (None, 0.0)
        if self.last_norm is not None:
            gain_D, eps = self.last_norm
            self._last = (_floats("norm", gain_D, self.width, self.held), eps)
        self._level = LEVELS.index(level() or LEVELS[0])
        self._sizes: dict[tuple[int, int], int] = {}

    def past(self) -> torch.Tensor:
        """int64 [B, 5], columns PAST_FIELDS, all zeros: where the caches lie and what they hold."""
        return torch.zeros(len(self.blocks), len(PAST_FIELDS), dtype=torch.int64)

    def run(
        self,
        x_QD: torch.Tensor,
        past_B5: torch.Tensor,
        angles: Sequence[torch.Tensor],
        most: int,
        *,
        unseen_Q: torch.Tensor | None = None,
        seen: int = 0,
    ) -> int:
        """All layers, and the last norm, over `x_QD` (float32, contiguous), in place.

        `past_B5` as `past` gives it, filled in by the caller (it vouches for the addresses: room
        for Q more positions, SLACK behind the end). `angles`: cos and sin, float32 [Q, rotary] and
        contiguous, of each rope. `most`: at least the longest cache's length and Q together.
        With `unseen_Q` (int64 [Q]) every row is the next position of a sequence of its own, in
        caches [Q, J, room, E], and does not see the first so many of the `seen` positions before.
        Returns -1, or the first layer that met NaN or inf, when x and no count is of use. Raises
        ValueError when sizes do not fit.
        """
        num_rows = x_QD.shape[0]
        if (
            x_QD.shape != (num_rows, self.width)
            or not 1 <= num_rows <= MOST_ROWS
            or x_QD.dtype != torch.float32
            or not x_QD.is_contiguous()
            or past_B5.shape != (len(self.blocks), len(PAST_FIELDS))
            or past_B5.dtype != torch.int64
            or not past_B5.is_contiguous()
            or len(angles) < 2 * (max(self.rotary) + 1)
        ):
            raise ValueError(f"native: x is {x_QD.dtype} {list(x_QD.shape)}, width {self.width}")
        for rope, rotary in self.rotary.items():
            for angle in angles[2 * rope : 2 * rope + 2]:
                if angle.shape != (num_rows, rotary) or angle.dtype != torch.float32:
                    raise ValueError(f"native: angles are {angle.dtype} {list(angle.shape)}")
        if unseen_Q is not None and (
            unseen_Q.dtype != torch.int64
            or unseen_Q.shape != (num_rows,)
            or not all(0 <= unseen <= seen for unseen in unseen_Q.tolist())
        ):
            raise ValueError(f"native: {unseen_Q} of {seen} positions are not seen")
        room, memory, threads = self.room(most)
        pointers = (ctypes.c_void_p * len(angles))(*[angle.data_ptr() for angle in angles])
        bad: int = LIBRARY.hire_step_sequences(
            self._address, len(self.blocks), past_B5.data_ptr(), ctypes.addressof(pointers),
            x_QD.data_ptr(), num_rows, memory.data_ptr(), room, *self._last, threads, self._level,
            None if unseen_Q is None else unseen_Q.data_ptr(), seen,
        )  # fmt: skip
        return bad

    def room(self, most: int) -> tuple[int, torch.Tensor, int]:
        """(positions, at least `most`; scratch memory for so many; for how many threads)."""
        threads = torch.get_num_threads()
        room = max(256, 1 << (most - 1).bit_length())
        size = self._sizes.get((room, threads))
        if size is None:
            size = LIBRARY.hire_step_scratch(self._address, len(self.blocks), room, threads)
            self._sizes[room, threads] = size
        return room, scratch(size), threads

    def describe(self, struct: Any) -> None:
        """Tell a hire_token (`_native_token.py`) of the layers, as long as this lives."""
        struct.blocks, struct.num_blocks = self._address, len(self.blocks)
        struct.last_norm, struct.eps = self._last
        struct.level = self._level


def matvec(matrix: Matrix | Codes, x_QI: torch.Tensor) -> torch.Tensor:
    """float32 [Q, outputs]: up to MOST_ROWS rows of float32 times the matrix. Raises ValueError."""
    held: list[torch.Tensor] = []
    described = matrix.described(held)
    num_rows = x_QI.shape[0]
    if (
        x_QI.shape != (num_rows, described.inputs)
        or not 1 <= num_rows <= MOST_ROWS
        or x_QI.dtype != torch.float32
    ):
        raise ValueError(f"native: x is {x_QI.dtype} {list(x_QI.shape)}")
    x_QI = x_QI.contiguous()
    y_QO = torch.empty(num_rows, described.outputs)
    address = ctypes.addressof(described)
    memory = scratch(LIBRARY.hire_matvec_scratch(address, num_rows))
    LIBRARY.hire_matvec(
        address, x_QI.data_ptr(), y_QO.data_ptr(), num_rows,
        memory.data_ptr(), torch.get_num_threads(), LEVELS.index(level() or LEVELS[0]),
    )  # fmt: skip
    return y_QO
