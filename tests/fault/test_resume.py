"""--resume and --overwrite: what is refused, what continues, and what a full disk does."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.cli import Cli, Ended, contents, is_complete
from tests.tiny_files import save_tiny, write_gguf

Events = list[tuple[str, str]]
SEED = ("--set", "seed=5")


@dataclass(frozen=True)
class Source:
    """A model and a text of its own, and what its conversion gives when nothing interrupts it."""

    cli: Cli
    folder: Path
    finished: dict[str, Any]
    events: Events

    @property
    def text(self) -> Path:
        return self.folder / "notes.txt"

    def convert(self, out: Path, *flags: str, **options: Any) -> Ended:
        data = f"data.source={self.text}"
        model = self.folder / "model"
        return self.cli("convert", model, out, "-r", "tiny-ci", "--set", data, *flags, **options)

    def number_of(self, event: str, path: str) -> int:
        """The number of an event in an uninterrupted run, the path below OUT.work."""
        return self.events.index((event, f"out.work/{path}"))


def log_of(run: Callable[..., Ended], out: Path) -> Events:
    log = out.parent / "events.json"
    ended = run(out, hooks=[["log_events", str(out), str(log)]])
    assert ended.code == 0, ended.err
    below = out.parent
    return [(e, Path(p).relative_to(below).as_posix()) for e, p in json.loads(log.read_text())]


@pytest.fixture(scope="module")
def original(hireconvert: Cli, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("original")
    save_tiny(folder / "model")
    text = "\n\n\n".join(f"Note {n}: the quick brown fox, {n * 7} times." for n in range(200))
    (folder / "notes.txt").write_text(text)
    events = log_of(Source(hireconvert, folder, {}, []).convert, folder / "out")
    return Source(hireconvert, folder, contents(folder / "out"), events)


@pytest.fixture
def source(original: Source, tmp_path: Path) -> Source:
    """A copy that a test may change."""
    shutil.copytree(original.folder, tmp_path / "source")
    return Source(original.cli, tmp_path / "source", original.finished, original.events)


@pytest.fixture
def killed(source: Source, tmp_path: Path) -> Iterator[Path]:
    """OUT of a conversion that was killed in its second predictor; the test must not finish it."""
    out = tmp_path / "out"
    number = source.number_of("os.rename", "predictors/layer_001.partial")
    ended = source.convert(out, hooks=[["signal_at", str(out), number, "SIGKILL"]])
    assert ended.signal == signal.SIGKILL
    yield out
    assert not out.exists() and (tmp_path / "out.work" / "predictors" / "layer_000").is_dir()


# --------------------------------------------------------------------------- what is refused


def change_weights(source: Source) -> None:
    tensors = load_file(source.folder / "model" / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, source.folder / "model" / "model.safetensors", {"format": "pt"})


def change_text(source: Source) -> None:
    source.text.write_text(source.text.read_text() + "one word more")


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": (
        {"flags": ("--set", "ffn.keep_fraction=0.25")},
        "recipe.ffn.keep_fraction: found 0.5, expected 0.25",
    ),
    "text settings": (
        {"flags": ("--set", "data.window=32")},
        "recipe.data.window: found 64, expected 32",
    ),
    "seed": ({"flags": SEED}, "seed: found 0, expected 5"),
    "model": ({"change": change_weights}, "model: found"),
    "text": ({"change": change_text}, "recipe.data.sha256: found"),
    "threads": (
        {"hook": ["replace_function", "torch.get_num_threads", 99]},
        "machine.threads: found 1, expected 99",
    ),
    "CPU": (
        {"hook": ["replace_function", "torch.backends.cpu.get_cpu_capability", "NEW"]},
        'machine.cpu_capability: found "',
    ),
    "device": (
        {"hook": ["replace", "hireconvert.pipeline.DEVICE", "cuda"]},
        'machine.device: found "cpu", expected "cuda"',
    ),
    "version": (
        {"hook": ["replace", "hireconvert.pipeline.__version__", "9.9"]},
        'versions.hireconvert: found "',
    ),
    "transformers": (
        {"hook": ["replace", "transformers.__version__", "9.9"]},
        "versions.transformers: found",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_resume_refuses_what_differs_and_names_it(what: str, source: Source, killed: Path) -> None:
    how, message = DIFFERENT[what]
    how.get("change", lambda source: None)(source)
    hooks = [how["hook"]] if "hook" in how else []
    ended = source.convert(killed, "--resume", *how.get("flags", ()), hooks=hooks)
    assert (ended.code, ended.out) == (4, "")
    assert "cannot resume" in ended.err and message in ended.err and "--overwrite" in ended.err
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.splitlines() if ": found " in line]
    assert len(lines) == 1, lines


def test_resume_refuses_neurons_left_out_that_now_count(source: Source, killed: Path) -> None:
    ended = source.convert(killed, "--resume", "--set", "ffn.unselected={bits: 4}")
    assert ended.code == 4 and "cannot resume" in ended.err and "--overwrite" in ended.err
    assert 'recipe.ffn.unselected.bits: found "absent", expected 4' in ended.err


def test_a_changed_gguf_file_is_refused(hireconvert: Cli, tmp_path: Path) -> None:
    model, out = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out"
    arguments = ("convert", model, out, "-r", "lossless")
    log = [["signal_at", str(out), 40, "SIGKILL"]]
    assert hireconvert(*arguments, hooks=log).signal == signal.SIGKILL
    assert (tmp_path / "out.work" / "source").is_dir()
    write_gguf(model, keys={"llama.new_key": 3})
    ended = hireconvert(*arguments, "--resume")
    assert ended.code == 4 and "gguf_sha256: found" in ended.err
    assert hireconvert(*arguments, "--overwrite").code == 0
    assert is_complete(out)


def test_nothing_to_resume_is_a_fresh_start(source: Source, tmp_path: Path) -> None:
    """So that one command line with --resume can be repeated until it succeeds."""
    assert source.convert(tmp_path / "out", "--resume").code == 0
    assert contents(tmp_path / "out") == source.finished
    again = source.convert(tmp_path / "out", "--resume")
    assert again.code == 0 and "already complete" in again.out


# --------------------------------------------------------------------------- stopping


STAGES = {
    "tokens": ("open", "tokens.partial/tokens.json"),
    "activations": ("open", "activations.partial/fingerprint.json"),
    "predictors": ("os.mkdir", "predictors/layer_001.partial"),
    "export": ("open", "export.partial/model/config.json"),
    "evaluation": ("open", "export/model/config.json"),
    "documents": ("open", "export/model/README.md"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_is_130_and_says_how_to_continue(
    stage: str, original: Source, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    hooks = [["signal_at", str(out), original.number_of(*STAGES[stage]), "SIGINT"]]
    ended = original.convert(out, hooks=hooks)
    assert (ended.code, ended.out) == (130, "")
    assert "--resume" in ended.err and "Traceback" not in ended.err
    assert not out.exists()
    assert original.convert(out, "--resume").code == 0
    assert contents(out) == original.finished


def test_of_two_at_once_the_second_refuses(original: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("convert", original.folder / "model", out, "-r", "lossless")
    hooks = [["signal_at", str(out), 10, "SIGSTOP"]]
    first = original.cli.start(*arguments, hooks=hooks)
    stopped = first.wait()
    assert (stopped.code, stopped.signal) == (None, None)
    for flag in ("--resume", "--overwrite"):
        second = original.cli(*arguments, flag)
        assert (second.code, second.out) == (2, "")
        assert "another hireconvert process is working" in second.err
    first.send("SIGCONT")
    ended = first.wait()
    assert ended.code == 0, ended.err
    assert is_complete(out)


# --------------------------------------------------------------------------- replacing


def test_killed_while_replacing(original: Source, tmp_path: Path) -> None:
    """The old OUT stands until the new one is complete, whichever moment the kill picks."""

    def prepare(name: str) -> Path:
        out = tmp_path / name / "out"
        shutil.copytree(original.folder / "out", out)
        (out / "mine.txt").write_text("x")
        return out

    def overwrite(out: Path, **options: Any) -> Ended:
        return original.convert(out, "--overwrite", *SEED, **options)

    events = log_of(overwrite, prepare("whole"))
    finished = contents(tmp_path / "whole" / "out")
    assert "mine.txt" not in finished and finished != original.finished
    moved = events.index(("os.rename", "out"))
    first = events.index(("open", "out.work/replaces_out"))
    left = set()
    for number in (first, first + 1, moved, moved + 1, moved + 3, moved + 4, moved + 8):
        out = prepare(str(number))
        ended = overwrite(out, hooks=[["signal_at", str(out), number, "SIGKILL"]])
        assert ended.signal == signal.SIGKILL
        old = (out / "mine.txt").exists()
        assert old or not out.exists() or is_complete(out)
        left.add("old" if old else "new" if out.exists() else "absent")
        ended = original.convert(out, "--resume", *SEED)
        assert ended.code == 0, (number, ended.err)
        assert contents(out) == finished
        assert not out.with_name("out.work").exists()
        shutil.rmtree(out.parent)
    assert left == {"old", "absent", "new"}


def test_killed_while_throwing_away_an_unfinished_conversion(
    original: Source, tmp_path: Path
) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    number = original.number_of("open", "evaluation/result.json")
    ended = original.convert(out, hooks=[["signal_at", str(out), number, "SIGKILL"]])
    assert ended.signal == signal.SIGKILL
    shutil.copytree(tmp_path / "out.work", kept)
    for number in (3, 5, 9, 14, 19):  # 2 is the mark that clearing has begun
        shutil.rmtree(tmp_path / "out.work")
        shutil.copytree(kept, tmp_path / "out.work")
        hooks = [["signal_at", str(out), number, "SIGKILL"]]
        assert original.convert(out, "--overwrite", *SEED, hooks=hooks).signal == signal.SIGKILL
        cut = [["signal_at", str(out), number + 30, "SIGKILL"]]
        ended = original.convert(out, "--resume", *SEED, hooks=cut)
        assert ended.signal == signal.SIGKILL, ended.err  # it got to work again
    ended = original.convert(out, "--resume", *SEED)
    assert ended.code == 0, ended.err
    assert json.loads((out / "hire_report.json").read_text())["seed"] == 5


# --------------------------------------------------------------------------- a full disk


def refused_for_space(ended: Ended, out: Path) -> None:
    assert (ended.code, ended.out) == (4, ""), ended.err
    assert "disk is full" in ended.err and "--resume" in ended.err
    assert "Traceback" not in ended.err
    assert not out.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_is_told_and_resumed(
    stage: str, original: Source, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    number = original.number_of(*STAGES[stage])
    if stage == "evaluation":
        number = original.number_of("open", "evaluation.partial/result.json")
    ended = original.convert(out, hooks=[["full_disk_at", str(out), number]])
    refused_for_space(ended, out)
    assert original.convert(out, "--resume").code == 0
    assert contents(out) == original.finished


@pytest.mark.parametrize("num_bytes", [2_000, 20_000, 50_000])
@pytest.mark.parametrize("model", ["folder", "gguf"])
def test_a_write_cut_short_by_the_system(
    model: str, num_bytes: int, hireconvert: Cli, tmp_path: Path
) -> None:
    """The kernel ends the write, inside safetensors and tokenizers too: first told, then killed."""
    path = tmp_path / ("tiny.gguf" if model == "gguf" else "model")
    write_gguf(path) if model == "gguf" else save_tiny(path)
    out = tmp_path / "out"
    arguments = ("convert", path, out, "-r", "tiny-ci")
    refused_for_space(hireconvert(*arguments, hooks=[["limit_file_size", num_bytes, False]]), out)
    resume = (*arguments, "--resume")
    ended = hireconvert(*resume, hooks=[["limit_file_size", num_bytes, True]])
    assert ended.signal == signal.SIGXFSZ
    assert not out.exists()
    assert hireconvert(*resume).code == 0
    assert is_complete(out)


def test_little_space_is_told_before_anything_is_written(original: Source, tmp_path: Path) -> None:
    ended = original.convert(tmp_path / "out", hooks=[["little_space", 1000]])
    assert ended.code == 4 and "not enough disk space" in ended.err and "GB" in ended.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()
