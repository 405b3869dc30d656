"""SIGKILL in every stage: what is left is never half an OUT, and --resume ends at the same bits."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli import Cli, Ended, contents, digests, is_complete
from tests.tiny_files import save_tiny, write_gguf

DISTILLED = (
    "ffn.predictor.kind=lr",
    "ffn.predictor.rank=8",
    "ffn.predictor.distill={steps: 4, batch_rows: 32}",
)
LOW_RANK_HEAD = ("ffn=null", "head.kind=lr", "head.rank=8", "head.certified=false")
STEPS = 8
FINETUNE = (
    "finetune={num_tokens: 512, window: 32, step_windows: 2, learning_rate: 1e-3, "
    "checkpoint_steps: 3, dense_prefix: 0.5}"
)
LAYERS = ("predictors/layer_000", "predictors/layer_001")
ENDING = ("documents", "published")


@dataclass(frozen=True)
class Case:
    """A kind of conversion and the stages that a kill must be seen to land in."""

    model: str
    recipe: str
    changes: tuple[str, ...]
    stages: tuple[str, ...]
    every_event: bool = False  # else one event a stage, and both sides of each rename
    only: tuple[str, ...] = ()  # stages to kill in; else all, and whatever comes after the last


CASES = {
    "sampled text, q": Case(
        "folder",
        "tiny-ci",
        (),
        ("tokens", "activations", *LAYERS, "export", "evaluation", *ENDING),
        every_event=True,
    ),
    "GGUF, text file, lr distilled": Case(
        "gguf",
        "tiny-ci",
        ("data.source={text}", *DISTILLED),
        ("source", "tokens", "activations", *LAYERS, "export", "evaluation", *ENDING),
    ),
    "groups, neurons reordered": Case(
        "folder",
        "tiny-ci",
        ("data.source={text}", "ffn.group_size=4", "ffn.common_path=0.25"),
        ("tokens", *LAYERS, "export", "evaluation", *ENDING),
    ),
    "low-rank head": Case(
        "folder",
        "tiny-ci",
        ("data.source={text}", *LOW_RANK_HEAD),
        ("tokens", "activations", "predictors/head", "export", "evaluation", *ENDING),
    ),
    "attention in 4 bits": Case(
        "folder",
        "tiny-ci",
        ("data.source={text}", "attention={weights: int4}"),
        ("attention", "export"),
        only=("attention", "export"),
    ),
    "lossless": Case("folder", "lossless", (), ("export", *ENDING)),
    "finetuned": Case(
        "folder",
        "tiny-ci",
        ("data.source={text}", FINETUNE),
        ("finetune_text", "finetune", "activations", "evaluation"),
        only=("finetune_text", "finetune", "finetune_state", "activations", "evaluation"),
    ),
    "finetuned, by predictors": Case(
        "folder",
        "tiny-ci",
        ("data.source={text}", FINETUNE, "finetune.mask=oracle_then_predicted", "ffn.group_size=4"),
        ("neuron_order", "finetune", LAYERS[0]),
        only=("neuron_order", "finetune", "finetune_state", LAYERS[0]),
    ),
}


@dataclass(frozen=True)
class Job:
    """A conversion that can be run into any OUT, and what it gives when nobody interrupts it."""

    cli: Cli
    arguments: tuple[str, ...]  # with OUT between the first and the rest
    finished: dict[str, Any]
    events: list[tuple[str, str]]  # (event, path within the folder of OUT), in order

    def __call__(self, out: Path, *flags: str, **options: Any) -> Ended:
        model, *rest = self.arguments
        return self.cli("convert", model, out, *rest, *flags, **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The two forms of the tiny model and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    text = "\n\n\n".join(f"Note {n}: the quick brown fox, {n * 7} times." for n in range(200))
    (folder / "notes.txt").write_text(text)
    return {
        "folder": str(save_tiny(folder / "model")),
        "gguf": str(write_gguf(folder / "tiny.gguf")),
        "text": str(folder / "notes.txt"),
    }


@pytest.fixture(scope="module")
def jobs(hireconvert: Cli, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Jobs by the name of their case, each run once without interruption."""
    made: dict[str, Job] = {}

    def job(name: str) -> Job:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp("whole")
            sets = [
                part
                for key in case.changes
                for part in ("--set", key.replace("{text}", inputs["text"]))
            ]
            arguments = (inputs[case.model], "-r", case.recipe, *sets)
            out, log = folder / "out", folder / "events.json"
            hooks = [["log_events", str(out), str(log)]]
            first = Job(hireconvert, arguments, {}, [])
            ended = first(out, hooks=hooks)
            assert ended.code == 0, ended.err
            events = [
                (event, Path(path).relative_to(folder).as_posix())
                for event, path in json.loads(log.read_text())
            ]
            made[name] = Job(hireconvert, arguments, contents(out), events)
        return made[name]

    return job


# --------------------------------------------------------------------------- where a kill lands


def left_in(out: Path) -> str:
    """The stage that a killed conversion was in, judged by nothing but what it left on disk."""
    work = out.with_name(out.name + ".work")
    if not work.exists():
        return "nothing yet" if not out.exists() else "done"
    partial = sorted(path for path in work.rglob("*.partial") if path.is_dir())
    if out.exists() and not (work / "export" / "model").exists():
        return "published"
    if partial:
        assert len(partial) == 1
        return partial[0].relative_to(work).as_posix().removesuffix(".partial")
    if (work / "export" / "model" / "recipe.yaml").exists():
        return "documents"
    finished = [path.parent.relative_to(work).as_posix() for path in work.rglob("fingerprint.json")]
    return "between stages" if finished else "nothing yet"


def contents_of_state(out: Path) -> dict[str, str]:
    """Digests of what the finetune left to continue from."""
    found = digests(out.with_name("out.work") / "finetune_state")
    assert "training.safetensors" in found
    return found


def stage_of(path: str) -> str | None:
    """The stage whose unfinished artifact an event touches."""
    name, found, _ = path.partition(".partial")
    return name.removeprefix("out.work/") if found else None


def kill_points(events: list[tuple[str, str]], case: Case) -> list[int]:
    """Numbers of the events to be killed before: in each stage, and on both sides of renames."""
    every_event = case.every_event
    published = events.index(("os.rename", "out.work/export/model")) + 1
    stages = [stage_of(path) for _, path in events[:published]]
    points = set()
    for stage in {stage for stage in stages if stage}:
        if case.only and not stage.startswith(case.only):
            continue
        first = stages.index(stage)
        rename = len(stages) - 1 - stages[::-1].index(stage)
        points |= {(first + rename) // 2, rename + 1}
        if every_event:
            points |= {first + 1, rename}
    if case.only:
        return sorted(points)
    points |= {published, len(events) - 1}
    for name in ("recipe.yaml", "hire_report.json", "SHA256SUMS"):
        points.add(events.index(("open", f"out.work/export/model/{name}")) + 1)
    for name in ("source", "export", "tokens") if every_event else ("source",):
        removed = ("os.remove", f"out.work/{name}.partial/fingerprint.json")
        points |= {events.index(removed) + 1} if removed in events else set()
    return sorted(points)


def check_resumed(job: Job, out: Path, done: set[str], log: Path) -> None:
    """Resume, and assert that finished stages were kept and the result is that of one whole run."""
    ended = job(out, "--resume", hooks=[["log_events", str(out), str(log)]])
    assert ended.code == 0, ended.err
    events = json.loads(log.read_text())
    begun = [Path(path).relative_to(out.parent) for event, path in events if event == "os.mkdir"]
    assert not done & {stage_of(path.as_posix()) for path in begun}
    assert is_complete(out)
    assert contents(out) == job.finished
    assert not out.with_name("out.work").exists()


def finished_stages(out: Path) -> set[str]:
    work = out.with_name("out.work")
    if out.exists():  # OUT.work is being removed, and nothing in it is needed any more
        return set()
    return {path.parent.relative_to(work).as_posix() for path in work.rglob("fingerprint.json")} - {
        stage_of(path.relative_to(out.parent).as_posix() + "/") for path in work.rglob("*.partial")
    }


@pytest.mark.parametrize("name", CASES)
def test_killed_in_every_stage_and_resumed_bit_for_bit(
    name: str, jobs: Any, tmp_path: Path
) -> None:
    job, case = jobs(name), CASES[name]
    hit: Counter[str] = Counter()
    for number in kill_points(job.events, case):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        ended = job(out, hooks=[["signal_at", str(out), number, "SIGKILL"]])
        assert ended.signal == signal.SIGKILL, (number, ended)
        assert not out.exists() or is_complete(out), number
        hit[left_in(out)] += 1
        check_resumed(job, out, finished_stages(out), tmp_path / "log.json")
        shutil.rmtree(out.parent)
    assert set(case.stages) <= set(hit), hit
    assert hit.total() >= (24 if case.every_event else 2 + len(case.stages))


def test_killed_after_any_step_of_the_finetune(jobs: Any, tmp_path: Path) -> None:
    """--resume repeats no more than the steps since the last checkpoint."""
    job, log = jobs("finetuned, by predictors"), tmp_path / "steps.json"
    for number in (1, 3, 4, 5, STEPS):
        out = tmp_path / str(number) / "out"
        ended = job(out, hooks=[["signal_at_step", number, "SIGKILL"]])
        assert ended.signal == signal.SIGKILL and left_in(out) == "finetune"
        ended = job(out, "--resume", hooks=[["log_steps", str(log)]])
        assert ended.code == 0, ended.err
        # Checkpoints are written every 3 steps, and before the 5th when predictors are fitted.
        saved = {1: 0, 3: 3, 4: 3, 5: 4, STEPS: 6}[number]
        assert json.loads(log.read_text()) == list(range(saved + 1, STEPS + 1))
        assert contents(out) == job.finished


def test_killed_again_and_again(jobs: Any, tmp_path: Path) -> None:
    job, out = jobs("finetuned"), tmp_path / "out"
    for number in (2, 3, 5, 7):
        flags = ("--resume",) if out.with_name("out.work").exists() else ()
        ended = job(out, *flags, hooks=[["signal_at_step", number, "SIGKILL"]])
        assert ended.signal == signal.SIGKILL
    assert job(out, "--resume").code == 0
    assert contents(out) == job.finished


def test_state_that_finds_no_room_is_told_and_resumed(jobs: Any, tmp_path: Path) -> None:
    """The tiny model's file fits, its training state of three times the numbers does not."""
    job, out, log = jobs("finetuned"), tmp_path / "out", tmp_path / "steps.json"
    hooks = [["limit_file_size", 120_000, False], ["log_steps", str(log)]]
    ended = job(out, hooks=hooks)
    assert (ended.code, ended.out) == (4, ""), ended.err
    assert "disk is full" in ended.err and "--resume" in ended.err
    assert not out.exists()
    assert job(out, "--resume").code == 0
    assert contents(out) == job.finished
    assert json.loads(log.read_text()) == [1, 2]  # the third step's checkpoint found no room


def test_interrupted_while_training_keeps_the_last_checkpoint(jobs: Any, tmp_path: Path) -> None:
    job, out, log = jobs("finetuned"), tmp_path / "out", tmp_path / "steps.json"
    ended = job(out, hooks=[["signal_at_step", 4, "SIGINT"]])
    assert (ended.code, ended.out) == (130, "") and "--resume" in ended.err
    ended = job(out, "--resume", hooks=[["log_steps", str(log)]])
    assert ended.code == 0, ended.err
    assert json.loads(log.read_text()) == [4, 5, 6, 7, 8]
    assert contents(out) == job.finished


def test_training_state_of_another_recipe_is_refused(jobs: Any, tmp_path: Path) -> None:
    job, out = jobs("finetuned"), tmp_path / "out"
    assert job(out, hooks=[["signal_at_step", 4, "SIGKILL"]]).signal == signal.SIGKILL
    state = contents_of_state(out)
    ended = job(out, "--resume", "--set", "finetune.learning_rate=1e-2")
    assert ended.code == 4
    assert "recipe.finetune.learning_rate: found 0.001, expected 0.01" in ended.err
    assert contents_of_state(out) == state
    assert job(out, "--resume").code == 0
    assert contents(out) == job.finished


def test_killed_at_random_times(jobs: Any, tmp_path: Path) -> None:
    """By the clock, so also in the middle of a computation or of a library's own write."""
    job, seeded = jobs("GGUF, text file, lr distilled"), random.Random(0)
    start = time.perf_counter()
    assert job(tmp_path / "whole" / "out").code == 0
    whole_s = time.perf_counter() - start
    kills = 0
    for number in range(8):
        out = tmp_path / str(number) / "out"
        # Early in the run, so that a machine twice as fast as a moment ago is still caught in it.
        ended = job(out, kill_after=whole_s * seeded.uniform(0.02, 0.5))
        assert not out.exists() or is_complete(out)
        if ended.code != 0:
            assert ended.signal == signal.SIGKILL, ended
            kills += 1
            if out.with_name("out.work").exists():
                check_resumed(job, out, finished_stages(out), tmp_path / "log.json")
    assert kills >= 2
