"""Budgets and --auto on the command line, on tiny models: what they choose, write and refuse."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hireconvert.auto import CANDIDATES, rounded
from tests.cli import Cli, contents, is_complete
from tests.tiny_files import save_tiny

SEARCH = (
    *("--set", "ffn.budget.mode=search", "--set", "ffn.budget.step=0.1"),
    *("--set", "ffn.over_select=1.0", "--set", "ffn.budget.sweeps=3"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of four layers, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    text = "\n\n\n".join(f"Note {n}: the quick brown fox, {n * 7} times." for n in range(200))
    (folder / "notes.txt").write_text(text)
    model = save_tiny(folder / "model", num_hidden_layers=4)
    return {"model": str(model), "data": f"data.source={folder / 'notes.txt'}"}


@pytest.fixture(scope="module", params=["greedy", "second_order"])
def searched(
    request: pytest.FixtureRequest,
    hireconvert: Cli,
    inputs: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """One conversion with a search: its folder, arguments and file events."""
    folder = tmp_path_factory.mktemp("searched")
    out, log = folder / "out", folder / "events.json"
    method = ("--set", f"ffn.budget.method={request.param}")
    arguments = ("-r", "tiny-ci", "--set", inputs["data"], *SEARCH, *method)
    hooks = [["log_events", str(out), str(log)]]
    ended = hireconvert("convert", inputs["model"], out, *arguments, hooks=hooks)
    assert ended.code == 0, ended.err
    events = [
        (event, str(Path(path).relative_to(folder))) for event, path in json.loads(log.read_text())
    ]
    return {"out": out, "arguments": arguments, "events": events, "err": ended.err}


def test_the_list_found_is_in_the_recipe_the_config_and_the_report(
    searched: dict[str, Any],
) -> None:
    out = searched["out"]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    report = json.loads((out / "hire_report.json").read_text())
    config = json.loads((out / "config.json").read_text())
    shares = recipe["ffn"]["keep_fraction"]
    assert len(shares) == 4 and set(shares) != {0.5}
    assert sum(shares) == pytest.approx(2.0, abs=1e-9)
    assert recipe["ffn"]["budget"]["mode"] == "list"
    assert report["budget"]["found"]["keep_fraction"] == shares
    assert report["budget"]["searched"]["kl_searched"] < report["budget"]["start"]["kl_searched"]
    layers = config["hire"]["ffn"]["layers"]
    assert [layer["num_kept"] for layer in layers] == [int(share * 64 + 0.5) for share in shares]
    assert report["bytes_per_token"]["converted"] == report["budget"]["bytes_per_token"]
    assert "budget search: mean keep 0.500" in searched["err"]


def test_the_recipe_written_makes_the_same_model(
    hireconvert: Cli, inputs: dict[str, str], searched: dict[str, Any], tmp_path: Path
) -> None:
    ended = hireconvert(
        *("convert", inputs["model"], tmp_path / "again"),
        *("-r", searched["out"] / "recipe.yaml", "--set", inputs["data"]),
    )
    assert ended.code == 0, ended.err
    first, again = contents(searched["out"]), contents(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "hire/predictors.safetensors", "recipe.yaml"):
        assert first[name] == again[name]
    assert again["report"]["budget"] is None


def test_killed_in_the_search_and_resumed_bit_for_bit(
    hireconvert: Cli, inputs: dict[str, str], searched: dict[str, Any], tmp_path: Path
) -> None:
    events = searched["events"]
    path = "out.work/budget_state/scores.jsonl"
    scored = [number for number, event in enumerate(events) if event == ("open", path)]
    points = [scored[1], scored[len(scored) // 2], scored[-1]]
    points.append(events.index(("os.rename", "out.work/budget.partial")) + 1)
    model, arguments = inputs["model"], searched["arguments"]
    for number in points:
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        hooks = [["signal_at", str(out), number, "SIGKILL"]]
        ended = hireconvert("convert", model, out, *arguments, hooks=hooks)
        assert ended.signal == signal.SIGKILL, ended
        scores = out.with_name("out.work") / "budget_state" / "scores.jsonl"
        before = scores.read_text().count("\n") if scores.exists() else 0
        assert before >= points.index(number)
        ended = hireconvert("convert", model, out, *arguments, "--resume")
        assert ended.code == 0, ended.err
        assert is_complete(out) and contents(out) == contents(searched["out"])


def test_a_changed_search_is_not_resumed(
    hireconvert: Cli, inputs: dict[str, str], searched: dict[str, Any], tmp_path: Path
) -> None:
    number = searched["events"].index(("os.mkdir", "out.work/budget.partial")) + 3
    arguments = ("convert", inputs["model"], tmp_path / "out", *searched["arguments"])
    hooks = [["signal_at", str(tmp_path / "out"), number, "SIGKILL"]]
    assert hireconvert(*arguments, hooks=hooks).signal == signal.SIGKILL
    ended = hireconvert(*arguments, "--set", "ffn.budget.step=0.2", "--resume")
    assert ended.code == 4
    assert "recipe.ffn.budget.step: found 0.1, expected 0.2" in ended.err


@pytest.mark.parametrize(
    ("target", "reached"), [("perplexity_increase=0.05", True), ("kl=0.0000001", False)]
)
def test_targets_are_reached_or_said_not_to_be(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path, target: str, reached: bool
) -> None:
    sets = ("-r", "tiny-ci", "--set", inputs["data"], *SEARCH)
    sets = (*sets, "--set", f"ffn.budget.target.{target}")
    ended = hireconvert("convert", inputs["model"], tmp_path / "out", *sets)
    assert ended.code == 0, ended.err
    budget = json.loads((tmp_path / "out" / "hire_report.json").read_text())["budget"]
    assert budget["reached"] is reached
    if reached:
        assert budget["found"]["perplexity_increase_held"] <= 0.05
    assert ("was not reached" in ended.err) is not reached
    assert budget["mean_keep"] != 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("ffn.budget.mode=uniform", "ffn.keep_fraction=[0.5, 0.5]"), "ffn.budget.mode: uniform,"),
        (("ffn.budget.mode=list",), "ffn.budget.mode: list, but keep_fraction is one number"),
        (("ffn.budget.mode=best",), "ffn.budget.mode: 'best' is not one of"),
        (("ffn.budget.mode=search", "ffn.group_size=4"), "ffn.budget.mode: search measures single"),
        (("ffn.budget.target={}",), "ffn.budget.target: give one of bytes_per_token"),
        (("ffn.budget.target={kl: 1, bytes_per_token: 9}",), "found bytes_per_token and kl"),
        (("ffn.budget.target={kl: 0}",), "ffn.budget.target.kl: 0 is not a finite number above 0"),
        (("ffn.budget={mode: list, target: {kl: 1}}",), "ffn.budget.target: mode list aims at"),
        (("ffn.budget.taget={kl: 1}",), "ffn.budget.taget: unknown key, did you mean target?"),
    ],
)
def test_wrong_budgets_are_refused_by_key(
    hireconvert: Cli, changes: tuple[str, ...], message: str
) -> None:
    sets = [part for change in changes for part in ("--set", change)]
    ended = hireconvert("recipes", "validate", "tiny-ci", *sets)
    assert ended.code == 2 and message in ended.err, ended.err


# --------------------------------------------------------------------------- --auto


def auto(hireconvert: Cli, inputs: dict[str, str], out: Path, *more: str) -> tuple[Any, list[str]]:
    """The plan that --auto --dry-run prints and the lines of its table."""
    sets = ("--set", inputs["data"], "--set", "ffn.predictor.block=16", "--set", "head=null")
    arguments = ("convert", inputs["model"], out, "--auto", *more, *sets, "--dry-run", "--json")
    ended = hireconvert(*arguments)
    assert ended.code == 0, ended.err
    assert not out.exists() and not list(out.parent.glob("hireconvert-auto-*"))
    return json.loads(ended.out), ended.err.splitlines()


def test_auto_chooses_by_the_limit_and_says_what_it_tried(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path
) -> None:
    loose, lines = auto(hireconvert, inputs, tmp_path / "out", "--max-kl", "0.05")
    tight, _ = auto(hireconvert, inputs, tmp_path / "out", "--max-kl", "0.0003")
    kept = [plan["layers"][0]["kept"] for plan in (loose, tight)]
    assert kept[0] < kept[1]
    assert loose["recipe"] == "aggressive" and tight["recipe"] == "balanced"
    table = "\n".join(lines)
    assert table.count("(chosen)") == 1
    assert "dense, int8" in table and "dense, 4 bits in groups of 32" in table
    assert "plain quantization would serve better: dense, 4 bits" in table


def test_auto_takes_what_is_said_of_the_finetune(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path
) -> None:
    """Without an FFN there is nothing to train: that candidate goes without the section."""
    sets = ("--set", inputs["data"], "--set", "finetune.num_tokens=1024")
    arguments = ("convert", inputs["model"], tmp_path / "out", "--auto", "--max-kl", "1e-9", *sets)
    ended = hireconvert(*arguments, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["recipe"] == "lossless"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_auto_beside_a_folder_that_cannot_be_written_says_so(
    hireconvert: Cli, inputs: dict[str, str]
) -> None:
    ended = hireconvert("convert", inputs["model"], "/proc/out", "--auto", "--dry-run")
    assert ended.code == 4
    assert "cannot write beside OUT, in /proc" in ended.err


def test_auto_refuses_a_full_out_before_it_tries_anything(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    ended = hireconvert("convert", inputs["model"], tmp_path, "--auto")
    assert ended.code == 2 and "is not empty" in ended.err
    assert "reading the model" not in ended.err


def test_auto_says_when_nothing_keeps_within_the_limit(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path
) -> None:
    sets = ("--set", inputs["data"], "--set", "ffn.predictor.block=16", "--set", "head=null")
    arguments = ("convert", inputs["model"], tmp_path / "out", "--auto", "--max-kl", "1e-9", *sets)
    ended = hireconvert(*arguments)
    assert ended.code == 4
    assert "nothing tried keeps within KL 1e-09: balanced 0.5: 0.00" in ended.err


@pytest.mark.parametrize(
    "share",
    ["ffn.keep_fraction=0.4", " ffn.keep_fraction = [0.4, 0.4]", "ffn={keep_fraction: 0.3}"],
)
def test_auto_refuses_a_share_that_it_chooses_itself(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path, share: str
) -> None:
    arguments = ("convert", inputs["model"], tmp_path / "out", "--auto", "--set", share)
    ended = hireconvert(*arguments)
    assert ended.code == 2 and "--auto chooses ffn.keep_fraction" in ended.err


def test_auto_within_nothing_but_no_loss_leaves_the_ffn_alone(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path
) -> None:
    sets = ("--set", inputs["data"])
    arguments = ("convert", inputs["model"], tmp_path / "out", "--auto", "--max-kl", "1e-9", *sets)
    ended = hireconvert(*arguments)
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hire"]["ffn"] is None and config["hire"]["head"]["certified"]
    assert "no plain rounding of the dense weights reads fewer bytes within the limit" in ended.err


def test_auto_goes_on_to_convert_with_a_searched_list(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path
) -> None:
    sets = ("--set", inputs["data"], "--set", "ffn.predictor.block=16")
    small = ("--set", "data.num_tokens=256", "--set", "data.num_held_tokens=128")
    small = (*small, "--set", "data.window=64", "--set", "evaluate.num_tokens=0")
    ended = hireconvert(
        "convert", inputs["model"], tmp_path / "out", "--auto", "--max-kl", "0.01", *sets, *small
    )
    assert ended.code == 0, ended.err
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    shares = recipe["ffn"]["keep_fraction"]
    assert len(shares) == 4
    tried = [keep for name, keep in CANDIDATES if name == recipe["name"]]
    assert any(sum(shares) / 4 == pytest.approx(keep, abs=1e-6) for keep in tried)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no recipe: give --recipe NAME"),
        (("--auto", "-r", "tiny-ci"), "--auto chooses a recipe, and --recipe tiny-ci names one"),
        (("-r", "tiny-ci", "--max-kl", "1"), "--max-kl is a limit for --auto"),
        (("--auto", "--max-kl", "0"), "--max-kl 0 is not above 0"),
    ],
)
def test_options_that_contradict_each_other(
    hireconvert: Cli, inputs: dict[str, str], tmp_path: Path, options: Any, message: str
) -> None:
    ended = hireconvert("convert", inputs["model"], tmp_path / "out", *options)
    assert ended.code == 2 and message in ended.err, ended.err
    assert not list(tmp_path.iterdir())


def test_rounding_is_to_the_nearest_level() -> None:
    weight_AB = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for bits, block in ((8, 0), (4, 32)):
        found_AB, top = rounded(weight_AB, bits, block), 2 ** (bits - 1) - 1
        blocks, found = (t.view(5, -1, block or 64) for t in (weight_AB, found_AB))
        scale = blocks.abs().amax(-1, keepdim=True) / top
        assert bool(((blocks - found).abs() <= scale / 2 + 1e-6).all())
        levels = (found / scale).round()
        assert torch.allclose(levels * scale, found, atol=1e-6) and levels.abs().max() == top
