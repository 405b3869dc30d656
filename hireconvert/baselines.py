"""The model that a converted one is measured against, and what is kept of it between runs.

Kept are the states that the baseline's head receives, float32 [N, D] for each set of windows: 4 D
bytes a token (19 MB for 8,192 tokens of SmolLM2-135M). The slow part, running the decoder layers,
is done once; losses, divergence and agreement follow from the head, exactly as in the first run.
Of tasks the score of each item is kept.

    CACHE/baselines/KEY.safetensors   KEY: SHA-256 of the model files, the token ids or the items,
                                      and versions

Shape suffixes: N rows (scored positions), D width, W windows, T tokens of a window.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hireconvert.answers import Answers, Task
from hireconvert.checkpoint import open_checkpoint
from hireconvert.version import __version__
from hireconvert.workspace import write_atomically

HIT, STORED, NOT_STORED, OFF = "hit", "stored", "could not be written", "off"


@dataclass(frozen=True)
class Baseline:
    """A dense model in float32; `source` and `fingerprint` as in `DenseCheckpoint`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str


@contextmanager
def open_baseline(name: str) -> Iterator[Baseline]:
    """Give the model of a Hub id, a folder or a GGUF file, checked as `convert` checks it.

    Raises InputError for what cannot be used, HubError when the Hub does not deliver.
    """
    with tempfile.TemporaryDirectory(prefix="hireconvert-") as work:
        checkpoint = open_checkpoint(name, work=Path(work))
        yield Baseline(
            model=checkpoint.load_model(dtype=torch.float32),
            tokenizer=checkpoint.load_tokenizer(),
            source=checkpoint.source,
            fingerprint=checkpoint.fingerprint,
        )


def cache_folder() -> Path:
    """Where this user's caches of hireconvert lie; it need not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if Path(given).is_absolute():  # the specification has relative ones ignored
        return Path(given) / "hireconvert"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "hireconvert" / "Cache"
    return Path.home() / ".cache" / "hireconvert"


def kept_states(
    baseline: Baseline,
    ids_WT: torch.Tensor,
    compute: Callable[[], torch.Tensor],
    *,
    cache: Path | None,
) -> tuple[torch.Tensor, str]:
    """What `compute` gives for these windows [N, D], from the cache where it lies there.

    `cache` None keeps nothing. The second value says what happened; a cache that cannot be
    written, or whose file is damaged, costs time and nothing else.
    """
    key = {
        "ids": hashlib.sha256(ids_WT.contiguous().numpy().astype("<i8").tobytes()).hexdigest(),
        "shape": list(ids_WT.shape),
    }
    num_rows = ids_WT.shape[0] * (ids_WT.shape[1] - 1)
    return _kept(baseline, key, "hidden_ND", num_rows, compute, cache)


def kept_answers(
    baseline: Baseline,
    task: Task,
    tokenizer: Any,
    compute: Callable[[], Answers],
    *,
    cache: Path | None,
) -> tuple[Answers, str]:
    """The baseline's answers to the items of `task`, read with `tokenizer`; as `kept_states`.

    Nothing is kept where the tokenizer does not say what it is made of, nor of the harness's
    tasks: what it asks depends on more than the items (examples, prompts, filters).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if cache is None or backend is None or task.kind == "lm_eval":
        return compute(), OFF
    key = {
        "python": platform.python_version(),  # which runs the programs of some items
        "task": [task.name, task.kind, task.metric, task.fingerprint],
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
    }

    def scores() -> torch.Tensor:
        return torch.from_numpy(compute().score_N)

    score_N, state = _kept(baseline, key, "score_N", task.num_items, scores, cache)
    return Answers(score_N.numpy().astype(np.float64), 0), state


def _kept(
    baseline: Baseline,
    key: dict[str, Any],
    name: str,
    num_rows: int,
    compute: Callable[[], torch.Tensor],
    cache: Path | None,
) -> tuple[torch.Tensor, str]:
    """What `compute` gives, `num_rows` along its first axis, from the cache where it lies there."""
    if cache is None:
        return compute(), OFF
    path = cache / "baselines" / f"{_digest(baseline, key)}.safetensors"
    found = _read(path, name)
    if found is not None and found.shape[0] == num_rows:
        return found, HIT
    found = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({name: found.contiguous()}))
    except OSError:
        return found, NOT_STORED
    return found, STORED


def _read(path: Path, name: str) -> torch.Tensor | None:
    try:
        return load(path.read_bytes()).get(name)
    except (OSError, SafetensorError):
        return None


def _digest(baseline: Baseline, key: dict[str, Any]) -> str:
    parts = {
        **key,
        "model": baseline.fingerprint,
        "dtype": str(baseline.model.dtype),
        "hireconvert": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
