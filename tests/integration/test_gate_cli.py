"""`eval` through the command line: several texts, a baseline, and a gate that catches sabotage."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from hireconvert.inspection import check_checksums
from tests.cli import Cli
from tests.tiny_files import save_tiny
from tools.sabotage import SABOTAGES, spoiled

TOKENS = ("--tokens", "2048")
# What the tiny model keeps easily; a figure outside has a cause.
GATE = """
perplexity_increase: {max: 0.02, high: 0.2}
kl_mean: {max: 0.006}
kl_p99: {max: 0.03}
top1_agreement: {min: 0.75}
recall_mean: {min: 0.97}
recall_worst: {min: 0.97}
kept: {min: 0.49, max: 0.51}
head_top1_agreement: {min: 1.0}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hireconvert: Cli) -> Path:
    """A folder with a tiny model, its conversion and a gate."""
    root = tmp_path_factory.mktemp("gate")
    save_tiny(root / "dense")
    (root / "gate.yaml").write_text(GATE)
    ended = hireconvert("convert", root / "dense", root / "good", "-r", "tiny-ci")
    assert ended.code == 0, ended.err
    return root


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A cache of the test's own."""
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def judged(place: Path, folder: Path) -> tuple[str | Path, ...]:
    gate, dense = place / "gate.yaml", place / "dense"
    return ("eval", folder, "--baseline", dense, *TOKENS, "--gate", gate, "--json")


def test_the_gate_passes_on_the_good_checkpoint(
    place: Path, tmp_path: Path, hireconvert: Cli, environment: dict[str, str]
) -> None:
    junit = tmp_path / "gate.xml"
    ended = hireconvert(*judged(place, place / "good"), "--junit", junit, environment=environment)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["gate"]["passed"] and len(found["gate"]["checks"]) == 10
    assert all(each["found"] is not None for each in found["gate"]["checks"])
    (suite,) = ElementTree.parse(junit).getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("10", "0")


# What must be among the breaches, and what must not: the cause shows in the figures.
EXPECTED: dict[str, tuple[set[str], set[str]]] = {
    "predictor shuffled": ({"recall_mean", "recall_worst", "kl_mean"}, {"kept"}),
    "k halved": ({"kept", "kl_mean"}, set()),
    "one layer damaged": ({"kl_mean", "kl_p99", "top1_agreement"}, {"kept", "recall_mean"}),
    "sparse path disabled: keeps every neuron": ({"kept"}, {"kl_mean", "recall_mean"}),
    "sparse path disabled: no selection": ({"kept", "recall_mean", "kl_mean"}, set()),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_the_gate_catches_sabotage(
    place: Path, tmp_path: Path, hireconvert: Cli, environment: dict[str, str], name: str
) -> None:
    folder = spoiled(place / "good", tmp_path / "bad", name)
    assert check_checksums(folder) > 0  # it is the figures that tell
    junit = tmp_path / "gate.xml"
    ended = hireconvert(*judged(place, folder), "--junit", junit, environment=environment)
    assert ended.code == 3, ended.err
    result = json.loads(ended.out)
    breached = {each["limit"] for each in result["gate"]["checks"] if not each["passed"]}
    must, must_not = EXPECTED[name]
    assert must <= breached and not must_not & breached, ended.err
    for limit in breached:
        assert f"\n{limit} " in ended.err
    assert f"{len(breached)} of 10 limits of {place / 'gate.yaml'} were breached" in ended.err
    (suite,) = ElementTree.parse(junit).getroot()
    assert suite.attrib["failures"] == str(len(breached))


def test_a_disabled_sparse_path_is_named_as_not_measured(
    place: Path, tmp_path: Path, hireconvert: Cli, environment: dict[str, str]
) -> None:
    folder = spoiled(place / "good", tmp_path / "bad", "sparse path disabled: no selection")
    ended = hireconvert(*judged(place, folder), environment=environment)
    found = {each["limit"]: each["found"] for each in json.loads(ended.out)["gate"]["checks"]}
    assert found["kept"] is None and found["head_top1_agreement"] == 1.0
    assert "not measured" in ended.err


def test_a_predictor_that_overflows_is_refused(
    place: Path, tmp_path: Path, hireconvert: Cli, environment: dict[str, str]
) -> None:
    folder = Path(shutil.copytree(place / "good", tmp_path / "bad"))
    path = folder / "hire" / "predictors.safetensors"
    tensors = load_file(path)
    tensors["layers.0.bias"].fill_(3e38)  # no NaN and no inf in the file, but in its products
    save_file(tensors, path, {"format": "pt"})
    ended = hireconvert(*judged(place, folder), environment=environment)
    assert ended.code == 4 and "layer 0 selected in no row" in ended.err
    assert ended.out == "" and "Traceback" not in ended.err


def test_figures_are_the_same_with_and_without_the_cache(
    place: Path, hireconvert: Cli, environment: dict[str, str]
) -> None:
    found: list[Any] = []
    asked = ("--tasks", "retrieval", "--limit", "2", "--max-length", "512", "--json")
    for flags in ((), (), ("--no-cache",)):
        ended = hireconvert(
            *("eval", place / "good", "--baseline", place / "dense", *TOKENS, *asked, *flags),
            environment=environment,
        )
        assert ended.code == 0, ended.err
        result = json.loads(ended.out)
        del result["seconds"]
        found.append(result)
    for kind in ("texts", "tasks"):
        states = [next(iter(each[kind].values())).pop("baseline_cache") for each in found]
        assert states == ["stored", "hit", "off"]
    assert found[0] == found[1] == found[2]
    (text,) = found[0]["texts"].values()
    # The dense view is the model that was converted.
    assert text["dense"]["kl_mean"] < 1e-6 and text["increase"]["all"]["n"] == 2
    assert text["increase"]["all"]["low"] < text["increase"]["all"]["point"]


def test_each_text_has_figures_of_its_own(place: Path, tmp_path: Path, hireconvert: Cli) -> None:
    (tmp_path / "one.txt").write_text("Some words to be scored. " * 100)
    (tmp_path / "two.txt").write_text("def f(x): return x + 1\n" * 100)
    arguments = ("eval", place / "good", "--tokens", "256")
    texts = ("--text", tmp_path / "one.txt", "--text", tmp_path / "two.txt")
    ended = hireconvert(*arguments, *texts, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    one, two = result["texts"]["one.txt"], result["texts"]["two.txt"]
    assert one["text_sha256"] != two["text_sha256"]
    assert one["dense"]["perplexity"] != two["dense"]["perplexity"]
    assert one["increase"]["all"] == {
        "point": one["all"]["perplexity"] / one["baseline_perplexity"] - 1,
        **{"low": None, "high": None, "n": 1},  # one window has no interval
    }
    assert result["baseline"] == {"source": "own dense view", "fingerprint": None}
    assert result["checkpoint"]["recipe"] == "tiny-ci"
    assert str(tmp_path) not in ended.out
    ended = hireconvert(*arguments, *texts)
    assert "one.txt" in ended.out and "two.txt" in ended.out and "neurons kept" in ended.out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "one.txt").write_text("x")
    ended = hireconvert(*arguments, *texts, "--text", tmp_path / "other" / "one.txt")
    assert ended.code == 2 and "two texts are called one.txt" in ended.err


def test_tasks_are_held_to_their_limits(place: Path, hireconvert: Cli, tmp_path: Path) -> None:
    rows = [
        {"id": number, "ctx": f"{number} and then", "cont": [" this", " that!"], "gold": number % 2}
        for number in range(6)
    ]
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "gate.yaml").write_text(
        "tasks: {choice: {low: -1.0}, absent: {min: -1.0}}\n"
        "tasks_mean: {kind: likelihood, min: -1.0}\n"
    )
    arguments = ("eval", place / "good", "--tokens", "64", "--gate", tmp_path / "gate.yaml")
    tasks = ("--tasks", tmp_path / "choice.jsonl", "--limit", "4", "--max-length", "400")
    ended = hireconvert(*arguments, *tasks, "--json")
    assert ended.code == 3, ended.err
    result = json.loads(ended.out)
    assert result["tasks"]["choice"]["num_items"] == 4
    assert result["tasks"]["choice"]["sparse_rows"] > 0
    found = {each["limit"]: each["passed"] for each in result["gate"]["checks"]}
    assert found == {
        "tasks.choice.low": True,
        "tasks.absent.min": False,
        "tasks_mean.min": True,
        "dense_rows": True,
    }
    ended = hireconvert(*arguments, *tasks)
    assert "choice" in ended.out and "3 of 4 limits kept" in ended.out
    ended = hireconvert("eval", place / "good", "--tasks", "nonsense", "--max-length", "400")
    assert ended.code == 2 and "nonsense" in ended.err


def test_speed_is_measured_when_asked(place: Path, hireconvert: Cli, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("speed_ratio: {min: 1000}\n")
    arguments = ("eval", place / "good", "--tokens", "128", "--gate", tmp_path / "gate.yaml")
    ended = hireconvert(*arguments)
    assert ended.code == 3 and "not measured" in ended.err
    ended = hireconvert(*arguments, "--speed", "--json")
    speed = json.loads(ended.out)["speed"]
    assert ended.code == 3 and "not measured" not in ended.err
    assert speed["ratio"] == speed["dense"]["median_ms"] / speed["converted"]["median_ms"]


def test_a_baseline_that_reads_other_tokens(place: Path, tmp_path: Path, hireconvert: Cli) -> None:
    other = save_tiny(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = hireconvert("eval", place / "good", "--baseline", other, "--tokens", "64")
    assert ended.code == 4 and "other tokens" in ended.err and ended.out == ""


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--junit", "x.xml"), 2, "--gate"),
        (("--gate", "gate.yaml", "--junit", "."), 2, "it is a folder"),
        (("--gate", "gate.yaml", "--junit", "absent/x.xml"), 2, "absent is no folder"),
        (("--gate", "absent.yaml"), 2, "absent.yaml: the gate cannot be read"),
        (("--baseline", "no/such/model"), 4, "does not exist"),
        (("--baseline", "GOOD"), 4, "already converted"),
        (("--baseline", "OTHER"), 4, "vocabulary"),
    ],
)
def test_mistakes_are_told_before_anything_slow(
    place: Path, tmp_path: Path, hireconvert: Cli, flags: tuple[str, ...], code: int, message: str
) -> None:
    save_tiny(tmp_path / "other", vocab_size=300)
    names = {"GOOD": str(place / "good"), "OTHER": str(tmp_path / "other")}
    ended = hireconvert("eval", place / "good", *(names.get(flag, flag) for flag in flags))
    assert ended.code == code and message in ended.err, ended.err
    assert ended.out == "" and "evaluation" not in ended.err
