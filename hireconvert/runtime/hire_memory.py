"""Load mode `inference`: pages of dense weights that decoding does not read go back to the system.

The tensors of a checkpoint are views of private mappings of its files, as safetensors loads them.
Pages nobody wrote to can be dropped at any time; they come back from the file when something reads
them again: the next prompt, saving, training. So nothing is refused and nothing is lost. A mapping
that was written to (a weight trained or merged in place) is left alone.
"""

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MODES = ("keep_dense", "inference")
VARIABLE = "HIRE_MEMORY"  # of the environment: the mode that models are loaded in
_DONTNEED = 4  # MADV_DONTNEED of Linux
_MAPPINGS = Path("/proc/self/smaps")
_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r..p \S+ \S+ \S+\s+(\S.*\.safetensors)$")
_WRITTEN = re.compile(r"Anonymous:\s+(\d+) kB$")


def default_mode() -> str:
    """The mode that the environment asks for. Raises ValueError when there is none such."""
    mode = os.environ.get(VARIABLE) or MODES[0]
    if mode not in MODES:
        raise ValueError(f"{VARIABLE} is {mode!r}, expected one of {list(MODES)}")
    return mode


@dataclass
class _Mapping:
    start: int
    end: int
    written: bool = False

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        return any(self.start <= tensor.data_ptr() < self.end for tensor in tensors)


def _mappings() -> Iterator[_Mapping]:
    """Private mappings of safetensors files in this process; none where the system has no list."""
    found = None
    try:
        lines = _MAPPINGS.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        header, pages = _HEADER.match(line), _WRITTEN.match(line)
        if header is not None:
            found = _Mapping(int(header[1], 16), int(header[2], 16))
        elif pages is not None and found is not None:
            found.written = int(pages[1]) > 0
            yield found
            found = None


def release(tensors: Iterable[torch.Tensor]) -> int:
    """Drop the unwritten mappings in which any of the tensors lie; returns their bytes."""
    held = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.numel()]
    found = [m for m in _mappings() if not m.written and m.holds(held)]
    if not found:
        return 0
    library: Any = ctypes.CDLL(None)
    total = 0
    for mapping in found:
        size = mapping.end - mapping.start
        if library.madvise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(size), _DONTNEED) == 0:
            total += size
    if total and hasattr(library, "malloc_trim"):
        library.malloc_trim(ctypes.c_size_t(0))  # what packing used and freed
    return total
