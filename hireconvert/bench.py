"""How fast a converted model decodes, beside dense PyTorch and other engines, and what bytes allow.

Every model lives in its own process (`subjects.py`) and is measured in turns (`arms.py`). The
result is the JSON document of `hireconvert bench`.

Shape suffixes: W windows, T tokens.
"""

import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hireconvert.arms import Arm, Load, Reference, medians_at, run_rounds
from hireconvert.baselines import cache_folder
from hireconvert.crossover import KINDS, ROWS, checkpoint_digest, kept, measure, most_sparse_rows
from hireconvert.data import evaluation_windows
from hireconvert.errors import InputError, UsageError
from hireconvert.evaluate import builtin_text
from hireconvert.inspection import dense_table, inspect_checkpoint
from hireconvert.roofline import DTYPES, measure_stream, stream_bytes
from hireconvert.session import (
    BOTH,
    DENSE,
    OWN_DENSE,
    Request,
    Session,
    load_converted,
    load_dense,
    load_rivals,
    open_session,
    stored_dtype,
)
from hireconvert.stages import Reporter
from hireconvert.subjects import (
    STEPS,
    LlamaSubject,
    Subject,
    TorchModel,
    TorchSubject,
    Way,
    find_program,
)
from hireconvert.timing import range_of
from hireconvert.version import __version__

# Of a generation config; and what is taken where it does not sample.
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
USUAL_SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
_WINDOW, _GROWTH_ROUNDS = 256, 3


# --------------------------------------------------------------------------- the whole


def check_request(request: Request) -> None:
    """Raise UsageError or InputError for what would fail only after minutes."""
    names = [path.stem for path in request.rivals]
    if len(names) != len(set(names)):
        raise UsageError("two rivals have files of one name; figures go by name, so rename one.")
    for path in request.rivals:
        if path.suffix != ".gguf" or not path.is_file():
            raise InputError(f"--rival {path} is no GGUF file.")
    if request.rivals:
        find_program()
    if request.dtype is not None and request.dtype not in DTYPES:
        raise UsageError(f"--dtype {request.dtype}: one of {', '.join(DTYPES)}.")


def read_text(path: Path | None) -> str:
    """The text of a file, without one that every Python carries. Raises InputError."""
    if path is None:
        return builtin_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error


def prompt_and_windows(session: Session, text: str) -> tuple[list[int], torch.Tensor | None]:
    """(token ids of the longest prompt; windows [W, T] to measure quality on, or None)."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(session.folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{session.folder} holds no tokenizer that loads: {error}") from error
    longest, request = max(session.request.contexts), session.request
    ids_WT = evaluation_windows(text, tokenizer, num_tokens=longest, window=longest).ids_WT
    prompt_T = ids_WT.flatten()[:longest].tolist()
    if not request.kl_tokens:
        return prompt_T, None
    window = min(_WINDOW, request.kl_tokens)
    return prompt_T, evaluation_windows(
        text, tokenizer, num_tokens=request.kl_tokens, window=window
    ).ids_WT


def bench(folder: Path, request: Request, reporter: Reporter) -> dict[str, Any]:
    """Everything measured, ready for JSON.

    Raises UsageError for settings that make no sense, InputError when the folder, a rival, the
    text or the machine cannot be used, HubError when the Hub does not deliver.
    """
    start = time.perf_counter()
    check_request(request)
    facts, text = inspect_checkpoint(folder), read_text(request.text)
    with open_session(folder, request) as (session, stack):
        prompt_T, ids_WT = prompt_and_windows(session, text)
        main_T = prompt_T[: request.contexts[0]]
        with reporter.stage("stream", 1) as advance:
            stream = measure_stream(stream_bytes(), session.threads)
            advance()
        with reporter.stage("loading", 3) as advance:
            load_rivals(session, stack, main_T)  # first: a wrong file should not cost minutes
            advance("rivals")
            load_dense(session, stack)
            advance("dense")
            converted = load_converted(session, stack)
            advance("converted")
        arms = session.arms
        main = Load(main_T, request.batches[0], request.num_tokens)
        with reporter.stage("decoding", len(arms) + request.rounds) as advance:
            run_rounds(arms, main, rounds=request.rounds, tick=advance)
        # Once more: what ran beside the first measurement may not have run beside the rounds.
        again = measure_stream(stream_bytes(), session.threads)
        stream = max(stream, again, key=lambda one: one.gb_per_s)
        rows = growth(session, prompt_T, reporter)
        sampled = sampling(session, main, reporter)
        parts = {arm.name: converted.parts(arm.way, main_T) for arm in arms if arm.name == BOTH}
        parts[DENSE] = converted.parts(Way(), main_T)
        subjects = [_subject_facts(subject) for subject in session.subjects]
        if ids_WT is not None:
            measure_quality(session, stack, ids_WT, reporter)
        return {
            "checkpoint": {key: facts[key] for key in ("recipe", "architecture")},
            "settings": _settings(session),
            "machine": {**machine(), "stream": asdict(stream)},
            "arms": [_arm_facts(arm, stream.gb_per_s) for arm in arms],
            "subjects": subjects,
            "byte_bound": byte_bound(session),
            "breakdown": breakdown(arms, parts),
            "growth": rows,
            "sampling": sampled,
            "overtaking": overtaking(session, main_T, reporter),
            "skipped": session.skipped,
            "versions": versions(),
            "seconds": round(time.perf_counter() - start, 1),
        }


def growth(session: Session, ids_T: Sequence[int], reporter: Reporter) -> list[dict[str, Any]]:
    """Median ms per step where context or batch grow; the first row is the main table's."""
    request = session.request
    context, batch = request.contexts[0], request.batches[0]
    names = {DENSE, BOTH}
    arms = [a for a in session.arms if a.name in names or isinstance(a.subject, LlamaSubject)]
    rows = [{"context": context, "batch": batch, "ms": {arm.name: arm.median_ms for arm in arms}}]
    places = [(more, batch) for more in request.contexts[1:]]
    places += [(context, more) for more in request.batches[1:]]
    if not places:
        return rows
    with reporter.stage("growth", len(places)) as advance:
        for length, size in places:
            load = Load(ids_T[:length], size, request.num_tokens)
            found = medians_at(arms, load, rounds=min(_GROWTH_ROUNDS, request.rounds))
            rows.append({"context": length, "batch": size, "ms": found})
            advance(f"context {length}, batch {size}")
    return rows


def sampling_settings(folder: Path) -> tuple[dict[str, Any], bool]:
    """(settings to sample with, whether they are the folder's own)."""
    try:
        own = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:  # it has none
        own = transformers.GenerationConfig()
    if not own.do_sample:
        return dict(USUAL_SAMPLING), False
    given = {name: getattr(own, name) for name in SAMPLING_SETTINGS}
    return {name: value for name, value in given.items() if value is not None}, True


def sampling(session: Session, load: Load, reporter: Reporter) -> dict[str, Any]:
    """Median ms per sampled token, dense and converted, one sequence."""
    settings, own = sampling_settings(session.folder)
    arms = [arm for arm in session.arms if arm.name in (DENSE, BOTH)]
    rounds = min(_GROWTH_ROUNDS, session.request.rounds)
    with reporter.stage("sampling", 1) as advance:
        found = medians_at(arms, replace(load, batch=1, sampling=settings), rounds=rounds)
        advance()
    return {"settings": settings, "own": own, "ms": found}


def overtaking(session: Session, ids_T: Sequence[int], reporter: Reporter) -> dict[str, Any]:
    """From how many rows on dense is faster: measured once a machine and checkpoint, then kept."""
    arms = {arm.name: arm for arm in session.arms}
    dense, converted = arms[DENSE].subject, arms[BOTH].subject
    assert isinstance(dense, TorchSubject) and isinstance(converted, TorchSubject)
    room = getattr(session.text_config, "max_position_embeddings", None) or math.inf
    # Steps go on behind one another.
    rows = [number for number in ROWS if len(ids_T) + STEPS * number <= room] or [1]
    with reporter.stage("rows", len(rows) * len(KINDS)) as advance:
        found = kept(
            cache_folder(),
            {
                **machine(),
                **versions(),
                "threads": session.threads,
                "dtype": session.dtype,
                "path": converted.facts["path"],
                "checkpoint": checkpoint_digest(session.folder),
                "baseline": session.request.baseline and checkpoint_digest(session.dense),
                "context": len(ids_T),
                "rows": rows,
            },
            lambda: measure(dense, converted, arms[BOTH].way, ids_T, rows=rows, tick=advance),
        )
    most = most_sparse_rows(found)
    return {**found, "max_sparse_rows": session.hire["max_sparse_rows"], "fastest_up_to": most}


def measure_quality(
    session: Session, stack: ExitStack, ids_WT: torch.Tensor, reporter: Reporter
) -> None:
    """Divergence of all arms from the dense model at the dtype it is stored in."""
    reference = next(arm for arm in session.arms if arm.name == DENSE)
    stored = stored_dtype(dense_table(session.dense))
    if session.dtype != stored:
        model = TorchModel(session.dense, stored, session.threads)
        subject = stack.enter_context(TorchSubject(f"{DENSE} {stored}", model))
        reference = Arm("reference", subject, Way(), 0)
    # A compiled model computes what the eager one does, and is compiled for decoding.
    plain = [arm for arm in session.arms if "compiled" not in arm.name]
    with (
        reporter.stage("quality", len(ids_WT) + len(plain)) as advance,
        Reference(reference, ids_WT, advance) as original,
    ):
        for arm in plain:
            original.compare(arm)
            advance(arm.name)


def _settings(session: Session) -> dict[str, Any]:
    request = session.request
    return {
        "baseline": request.baseline,
        "dtype": session.dtype,
        "threads": session.threads,
        "batches": list(request.batches),
        "contexts": list(request.contexts),
        "num_tokens": request.num_tokens,
        "rounds": request.rounds,
        "kl_tokens": request.kl_tokens,
    }


def machine() -> dict[str, Any]:
    """What this machine is, as far as the system tells."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # only Linux has the file
    return {"processor": name, "system": platform.system()}


def versions() -> dict[str, str]:
    """Of what took part."""
    return {
        "hireconvert": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _arm_facts(arm: Arm, stream: float) -> dict[str, Any]:
    rate = arm.bytes_per_token / arm.median_ms / 1e6
    return {
        "name": arm.name,
        "way": arm.way.to_dict(),
        "threads": arm.subject.threads,
        "ms": asdict(range_of(arm.medians)),
        "first_ms": statistics.median(arm.firsts),
        "rounds": len(arm.medians),
        "unsteady_rounds": arm.unsteady,
        "bytes_per_token": arm.bytes_per_token,
        "gb_per_s": rate,
        "roofline": rate / stream,
        "kl": arm.kl,
        "top1": arm.top1,
    }


def _subject_facts(subject: Subject) -> dict[str, Any]:
    memory = subject.memory()
    before = memory["before"]
    taken = {
        name: None if None in (memory[name], before) else memory[name] - before
        for name in ("resident", "peak")
    }
    return {"name": subject.name, **subject.facts, **taken}


def byte_bound(session: Session) -> dict[str, dict[str, float]]:
    """How many times fewer bytes than dense a token reads, and what share of that was reached.

    Over PyTorch and over the dense model through our own kernels, where they run whole steps.
    """
    found = {arm.name: arm for arm in session.arms}
    converted = found[BOTH]

    def over(name: str) -> dict[str, float]:
        dense = found[name]
        bound = dense.bytes_per_token / converted.bytes_per_token
        reached = dense.median_ms / converted.median_ms
        return {"ratio": bound, "reached": reached, "share": reached / bound}

    return {name: over(name) for name in (DENSE, OWN_DENSE)}


def breakdown(
    arms: Sequence[Arm], parts: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, float | None]]:
    """Milliseconds of a token by part; `rest` is what neither the FFNs nor the head take."""
    whole = {arm.name: arm.median_ms for arm in arms}
    return {
        name: {
            **part,
            "token_ms": whole[name],
            "rest_ms": whole[name] - sum(part[key] or 0.0 for key in ("ffn_ms", "head_ms")),
        }
        for name, part in parts.items()
    }
