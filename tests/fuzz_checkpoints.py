"""Mutated checkpoints, opened and decoded as the product does, over a library with sanitizers
(tools/fuzz.py builds it and runs this).

python -m tests.fuzz_checkpoints --count 1000 --seed 0 --out FOLDER

A mutant may be refused with an InputError, whose exit code is 4, or decode. Whatever else happens
is a finding: another exception, a sanitizer's report, a crash, more than SECONDS of the processor
(or STILL seconds without using any), more than MEGABYTES. A finding is a file in FOLDER from which
`--replay` makes the mutant again. Mutants run in processes forked in batches from one that has
imported everything; a batch that dies goes on behind the mutant that ended it. Progress goes to
stderr, with the number to `--start` from; the last line on stdout is a JSON summary.
"""

import argparse
import contextlib
import faulthandler
import gc
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from hireconvert.errors import HireError, InputError
from hireconvert.loading import load
from tests import fuzz_cases, native_fuzz
from tests.fuzz_apply import FOLDER, Files, apply
from tests.fuzz_mutations import Draw
from tests.native import LEVELS, _native
from tests.native_head import _native_head

SECONDS, STILL, MEGABYTES, BATCH = 20.0, 600.0, 1500, 1000
LONGEST_MESSAGE = 1000
MACHINERY = 70  # exit status of a batch that failed by itself
PROMPT = torch.tensor([[3, 4, 5]])


# --------------------------------------------------------------------------- one mutant


class Place:
    """A folder in memory that holds one case and is changed into its mutants."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder, self.pristine, self.now = folder, files, dict(files)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def become(self, files: Files) -> None:
        """Hold these files."""
        for name in self.now.keys() | files.keys():
            old, new = self.now.get(name), files.get(name)
            if old == new:
                continue
            path = self.folder / name
            if old == FOLDER:
                path.rmdir()
            if new is None:
                path.unlink(missing_ok=True)
            elif new == FOLDER:
                path.unlink(missing_ok=True)
                path.mkdir()
            else:
                path.write_bytes(new)
        self.now = dict(files)


@torch.no_grad()
def decode(model: Any, *, generate: bool) -> None:
    """A few tokens: the native step, the FFN kernels by themselves, forced selection."""
    cache = model(PROMPT, use_cache=True).past_key_values
    for step in (True, False):
        model.set_hire_scope("decode", step=step)
        for token in (6, 7):
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    model.set_hire_scope("all")
    model(PROMPT, use_cache=False)
    model.set_hire_scope("decode")
    if generate:
        model.generate(PROMPT, max_new_tokens=3, do_sample=False, pad_token_id=0)


def outcome(folder: Path, *, generate: bool) -> tuple[str, str]:
    """("refused", message), ("decodes", "") or ("finding", what happened)."""
    try:
        model: Any = load(folder)
    except InputError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE or len(message) < 20:
            return "finding", f"a message of {len(message)} characters: {message[:300]}"
        return "refused", message
    except HireError as error:
        return "finding", f"exit code {error.exit_code}: {error}"
    except Exception:  # noqa: BLE001 - any other is what is looked for
        return "finding", f"load: {traceback.format_exc()}"
    try:
        decode(model, generate=generate)
    except Exception:  # noqa: BLE001
        return "finding", f"decode: {traceback.format_exc()}"
    return "decodes", ""


# --------------------------------------------------------------------------- a batch


def mutant(seed: int, number: int, draws: list[Draw]) -> dict[str, Any]:
    """The mutant of that number: its case, its changes and how it is run."""
    dice = random.Random(f"{seed}:{number}")
    case = dice.randrange(len(draws))
    level = dice.choice([*LEVELS, LEVELS[-1], "ffn"])
    changes = draws[case].mutant(dice)
    return {
        "seed": seed, "number": number, "case": case, "level": level,
        "generate": dice.random() < 0.2, "changes": changes,
    }  # fmt: skip


def run_mutant(one: dict[str, Any], place: Place) -> tuple[str, str]:
    """What came of it."""
    place.become(apply(place.pristine, one["changes"]))
    os.environ["HIRE_NATIVE"] = one["level"]
    found = outcome(place.folder, generate=one["generate"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    if peak > MEGABYTES:
        return "memory", f"{peak} MB at the peak, {found[0]}: {found[1]}"
    return found


def _exact_memory() -> None:
    """What is packed together lies apart, and scratch memory has the size that was asked for."""
    held: dict[str, Any] = {}

    def scratch(size: int) -> torch.Tensor:
        held["last"] = torch.zeros(size, dtype=torch.uint8)
        return held["last"]

    _native.together = _native_head.together = native_fuzz.apart
    _native.scratch = _native_head.scratch = scratch


def _child(numbers: list[int], seed: int, draws: list[Draw], folder: Path, pipe: int) -> None:
    faulthandler.register(signal.SIGUSR1)
    places: dict[int, Place] = {}
    with os.fdopen(pipe, "w") as told:
        for number in numbers:
            one = mutant(seed, number, draws)
            case = one["case"]
            if case not in places:
                places[case] = Place(folder / str(case), dict(draws[case].files))
            print(json.dumps({"number": number}), file=told, flush=True)
            kind, text = run_mutant(one, places[case])
            report = {"number": number, "case": case, "kind": kind, "text": text[-6000:]}
            print(json.dumps(report), file=told, flush=True)
            if kind == "memory":  # the peak never falls again
                return


class Batch:
    """A forked process that runs mutants and tells what came of each."""

    def __init__(self, numbers: list[int], seed: int, draws: list[Draw], root: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=root))
        self.errors = self.folder / "stderr"
        end, pipe = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(end)
            status = MACHINERY
            with contextlib.suppress(KeyboardInterrupt):
                with self.errors.open("wb") as errors:
                    os.dup2(errors.fileno(), 2)
                try:
                    _child(numbers, seed, draws, self.folder, pipe)
                    status = 0
                except Exception:  # noqa: BLE001 - the machinery's own
                    traceback.print_exc()
            os._exit(status)
        os.close(pipe)
        self._end, self._rest = end, b""

    def lines(self) -> Iterator[dict[str, Any]]:
        """Reports as they come; the process is gone when there are no more."""
        used, since = self._used(), time.monotonic()
        while True:
            ready, _, _ = select.select([self._end], [], [], 1.0)
            if not ready:
                # Time by the clock says nothing on a machine that others use as well.
                if self._used() - used < SECONDS and time.monotonic() - since < STILL:
                    continue
                os.kill(self.pid, signal.SIGUSR1)  # says where it hangs
                time.sleep(0.5)
                os.kill(self.pid, signal.SIGKILL)
                return
            piece = os.read(self._end, 1 << 16)
            if not piece:
                return
            used, since = self._used(), time.monotonic()
            *whole, self._rest = (self._rest + piece).split(b"\n")
            yield from map(json.loads, whole)

    def _used(self) -> float:
        """Seconds of the processor."""
        numbers = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> tuple[int, str]:
        """(status, the last of stderr)."""
        os.close(self._end)
        _, status = os.waitpid(self.pid, 0)
        text = self.errors.read_text(errors="replace")
        shutil.rmtree(self.folder)
        place = max(text.find("ERROR: AddressSanitizer"), text.find("runtime error:"), 0)
        return status, text[max(place - 200, len(text) - 5000 if place == 0 else 0) :][:5000]


# --------------------------------------------------------------------------- all of them


class Fuzz:
    """Counts and findings of a run."""

    def __init__(self, seed: int, draws: list[Draw], root: Path, out: Path | None) -> None:
        self.seed, self.draws, self.root, self.out = seed, draws, root, out
        self.kinds, self.cases = Counter[str](), Counter[str]()
        self.findings: list[dict[str, Any]] = []

    def finding(self, number: int, kind: str, text: str) -> None:
        """Keep what reproduces it."""
        one = mutant(self.seed, number, self.draws)
        one["case_name"] = list(fuzz_cases.CASES)[one["case"]]
        one |= {"kind": kind, "text": text}
        self.findings.append(one)
        print(f"FINDING {number} ({kind}): {text[-400:]}", file=sys.stderr)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"finding-{self.seed}-{number}.json"
            path.write_text(json.dumps(one, indent=1))

    def batch(self, numbers: list[int]) -> list[int]:
        """Run these; returns those that are still to be run."""
        batch, current, done = Batch(numbers, self.seed, self.draws, self.root), -1, -1
        for report in batch.lines():
            current = report["number"]
            if "kind" in report:
                done = current
                self.kinds[report["kind"]] += 1
                self.cases[f"{report['case']} {report['kind']}"] += 1
                if report["kind"] in ("finding", "memory"):
                    self.finding(current, report["kind"], report["text"])
        status, errors = batch.close()
        if status != 0:
            if current == done or os.waitstatus_to_exitcode(status) == MACHINERY:
                raise RuntimeError(f"a batch ended with {status} between mutants: {errors}")
            kind = "hang" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9 else "crash"
            self.kinds[kind] += 1
            self.finding(current, kind, f"status {status}: {errors}")
        return [number for number in numbers if number > current]

    def summary(self, started: float, asked: int) -> dict[str, Any]:
        """What stdout gets."""
        seconds, ran = time.monotonic() - started, sum(self.kinds.values())
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "seed": self.seed, "asked": asked, "ran": ran, "seconds": round(seconds, 1),
            "per_second": round(ran / seconds, 1),
            "cpu_seconds": round(cpu.ru_utime + cpu.ru_stime, 1), **dict(self.kinds),
            "num_findings": len(self.findings), "cases": dict(sorted(self.cases.items())),
        }  # fmt: skip


def run_all(fuzz: Fuzz, numbers: range, minutes: float) -> dict[str, Any]:
    """Every number, in batches, until the time is over."""
    started = last = time.monotonic()
    todo: list[int] = []
    ahead = iter(numbers)
    while time.monotonic() - started < 60 * minutes:
        todo += itertools.islice(ahead, BATCH - len(todo))
        if not todo:
            break
        todo = fuzz.batch(todo)
        if time.monotonic() - last > 20:
            last = time.monotonic()
            told = fuzz.summary(started, len(numbers)) | {"next": min(todo, default=None)}
            print(json.dumps(told), file=sys.stderr, flush=True)
    return fuzz.summary(started, len(numbers))


def pristine(root: Path) -> list[Draw]:
    """The cases, made in a process of its own: this one must stay without threads to be forked."""
    pid = os.fork()
    if pid == 0:
        try:
            fuzz_cases.build(root)
        except Exception:  # noqa: BLE001 - this process has nobody above to tell
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("the checkpoints could not be made")
    draws = []
    for index in range(len(fuzz_cases.CASES)):
        folder = root / str(index)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        draws.append(Draw({str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths)}))
    return draws


def warm(draws: list[Draw], root: Path) -> None:
    """Import and cache in this process what every batch would have to."""
    for index, draw in enumerate(draws):
        place = Place(root / f"warm{index}", dict(draw.files))
        kind, text = outcome(place.folder, generate=True)
        if kind != "decodes":
            raise RuntimeError(f"case {index} as it was made: {kind}: {text}")
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    if num_threads > 1:
        raise RuntimeError(f"{num_threads} threads, which a forked process would lack")
    gc.collect()
    gc.freeze()  # what is here now need not be looked through for garbage


def replay(path: Path, draws: list[Draw], root: Path) -> dict[str, Any]:
    """Run the mutant of a finding in this process."""
    one = json.loads(path.read_text())
    place = Place(root / "replay", dict(draws[one["case"]].files))
    kind, text = run_mutant(one, place)
    print(text, file=sys.stderr)
    return {"finding": path.name, "kind": kind, "num_findings": int(kind in ("finding", "memory"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--count", type=int, default=1000, help="how many mutants")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--out", type=Path, help="folder that findings are written to")
    parser.add_argument("--replay", type=Path, help="run one finding again")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    _exact_memory()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        root = Path(name)
        draws = pristine(root / "cases")
        if asked.replay is not None:
            summary = replay(asked.replay, draws, root)
        else:
            warm(draws, root)
            numbers = range(asked.start, asked.start + asked.count)
            fuzz = Fuzz(asked.seed, draws, root, asked.out)
            summary = run_all(fuzz, numbers, asked.minutes)
    print(json.dumps(summary))
    return 1 if summary["num_findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
