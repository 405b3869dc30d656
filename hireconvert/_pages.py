"""Memory for what the kernels stream: large pages, cut at cache lines."""

import contextlib
import mmap
import threading
from collections.abc import Mapping
from math import prod

import torch

_PAGE, _CHUNK, _LINE = 2**21, 2**26, 64
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class _Memory:
    """Memory in large pages, where the system has them, handed out piece by piece.

    A stream of rows that are read once spends a third of its time on the addresses of small pages.
    Pieces of several layers share a chunk, because a large page for the end of each would be a
    quarter of a small model; a chunk goes when the last of its pieces does. What fills half a chunk
    has pages of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size], at a cache line."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(size, dtype=torch.uint8)
        size = _lines(size)
        if 2 * size > _CHUNK:
            return self._pages(size)
        with self._lock:
            if self._used + size > self._chunk.numel():
                self._chunk, self._used = self._pages(_CHUNK), 0
            piece = self._chunk[self._used : self._used + size]
            self._used += size
        return piece

    def give_back(self, piece: torch.Tensor) -> None:
        """Hand the piece out again if nothing was taken since; nothing may point to it."""
        with self._lock:
            start = piece.data_ptr() - self._chunk.data_ptr()
            if start >= 0 and start + piece.numel() == self._used:
                self._used = start

    @staticmethod
    def _pages(size: int) -> torch.Tensor:
        pages = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        start = -memory.data_ptr() % _PAGE
        return memory[start : start + size]


MEMORY = _Memory()


def _lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


def placed(shapes: Shapes) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors in one piece of memory, each at a cache line and with one behind it; the piece)."""
    sizes = {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in shapes.items()}
    # Scales are read 16 at a time, beyond the end of the last row.
    piece = MEMORY.take(sum(_lines(size) + _LINE for size in sizes.values()))
    tensors, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        tensors[name] = piece[start : start + sizes[name]].view(dtype).view(shape)
        start += _lines(sizes[name]) + _LINE
    return tensors, piece


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """What `placed` is asked for to hold these tensors."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in one piece of memory, each at a cache line and with one behind it."""
    moved, _ = placed(shapes_of(tensors))
    for name, tensor in tensors.items():
        moved[name].copy_(tensor)
    return moved
