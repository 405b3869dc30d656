"""`convert` with a finetune: what it trains, writes, reports, refuses and shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hireconvert
from hireconvert.render import PlainReporter
from tests.cli import Cli, Ended, contents, is_complete
from tests.tiny_files import SIZES, save_tiny, tiny_tokenizer

SMALL = "finetune={num_tokens: 1024, window: 32, learning_rate: 1e-2, anneal: 0.5}"
SETTINGS = ("-r", "tiny-ci", "--set", "evaluate.num_tokens=128")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and two texts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "model")
    for name in ("notes", "lessons"):
        pieces = (f"{name} {n}: the quick brown fox, {n * 7} times." for n in range(1000))
        (folder / f"{name}.txt").write_text("\n\n\n".join(pieces))
    return folder


@pytest.fixture(scope="module")
def run(hireconvert: Cli, inputs: Path) -> Any:
    """Convert the tiny model into OUT on the notes, with recipe changes."""

    def convert(out: Path, *changes: str, model: Path | None = None, flags: tuple[str, ...] = ()):
        sets = [part for change in changes for part in ("--set", change)]
        data = ("--set", f"data={inputs / 'notes.txt'}")
        return hireconvert(
            "convert", model or inputs / "model", out, *SETTINGS, *data, *sets, *flags
        )

    return convert


@pytest.fixture(scope="module")
def trained(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished conversion with a finetune, shared by the tests that only read."""
    out = tmp_path_factory.mktemp("trained") / "out"
    ended: Ended = run(out, SMALL)
    assert ended.code == 0, ended.err
    return out


@pytest.fixture(scope="module")
def untrained(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversion without."""
    out = tmp_path_factory.mktemp("untrained") / "out"
    assert run(out).code == 0
    return out


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "hire_report.json").read_text())
    return report


# --------------------------------------------------------------------------- what is written


def test_ffn_and_norms_are_trained_and_nothing_else(inputs: Path, trained: Path) -> None:
    before = load_file(inputs / "model" / "model.safetensors")
    after = load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(after[name].dtype == before[name].dtype == torch.bfloat16 for name in before)
    ffn = {name for name in before if "mlp" in name}
    assert ffn and ffn <= changed
    assert all("mlp" in name or "norm" in name for name in changed)


def test_both_views_load_and_are_of_the_source(inputs: Path, trained: Path) -> None:
    dense, info = AutoModelForCausalLM.from_pretrained(trained, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    sparse = hireconvert.load(trained)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits.float(), dense(ids).logits.float())
    source, config = (
        json.loads((folder / "config.json").read_text()) for folder in (inputs / "model", trained)
    )
    del config["hire"], config["auto_map"]
    assert config == source
    for path in (inputs / "model").glob("tokenizer*"):
        assert (trained / path.name).read_bytes() == path.read_bytes()
    assert is_complete(trained) and not trained.with_name("out.work").exists()


def test_verify_and_inspect_accept_it(hireconvert: Cli, trained: Path) -> None:
    for verb in ("verify", "inspect"):
        assert hireconvert(verb, trained).code == 0


def test_the_report_says_what_was_trained_on_what(trained: Path, untrained: Path) -> None:
    report = report_of(trained)
    tuned = report["finetune"]
    assert tuned["text"]["source"] == "notes.txt" and tuned["text"]["num_tokens"] == 1024
    assert len(tuned["text"]["text_sha256"]) == 64
    assert tuned["steps"] == 16 and tuned["num_tokens"] == 1024 and len(tuned["losses"]) == 16
    assert report["timings"]["finetune"] > 0
    assert report_of(untrained)["finetune"] is None
    card = (trained / "README.md").read_text()
    assert "tokens the weights were trained on | 1,024" in card


def test_quality_is_against_the_original(trained: Path, untrained: Path) -> None:
    tuned, plain = report_of(trained)["evaluation"], report_of(untrained)["evaluation"]
    assert tuned["baseline_perplexity"] == plain["baseline_perplexity"]
    assert plain["dense"]["kl_mean"] == 0 and plain["dense"]["perplexity"] == pytest.approx(
        plain["baseline_perplexity"]
    )
    assert tuned["dense"]["kl_mean"] > 0
    assert tuned["dense"]["perplexity"] != tuned["baseline_perplexity"]


def test_training_lowers_the_divergence_of_the_selecting_model(run: Any, tmp_path: Path) -> None:
    """With a keep low enough to hurt, the trained model selects nearer to the original."""
    figures = []
    text = ("data.num_held_tokens=512", "evaluate.num_tokens=512", "ffn.keep_fraction=0.2")
    finetune = (SMALL, "finetune.num_tokens=8192", "finetune.learning_rate=2e-3")
    for name, changes in (("plain", text), ("tuned", (*text, *finetune))):
        ended = run(tmp_path / name, *changes)
        assert ended.code == 0, ended.err
        figures.append(report_of(tmp_path / name)["evaluation"]["all"]["kl_mean"])
    assert figures[1] < 0.8 * figures[0]


def test_two_runs_give_the_same_bits(run: Any, trained: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "out", SMALL).code == 0
    assert contents(tmp_path / "out") == contents(trained)


def test_text_of_its_own_and_no_path_in_what_is_written(
    run: Any, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = run(out, SMALL, f"finetune.source={inputs / 'lessons.txt'}")
    assert ended.code == 0, ended.err
    report = report_of(out)
    assert report["finetune"]["text"]["source"] == "lessons.txt"
    assert report["data"]["source"] == "notes.txt"
    assert "finetune" in report["fingerprint"]["recipe"]
    for name in ("recipe.yaml", "hire_report.json", "README.md"):
        assert str(inputs) not in (out / name).read_text()


def test_the_model_trains_on_what_it_writes_itself(
    hireconvert: Cli, inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = hireconvert("convert", inputs / "model", out, *SETTINGS, "--set", SMALL)
    assert ended.code == 0, ended.err
    report = report_of(out)
    assert report["finetune"]["text"]["source"] == "self"
    assert report["finetune"]["text"]["text_sha256"] != report["data"]["text_sha256"]


def test_shards_stay_as_small_as_asked(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, SMALL, "output.max_shard_gb=0.00003").code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert all(path.stat().st_size < 40_000 for path in out.glob("model-*.safetensors"))
    AutoModelForCausalLM.from_pretrained(out)


# --------------------------------------------------------------------------- what is refused


def test_too_little_text(run: Any, tmp_path: Path) -> None:
    ended = run(tmp_path / "out", "finetune={num_tokens: 1000000, window: 64}")
    assert ended.code == 4
    assert "notes.txt: too little text" in ended.err
    assert "the minimum is 1000000 (finetune.num_tokens)" in ended.err
    ended = run(tmp_path / "out", SMALL, flags=("--overwrite",))
    assert ended.code == 0, ended.err


def test_text_that_is_not_there(run: Any, tmp_path: Path) -> None:
    ended = run(tmp_path / "out", SMALL, "finetune.source=nowhere.txt")
    assert ended.code == 4 and "finetune.source 'nowhere.txt' does not exist" in ended.err
    assert not (tmp_path / "out.work").exists()


def test_a_finetune_that_diverges_is_told(run: Any, tmp_path: Path) -> None:
    ended = run(tmp_path / "out", SMALL, "finetune.learning_rate=1.0e38", "finetune.clip=1.0e38")
    assert ended.code == 4, ended.err
    assert "the finetune diverged" in ended.err and "finetune.learning_rate" in ended.err
    assert "Traceback" not in ended.err


def test_without_an_ffn_there_is_nothing_to_finetune(
    hireconvert: Cli, inputs: Path, tmp_path: Path
) -> None:
    ended = hireconvert(
        "convert", inputs / "model", tmp_path / "out", "-r", "lossless", "--set", SMALL
    )
    assert ended.code == 2 and "finetune: trains the selecting FFN" in ended.err


def test_experts_are_not_trained_and_a_note_says_so(run: Any, tmp_path: Path) -> None:
    config = MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2})
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    ended = run(tmp_path / "out", SMALL, model=tmp_path / "model")
    assert ended.code == 0, ended.err
    assert "nothing is trained" in ended.err
    assert report_of(tmp_path / "out")["finetune"] is None


# --------------------------------------------------------------------------- progress


def test_the_loss_is_shown_while_it_trains(run: Any, tmp_path: Path) -> None:
    ended = run(tmp_path / "out", SMALL)
    lines = [line for line in ended.err.splitlines() if line.startswith("finetune: step ")]
    assert len(lines) == 15  # the first of 16 steps has no pace yet
    assert "step 16 of 16, loss " in lines[-1] and "0.0 minutes left" in lines[-1]


def test_a_line_for_each_twentieth_of_a_long_stage() -> None:
    notes: list[str] = []

    class Noting(PlainReporter):
        def note(self, message: str) -> None:
            notes.append(message)

    reporter = Noting(None)  # type: ignore[arg-type]  # nothing is printed
    with reporter.stage("training", 400) as advance:
        for _ in range(100):
            advance()
        for _ in range(300):
            advance("loss 1")
    assert notes[0] == "training" and len(notes) == 1 + 15
    assert notes[1].startswith("training: step 120 of 400, loss 1, ")
