"""`bench` through the command line on a tiny model, a fake llama.cpp beside it."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hireconvert import render_bench
from hireconvert.bench import USUAL_SAMPLING, sampling_settings
from tests.cli import Cli, Ended
from tests.fake_llama import install
from tests.tiny_files import save_tiny

QUICK = ("--threads", "1", "--tokens", "3", "--rounds", "1", "--context", "8", "--no-compile")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hireconvert: Cli) -> Path:
    """A folder with a tiny model, its conversion, a program and GGUF files for it."""
    root = tmp_path_factory.mktemp("bench")
    save_tiny(root / "dense")
    ended = hireconvert("convert", root / "dense", root / "out", "-r", "tiny-ci")
    assert ended.code == 0, ended.err
    install(root)
    for name in ("tiny", "small", "crash"):
        (root / f"{name}.gguf").write_text("")
    return root


def run(hireconvert: Cli, place: Path, *arguments: str | Path) -> Ended:
    environment = {"HIRE_LLAMA": str(place / "llama_rival"), "XDG_CACHE_HOME": str(place)}
    return hireconvert("bench", *arguments, environment=environment)


@pytest.fixture(scope="module")
def measured(place: Path, hireconvert: Cli) -> dict[str, Any]:
    """Everything that one run tells, and its plot in `place`."""
    more = ("--context", "16", "--batch", "1", "--batch", "2", "--kl-tokens", "24", "--json")
    files = ("--rival", place / "tiny.gguf", "--plot", place / "speed.svg")
    ended = run(hireconvert, place, place / "out", *QUICK, *more, *files)
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_every_arm_is_timed_and_compared(measured: dict[str, Any]) -> None:
    arms = {arm["name"]: arm for arm in measured["arms"]}
    sparse = {"converted, nothing sparse", "converted, head", "converted, FFN", "converted"}
    assert sparse | {"dense", "llama.cpp tiny"} <= set(arms)
    for arm in arms.values():
        assert 0 < arm["ms"]["low_ms"] <= arm["ms"]["median_ms"] <= arm["ms"]["high_ms"]
        assert arm["bytes_per_token"] > 0 and arm["rounds"] == 1 and arm["kl"] >= 0
    assert arms["dense"]["kl"] == arms["converted, nothing sparse"]["kl"] == 0
    assert arms["converted"]["kl"] > 0 and arms["llama.cpp tiny"]["kl"] > 0
    assert arms["llama.cpp tiny"]["ms"]["median_ms"] == 4.0
    read = [arms[name]["bytes_per_token"] for name in ("dense", "converted, FFN", "converted")]
    assert read == sorted(read, reverse=True)


def test_what_bytes_allow_and_what_a_token_is_made_of(measured: dict[str, Any]) -> None:
    for bound in measured["byte_bound"].values():
        assert bound["ratio"] > 1
        assert bound["share"] == pytest.approx(bound["reached"] / bound["ratio"])
    assert measured["machine"]["stream"]["gb_per_s"] > 0
    for part in measured["breakdown"].values():
        whole = part["ffn_ms"] + part["head_ms"] + part["rest_ms"]
        assert whole == pytest.approx(part["token_ms"])


def test_sampling_is_timed_with_the_settings_of_the_folder(
    measured: dict[str, Any], place: Path
) -> None:
    found = measured["sampling"]
    assert set(found["ms"]) == {"dense", "converted"} and min(found["ms"].values()) > 0
    assert found["own"] is False and found["settings"] == USUAL_SAMPLING
    own = {"do_sample": True, "top_k": 20, "repetition_penalty": 1.1}
    (place / "own").mkdir()
    (place / "own" / "generation_config.json").write_text(json.dumps(own))
    settings, is_own = sampling_settings(place / "own")
    assert is_own and settings.items() >= {"top_k": 20, "repetition_penalty": 1.1}.items()
    assert sampling_settings(place) == (USUAL_SAMPLING, False)
    line = (
        "sampled with the folder's own settings (top_k 20): dense 3.00, converted 1.25 ms a token"
    )
    shown = {"settings": {"top_k": 20}, "own": True, "ms": {"dense": 3, "converted": 1.25}}
    assert render_bench.sampling(shown) == line


def test_a_generation_config_of_ones_own_does_not_stop_greedy_timing(
    place: Path, hireconvert: Cli
) -> None:
    """A penalty takes the head's certificate away, and greedy tokens are to be timed."""
    folder = Path(shutil.copytree(place / "out", place / "penalty"))
    given = {"do_sample": True, "top_k": 9, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
    (folder / "generation_config.json").write_text(json.dumps(given))
    ended = run(hireconvert, place, folder, *QUICK, "--kl-tokens", "0", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["sampling"]
    assert found["own"] and found["settings"]["repetition_penalty"] == 1.1


def test_growth_memory_and_settings(measured: dict[str, Any]) -> None:
    places = [(row["context"], row["batch"]) for row in measured["growth"]]
    assert places == [(8, 1), (16, 1), (8, 2)]
    assert all(set(row["ms"]) >= {"dense", "converted"} for row in measured["growth"])
    subjects = {each["name"]: each for each in measured["subjects"]}
    assert subjects["converted"]["load_ms"] > 0 and subjects["converted"]["resident"] > 0
    assert measured["settings"]["dtype"] == "bfloat16" and measured["skipped"] == {}


def test_rows_at_which_dense_overtakes_are_measured_once(
    place: Path, measured: dict[str, Any], hireconvert: Cli
) -> None:
    found = measured["overtaking"]
    assert found["rows"] == [1, 2, 4, 8, 16, 32] and found["context"] == 8
    for times in found["ms"].values():
        assert [len(times[name]) for name in ("dense", "converted")] == [6, 6]
        assert all(each > 0 for name in times for each in times[name])
    assert set(found["from_rows"]) == {"positions", "sequences"}
    assert found["cache"] == "stored" and Path(found["path"]).is_relative_to(place / "hireconvert")
    again = run(hireconvert, place, place / "out", *QUICK, "--kl-tokens", "0", "--json")
    assert again.code == 0, again.err
    kept = json.loads(again.out)["overtaking"]
    assert kept["cache"] == "hit" and kept["ms"] == found["ms"] and kept["path"] == found["path"]


def test_the_plot_is_drawn(place: Path, measured: dict[str, Any]) -> None:
    assert (place / "speed.svg").read_text().count("<svg") == 1


def test_the_table_is_for_people(measured: dict[str, Any]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_bench.bench({**measured, "skipped": {"x": "why"}}))
    text = console.export_text()
    for words in ("bytes bound the gain over 'dense'", "dense overtakes", "left out: x (why)"):
        assert words in text
    assert all(arm["name"] in text for arm in measured["arms"])


def test_mistakes_end_with_one_message(place: Path, tmp_path: Path, hireconvert: Cli) -> None:
    out, rival = place / "out", place / "tiny.gguf"
    empty = {"HIRE_LLAMA": "", "XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}
    cases: list[tuple[int, str, Ended]] = [
        (2, "--plot", run(hireconvert, place, out, "--plot", tmp_path / "x.png")),
        (2, "int8", run(hireconvert, place, out, "--dtype", "int8")),
        (2, "--batch", run(hireconvert, place, out, "--batch", "0")),
        (4, "no GGUF file", run(hireconvert, place, out, "--rival", tmp_path / "x.gguf")),
        (4, "config.json", run(hireconvert, place, tmp_path)),
        (4, "cannot be read", run(hireconvert, place, out, "--text", tmp_path / "none.txt")),
        (4, "fetch_llama.py", hireconvert("bench", out, "--rival", rival, environment=empty)),
    ]
    for code, words, ended in cases:
        assert ended.code == code and words in ended.err, (words, ended)
        assert ended.out == "" and "Traceback" not in ended.err


@pytest.mark.parametrize(("name", "words"), [("crash", "no more memory"), ("small", "vocabulary")])
def test_a_rival_that_fails_is_named(place: Path, hireconvert: Cli, name: str, words: str) -> None:
    quality = ("--kl-tokens", "24")
    ended = run(
        hireconvert, place, place / "out", *QUICK, *quality, "--rival", place / f"{name}.gguf"
    )
    assert ended.code == 4 and words in ended.err and name in ended.err, ended
    assert ended.out == "" and "Traceback" not in ended.err
