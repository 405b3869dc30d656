"""From how many rows at once on dense decoding is faster, and where that finding is kept.

    CACHE/crossover/KEY.json   KEY: SHA-256 of the machine, the settings and both checkpoints

Rows come as new positions of one sequence (what assisted and prompt-lookup decoding verify) or as
one position of each of several sequences (a batch). Nothing but `bench` reads the file: what a
checkpoint does follows from its own `hire.max_sparse_rows`, which the user sets.

Shape suffixes: T tokens.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hireconvert.baselines import HIT, NOT_STORED, STORED
from hireconvert.loading import CHECKSUMS
from hireconvert.subjects import TorchSubject, Way
from hireconvert.workspace import file_sha256, write_atomically

ROWS = (1, 2, 4, 8, 16, 32)
KINDS = ("positions", "sequences")
_ROUNDS = 3
Finding = dict[str, Any]


def measure(
    dense: TorchSubject,
    converted: TorchSubject,
    way: Way,
    ids_T: Sequence[int],
    *,
    rows: Sequence[int] = ROWS,
    tick: Callable[[str], None] = lambda detail: None,
) -> Finding:
    """Median milliseconds of a step behind a prompt, of both subjects in turns, and `from_rows`.

    `from_rows`, by kind, is the least number of rows from which on dense is faster at every number
    measured; None: at no such number.
    """
    found: Finding = {"context": len(ids_T), "rows": list(rows), "ms": {}, "from_rows": {}}
    for kind in KINDS:
        times: dict[str, list[float]] = {"dense": [], "converted": []}
        for number in rows:
            runs: dict[str, list[float]] = {name: [] for name in times}
            for _ in range(_ROUNDS):
                runs["dense"].append(dense.step_ms(Way(), ids_T, rows=number, kind=kind))
                runs["converted"].append(converted.step_ms(way, ids_T, rows=number, kind=kind))
            for name, each in runs.items():
                times[name].append(statistics.median(each))
            tick(f"{number} {kind}")
        found["ms"][kind] = times
        found["from_rows"][kind] = overtaken_from(rows, times)
    return found


def overtaken_from(rows: Sequence[int], times: Mapping[str, Sequence[float]]) -> int | None:
    """The least number of rows from which on dense is faster at every number measured."""
    first = None
    for number, dense, converted in zip(rows, times["dense"], times["converted"], strict=True):
        if dense > converted:
            first = None
        elif first is None:
            first = number
    return first


def most_sparse_rows(finding: Mapping[str, Any]) -> int:
    """The most rows measured at which dense is faster in neither kind; 1 where it always is."""
    ends = [end for end in finding["from_rows"].values() if end is not None]
    below = [number for number in finding["rows"] if not ends or number < min(ends)]
    return int(max(below, default=1))


def checkpoint_digest(folder: Path) -> str:
    """What tells a folder from others: its list of checksums, or else its configuration."""
    for name in (CHECKSUMS, "config.json"):
        if (folder / name).is_file():
            return file_sha256(folder / name)
    return ""


def kept(cache: Path, key: Mapping[str, Any], compute: Callable[[], Finding]) -> Finding:
    """What `compute` finds, from the cache where it lies there; `cache` in it says what happened.

    A cache that cannot be written, or whose file is damaged, costs time and nothing else.
    """
    path = cache / "crossover" / f"{_digest(key)}.json"
    found = _read(path)
    if found is not None:
        return {**found, "cache": HIT, "path": str(path)}
    found, state = compute(), STORED
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"key": dict(key), "found": found, "sha256": _digest(found)}
        write_atomically(path, json.dumps(content, indent=1).encode())
    except OSError:
        state = NOT_STORED
    return {**found, "cache": state, "path": str(path)}


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Finding | None:
    """What `kept` wrote there; None for anything else."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found: Finding = content["found"]
        return found if content["sha256"] == _digest(found) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
