"""What `bench` measures: models in processes of their own, so that memory and threads are theirs.

A subject is a model loaded once; an arm, one way to run it. A subject of torch is served by
`bench_worker.py`, one of llama.cpp by `benchmarks/llama_rival.c`, which the library does not bring.

Shape suffixes: T tokens, V vocabulary.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hireconvert.baselines import cache_folder
from hireconvert.errors import InputError
from hireconvert.timing import Trace
from hireconvert.workers import Worker

PROGRAM, VARIABLE = "llama_rival", "HIRE_LLAMA"
STEPS = 4  # that `step_ms` takes behind one another; the first makes room in the cache
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Way:
    """One way to run a subject.

    `ffn`: decode steps run as converted, by the kernels where they can; without it, as
    Transformers does. `keep`: the share of neurons they compute, None as converted; 1.0 is a dense
    FFN through our own kernels. `head`: the head selects, by the settings of `head_spec` in place
    of the converted ones where given.
    """

    ffn: bool = False
    head: bool = False
    keep: float | None = None
    head_spec: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        spec = None if self.head_spec is None else dict(self.head_spec)
        return {"ffn": self.ffn, "head": self.head, "keep": self.keep, "head_spec": spec}


@dataclass(frozen=True)
class TorchModel:
    """How a model of torch is loaded.

    `kind`: `native`, Transformers' own class, or `hire`, the converted model. `dtype` as torch
    names it. `compiled` decodes with a static cache through torch.compile; `torchao` names a
    weight format of torchao. `native` bounds the native kernels as HIRE_NATIVE does.
    """

    folder: Path
    dtype: str
    threads: int
    kind: str = "native"
    compiled: bool = False
    torchao: str | None = None
    native: str | None = None


class TorchSubject:
    """A model of torch in its own process; use it as a context. Raises InputError."""

    def __init__(self, name: str, model: TorchModel) -> None:
        self.name, self.threads = name, model.threads
        environment = {**os.environ, "OMP_NUM_THREADS": str(model.threads)}
        parts = [str(_PACKAGE.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)
        if model.native is not None:
            environment["HIRE_NATIVE"] = model.native
        opening = {**vars(model), "folder": str(model.folder.resolve())}
        command = [sys.executable, "-m", "hireconvert.bench_worker"]
        self._worker = Worker(name, command, environment=environment, opening=json.dumps(opening))
        self.facts = self._worker.facts

    def __enter__(self) -> "TorchSubject":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        return self._worker.ask(json.dumps({"do": do, **request}))

    def decode(
        self,
        way: Way,
        ids_T: Sequence[int],
        *,
        batch: int,
        num_tokens: int,
        sampling: Mapping[str, Any] | None = None,
    ) -> Trace:
        """One decode of `num_tokens` tokens after the prompt, greedy or with settings to sample."""
        found = self._ask(
            "decode",
            way=way.to_dict(),
            ids=list(ids_T),
            batch=batch,
            num_tokens=num_tokens,
            sampling=sampling,
        )
        return Trace(found["first_ms"], tuple(found["token_ms"]))

    def logits(self, way: Way, ids_T: Sequence[int], path: Path) -> torch.Tensor:
        """Float32 [T, V] at every position, selecting at every position; they lie in `path`."""
        found = self._ask("logits", way=way.to_dict(), ids=list(ids_T), path=str(path))
        return mapped(path, found["rows"], found["vocabulary"])

    def parts(self, way: Way, ids_T: Sequence[int]) -> dict[str, float]:
        """Milliseconds that all FFNs and the head take for one row, each measured alone."""
        return self._ask("parts", way=way.to_dict(), ids=list(ids_T))

    def step_ms(self, way: Way, ids_T: Sequence[int], *, rows: int, kind: str) -> float:
        """Milliseconds of a decode step of so many rows behind a prompt, the median of some.

        `kind`: `positions` of one sequence, or one position of each of so many `sequences`.
        """
        found = self._ask("step", way=way.to_dict(), ids=list(ids_T), rows=rows, kind=kind)
        return float(found["ms"])

    def memory(self) -> dict[str, Any]:
        """Bytes of the process: `before` the model was loaded, `resident` now, `peak`."""
        return self._ask("memory")


class LlamaSubject:
    """A GGUF file run by llama.cpp; use it as a context. Raises InputError."""

    def __init__(self, name: str, path: Path, *, threads: int) -> None:
        self.name, self.threads = name, threads
        command = [str(find_program()), "serve", str(path.resolve()), str(threads)]
        self._worker = Worker(name, command, environment=os.environ)
        self.facts = self._worker.facts

    def __enter__(self) -> "LlamaSubject":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def use_threads(self, threads: int) -> None:
        """Decode with so many threads from here on."""
        self.threads = int(self._worker.ask(f"threads {threads}")["threads"])

    def decode(self, way: Way, ids_T: Sequence[int], *, batch: int, num_tokens: int) -> Trace:
        """One greedy decode after the prompt, each time taken around `llama_decode` alone."""
        found = self._worker.ask(f"decode {batch} {num_tokens - 1} {_numbers(ids_T)}")
        return Trace(found["prefill_ms"], tuple(found["token_ms"]))

    def logits(self, way: Way, ids_T: Sequence[int], path: Path) -> torch.Tensor:
        """Float32 [T, V] at every position; they lie in `path`, whose name may hold no space."""
        found = self._worker.ask(f"logits {path} {_numbers(ids_T)}")
        return mapped(path, found["rows"], found["vocabulary"])

    def memory(self) -> dict[str, Any]:
        """As `TorchSubject.memory`."""
        found = self._worker.ask("memory")
        return {
            "before": 0,
            "resident": found["resident_bytes"],
            "peak": found["peak_bytes"],
        }


Subject = TorchSubject | LlamaSubject


def find_program() -> Path:
    """Where the program that runs GGUF files lies. Raises InputError where there is none."""
    given = os.environ.get(VARIABLE)
    if given:
        if not Path(given).is_file():
            raise InputError(f"{VARIABLE} names {given}, where there is no file.")
        return Path(given)
    found = shutil.which(PROGRAM)
    fetched = cache_folder() / "llama" / PROGRAM
    if found is None and not fetched.is_file():
        raise InputError(
            f"a rival needs llama.cpp's program {PROGRAM}, which is not here. From a clone, "
            f"`python benchmarks/fetch_llama.py` fetches and builds it; {VARIABLE} may name it."
        )
    return fetched if found is None else Path(found)


def _numbers(ids_T: Sequence[int]) -> str:
    return " ".join(str(token) for token in ids_T)


def mapped(path: Path, rows: int, vocabulary: int) -> torch.Tensor:
    """The logits in a file, float32 [rows, vocabulary]. Raises InputError when it holds others."""
    if path.stat().st_size != 4 * rows * vocabulary:
        raise InputError(f"the logits in {path} are not {rows} rows of {vocabulary} numbers.")
    return torch.from_numpy(np.fromfile(path, dtype=np.float32).reshape(rows, vocabulary))
