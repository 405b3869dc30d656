"""Tasks of lm-evaluation-harness from local files, on a tiny model, without any hub."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hireconvert.errors import InputError
from hireconvert.harness import TaskRequest, run_tasks
from hireconvert.lmeval import find_tasks
from tests.tiny import hire_model
from tests.tiny_files import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
num_fewshot: 1
fewshot_config: {sampler: default}
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITES = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLS = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_llama(max_position_embeddings=1024).float().eval()


@pytest.fixture(scope="module")
def model(dense: Any) -> Any:
    return hire_model(dense, ffn={"keep_fraction": 0.5})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def local(folder: Path, body: str) -> str:
    rows = [
        {"q": f"Is {number} even?", "choices": ["yes", "no"], "gold": number % 2}
        for number in range(12)
    ]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "task.yaml"
    path.write_text(
        "task: parity\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
        "test_split: test\nfewshot_split: test\nmetadata: {version: 1.0}\n" + body
    )
    return f"lm_eval:{path}"


@pytest.mark.parametrize(("body", "metric"), [(CHOICES, "acc"), (WRITES, "exact_match")])
def test_both_models_answer_the_same_items(
    model: Any, dense: Any, tmp_path: Path, body: str, metric: str
) -> None:
    name = local(tmp_path, body)
    seen: list[int] = []
    figures = run_tasks(
        model,
        dense,
        TOKENIZER,
        TaskRequest([name], limit=4),
        progress=lambda done, total: seen.append(done),
    )["tasks"]["parity"]
    assert (figures["kind"], figures["metric"], figures["num_items"]) == ("lm_eval", metric, 4)
    assert figures["sparse_rows"] > 0 and seen == list(range(1, 9))
    task = find_tasks(name.removeprefix("lm_eval:"), limit=4)[0]
    answers = [
        task.answer(one, TOKENIZER, sparse=False, tick=lambda: None).score_N
        for one in (dense, model, dense)
    ]
    # The dense view answers alike: the examples shown are drawn anew from the same seed.
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(answers[0], answers[2])
    assert figures["baseline"] == answers[0].mean()


@pytest.mark.parametrize("body", [CHOICES, WRITES])
def test_a_scope_that_is_off_is_not_measured(
    model: Any, tmp_path: Path, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "set_hire_scope", lambda self, scope, **options: None)
    monkeypatch.setattr(model.hire_state, "scope", "off")
    with pytest.raises(RuntimeError, match="the sparse path did not run"):
        run_tasks(model, None, TOKENIZER, TaskRequest([local(tmp_path, body)], limit=2))
    assert logging.getLogger("lm_eval").level != logging.ERROR


def test_a_limit_draws_with_the_seed(tmp_path: Path) -> None:
    path = local(tmp_path, CHOICES).removeprefix("lm_eval:")
    first, again, other = (find_tasks(path, limit=5, seed=seed)[0] for seed in (0, 0, 1))
    assert first.places == again.places != other.places
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert find_tasks(path)[0].places == tuple(range(12))


def test_tasks_without_a_score_for_each_item_are_refused(tmp_path: Path) -> None:
    path = local(tmp_path, ROLLS).removeprefix("lm_eval:")
    with pytest.raises(InputError, match="gives no score to each item"):
        find_tasks(path)


def test_mistakes_in_a_task_file_are_named(tmp_path: Path) -> None:
    path = local(tmp_path, CHOICES).removeprefix("lm_eval:")
    (tmp_path / "items.jsonl").unlink()
    with pytest.raises(InputError, match=r"task.yaml cannot be used"):
        find_tasks(path)


def test_an_absent_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'hireconvert\[eval\]'"):
        find_tasks("arc_easy")
