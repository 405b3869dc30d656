"""The native LM head: a weight packed for `native/head.h`, and calls into it.

The files that ship in checkpoints import this module when it is there
(`runtime/hire_head_native.py`), so what they use of it may only change together with `ABI`.

Shape suffixes: N rows, D width, V vocabulary, T tiles of 16 rows.
"""

import ctypes
import itertools
import weakref
from typing import Any, NamedTuple

import torch

from hireconvert._native import LEVELS, LIBRARY, VARIABLE, level, machinery, scratch
from hireconvert._packing import LANES, TYPES
from hireconvert._pages import Shapes, placed
from hireconvert.runtime.hire_predict import head_copy_bytes, num_loud

__all__ = [
    "MOST_WIDTH", "TYPES", "VARIABLE", "HeadCall", "HeadLayer", "RowCall", "level",
    "machinery",
]  # fmt: skip
MOST_WIDTH = 16384
_VNNI = len(LEVELS)  # one more than the highest of LEVELS
_MOST_ROWS = 2**31 - 64
_SEGMENTS = 32  # HIRE_SEGMENTS of native/kernels.h
_NUMBERS = ("width", "num_rows", "num_loud", "weight_type", "weight_stride")
_POINTERS = ("weight", "bias", "order", "divisor", "tiles", "scales", "low", "low_error")


class _Struct(ctypes.Structure):
    """hire_head of native/head.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("loud_ratio", ctypes.c_double),
    ]


class _Call(ctypes.Structure):
    """hire_head_call of native/head.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "rescored", "finite", "counts")),
        *((name, ctypes.c_int64) for name in ("num_rows", "certify", "count")),
        ("cap", ctypes.c_double),
    ]


_HEADS: "weakref.WeakValueDictionary[int, HeadLayer]" = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def _declare() -> None:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    LIBRARY.hire_head_level.argtypes, LIBRARY.hire_head_level.restype = [number], number
    LIBRARY.hire_head_energy.argtypes = [pointer, pointer, number, number]
    LIBRARY.hire_head_energy.restype = None
    LIBRARY.hire_head_pack.argtypes = [pointer, pointer, number, number]
    LIBRARY.hire_head_pack.restype = size
    LIBRARY.hire_head_scratch_bytes.argtypes = [pointer, size, size]
    LIBRARY.hire_head_scratch_bytes.restype = size
    LIBRARY.hire_head_logits.argtypes = [pointer, pointer, pointer, number, number]
    LIBRARY.hire_head_logits.restype = size


_declare()


def head_level(highest: str | None) -> int:
    """The level that the library is told: of AVX-512 with VNNI where the machine has it."""
    wanted = LEVELS.index(highest or LEVELS[0])
    return int(LIBRARY.hire_head_level(_VNNI if wanted == _VNNI - 1 else wanted))


class HeadCall(NamedTuple):
    """What a call of `HeadLayer.run` gives."""

    logits_NV: torch.Tensor  # float32, before soft-capping
    rescored_NV: torch.Tensor | None  # bool: where logits are the reference's; when asked for
    finite_N: torch.Tensor | None  # bool: which rows were written; None: all
    num_rescored: int  # rows of the weight that were read, of all N together
    num_refined: int  # rows of low nibbles that were read


def _divisors(energy_D: torch.Tensor, loud: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order int32 [D], divisor float64 [D]): loud columns first, then what x is divided by.

    Where errors of all columns are alike in size, the bound is least when column j is multiplied by
    sqrt(|x_j| / |w_j|); of x nothing is known here.
    """
    order_D = torch.sort(energy_D, descending=True, stable=True).indices
    quiet_D = energy_D[order_D[loud:]].clamp(1e-60, 1e60).sqrt()
    divisor_D = torch.ones_like(energy_D)
    if quiet_D.numel():
        divisor_D[loud:] = (quiet_D.log().mean().exp() / quiet_D).clamp(1e-4, 1e4).sqrt()
    return order_D.int(), divisor_D


def _shapes(shape_VD: torch.Size, bits: int, biased: bool) -> Shapes:
    """What a packed head holds."""
    rows, width = shape_VD
    tiles, codes, number = -(-rows // LANES), torch.uint8, torch.bfloat16
    every, low = head_copy_bytes((1, width), 8)  # with 6 and 2 bytes of numbers of each row
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "order": (torch.int32, (width,)),
        "divisor": (torch.float64, (width,)),
        "tiles": (codes, (tiles, LANES * (every - 6))),
        "scales": (number, (tiles, 3, LANES)),
    }
    if bits == 8:
        shapes |= {"low": (codes, (rows, low - 2)), "low_error": (number, (rows,))}
    return shapes | ({"bias": (torch.float32, (rows,))} if biased else {})


class HeadLayer:
    """One head packed for the library. Immutable: a change of weights calls for another one."""

    def __init__(
        self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, *, bits: int = 8
    ) -> None:
        """Pack the live weight, which is read again at every call, and so must stay as it is.

        `bits` 8: two nibbles of most columns, 4: the high ones alone. Raises ValueError when the
        weight is none of `TYPES` in rows on the CPU or too large.
        """
        _check(weight_VD, bias_V, bits)
        self.shape_VD = weight_VD.shape
        self.bits, self.level = bits, level()
        self.level_number = head_level(self.level)
        rows, width = self.shape_VD
        loud, threads = num_loud(width), torch.get_num_threads()
        self.tensors, _ = placed(_shapes(self.shape_VD, bits, bias_V is not None))
        if bias_V is not None:
            self.tensors["bias"].copy_(bias_V.detach())
        self.weight_VD = weight_VD.detach()
        pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self._struct = _Struct(
            width=width,
            num_rows=rows,
            num_loud=loud,
            weight_type=TYPES.index(weight_VD.dtype),
            weight_stride=weight_VD.stride(0),
            weight=self.weight_VD.data_ptr(),
            **pointers,
        )
        self._address, number = ctypes.addressof(self._struct), LEVELS.index(self.level or "")
        energy_SD = torch.empty(_SEGMENTS, width, dtype=torch.float64)
        LIBRARY.hire_head_energy(self._address, energy_SD.data_ptr(), threads, number)
        order_D, divisor_D = _divisors(energy_SD.sum(0), loud)
        self.tensors["order"].copy_(order_D)
        self.tensors["divisor"].copy_(divisor_D)
        ratio_V = torch.empty(rows)
        bad = LIBRARY.hire_head_pack(self._address, ratio_V.data_ptr(), threads, number)
        self.finite = bad == 0  # what a weight with NaN or inf was packed to is of no use
        self._struct.loud_ratio = float(ratio_V.max())
        self.handle = next(_HANDLES)
        _HEADS[self.handle] = self

    @property
    def address(self) -> int:
        """Where the library finds it, as long as the layer lives."""
        return self._address

    def __deepcopy__(self, memo: Any) -> None:
        """None: a copy of the model has its own weight, and packs it."""

    def __reduce__(self) -> Any:
        return _nothing, ()

    def run(
        self, x_ND: torch.Tensor, count: int, *, certify: bool, cap: float | None, mask: bool
    ) -> HeadCall:
        """Logits of rows each on its own: bits depend neither on threads nor on other rows.

        `certify`: the best `count` rows, after soft-capping with `cap`, are those of the reference
        head, in its order and with its logits; else `count` rows are the reference's and all others
        below them. Raises ValueError when x is not [N, D].
        """
        rows, width = self.shape_VD
        if x_ND.dim() != 2 or x_ND.shape[1] != width or count < 1:
            raise ValueError(f"native: x is {list(x_ND.shape)}, width {width}; count is {count}")
        x_ND, count = x_ND.float().contiguous(), min(count, rows)
        num = x_ND.shape[0]
        logits_NV = torch.empty(num, rows)
        rescored_NV = torch.zeros(num, rows, dtype=torch.bool) if mask else None
        finite_N, counts = torch.empty(num, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
        call = _Call(
            x=x_ND.data_ptr(),
            y=logits_NV.data_ptr(),
            rescored=None if rescored_NV is None else rescored_NV.data_ptr(),
            finite=finite_N.data_ptr(),
            counts=counts.data_ptr(),
            num_rows=num,
            certify=certify,
            count=count,
            cap=cap or 0.0,
        )
        bad = LIBRARY.hire_head_logits(
            self._address,
            ctypes.addressof(call),
            scratch(LIBRARY.hire_head_scratch_bytes(self._address, count, num)).data_ptr(),
            torch.get_num_threads(),
            self.level_number,
        )
        rescored, refined, _ = counts.tolist()
        return HeadCall(logits_NV, rescored_NV, finite_N if bad else None, rescored, refined)


class RowCall:
    """A head that is called for one row again and again, with the same settings.

    `count`, `certify` and `cap` as `HeadLayer.run` takes them; `counts` int64 [7] is what the
    library adds to (COUNTER_NAMES of `runtime/hire_head.py`). Raises ValueError.
    """

    def __init__(
        self,
        layer: HeadLayer,
        counts: torch.Tensor,
        *,
        count: int,
        certify: bool,
        cap: float | None,
    ) -> None:
        rows = layer.shape_VD[0]
        if (
            counts.dtype != torch.int64
            or counts.device.type != "cpu"
            or counts.dim() != 1
            or count < 1
        ):
            raise ValueError(
                f"native: counts are {counts.dtype} {list(counts.shape)}; {count} rows"
            )
        self.layer, self.counts, self._count = layer, counts, min(count, rows)
        self._logits_1V = torch.empty(1, rows)
        self._finite, self._read = torch.empty(1, dtype=torch.bool), torch.zeros(3).long()
        self._call = _Call(
            y=self._logits_1V.data_ptr(), finite=self._finite.data_ptr(),
            counts=self._read.data_ptr(), num_rows=1, certify=certify, count=self._count,
            cap=cap or 0.0,
        )  # fmt: skip

    def describe(self, struct: Any, x_D: torch.Tensor) -> None:
        """Tell a hire_token (`_native_token.py`) of the head of `x_D`, as long as both live."""
        self._call.x = x_D.data_ptr()
        address = self.layer.address
        size = LIBRARY.hire_head_scratch_bytes(address, self._count, 1)
        self._memory = scratch(size)
        struct.head, struct.call = address, ctypes.addressof(self._call)
        struct.head_scratch, struct.head_counts = self._memory.data_ptr(), self.counts.data_ptr()
        struct.head_level = self.layer.level_number

    def taken(self) -> torch.Tensor:
        """The logits float32 [1, V] of the last call; the next one writes to other memory."""
        logits_1V, self._logits_1V = self._logits_1V, torch.empty_like(self._logits_1V)
        self._call.y = self._logits_1V.data_ptr()
        return logits_1V


def _check(weight_VD: torch.Tensor, bias_V: torch.Tensor | None, bits: int) -> None:
    given = f"{weight_VD.dtype} {list(weight_VD.shape)} on {weight_VD.device}"
    if weight_VD.dim() != 2 or weight_VD.device.type != "cpu" or weight_VD.dtype not in TYPES:
        raise ValueError(f"native: the head's weight is {given}")
    rows, width = weight_VD.shape
    if not 1 <= width <= MOST_WIDTH or not 1 <= rows <= _MOST_ROWS:
        raise ValueError(f"native: the head's weight is {given}")
    if weight_VD.stride(1) != 1 or weight_VD.stride(0) < width:
        raise ValueError(f"native: the head's weight lies in strides {weight_VD.stride()}")
    if bits not in (4, 8):
        raise ValueError(f"native: the head's bits are {bits}, expected 4 or 8")
    if bias_V is None:
        return
    if bias_V.shape != (rows,) or bias_V.device.type != "cpu" or bias_V.dtype not in TYPES:
        raise ValueError(f"native: the head's bias is {bias_V.dtype} {list(bias_V.shape)}")


def _nothing() -> None:
    """What a packed head becomes when it is pickled: nothing, and it is packed again."""


# --------------------------------------------------------------------------- inside graphs

_OPERATORS = torch.library.Library("hire_native", "FRAGMENT")
_OPERATORS.define(
    "head(Tensor x, int handle, bool certify, int count, float cap)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _head(x_ND: torch.Tensor, handle: int, certify: bool, count: int, cap: float) -> _Result:
    call = _HEADS[handle].run(x_ND, count, certify=certify, cap=cap, mask=True)
    finite_N = call.finite_N
    if finite_N is None:
        finite_N = torch.ones(x_ND.shape[0], dtype=torch.bool)
    assert call.rescored_NV is not None
    read_2 = torch.tensor([call.num_rescored, call.num_refined])
    return call.logits_NV, call.rescored_NV, finite_N, read_2


def _head_shapes(x_ND: torch.Tensor, handle: int, certify: bool, count: int, cap: float) -> _Result:
    del certify, count, cap
    shape_NV = (x_ND.shape[0], _HEADS[handle].shape_VD[0])
    return (
        x_ND.new_empty(shape_NV, dtype=torch.float32),
        x_ND.new_empty(shape_NV, dtype=torch.bool),
        x_ND.new_empty(x_ND.shape[0], dtype=torch.bool),
        x_ND.new_empty(2, dtype=torch.int64),
    )


_OPERATORS.impl("head", _head, "CPU")
torch.library.register_fake("hire_native::head", _head_shapes, lib=_OPERATORS)
