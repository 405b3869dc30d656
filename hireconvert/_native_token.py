"""Tokens of one sequence in one native call each: embedding, decoder layers, head, best row.

And rows drawn of few, with the numbers of PyTorch's generator.

The file of a checkpoint that imports this is `runtime/hire_token.py`. Shape suffixes: D width,
V vocabulary, B decoder layers, L rows of the embedding.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hireconvert._native import LIBRARY
from hireconvert._native_head import RowCall
from hireconvert._native_step import PAST_FIELDS, Step
from hireconvert._packing import TYPES

__all__ = [
    "BEYOND", "HIDDEN", "MOST_LEFT", "STOPPED", "UNSURE", "Embedding", "RowCall", "Token",
    "draw", "kth_largest", "largest",
]  # fmt: skip
STOPPED, HIDDEN = -1, -2  # of native/token.h
_FIELDS = (
    ("blocks", ctypes.c_void_p), ("num_blocks", ctypes.c_int64), ("pasts", ctypes.c_void_p),
    ("most_kept", ctypes.c_void_p), ("angles", ctypes.c_void_p), ("rotary", ctypes.c_void_p),
    ("num_ropes", ctypes.c_int64), ("last_norm", ctypes.c_void_p), ("eps", ctypes.c_double),
    ("scratch", ctypes.c_void_p), ("most", ctypes.c_int64), ("embedding", ctypes.c_void_p),
    ("embedding_stride", ctypes.c_int64), ("embedding_scale", ctypes.c_double),
    ("type", ctypes.c_int64), ("x", ctypes.c_void_p), ("narrow", ctypes.c_void_p),
    ("head", ctypes.c_void_p), ("call", ctypes.c_void_p), ("head_scratch", ctypes.c_void_p),
    ("head_counts", ctypes.c_void_p), ("num_threads", ctypes.c_int64), ("level", ctypes.c_int64),
    ("head_level", ctypes.c_int64),
)  # fmt: skip


class _Struct(ctypes.Structure):
    """hire_token of native/token.h."""

    _fields_ = _FIELDS


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
LIBRARY.hire_next.argtypes, LIBRARY.hire_next.restype = [_POINTER, _SIZE], _SIZE
LIBRARY.hire_embed.argtypes = [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER]
LIBRARY.hire_embed.restype = None
LIBRARY.hire_largest.argtypes, LIBRARY.hire_largest.restype = [_POINTER, _SIZE], _SIZE
LIBRARY.hire_draw.argtypes, LIBRARY.hire_draw.restype = [_POINTER, _POINTER], _SIZE
LIBRARY.hire_kth_largest.argtypes = [_POINTER, _SIZE, _SIZE]
LIBRARY.hire_kth_largest.restype = ctypes.c_float
BEYOND, UNSURE, MOST_LEFT = -1, -2, 1024  # of native/draw.h
CUTS = ("top_p", "min_p")  # enum hire_cut_kind
_WORDS = 624  # HIRE_GENERATOR_WORDS of native/draw.h
STATE_BYTES = 24 + 8 * _WORDS  # PyTorch's states have more behind


@dataclass(frozen=True)
class Embedding:
    """A live weight [L, D] whose rows are the model's input, times `scale`.

    Raises ValueError when it does not lie in rows of one of `TYPES` on the CPU.
    """

    weight_LD: torch.Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        weight = self.weight_LD
        given = f"{weight.dtype} {list(weight.shape)} on {weight.device}"
        if weight.dim() != 2 or weight.device.type != "cpu" or weight.dtype not in TYPES:
            raise ValueError(f"native: the embedding is {given}")
        rows, width = weight.shape
        if rows < 1 or weight.stride(1) != 1 or weight.stride(0) < width:
            raise ValueError(f"native: the embedding is {given} in strides {weight.stride()}")

    def describe(self, struct: _Struct) -> None:
        """Tell the library where it is, as long as this lives."""
        struct.embedding, struct.embedding_stride = (
            self.weight_LD.data_ptr(),
            self.weight_LD.stride(0),
        )
        struct.embedding_scale, struct.type = self.scale, TYPES.index(self.weight_LD.dtype)

    def row(self, token: int) -> torch.Tensor:
        """float32 [D]: what the model's first layer gets. Raises ValueError."""
        rows, width = self.weight_LD.shape
        if not 0 <= token < rows:
            raise ValueError(f"native: token {token} of {rows}")
        struct, x_D = _Struct(), torch.empty(width)
        self.describe(struct)
        narrow_D = torch.empty_like(x_D)
        LIBRARY.hire_embed(
            ctypes.addressof(struct), width, token, x_D.data_ptr(), narrow_D.data_ptr()
        )
        return x_D


class Token:
    """A sequence that goes on token by token, over caches with room for `most` positions.

    `past_B5` as `Step.past` gives it, filled in by the caller, who vouches for the room; the
    library moves it on. `kept_B`: how many positions the cache of a layer keeps, 0: all. `angles`:
    cos and sin of each rope, float32 [P, rotary] and contiguous, of the positions from the next
    one on. Raises ValueError when sizes do not fit.
    """

    def __init__(
        self,
        step: Step,
        past_B5: torch.Tensor,
        kept_B: Sequence[int],
        *,
        angles: Sequence[torch.Tensor],
        embedding: Embedding,
        head: RowCall | None,
        most: int,
    ) -> None:
        self._left = _check(step, past_B5, kept_B, angles, embedding)
        self._rows, width = embedding.weight_LD.shape
        if head is not None and (head.layer.shape_VD[1] != width or head.counts.numel() != 7):
            raise ValueError(f"native: the head is {list(head.layer.shape_VD)}, width {width}")
        self.x_D = torch.empty(width)
        self._dtype = embedding.weight_LD.dtype
        narrow_D = torch.empty_like(self.x_D)
        kept = (ctypes.c_int64 * len(kept_B))(*kept_B)
        places = (ctypes.c_void_p * len(angles))(*[angle.data_ptr() for angle in angles])
        rotary = (ctypes.c_int64 * (len(angles) // 2))(*[a.shape[1] for a in angles[::2]])
        room, memory, threads = step.room(most)
        struct = self._struct = _Struct(
            pasts=past_B5.data_ptr(), most_kept=ctypes.addressof(kept),
            angles=ctypes.addressof(places), rotary=ctypes.addressof(rotary),
            num_ropes=len(rotary), scratch=memory.data_ptr(), most=room, x=self.x_D.data_ptr(),
            narrow=narrow_D.data_ptr(), num_threads=threads,
        )  # fmt: skip
        step.describe(struct)
        embedding.describe(struct)
        self._head = head
        if head is not None:
            head.describe(struct, self.x_D)
        # The library knows these by their addresses alone.
        self._held: list[Any] = [
            step, past_B5, kept, places, rotary, memory, narrow_D, angles, embedding,
        ]  # fmt: skip
        self._address = ctypes.addressof(struct)

    def next(self, token: int) -> int:
        """The first of the largest logits behind `token`, at the next position.

        STOPPED: a layer met NaN or inf, and nothing has changed. HIDDEN: logits are yet to be made
        of `hidden`, as there is no head or it cannot run. Raises ValueError when `token` is no row
        of the embedding or nothing is known of more positions.
        """
        if not 0 <= token < self._rows or self._left < 1:
            raise ValueError(f"native: token {token} of {self._rows}, {self._left} positions left")
        best: int = LIBRARY.hire_next(self._address, token)
        self._left -= best != STOPPED
        return best

    def logits(self) -> torch.Tensor:
        """float32 [1, V] of the last token; the next writes other memory."""
        assert self._head is not None
        return self._head.taken()

    def hidden(self) -> torch.Tensor:
        """[1, 1, D] in the embedding's type: what the head gets."""
        return self.x_D.to(self._dtype, copy=True)[None, None]


def _check(
    step: Step,
    past_B5: torch.Tensor,
    kept_B: Sequence[int],
    angles: Sequence[torch.Tensor],
    embedding: Embedding,
) -> int:
    """How many positions the angles are for. Raises ValueError."""
    if embedding.weight_LD.shape[1] != step.width or len(kept_B) != len(step.blocks):
        raise ValueError(f"native: embedding {list(embedding.weight_LD.shape)}, {len(kept_B)} kept")
    shape = (len(step.blocks), len(PAST_FIELDS))
    if past_B5.shape != shape or past_B5.dtype != torch.int64 or not past_B5.is_contiguous():
        raise ValueError(f"native: caches are {past_B5.dtype} {list(past_B5.shape)}")
    if len(angles) < 2 * (max(step.rotary) + 1) or len(angles) % 2:
        raise ValueError(f"native: angles of {len(angles) // 2} ropes")
    for place, angle in enumerate(angles):
        rotary = step.rotary.get(place // 2, angle.shape[-1])
        if angle.dim() != 2 or angle.shape[1] != rotary or angle.dtype != torch.float32:
            raise ValueError(f"native: angles are {angle.dtype} {list(angle.shape)}")
        if not angle.is_contiguous() or angle.shape != angles[place // 2 * 2].shape:
            raise ValueError(f"native: angles are {list(angle.shape)}, {angle.stride()}")
    return min(angle.shape[0] for angle in angles)


def largest(x_V: torch.Tensor) -> int:
    """Where the first of the largest stands, as `torch.argmax` has it. Raises ValueError."""
    if x_V.dim() != 1 or x_V.dtype != torch.float32 or not x_V.numel():
        raise ValueError(f"native: the numbers are {x_V.dtype} {list(x_V.shape)}")
    x_V = x_V.contiguous()
    found: int = LIBRARY.hire_largest(x_V.data_ptr(), x_V.numel())
    return found


# --------------------------------------------------------------------------- draws


class _Cut(ctypes.Structure):
    """hire_cut of native/draw.h."""

    _fields_ = (("kind", ctypes.c_int64), ("share", ctypes.c_double))


class _DrawCall(ctypes.Structure):
    """hire_draw_call of native/draw.h."""

    _fields_ = (
        ("score", ctypes.c_void_p), ("num", ctypes.c_int64), ("top_k", ctypes.c_int64),
        ("cuts", ctypes.c_void_p), ("num_cuts", ctypes.c_int64), ("level", ctypes.c_double),
        ("near", ctypes.c_double),
    )  # fmt: skip


def draw(
    score_V: torch.Tensor,
    state: torch.Tensor,
    *,
    top_k: int,
    cuts: Sequence[tuple[str, float]] = (),
    level: float | None = None,
    near: float = 0.0,
) -> int:
    """The row that transformers and `torch.multinomial` draw of these scores.

    `cuts`: (`top_p` or `min_p`, the share) behind `top_k`, in their order. `state` is what
    `torch.Generator.get_state` gives on a CPU, and is moved on by a number for each score. BEYOND
    where a row that top-k leaves is not above `level`; UNSURE where quantities that decide differ
    by no more than `near`, relatively, where more than MOST_LEFT rows are left, or where scores
    are not finite: the state is then as it was. Raises ValueError.
    """
    _check_state(state)
    _check_scores(score_V, top_k, MOST_LEFT)
    if any(kind not in CUTS or not 0 <= share <= 1 for kind, share in cuts):
        raise ValueError(f"native: cuts are {list(cuts)}")
    places = (_Cut * len(cuts))(*[_Cut(CUTS.index(kind), share) for kind, share in cuts])
    call = _DrawCall(
        score=score_V.data_ptr(), num=len(score_V), top_k=top_k, cuts=ctypes.addressof(places),
        num_cuts=len(cuts), level=-math.inf if level is None else level, near=near,
    )  # fmt: skip
    found: int = LIBRARY.hire_draw(ctypes.addressof(call), state.data_ptr())
    return found


def kth_largest(score_V: torch.Tensor, k: int) -> float:
    """The `k`-th largest of float32 scores; NaN where one is NaN. Raises ValueError."""
    _check_scores(score_V, k, 2 * MOST_LEFT)
    found: float = LIBRARY.hire_kth_largest(score_V.data_ptr(), len(score_V), k)
    return found


def _check_scores(score_V: torch.Tensor, k: int, most: int) -> None:
    fits = score_V.device.type == "cpu" and score_V.is_contiguous() and score_V.dim() == 1
    if not fits or score_V.dtype != torch.float32:
        raise ValueError(f"native: scores are {score_V.dtype} {list(score_V.shape)}")
    if not 1 <= k <= min(len(score_V), most):
        raise ValueError(f"native: {k} of {len(score_V)} scores")


def _check_state(state: torch.Tensor) -> None:
    fits = state.device.type == "cpu" and state.dtype == torch.uint8 and state.is_contiguous()
    if not fits or state.numel() < STATE_BYTES:
        raise ValueError(f"native: a generator's state is {state.dtype} {list(state.shape)}")
    left, following = int(state[8:12].view(torch.int32)), int(state[16:24].view(torch.int64))
    if not 1 <= left <= _WORDS or not 0 <= following <= _WORDS:
        raise ValueError(f"native: a generator's state is at word {following}, {left} left")
