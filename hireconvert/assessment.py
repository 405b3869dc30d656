"""A whole evaluation of a finished folder: texts, tasks and speed, all against one baseline.

The baseline is another model, or else the folder's own dense view. The result is the JSON document
of `hireconvert eval`; `gate.py` holds limits against it and `report.py` draws it.

Shape suffixes: W windows, T tokens of a window, N rows (scored positions), D width.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from hireconvert.answers import Answers, Task
from hireconvert.baselines import (
    Baseline,
    cache_folder,
    kept_answers,
    kept_states,
    open_baseline,
)
from hireconvert.data import EvalWindows, evaluation_windows
from hireconvert.errors import InputError, UsageError
from hireconvert.evaluate import EvalReport, builtin_text, evaluate_model, hidden_states
from hireconvert.harness import DEFAULT_MAX_LENGTH, TaskRequest, run_tasks
from hireconvert.inspection import inspect_checkpoint
from hireconvert.loading import CHECKSUMS, load
from hireconvert.measures import ViewReport
from hireconvert.paired import perplexity_ratio
from hireconvert.stages import Reporter, steps
from hireconvert.timing import Timed, time_decode
from hireconvert.version import __version__
from hireconvert.workspace import file_sha256

BUILTIN = "pydoc_data.topics"
OWN = "own dense view"
PROMPT_TOKENS, TIMED_TOKENS, TIMED_ROUNDS = 64, 32, 5
_STEPS = 100


@dataclass(frozen=True)
class Request:
    """What to measure; without texts, the text that every Python carries is taken."""

    texts: tuple[Path, ...] = ()
    num_tokens: int = 8192  # of each text
    baseline: str | None = None  # Hub id, folder or GGUF; None: the folder's own dense view
    tasks: tuple[str, ...] = ()  # as harness.open_tasks takes them
    limit: int | None = None  # items of each task
    seed: int = 0  # of the items
    max_length: int = DEFAULT_MAX_LENGTH  # of generated items, tokens
    speed: bool = False
    use_cache: bool = True


@dataclass(frozen=True)
class _Subject:
    """What is measured, and against what."""

    model: Any
    tokenizer: Any
    baseline: Baseline | None
    cache: Path | None
    reporter: Reporter


def assess(folder: Path, request: Request, reporter: Reporter) -> dict[str, Any]:
    """Everything measured, ready for JSON; figures that are not finite are None.

    Raises UsageError for texts of one name and unknown tasks, InputError when the folder, a text
    or the baseline cannot be used, RuntimeError when the sparse path did not run (our bug).
    """
    start = time.perf_counter()
    texts = _read_texts(request.texts)
    facts = inspect_checkpoint(folder)
    with _subject(folder, request, reporter) as subject:
        windows = {
            name: _windows(subject, text, request.num_tokens) for name, text in texts.items()
        }
        # First, because names of tasks that do not exist should not cost minutes.
        tasks = _tasks(subject, request) if request.tasks else None
        reports = {name: _text_report(subject, name, each) for name, each in windows.items()}
        speed = None
        if request.speed:
            speed = _speed(subject, next(iter(windows.values())).ids_WT[:1, :PROMPT_TOKENS])
        baseline = subject.baseline
        result = {
            "checkpoint": {
                **{key: facts[key] for key in ("recipe", "architecture", "layers")},
                "sums": _checksums(folder),
            },
            "bytes_per_token": facts["bytes_per_token"],
            "baseline": {
                "source": OWN if baseline is None else baseline.source,
                "fingerprint": None if baseline is None else baseline.fingerprint,
            },
            "texts": reports,
            "tasks": tasks,
            "speed": speed,
        }
    result |= {"dtype": "float32", "versions": _versions()}
    result["seconds"] = round(time.perf_counter() - start, 1)
    finite: dict[str, Any] = _finite(result)
    return finite


def _versions() -> dict[str, str]:
    return {
        "hireconvert": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _checksums(folder: Path) -> str | None:
    """What tells this folder from others: the digest of its SHA256SUMS."""
    path = folder / CHECKSUMS
    return file_sha256(path) if path.is_file() else None


def _finite(tree: Any) -> Any:
    """The tree with None for NaN and infinities, which JSON does not have."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


# --------------------------------------------------------------------------- what is measured


def _read_texts(paths: tuple[Path, ...]) -> dict[str, str]:
    """Texts by file name, in the order given."""
    if not paths:
        return {BUILTIN: builtin_text()}
    texts: dict[str, str] = {}
    for path in paths:
        if path.name in texts:
            raise UsageError(
                f"two texts are called {path.name}; figures go by file name, so rename one."
            )
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return texts


@contextmanager
def _subject(folder: Path, request: Request, reporter: Reporter) -> Iterator[_Subject]:
    """Both models in float32. Raises InputError when one cannot be used or they do not pair."""
    model = load(folder, dtype=torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no tokenizer that can be loaded: {error}") from error
    cache = cache_folder() if request.use_cache else None
    if request.baseline is None:
        yield _Subject(model, tokenizer, None, cache, reporter)
        return
    with open_baseline(request.baseline) as baseline:
        rows, wanted = (
            each.get_output_embeddings().weight.shape[0] for each in (baseline.model, model)
        )
        if rows != wanted:
            raise InputError(
                f"the baseline {baseline.source} has a vocabulary of {rows} tokens, {folder} one "
                f"of {wanted}: they cannot be paired. Name the model it was converted from."
            )
        yield _Subject(model, tokenizer, baseline, cache, reporter)


def _windows(subject: _Subject, text: str, num_tokens: int) -> EvalWindows:
    windows = evaluation_windows(text, subject.tokenizer, num_tokens=num_tokens)
    if subject.baseline is not None:
        other = evaluation_windows(text, subject.baseline.tokenizer, num_tokens=num_tokens)
        if not torch.equal(other.ids_WT, windows.ids_WT):
            raise InputError(
                f"the baseline {subject.baseline.source} cuts the text into other tokens: they "
                "cannot be paired. Name the model that the folder was converted from."
            )
    return windows


# --------------------------------------------------------------------------- texts


def _text_report(subject: _Subject, name: str, windows: EvalWindows) -> dict[str, Any]:
    baseline, hidden_ND, state = subject.baseline, None, None
    if baseline is not None:
        hidden_ND, state = _baseline_states(subject, baseline, windows.ids_WT)
    with subject.reporter.stage(f"evaluation: {name}", _STEPS) as advance:
        report = evaluate_model(
            subject.model,
            None if baseline is None else baseline.model,
            windows,
            baseline_hidden_ND=hidden_ND,
            progress=steps(advance, _STEPS),
        )
    views = {"all": report.all, "all_prefix": report.all_prefix}
    return {
        **report.to_dict(),
        "baseline_cache": state,
        "increase": {
            scope: _increase(report, view, report.num_windows)
            for scope, view in views.items()
            if view is not None
        },
    }


@torch.no_grad()
def _baseline_states(
    subject: _Subject, baseline: Baseline, ids_WT: torch.Tensor
) -> tuple[torch.Tensor, str]:
    def compute() -> torch.Tensor:
        with subject.reporter.stage("baseline", len(ids_WT)) as advance:
            return hidden_states(baseline.model, ids_WT, advance)

    return kept_states(baseline, ids_WT, compute, cache=subject.cache)


def _increase(report: EvalReport, view: ViewReport, num_windows: int) -> dict[str, Any]:
    """Perplexity over the baseline's minus 1; the interval needs two windows."""
    point = view.perplexity / report.baseline_perplexity - 1
    if num_windows < 2:
        return {"point": point, "low": None, "high": None, "n": num_windows}
    lengths = [report.num_scored // num_windows] * num_windows
    ratio = perplexity_ratio(view.nll_N.numpy(), report.baseline_nll_N.numpy(), lengths)
    return {**asdict(ratio), "point": point, "low": ratio.low - 1, "high": ratio.high - 1}


# --------------------------------------------------------------------------- tasks and speed


def _tasks(subject: _Subject, request: Request) -> dict[str, Any] | None:
    """Figures of each task; None where nothing is sparse, so that there is nothing to measure."""
    hire = subject.model.config.hire
    if hire["ffn"] is None and hire["head"] is None:
        subject.reporter.note("tasks were not measured: nothing in OUT is sparse")
        return None
    baseline, keeper = subject.baseline, None
    if baseline is not None:
        keeper = partial(_baseline_answers, subject, baseline)
    with subject.reporter.stage("tasks", _STEPS) as advance:
        found: dict[str, Any] = run_tasks(
            subject.model,
            None if baseline is None else baseline.model,
            subject.tokenizer,
            TaskRequest(request.tasks, request.limit, request.seed, request.max_length),
            keeper=keeper,
            progress=steps(advance, _STEPS),
        )["tasks"]
    return found


def _baseline_answers(
    subject: _Subject, baseline: Baseline, task: Task, compute: Callable[[], Answers]
) -> tuple[Answers, str]:
    return kept_answers(baseline, task, subject.tokenizer, compute, cache=subject.cache)


def _speed(subject: _Subject, prompt_1T: torch.Tensor) -> dict[str, Any]:
    """Milliseconds per decoded token, measured in turns, and baseline over converted."""
    model, baseline = subject.model, subject.baseline
    dense = Timed(model, "off") if baseline is None else Timed(baseline.model)
    model.hire_stats(reset=True)
    with subject.reporter.stage("speed", _STEPS) as advance:
        times = time_decode(
            {"dense": dense, "converted": Timed(model, "decode")},
            prompt_1T,
            num_tokens=TIMED_TOKENS,
            rounds=TIMED_ROUNDS,
            progress=steps(advance, _STEPS),
        )
    _require_sparse_decoding(model)
    ratio = times["dense"].median_ms / times["converted"].median_ms
    return {
        "ratio": ratio,
        **{name: asdict(each) for name, each in times.items()},
        "num_tokens": TIMED_TOKENS,
        "threads": torch.get_num_threads(),
    }


def _require_sparse_decoding(model: Any) -> None:
    stats, hire = model.hire_stats(), model.config.hire
    counts = {f"layer {index}": each for index, each in stats["layers"].items()}
    for name, each in counts.items():
        if 0 < each["rows"] <= each["dense_rows"]:
            raise InputError(
                f"{name} selected in no decoded token: its estimates are NaN or inf, so the model "
                "runs dense. Its predictor is damaged; convert again or fetch the folder again."
            )
    if hire["head"] is not None:
        counts["the head"] = stats["head"]
    for name, each in counts.items():
        if each["rows"] <= each["dense_rows"]:
            raise RuntimeError(
                f"{name} counted {each} while decoding: the sparse path did not run, so its speed "
                "was not measured"
            )
