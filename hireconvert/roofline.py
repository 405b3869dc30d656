"""What bytes allow: how fast this machine streams, and what each way to run a model reads.

Shape suffixes: N, M rows and columns of the matrix that is streamed.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hireconvert.accounting import TensorTable, token_bytes
from hireconvert.runtime.hire_predict import is_copied, varies
from hireconvert.scoring import round_half_up
from hireconvert.subjects import Way

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_MEMORY, _ASSUMED_MEMORY = "/proc/meminfo", 4 * 2**30
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
_ASSUMED_CACHE, _TIMES_CACHE, _SHARE_OF_MEMORY = 32 * 2**20, 8, 0.25
_COLUMNS, _ROUNDS = 4096, 5


@dataclass(frozen=True)
class Stream:
    """How fast `num_bytes` were read, the best of several times."""

    gb_per_s: float
    num_bytes: int


def cache_bytes(folder: str = _CACHES) -> int:
    """The largest cache of a core, 32 MiB where the system does not tell."""
    sizes = [_ASSUMED_CACHE]
    for path in sorted(Path(folder).glob("index*/size")):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes)


def _free_bytes() -> int:
    """Memory that is to be had, files that the system keeps in memory included."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path(_MEMORY).read_text())
    except OSError:
        found = None
    return _ASSUMED_MEMORY if found is None else 1024 * int(found[1])


def stream_bytes() -> int:
    """Eight times the largest cache, but no more than a quarter of the free memory."""
    return min(_TIMES_CACHE * cache_bytes(), int(_SHARE_OF_MEMORY * _free_bytes()))


def measure_stream(num_bytes: int, threads: int) -> Stream:
    """The rate at which memory of this size is read: by a sum or by a product, the faster."""
    rows = max(1, num_bytes // (4 * _COLUMNS))
    block_NM, vector_M = torch.ones(rows, _COLUMNS), torch.ones(_COLUMNS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best_s = min(_seconds(run) for run in (block_NM.sum, lambda: block_NM @ vector_M))
    finally:
        torch.set_num_threads(before)
    return Stream(4 * block_NM.numel() / best_s / 1e9, 4 * block_NM.numel())


def _seconds(run: Callable[[], Any]) -> float:
    spent = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)


def counts_at(layer: Mapping[str, Any], keep: float) -> dict[str, Any]:
    """`num_kept` and `num_candidates` of a layer that keeps another share of its neurons.

    As many candidates for each neuron kept as before, all neurons at most. A layer that reads
    copies alone reads the weights then, as `rows` says, and one whose number of neurons varies
    keeps the same number in every row: the level that another mean takes is not known.
    """
    total, over = layer["num_neurons"], layer["num_candidates"] / layer["num_kept"]
    fixed = {}
    if varies(layer):
        fixed, over = {"selection": None}, 1.0 if layer["keep"] == "candidates" else over
    num_kept = min(total, max(1, round_half_up(keep * total)))
    candidates = min(total, max(num_kept, round_half_up(over * num_kept)))
    rows = {"rows": "stored"} if is_copied(layer) else {}
    return {"num_kept": num_kept, "num_candidates": candidates, **rows, **fixed}


def way_bytes(
    hire: Mapping[str, Any], tensors: TensorTable, config: Any, way: Way, *, dtype: str
) -> int:
    """Bytes read per decoded token; `tensors` the dense weights, `config` the text configuration.

    `dtype` is that of the weights in memory. The cache of keys and values is not counted.
    """
    stored = {name: (DTYPES[dtype], shape) for name, (_, shape) in tensors.items()}
    ffn, head, keep = hire["ffn"] if way.ffn else None, None, way.keep
    if keep is not None and keep >= 1:
        ffn = None  # the kernels read the dense matrices
    if ffn is not None and keep is not None:
        layers = [layer and {**layer, **counts_at(layer, keep)} for layer in ffn["layers"]]
        ffn = {**ffn, "layers": layers}
    if way.head:
        head = hire["head"] if way.head_spec is None else way.head_spec
    # Codes of the attention's matrices are what the kernels read, Transformers the matrices.
    attention = hire.get("attention") if way.ffn else None
    changed = {**hire, "ffn": ffn, "head": head, "attention": attention}
    found = token_bytes(changed, stored, config)
    return int(found["converted"])
