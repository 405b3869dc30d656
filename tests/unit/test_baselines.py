"""What is kept of a baseline between runs: found again, never mistaken, never fatal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hireconvert.answers import Answers
from hireconvert.baselines import Baseline, cache_folder, kept_answers, kept_states, open_baseline
from hireconvert.errors import InputError
from hireconvert.likelihood import LikelihoodTask, Question
from tests.tiny_files import save_tiny, tiny_tokenizer, write_gguf

IDS_WT = torch.arange(20).view(2, 10)
HIDDEN_ND = torch.randn(18, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny")
    with open_baseline(str(folder)) as opened:
        return opened


def states(baseline: Baseline, cache: Path | None, ids_WT: torch.Tensor = IDS_WT) -> str:
    """What happened; what is given must always be right."""
    wanted = HIDDEN_ND[: ids_WT.shape[0] * (ids_WT.shape[1] - 1)]
    found, state = kept_states(baseline, ids_WT, wanted.clone, cache=cache)
    assert found.equal(wanted) and found.dtype == torch.float32
    return state


def test_the_second_run_finds_what_the_first_computed(baseline: Baseline, tmp_path: Path) -> None:
    assert states(baseline, tmp_path) == "stored"
    (path,) = (tmp_path / "baselines").iterdir()
    assert path.suffix == ".safetensors"

    def never() -> torch.Tensor:
        raise AssertionError("computed again")

    found, state = kept_states(baseline, IDS_WT, never, cache=tmp_path)
    assert found.equal(HIDDEN_ND) and state == "hit"
    assert states(baseline, None) == "off"


def test_other_models_texts_and_versions_are_not_mistaken(
    baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert states(baseline, tmp_path) == "stored"
    other = Baseline(baseline.model, baseline.tokenizer, baseline.source, "another model")
    assert states(other, tmp_path) == "stored"
    assert states(baseline, tmp_path, IDS_WT + 1) == "stored"
    assert states(baseline, tmp_path, IDS_WT.view(4, 5)) == "stored"
    monkeypatch.setattr("hireconvert.baselines.transformers.__version__", "0")
    assert states(baseline, tmp_path) == "stored"
    assert len(list((tmp_path / "baselines").iterdir())) == 5


def test_a_damaged_file_is_computed_again(baseline: Baseline, tmp_path: Path) -> None:
    states(baseline, tmp_path)
    (path,) = (tmp_path / "baselines").iterdir()
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[:100]):
        path.write_bytes(damaged)
        assert states(baseline, tmp_path) == "stored"
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(baseline: Baseline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert states(baseline, tmp_path / "file") == "could not be written"


TASK = LikelihoodTask("yes", [Question(str(n), "so?", ("a", "b"), 0) for n in range(3)], "raw")


def answers(baseline: Baseline, cache: Path | None, task: Any = TASK, **options: Any) -> str:
    """What happened; what is given must always be right."""
    score_N = np.arange(task.num_items) / 2
    tokenizer = options.get("tokenizer", tiny_tokenizer())
    found, state = kept_answers(
        baseline, task, tokenizer, lambda: Answers(score_N.copy(), 0), cache=cache
    )
    assert np.array_equal(found.score_N, score_N) and found.score_N.dtype == np.float64
    return state


def test_answers_are_found_again_and_not_mistaken(baseline: Baseline, tmp_path: Path) -> None:
    assert answers(baseline, tmp_path) == "stored"
    assert answers(baseline, tmp_path) == "hit"
    assert answers(baseline, None) == "off"
    other = tiny_tokenizer()
    other.add_tokens(["so?"])
    assert answers(baseline, tmp_path, tokenizer=other) == "stored"
    for changed in ({"metric": "per_character"}, {"questions": TASK.questions[:2]}):
        assert answers(baseline, tmp_path, replace(TASK, **changed)) == "stored"
    stranger = replace(baseline, fingerprint="another model")
    assert answers(stranger, tmp_path) == "stored"
    assert answers(baseline, tmp_path, tokenizer=object()) == "off"  # it may be any
    assert answers(baseline, tmp_path, replace(TASK, kind="lm_eval")) == "off"
    assert answers(baseline, tmp_path) == "hit"


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hireconvert"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache_folder() == tmp_path / "home" / ".cache" / "hireconvert"


def test_a_gguf_file_is_a_baseline_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_baseline(str(write_gguf(tmp_path / "tiny.gguf"))) as opened:
        assert opened.source == "gguf:tiny.gguf"
        assert opened.model.dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    assert opened.model(IDS_WT).logits.isfinite().all()  # weights were read, not mapped


def test_a_baseline_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"), open_baseline(str(tmp_path / "no/x/y")):
        pass
