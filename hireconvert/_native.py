"""The native library of sparse FFN decoding: layers packed for it, and calls into it.

Importing this raises ImportError where no library was built. Nothing but torch is needed; the
files that ship in checkpoints import this module when it is there (`runtime/hire_native.py`), so
what they use of it may only change together with `ABI`.

Shape suffixes: N rows, D width, F neurons, P parts (gate and up, or up alone).
"""

import ctypes
import importlib.machinery
import itertools
import os
import platform
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hireconvert._packing import LANES, TYPES, pack
from hireconvert._pages import together

ABI = 5
_ARM = platform.machine() in ("aarch64", "arm64")
LEVELS = ("portable", "neon", "dotprod") if _ARM else ("portable", "avx2", "avx512")
ROWS_TOGETHER = 8  # HIRE_ROWS of native/kernels.h
VARIABLE = "HIRE_NATIVE"  # of the environment: `off`, `ffn`, or the highest level to use
_NUMBERS = (
    "width", "stride", "num_neurons", "num_candidates", "num_kept", "gated", "activation",
    "weight_type", "bits", "block", "symmetric", "normal", "tile_bytes", "rest_bits",
    "rest_block", "rest_symmetric", "rest_normal", "rest_bytes", "low_bytes",
    "relative",
)  # fmt: skip
_POINTERS = (
    "tiles", "unit", "mean", "inverse_scale", "bias", "soft", "rest_error", "norm", "rows",
    "row_bias", "down_bias", "rest", "rest_unit", "low_bias", "low", "level",
)  # fmt: skip


class _Struct(ctypes.Structure):
    """hire_layer of native/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def _load() -> Any:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        if path.exists():
            try:
                return _declared(ctypes.CDLL(str(path)), path)
            except OSError as error:  # an OpenMP runtime that neither torch nor the system has
                raise ImportError(f"{path.name} cannot be loaded: {error}") from error
    raise ImportError("hireconvert was installed without a C compiler and has no native library")


def _declared(library: Any, path: Path) -> Any:
    if library.hire_abi() != ABI:
        raise ImportError(f"{path.name} has ABI {library.hire_abi()}, expected {ABI}")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.hire_low_bytes.argtypes = [size] * 4
    library.hire_low_bytes.restype = size
    library.hire_scratch_bytes.argtypes = [pointer, size]
    library.hire_scratch_bytes.restype = size
    library.hire_scratch_places.argtypes = [pointer, pointer]
    library.hire_scratch_places.restype = None
    library.hire_ffn.argtypes = [*[pointer] * 6, size, number, number]
    library.hire_ffn.restype = size
    library.hire_top_k.argtypes = [pointer, size, size, pointer, pointer]
    library.hire_top_k.restype = None
    library.hire_pack_scratch.argtypes = [pointer]
    library.hire_pack_scratch.restype = size
    library.hire_pack.argtypes = [pointer, pointer, number, number]
    library.hire_pack.restype = number
    return library


LIBRARY = _load()
THREADS = ("OpenMP", "own threads", "one thread")[LIBRARY.hire_threads()]
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
    if wanted == "ffn":
        wanted = LEVELS[-1]
    if wanted not in LEVELS:
        choices = ", ".join(("off", "ffn", *LEVELS))
        raise ValueError(f"{VARIABLE} is {wanted!r}, expected one of {choices}")
    return LEVELS[LIBRARY.hire_level_at_most(LEVELS.index(wanted))]


def machinery() -> str:
    """The level that new layers use and whose threads run them, for the log."""
    return f"{level()}, {THREADS}"


def steps_allowed() -> bool:
    """Whether whole decode steps may run natively: with `ffn` only FFNs do."""
    return os.environ.get(VARIABLE) != "ffn"


# --------------------------------------------------------------------------- layers


class FfnLayer:
    """One FFN packed for the library. Immutable: a change of weights calls for another one.

    `tensors` are as `pack` or `together` places them: what is read may go beyond an end.
    """

    def __init__(self, numbers: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> None:
        self.numbers, self.tensors = dict(numbers), dict(tensors)
        self.level = level()
        self._level = LEVELS.index(self.level or LEVELS[0])
        pointers = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self._struct = _Struct(**self.numbers, **pointers)
        self._address = ctypes.addressof(self._struct)
        self._scratch_bytes = [
            LIBRARY.hire_scratch_bytes(self._address, rows) for rows in range(ROWS_TOGETHER + 1)
        ]
        self._width = self.numbers["width"]
        self.dtype = TYPES[self.numbers["weight_type"]]
        self.handle = next(_HANDLES)
        _LAYERS[self.handle] = self

    @classmethod
    def pack(
        cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor | None]
    ) -> "FfnLayer | None":
        """A layer of weights and predictor tensors (docs/format.md); raises ValueError.

        `settings`: `activation`, `num_candidates`, `num_kept` (as many: none is dropped), `level`
        (where every neuron whose estimated score reaches it is kept, all being candidates) and
        whether it is `relative` to the length of the row's estimated outputs, the predictor's
        `bits`, `block`, `symmetric`, `levels`, `rest` (the same keys, or None), and `refined`,
        whether the weights lie on the grid of `low_scale` and `down_low_scale`; where they do not,
        they are read as they are. Or `copies`, whether the weights are what the copies stand for,
        so that nothing else is read and selected; None where they are not.
        `tensors`: `gate` (or None), `up` and `down` [F, D]; their biases as `gate_bias`, ...;
        `norm` [F], what scores are multiplied by; the predictor's and the low-bit copy's.
        """
        packed = pack(LIBRARY, LEVELS.index(level() or LEVELS[0]), settings, tensors)
        return None if packed is None else cls(*packed)

    def counting(
        self,
        num_candidates: int,
        num_kept: int,
        level: float | None = None,
        relative: bool = False,
    ) -> "FfnLayer":
        """The layer with other numbers or level, over the same memory; raises ValueError."""
        if not 1 <= num_kept <= num_candidates <= self.numbers["num_neurons"]:
            raise ValueError(f"native: {num_kept} of {num_candidates} candidates are kept")
        counts = {"num_candidates": num_candidates, "num_kept": num_kept}
        tensors = {name: each for name, each in self.tensors.items() if name != "level"}
        if level is not None:
            counts = dict.fromkeys(counts, self.numbers["num_neurons"])
            counts["relative"] = int(relative)
            tensors["level"] = torch.tensor([level], dtype=torch.float32)
        return FfnLayer(self.numbers | counts, tensors)

    @property
    def varies(self) -> bool:
        """Whether the number of neurons kept differs from row to row."""
        return "level" in self.tensors

    def __deepcopy__(self, memo: Any) -> "FfnLayer":
        return self

    def __reduce__(self) -> Any:
        # Tensors alone: the memory that they lie in holds other layers too.
        return _moved, (self.numbers, {name: each.clone() for name, each in self.tensors.items()})

    @property
    def address(self) -> int:
        """Where the library finds it, as long as the layer lives."""
        return self._address

    def run(
        self, x_ND: torch.Tensor, counts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y [N, D]; None, or the bool mask [N] of the rows that were finite and so were written).

        `counts`, int64 [5] on the CPU, gets calls, rows, kept, candidates and dense rows added.
        Output bits depend neither on the number of threads nor on the other rows. Raises
        ValueError when x is not [N, D] of the weights' type.
        """
        shape = x_ND.shape
        if len(shape) != 2 or shape[1] != self._width or x_ND.dtype != self.dtype:
            raise ValueError(f"native: x is {x_ND.dtype} {list(shape)}, width {self._width}")
        x_ND, num_rows = x_ND.contiguous(), shape[0]
        y_ND = torch.empty_like(x_ND)
        # Behind the scratch memory one byte a row, whether it was finite: seldom is one not.
        size = self._scratch_bytes[min(num_rows, ROWS_TOGETHER)]
        memory = scratch(size + num_rows)
        start = memory.data_ptr()
        bad = LIBRARY.hire_ffn(
            self._address,
            x_ND.data_ptr(),
            y_ND.data_ptr(),
            start + size,
            None if counts is None else counts.data_ptr(),
            start,
            num_rows,
            torch.get_num_threads(),
            self._level,
        )
        return y_ND, (memory[size : size + num_rows].bool() if bad else None)

    def last(self) -> dict[str, torch.Tensor]:
        """What the first row of this thread's last call left in the scratch memory; for tests.

        `z` [P, Fp], `score` [F], `index` [C] and `chosen` [K], the kept among the candidates.
        """
        numbers, places = self.numbers, (ctypes.c_int64 * 4)()
        LIBRARY.hire_scratch_places(self._address, ctypes.addressof(places))
        memory = scratch(self._scratch_bytes[1])
        start = -memory.data_ptr() % 64
        neurons = numbers["num_neurons"]
        padded, parts = -(-neurons // LANES) * LANES, 1 + numbers["gated"]
        sizes = (parts * padded, neurons, numbers["num_candidates"], numbers["num_kept"])
        z, score, index, chosen = (
            memory[start + place : start + place + 4 * size].view(torch.int32).clone()
            for place, size in zip(places, sizes, strict=True)
        )
        z_PF = z.view(torch.float32).view(parts, padded)[:, :neurons]
        if numbers["num_kept"] == numbers["num_candidates"]:  # nothing chose among them
            chosen = torch.arange(numbers["num_kept"], dtype=torch.int32)
        return {"z": z_PF, "score": score.view(torch.float32), "index": index, "chosen": chosen}


def _moved(numbers: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> FfnLayer:
    return FfnLayer(numbers, together(tensors))


def scratch(size: int) -> torch.Tensor:
    """At least `size` bytes of this thread's own."""
    memory = getattr(_LOCAL, "scratch", None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = _LOCAL.scratch = torch.zeros(size, dtype=torch.uint8)
    return memory


def top_k(score_F: torch.Tensor, num: int) -> torch.Tensor:
    """The `num` largest scores, none negative or NaN, as ascending int32 indices.

    Ties go to the lowest index. Raises ValueError.
    """
    total = score_F.numel()
    if score_F.dtype != torch.float32 or score_F.dim() != 1 or not 1 <= num <= total:
        raise ValueError(f"native: {num} of {score_F.dtype} {list(score_F.shape)}")
    score_F = score_F.contiguous()
    out, spare = torch.zeros(2, total + 1, dtype=torch.int32)
    LIBRARY.hire_top_k(score_F.data_ptr(), total, num, out.data_ptr(), spare.data_ptr())
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
