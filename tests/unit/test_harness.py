"""Tasks run on tiny models: both on the same items, through the path they claim to measure."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hireconvert import decoding, harness, likelihood
from hireconvert.answers import require_sparse, view
from hireconvert.errors import HireError, InputError, UsageError
from hireconvert.likelihood import Question, read_task, score_continuations
from hireconvert.suite import build_items, grade
from tests.tiny import hire_model
from tests.tiny_files import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FFN = {"keep_fraction": 0.5}
LONG = {"max_position_embeddings": 4096}
QUESTIONS = [
    {"id": i, "ctx": f"Question {i}: is it so?\nAnswer:", "cont": [" yes", " no"], "gold": i % 2}
    for i in range(6)
]


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_llama(**LONG).float().eval()


@pytest.fixture(scope="module")
def model(dense: Any) -> Any:
    return hire_model(dense, ffn=FFN)


def run_tasks(
    model: Any, baseline: Any, tokenizer: Any, names: list[str], **options: Any
) -> dict[str, Any]:
    progress = options.pop("progress", lambda done, total: None)
    request = harness.TaskRequest(names, **options)
    return harness.run_tasks(model, baseline, tokenizer, request, progress=progress)


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


# ----------------------------------------------------------------------------------- run_tasks


def test_the_tree_of_results(model: Any, dense: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "yes.jsonl", QUESTIONS)
    seen: list[tuple[int, int]] = []
    tree = run_tasks(
        model,
        dense,
        TOKENIZER,
        ["retrieval", str(path)],
        limit=3,
        max_length=1024,
        progress=lambda done, total: seen.append((done, total)),
    )["tasks"]
    assert list(tree) == ["retrieval", "yes"]
    assert tree["retrieval"]["kind"] == "generated" and tree["yes"]["kind"] == "likelihood"
    for figures in tree.values():
        assert figures["num_items"] == 3 and figures["sparse_rows"] > 0
        gap = figures["converted"] - figures["baseline"]
        assert figures["difference"]["point"] == pytest.approx(gap)
        assert figures["difference"]["low"] <= gap <= figures["difference"]["high"]
        assert 0 < figures["p_mcnemar"] <= 1
    assert seen[-1] == (12, 12) and [done for done, _ in seen] == list(range(1, 13))
    json.dumps(tree, allow_nan=False)


def test_the_baseline_is_its_own_dense_view_unless_given(
    model: Any, dense: Any, tmp_path: Path
) -> None:
    names = ["retrieval", str(write(tmp_path / "yes.jsonl", QUESTIONS))]
    own = run_tasks(model, None, TOKENIZER, names, limit=2, max_length=1024)
    given = run_tasks(model, dense, TOKENIZER, names, limit=2, max_length=1024)
    assert own == given  # the same weights up to the order of neurons


def test_a_damaged_model_scores_worse(dense: Any, tmp_path: Path) -> None:
    """The dense model's own choices are the right ones; one with little left misses some."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(40):
        words = ["".join(rng.choice(list("abcdefgh"), 8)) for _ in range(5)]
        rows.append({"id": index, "ctx": words[0], "cont": words[1:], "gold": 0})
    questions = [Question(str(r["id"]), r["ctx"], tuple(r["cont"]), 0) for r in rows]
    scores, _ = score_continuations(dense, TOKENIZER, questions, False, lambda: None)
    for row, found in zip(rows, scores, strict=True):
        row["gold"] = int(np.argmax([score.log_likelihood for score in found]))
    path = write(tmp_path / "own.jsonl.gz", rows)
    poor = hire_model(dense, ffn={"keep_fraction": 0.1})
    figures = run_tasks(poor, dense, TOKENIZER, [str(path)])["tasks"]["own"]
    assert figures["baseline"] == 1.0 and figures["converted"] < 0.9
    assert figures["difference"]["high"] < 0 and figures["p_mcnemar"] < 0.05


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "no task is named"),
        (["copying"], {}, "task 'copying' is unknown; tasks are copy, retrieval"),
        (["copy", "suite"], {"limit": 2}, "two tasks are called 'copy'"),
        (["copy"], {"limit": 1}, "allow no interval"),
        (["copy"], {"max_length": 9999}, "the model has 4096 positions"),
        (["absent.jsonl"], {}, "absent.jsonl cannot be read"),
        (["lm_eval:absent.yaml"], {}, "absent.yaml does not exist"),
    ],
)
def test_mistakes_are_named(
    model: Any, names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HireError, match=message):
        run_tasks(model, None, TOKENIZER, names, **{"max_length": 2048, **options})


# --------------------------------------------------------------------------------- the sparse path


def test_a_scope_that_is_off_is_not_measured(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "yes.jsonl", QUESTIONS)
    monkeypatch.setattr(type(model), "set_hire_scope", lambda self, scope, **options: None)
    monkeypatch.setattr(model.hire_state, "scope", "off")
    for name in ("retrieval", str(path)):
        with pytest.raises(RuntimeError, match="the sparse path did not run"):
            run_tasks(model, None, TOKENIZER, [name], limit=2, max_length=1024)


def test_rows_that_fall_back_are_not_measured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.hire_state, "max_sparse_rows", 0)
    with pytest.raises(RuntimeError, match="fell back"):
        run_tasks(model, None, TOKENIZER, ["retrieval"], limit=2, max_length=1024)


def test_missing_and_dense_rows_are_found(model: Any) -> None:
    with view(model, "all"):
        model(torch.arange(3, 10)[None])
        assert require_sparse(model, 7) == 7
        assert require_sparse(model, None) == 7
        with pytest.raises(RuntimeError, match="expected 8:"):
            require_sparse(model, 8)
    with view(model, "all"):
        model.set_hire_scope("all", dense_prefix=99)
        model(torch.arange(3, 10)[None])
        with pytest.raises(InputError, match="layer 0 selected in no row"):
            require_sparse(model, 7)


def test_a_head_that_did_not_run_is_found(dense: Any) -> None:
    model = hire_model(dense, ffn=FFN, head={})
    with view(model, "all"):
        model(torch.arange(3, 10)[None])
        assert require_sparse(model, 7) == 7  # the head is not due
    with view(model, "decode"):
        ids = torch.arange(3, 10)[None]
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=300)
        assert require_sparse(model, 2) == 2
        model.get_output_embeddings().hire.counts.zero_()
        with pytest.raises(RuntimeError, match="head counted 0 rows"):
            require_sparse(model, 2)


def test_a_sparse_head_alone_counts_in_generated_tasks_only(dense: Any, tmp_path: Path) -> None:
    model = hire_model(dense, head={})
    tree = run_tasks(model, None, TOKENIZER, ["retrieval"], limit=2, max_length=1024)
    assert tree["tasks"]["retrieval"]["sparse_rows"] > 0
    path = write(tmp_path / "yes.jsonl", QUESTIONS)
    with pytest.raises(InputError, match="this checkpoint has none"):
        run_tasks(model, None, TOKENIZER, [str(path)])


# ---------------------------------------------------------------------------------- generated tasks


def test_decoding_is_greedy_cut_at_stops_and_graded(
    dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense.generation_config.repetition_penalty = 1.5  # what Qwen ships; it would forbid copying
    task = decoding.GeneratedTask(
        "copy", build_items("copy", TOKENIZER, num_items=2, max_length=2048)
    )
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(
        decoding, "grade", lambda item, text: seen.append((item.prompt, text)) or False
    )
    task.answer(dense, TOKENIZER, sparse=False, tick=lambda: None)
    dense.generation_config.repetition_penalty = 1.0
    assert len(seen) == 2
    for prompt, text in seen:
        ids = TOKENIZER(prompt, return_tensors="pt").input_ids
        for _ in range(5):
            ids = torch.cat([ids, dense(ids).logits[:, -1:].argmax(-1)], dim=1)
        plain = TOKENIZER.decode(ids[0, -5:].tolist())
        assert text == plain[: len(text)] if "\n" in plain else text.startswith(plain)


class Scripted:
    """Continues every prompt with given tokens; counts as a native model on a CPU."""

    def __init__(self, text: str, dense: Any) -> None:
        self.tokens = torch.tensor(TOKENIZER(text, add_special_tokens=False).input_ids)
        self.device, self.config = torch.device("cpu"), dense.config
        self.generation_config, self.steps = dense.generation_config, 0

    def generate(self, *, input_ids: Any, stopping_criteria: Any, **_: Any) -> torch.Tensor:
        for token in self.tokens:
            input_ids = torch.cat([input_ids, token.view(1, 1)], dim=1)
            self.steps += 1
            if stopping_criteria[0](input_ids, None).all():
                break
        return input_ids


@pytest.mark.parametrize(
    ("written", "answer", "steps"),
    [(" abc\nmore", " abc", 5), ("\nxy", "", 2), (" a<eos>bcd", " a", 3), (" abc", " abc", 4)],
)
def test_answers_end_at_a_stop_or_an_end_token(
    dense: Any, written: str, answer: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = build_items("copy", TOKENIZER, num_items=1, max_length=2048)[0]
    seen: list[str] = []
    monkeypatch.setattr(decoding, "grade", lambda item, text: seen.append(text) or True)
    scripted = Scripted(written, dense)
    task = decoding.GeneratedTask("copy", [item])
    assert task.answer(scripted, TOKENIZER, sparse=False, tick=lambda: None).score_N == [1.0]
    assert seen == [answer] and scripted.steps == steps


def test_a_model_that_copies_solves_copying(dense: Any) -> None:
    item = build_items("copy", TOKENIZER, num_items=1, max_length=2048)[0]
    right = Scripted(f" {item.expected}\n\nText: more", dense)
    task = decoding.GeneratedTask("copy", [item])
    assert task.answer(right, TOKENIZER, sparse=False, tick=lambda: None).score_N == [1.0]
    assert not grade(item, " something else")


# -------------------------------------------------------------------------------- likelihood tasks


def plain_score(model: Any, context: str, continuation: str) -> float:
    """The same figure from the model's own logits, looked up token by token."""
    ids = TOKENIZER(context + continuation).input_ids
    start = len(ids) - len(TOKENIZER(continuation, add_special_tokens=False).input_ids)
    log = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    return sum(float(log[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_scores_are_the_models_own(dense: Any) -> None:
    questions = [
        Question("0", "abc", (" de", " fgh", " i"), 0),
        Question("1", "a longer context", (" x", " y"), 1),
    ]
    scores, rows = score_continuations(dense, TOKENIZER, questions, False, lambda: None)
    assert rows == 0
    for question, found in zip(questions, scores, strict=True):
        for text, score in zip(question.continuations, found, strict=True):
            expected = plain_score(dense, question.context, text)
            assert score.log_likelihood == pytest.approx(expected, rel=1e-4)


def test_sparse_scores_differ_and_count_every_position(model: Any, dense: Any) -> None:
    questions = [Question("0", "some context", (" de", " fgh"), 0)]
    sparse, rows = score_continuations(model, TOKENIZER, questions, True, lambda: None)
    plain, _ = score_continuations(model, TOKENIZER, questions, False, lambda: None)
    assert sparse != plain
    bos = len(TOKENIZER("a").input_ids) - 1
    assert rows == sum(len("some context" + text) - 1 + bos for text in (" de", " fgh"))


def test_greedy_wants_every_token(dense: Any) -> None:
    questions, right = [], []
    for index in range(100):
        context = f"context {index}"
        ids = TOKENIZER(context, return_tensors="pt").input_ids
        best = TOKENIZER.decode(dense(ids).logits[0, -1].topk(2).indices.tolist())
        if best.isascii() and len(best) == 2:  # most bytes are no text by themselves
            questions += [Question(str(index), context, (text,), 0) for text in best]
            questions.append(Question(str(index), context, (best[0] + "qqq",), 0))
            right += [True, False, False]
    assert len(right) >= 9
    scores, _ = score_continuations(dense, TOKENIZER, questions, False, lambda: None)
    assert [found[0].greedy for found in scores] == right


def test_long_questions_keep_their_end(dense: Any) -> None:
    short = tiny_llama(max_position_embeddings=32).float().eval()
    long = [Question("0", "x" * 500 + " the end of the question is here", (" ab",), 0)]
    scores, _ = score_continuations(short, TOKENIZER, long, False, lambda: None)
    assert math.isfinite(scores[0][0].log_likelihood)


def test_one_pass_serves_all_one_token_continuations(
    dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = likelihood._score_batch
    monkeypatch.setattr(
        likelihood,
        "_score_batch",
        lambda m, batch, w: calls.append(len(batch)) or real(m, batch, w),
    )
    questions = [Question("0", "abc", ("d", "e", "f"), 0)]
    score_continuations(dense, TOKENIZER, questions, False, lambda: None)
    assert calls == [1]


def test_choices_are_weighed_as_the_metric_says(dense: Any) -> None:
    question = Question("0", "abc", (" a", " abcdefgh"), 1)
    raw = likelihood.LikelihoodTask("t", [question] * 2, "raw")
    per_character = likelihood.LikelihoodTask("t", [question] * 2, "per_character")
    found = [likelihood.Score(-3.0, False), likelihood.Score(-6.0, False)]
    assert not raw._right(question, found) and per_character._right(question, found)


def test_metrics_follow_from_the_choices(tmp_path: Path) -> None:
    varied = [{**row, "cont": [f" {i}", " b"]} for i, row in enumerate(QUESTIONS)]
    single = [{**row, "cont": [" b"], "gold": 0} for row in QUESTIONS]
    found = [read_task(write(tmp_path / "t.jsonl", rows)) for rows in (QUESTIONS, varied, single)]
    assert [task.metric for task in found] == ["raw", "per_character", "greedy"]
    assert found[0].name == "t" and found[0].num_items == 6


def test_a_limit_draws_with_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl.gz", QUESTIONS)
    drawn = [read_task(path, limit=3, seed=seed).questions for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert read_task(path, limit=99).num_items == 6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1]], "row 1: expected an object with a text `ctx`"),
        ([{**QUESTIONS[0], "cont": []}], "`gold` is 0, expected a place"),
        ([{**QUESTIONS[0], "cont": [1]}], "a list `cont` of texts"),
        ([{**QUESTIONS[0], "gold": 2}], "`gold` is 2, expected a place"),
        ([{**QUESTIONS[0], "gold": "0"}], "`gold` is '0'"),
        (QUESTIONS[:1], "1 questions"),
    ],
)
def test_rows_that_are_no_questions(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_task(write(tmp_path / "t.jsonl", rows))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl.gz", QUESTIONS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read as JSON lines"):
        read_task(path)
    (tmp_path / "u.jsonl").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON lines"):
        read_task(tmp_path / "u.jsonl")


def test_the_suite_is_all_its_tasks() -> None:
    found = harness.open_tasks(["suite"], TOKENIZER, limit=2, max_length=4096)
    assert [task.name for task in found] == ["copy", "retrieval", "json", "arithmetic", "python"]
    with pytest.raises(UsageError):
        harness.open_tasks(["suite", "json"], TOKENIZER, limit=2, max_length=4096)
