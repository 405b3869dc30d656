"""Parts of the bench: rounds, workers, rivals, bytes, tables; figures checked by hand."""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import frontier
from hireconvert import crossover, render_bench
from hireconvert.accounting import token_bytes
from hireconvert.arms import (
    MOST_REPEATS,
    Arm,
    Load,
    Reference,
    fastest_threads,
    medians_at,
    one_round,
    run_rounds,
    warm_up,
)
from hireconvert.bench import check_request
from hireconvert.errors import InputError, UsageError
from hireconvert.plots import SpeedPoint, quality_against_speed
from hireconvert.roofline import cache_bytes, counts_at, measure_stream, way_bytes
from hireconvert.session import Request, Session, stored_dtype
from hireconvert.subjects import LlamaSubject, Way, find_program
from hireconvert.timing import Trace
from hireconvert.workers import Worker
from tests.fake_llama import install
from tests.tiny import head_spec

LOAD = Load((1, 2, 3), 1, 4)


class Scripted:
    """A subject whose runs take what a list says, and whose logits are given."""

    threads = 1

    def __init__(self, name: str, log: list[str], runs: Sequence[Sequence[float]]) -> None:
        self.name, self.log, self.runs = name, log, [tuple(run) for run in runs]
        self.facts: dict[str, Any] = {"load_ms": 1.0}
        self.table_TV = torch.zeros(2, 3)

    def decode(self, way: Way, ids_T: Sequence[int], *, batch: int, num_tokens: int) -> Trace:
        self.log.append(self.name)
        run = self.runs.pop(0) if len(self.runs) > 1 else self.runs[0]
        return Trace(10.0, run)

    def logits(self, way: Way, ids_T: Sequence[int], path: Path) -> torch.Tensor:
        self.table_TV.numpy().tofile(path)
        return self.table_TV


def arm(name: str, log: list[str], *runs: Sequence[float]) -> Arm:
    return Arm(name, Scripted(name, log, runs or [(1.0, 1.0)]), Way(), 1000)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- rounds


def test_spread_leaves_out_a_tenth_at_both_ends() -> None:
    steady = [1.0] * 18 + [0.5, 9.0]
    assert Trace(1.0, tuple(steady)).spread == 1.0
    assert Trace(1.0, tuple([1.0] * 10 + [3.0] * 10)).spread == 3.0
    assert Trace(1.0, (4.0, 1.0, 2.0)).median_ms == 2.0


def test_a_round_is_run_again_by_all_arms_while_one_spreads() -> None:
    log: list[str] = []
    wild, calm = arm("wild", log, (1.0, 9.0), (2.0, 2.1)), arm("calm", log, (5.0, 5.0), (6.0, 7.0))
    traces, unsteady = one_round([wild, calm], LOAD)
    assert log == ["wild", "calm"] * 2 and not unsteady
    assert traces["wild"].token_ms == (2.0, 2.1)
    assert traces["calm"].token_ms == (5.0, 5.0)  # the steadier of its two


def test_a_round_that_stays_unsteady_counts_and_is_marked() -> None:
    log: list[str] = []
    wild = arm("wild", log, (1.0, 9.0))
    run_rounds([wild], LOAD, rounds=2, tick=lambda detail: None)
    assert wild.unsteady == 2 and wild.medians == [5.0, 5.0] and wild.median_ms == 5.0
    assert len(log) == 2 + 2 * (1 + MOST_REPEATS)


def test_warming_up_ends_when_two_runs_agree() -> None:
    log: list[str] = []
    warm_up(arm("settles", log, (9.0, 9.0), (3.0, 3.0), (3.1, 3.1), (3.0, 3.0)), LOAD)
    assert len(log) == 3
    log.clear()
    warm_up(arm("never", log, *[(3.0**power,) * 2 for power in range(9)]), LOAD)
    assert len(log) == 4


def test_growth_leaves_the_main_figures_alone() -> None:
    each = arm("a", [], (2.0, 2.0))
    assert medians_at([each], LOAD, rounds=3) == {"a": 2.0} and each.medians == []


# --------------------------------------------------------------------------- quality


def test_divergence_by_hand() -> None:
    original, other = arm("original", []), arm("other", [])
    p_TV = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    q_TV = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    original.subject.table_TV, other.subject.table_TV = p_TV.log(), q_TV.log()  # type: ignore[union-attr]
    with Reference(original, torch.tensor([[1, 2], [3, 4]])) as reference:
        reference.compare(other)
        reference.compare(original)
    expected = (0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2  # the second position is equal
    assert other.kl == pytest.approx(expected, rel=1e-5) and other.top1 == 0.5
    assert original.kl == pytest.approx(0, abs=1e-7) and original.top1 == 1.0


def test_logits_of_minus_infinity_have_no_divergence() -> None:
    original, other = arm("original", []), arm("other", [])
    other.subject.table_TV = torch.tensor([[0.0, 0.0, -math.inf]] * 2)  # type: ignore[union-attr]
    with Reference(original, torch.tensor([[1, 2]])) as reference:
        reference.compare(other)
    assert other.kl is None and other.top1 == 1.0


def test_another_vocabulary_is_refused() -> None:
    original, other = arm("original", []), arm("other", [])
    other.subject.table_TV = torch.zeros(2, 4)  # type: ignore[union-attr]
    with Reference(original, torch.tensor([[1, 2]])) as reference, pytest.raises(InputError) as e:
        reference.compare(other)
    assert "vocabulary of 4 tokens, expected 3" in str(e.value)


# --------------------------------------------------------------------------- workers and rivals


def worker(code: str, **options: Any) -> Worker:
    return Worker("it", [sys.executable, "-S", "-c", code], environment={}, **options)


def test_a_worker_answers_until_it_dies_and_says_how() -> None:
    code = "print('{}', flush=True); input(); print('{\"a\": 1}', flush=True); input(); 1 / 0"
    with worker(code) as it:
        assert it.facts == {} and it.ask("x") == {"a": 1}
        with pytest.raises(InputError, match="exit status 1: ZeroDivisionError"):
            it.ask("y")
        with pytest.raises(InputError, match="process ended"):
            it.ask("z")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('[1]')", "not JSON"),
        ('print(\'{"error": "no memory"}\')', "it: no memory"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9, without a word"),
    ],
)
def test_a_worker_that_does_not_start(code: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        worker(code)


def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be run"):
        Worker("it", [str(tmp_path / "file")], environment={})


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIRE_LLAMA", str(install(tmp_path)))
    return tmp_path


def test_a_rival_decodes_and_finds_its_threads(program: Path) -> None:
    with LlamaSubject("tiny", program / "tiny.gguf", threads=1) as subject:
        assert subject.facts["bytes_per_token"] == 5000
        trace = subject.decode(Way(), [1, 2], batch=1, num_tokens=4)
        assert trace == Trace(1.0, (4.0, 4.0, 4.0))
        fastest_threads(subject, [1, 2], 2)
        assert subject.threads == 2
        assert subject.logits(Way(), [1, 2], program / "l").shape == (2, 259)
        assert subject.memory() == {"before": 0, "resident": 1000, "peak": 2000}


@pytest.mark.parametrize(
    ("name", "message"), [("broken", "cannot load this file"), ("chatty", "not JSON")]
)
def test_a_rival_that_does_not_load(program: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LlamaSubject(name, program / f"{name}.gguf", threads=1)


def test_a_rival_that_dies(program: Path) -> None:
    with (
        LlamaSubject("crash", program / "crash.gguf", threads=1) as subject,
        pytest.raises(InputError, match=r"crash: .*exit status 1: no more memory"),
    ):
        subject.decode(Way(), [1], batch=1, num_tokens=3)


def test_without_the_program_the_message_names_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HIRE_LLAMA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"benchmarks/fetch_llama\.py"):
        find_program()
    monkeypatch.setenv("HIRE_LLAMA", str(tmp_path / "gone"))
    with pytest.raises(InputError, match="no file"):
        find_program()
    monkeypatch.delenv("HIRE_LLAMA")
    fetched = tmp_path / "hireconvert" / "llama"
    fetched.mkdir(parents=True)
    program = install(fetched)
    assert find_program() == program


def test_rivals_are_checked_before_anything_runs(program: Path) -> None:
    for folder in ("a", "b"):
        (program / folder).mkdir()
        (program / folder / "x.gguf").write_text("")
    with pytest.raises(UsageError, match="one name"):
        check_request(Request(rivals=(program / "a" / "x.gguf", program / "b" / "x.gguf")))
    with pytest.raises(InputError, match="no GGUF file"):
        check_request(Request(rivals=(program / "gone.gguf",)))
    with pytest.raises(UsageError, match="int8"):
        check_request(Request(dtype="int8"))
    check_request(Request(rivals=(program / "a" / "x.gguf",), dtype="float32"))


# --------------------------------------------------------------------------- bytes


def test_the_largest_cache_is_read(tmp_path: Path) -> None:
    for name, text in {"index0": "48K\n", "index3": "64M\n", "index4": "what\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(text)
    assert cache_bytes(str(tmp_path)) == 64 * 2**20
    assert cache_bytes(str(tmp_path / "none")) == 32 * 2**20


def test_streaming_restores_the_threads() -> None:
    before = torch.get_num_threads()
    stream = measure_stream(2**22, before + 1)
    assert stream.gb_per_s > 0 and stream.num_bytes == 2**22
    assert torch.get_num_threads() == before


def test_counts_at_another_share_keep_the_over_selection() -> None:
    layer = {"num_neurons": 100, "num_kept": 40, "num_candidates": 50}
    assert counts_at(layer, 0.2) == {"num_kept": 20, "num_candidates": 25}
    assert counts_at(layer, 0.9) == {"num_kept": 90, "num_candidates": 100}
    assert counts_at(layer, 0.001) == {"num_kept": 1, "num_candidates": 1}
    assert counts_at(layer, 1.0) == {"num_kept": 100, "num_candidates": 100}


def test_a_share_of_copied_neurons_reads_the_weights() -> None:
    layer = {"num_neurons": 100, "num_kept": 100, "num_candidates": 100, "rows": "copies"}
    counts = {"num_kept": 20, "num_candidates": 20, "rows": "stored"}
    assert counts_at(layer, 0.2) == counts
    assert counts_at(layer, 1.0) == {**counts, "num_kept": 100, "num_candidates": 100}


class Config:
    hidden_size, vocab_size = 32, 64


def hire() -> dict[str, Any]:
    predictor = {"kind": "q", "bits": 4, "block": 16, "symmetric": True, "rank": None}
    predictor |= {"factor_bits": 16, "num_inputs": 32, "groups": False}
    layer = {"num_neurons": 96, "num_kept": 48, "num_candidates": 48, "group_size": 1}
    layer |= {"num_common": 0, "score": "norm", "keep": "top_k", "predictor": predictor}
    return {"ffn": {"layers": [layer, None]}, "head": head_spec(), "layout": {"gate": "g"}}


def test_bytes_of_every_way_are_those_of_the_accounting() -> None:
    tensors: Any = {
        "model.embed_tokens.weight": ("F32", (64, 32)),
        "model.layers.0.mlp.up_proj.weight": ("F32", (96, 32)),
        "model.layers.0.mlp.gate_proj.weight": ("F32", (96, 32)),
        "model.layers.0.mlp.down_proj.weight": ("F32", (32, 96)),
    }
    halves: Any = {name: ("BF16", shape) for name, (_, shape) in tensors.items()}
    found = token_bytes(hire(), halves, Config)

    def read(way: Way) -> int:
        return way_bytes(hire(), tensors, Config, way, dtype="bfloat16")

    assert read(Way()) == found["dense"] == 2 * (64 * 32 + 3 * 96 * 32)
    assert read(Way(ffn=True, head=True)) == found["converted"]
    saved = found["ffn"]["dense"] - found["ffn"]["converted"]
    assert read(Way(ffn=True)) == found["dense"] - saved
    assert read(Way(ffn=True, keep=0.5)) == read(Way(ffn=True))
    assert read(Way(ffn=True, keep=1.0)) == found["dense"]
    # A neuron more or less is one row of gate, up and down in bfloat16.
    assert read(Way(ffn=True, keep=0.25)) == read(Way(ffn=True)) - 24 * 3 * 32 * 2
    assert read(Way(head=True, head_spec=head_spec(certify_top=8))) > read(Way(head=True))
    assert way_bytes(hire(), tensors, Config, Way(), dtype="float32") == 2 * read(Way())
    assert stored_dtype(tensors) == "float32" and stored_dtype(halves) == "bfloat16"


@pytest.mark.parametrize("step", [False, True])
def test_the_arms_of_what_is_sparse(tmp_path: Path, step: bool) -> None:
    def names(**parts: Any) -> dict[str, Way]:
        session = Session(
            folder=tmp_path,
            dense=tmp_path,
            request=Request(),
            dtype="float32",
            threads=1,
            hire={**hire(), **parts},
            tensors={},
            text_config=Config,
        )
        return session.ways(step)

    assert len(names()) == 4 and len(names(ffn=None)) == len(names(head=None)) == 2
    dense = names()["converted, nothing sparse"]
    # Through the kernels where they run whole steps, else as Transformers runs the dense model.
    assert dense == (Way(ffn=True, keep=1.0) if step else Way())
    assert names()["converted"] == Way(ffn=True, head=True)
    assert names(ffn=None)["converted"] == Way(ffn=True, head=True)
    assert names(head=None)["converted"] == Way(ffn=True)


# --------------------------------------------------------------------------- tables


def test_where_dense_overtakes() -> None:
    rows: Any = [{"context": 64, "batch": n, "ms": {"dense": 4, "converted": n}} for n in (1, 4)]
    assert render_bench.overtaking(rows) == "dense overtakes at context 64, batch 4"
    assert "none" in render_bench.overtaking(rows[:1])


class Steps:
    """A subject whose step takes a part for the call and a part for each row."""

    def __init__(self, log: list[tuple[str, int]], once: float, each: float) -> None:
        self.log, self.once, self.each = log, once, each

    def step_ms(self, way: Way, ids_T: Sequence[int], *, rows: int, kind: str) -> float:
        self.log.append((kind, rows))
        return self.once + rows * self.each * (2 if kind == "sequences" and way.ffn else 1)


def test_rows_from_which_on_dense_is_faster() -> None:
    log: list[tuple[str, int]] = []
    dense, converted = Steps(log, 32.5, 1.0), Steps(log, 3.0, 3.0)
    found = crossover.measure(dense, converted, Way(ffn=True), (1, 2, 3))  # type: ignore[arg-type]
    assert found["rows"] == [1, 2, 4, 8, 16, 32] and found["context"] == 3
    assert found["ms"]["positions"]["dense"] == [33.5, 34.5, 36.5, 40.5, 48.5, 64.5]
    assert found["ms"]["sequences"]["converted"] == [9, 15, 27, 51, 99, 195]
    assert found["from_rows"] == {"positions": 16, "sequences": 8}
    assert crossover.most_sparse_rows(found) == 4
    assert log[:2] == [("positions", 1)] * 2  # the two take turns


@pytest.mark.parametrize(
    ("dense", "first", "most"),
    [((9, 9, 9), None, 4), ((1, 9, 1), 4, 2), ((1, 1, 1), 1, 1), ((9, 5, 1), 2, 1)],
)
def test_dense_must_stay_faster_to_have_overtaken(
    dense: Sequence[float], first: int | None, most: int
) -> None:
    times = {"dense": dense, "converted": (5, 5, 5)}
    assert crossover.overtaken_from((1, 2, 4), times) == first
    ends = {"positions": first, "sequences": None}
    assert crossover.most_sparse_rows({"rows": [1, 2, 4], "from_rows": ends}) == most


def test_a_finding_is_kept_by_machine_and_checkpoint(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"rows": [1], "from_rows": {}}

    cache, key = tmp_path / "cache", {"processor": "a", "threads": 1}
    first = crossover.kept(cache, key, compute)
    assert first["cache"] == "stored" and crossover.kept(cache, key, compute)["cache"] == "hit"
    assert len(calls) == 1
    crossover.kept(cache, {**key, "threads": 2}, compute)
    assert len(calls) == 2
    path = Path(first["path"])
    for damaged in ("", "[]", "{}", path.read_text().replace('"rows"', '"lines"'), "\0"):
        path.write_text(damaged)
        assert crossover.kept(cache, key, compute)["cache"] == "stored"
    (tmp_path / "file").write_text("")
    found = crossover.kept(tmp_path / "file", key, compute)
    assert found["cache"] == "could not be written" and found["rows"] == [1]


def test_what_is_said_of_rows() -> None:
    found: dict[str, Any] = {"rows": [1, 32], "from_rows": {"positions": None, "sequences": 32}}
    found |= {"fastest_up_to": 1, "max_sparse_rows": 32, "cache": "hit", "path": "P"}
    text = render_bench.rows_advice(found)
    assert "overtakes at no number up to 32 rows (positions)" in text
    assert "overtakes at 32 rows (sequences)" in text and "decode.max_sparse_rows" in text
    assert "decode.max_sparse_rows" not in render_bench.rows_advice({**found, "fastest_up_to": 32})


@pytest.mark.parametrize("kl", [None, 0.0])
def test_the_plot_is_the_same_for_the_same_figures(kl: float | None) -> None:
    points = [SpeedPoint("a", "s", True, 5.0, 1e8, kl), SpeedPoint("b", "t", False, 1e12, 2e8, kl)]
    first = quality_against_speed(points, 14.0)
    assert first == quality_against_speed(points, 14.0)
    assert first.count("<svg") == 1 and re.search("</svg>", first)


# --------------------------------------------------------------------------- the frontier


def filled(path: Path) -> frontier.Store:
    store = frontier.Store(
        path,
        {"threads": 1, "dtype": "float32", "context": 4, "num_tokens": 8, "kl_tokens": 9}
        | {"text": "t"},
    )
    figures = {
        "ours out: keep 0.5, head dense": (4.0, 0.01),
        "llama.cpp m.Q8_0": (6.0, 0.005),
        "llama.cpp m.Q6_K": (5.0, 0.009),
        "llama.cpp m.Q4_0": (3.0, 0.3),
    }
    for name, (_, kl) in figures.items():
        store.add("arm", {"name": name, "bytes": 10**8, "threads": 1})
        store.add("quality", {"name": name, "kl": kl, "top1": 0.9})
    for factor in (1.0, 1.1, 0.9):
        ms = {name: factor * each[0] for name, each in figures.items()}
        store.add("round", {"ms": ms, "unsteady": ["llama.cpp m.Q4_0"]})
    stream = {"gb_per_s": 50.0, "num_bytes": 10**9}
    facts = {"processor": "p", "torch": "2", "transformers": "5"}
    store.add("machine", {**facts, "stream": stream})
    return store


def test_the_frontier_compares_with_the_fastest_rival_that_is_no_worse(tmp_path: Path) -> None:
    store = filled(tmp_path / "x.jsonl")
    rows = frontier.points(store)
    assert [row["ms"] for row in rows] == [3.0, 4.0, 5.0, 6.0]
    ours = next(row for row in rows if row["name"].startswith("ours"))
    assert frontier.rival_of(ours, rows)["name"] == "llama.cpp m.Q6_K"
    assert ours["rate"] == pytest.approx(25.0) and ours["roofline"] == pytest.approx(0.5)
    lines = {line.split(" | ")[0]: line for line in frontier.table(rows, store).splitlines()}
    assert "1.25 (Q6_K)" in lines["| ours out: keep 0.5, head dense"]
    assert "2.70-3.30 (3 unsteady)" in lines["| llama.cpp m.Q4_0"]
    assert frontier.draw(rows, store).count("<svg") == 1


def test_the_frontier_goes_on_where_it_stopped_and_refuses_other_settings(tmp_path: Path) -> None:
    store = filled(tmp_path / "x.jsonl")
    again = filled(tmp_path / "x.jsonl")
    assert len(again.rows) == 2 * len(store.rows) - 1
    again.add("round", {"ms": {"llama.cpp m.Q8_0": 7.0, "llama.cpp m.Q4_0": 2.0}, "unsteady": []})
    assert len(frontier.points(again)) == 2  # what the last round ran, over the rounds that did
    assert len(frontier.common_rounds(again)) == 7
    assert len(frontier.Store(tmp_path / "x.jsonl", None).rows) == len(again.rows)
    with pytest.raises(SystemExit, match="no round"):
        frontier.common_rounds(frontier.Store(tmp_path / "empty.jsonl", {}))
    with pytest.raises(SystemExit, match="another way"):
        frontier.Store(tmp_path / "x.jsonl", {"threads": 2})


def test_the_document_is_rewritten_between_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("# Performance\n\nwords\n")
    frontier.replace_between_marks(document, "a", "old \\1\n")
    frontier.replace_between_marks(document, "b", "other\n")
    frontier.replace_between_marks(document, "a", "new \\1\n")
    text = document.read_text()
    assert "words" in text and "other" in text and "old" not in text and text.count("new \\1") == 1
    assert text.index("new") < text.index("other")


def test_the_ways_of_the_frontier() -> None:
    ways = frontier.our_ways([0.5, 0.1], ["dense", "int8", "own"], False)
    assert len(ways) == 4
    assert ways["keep 0.1, head int8"].head_spec == frontier.HEADS["int8"]
    assert not ways["keep 0.1, head dense"].head
    own = frontier.our_ways([1.0], ["own"], True)["keep 1, head own"]
    assert own.head and own.head_spec is None
    copies = frontier.our_ways([None], ["own"], True)["copies, head own"]
    assert copies.ffn and copies.keep is None
    assert frontier.short_name("ours out: copies, head own") == "copies"
    assert frontier.short_name("ours out: keep 0.1, head int8") == "0.1"
    name = "ours out: keep 0.1, head int8"
    assert frontier.series(name) == "hireconvert out, head int8"
    assert frontier.short_name(name) == "0.1"
    assert frontier.short_name("llama.cpp m.Q4_0") == "Q4_0"
