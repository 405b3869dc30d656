"""Selection by whichever level a model's gradients go with, on the command line."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.cli import Cli, contents, is_complete
from tests.tiny_files import SIZES, save_tiny, tiny_tokenizer

LEVEL = (
    *("--set", "ffn.selection=level", "--set", "ffn.keep=candidates"),
    *("--set", "ffn.over_select=20", "--set", "ffn.score=error", "--set", "ffn.unselected={}"),
)


def save_gemma(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, head_dim=8, layer_types=["full_attention"] * 2)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["threshold", "relative"])
def converted(
    request: pytest.FixtureRequest, hireconvert: Cli, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A model that the rule serves, its conversion and the file events of that."""
    folder = tmp_path_factory.mktemp("rule")
    model = {"threshold": save_tiny, "relative": save_gemma}[request.param](folder / "model")
    out, log = folder / "out", folder / "events.json"
    hooks = [["log_events", str(out), str(log)]]
    ended = hireconvert("convert", str(model), out, "-r", "tiny-ci", *LEVEL, hooks=hooks)
    assert ended.code == 0, ended.err
    events = [
        (event, str(Path(path).relative_to(folder))) for event, path in json.loads(log.read_text())
    ]
    return {"out": out, "model": model, "rule": request.param, "err": ended.err, "events": events}


def test_the_rule_is_in_the_recipe_the_config_and_the_report(converted: dict[str, Any]) -> None:
    out, rule = converted["out"], converted["rule"]
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["ffn"]["selection"] == rule
    report = json.loads((out / "hire_report.json").read_text())
    assert report["rule"]["selection"] == rule
    assert report["rule"]["costs"][rule] == 1.0 == min(report["rule"]["costs"].values())
    layers = json.loads((out / "config.json").read_text())["hire"]["ffn"]["layers"]
    assert {layer["selection"]["rule"] for layer in layers} == {rule}
    assert f"ffn.selection: {rule} (" in converted["err"]


def test_its_recipe_makes_the_same_model_again(
    converted: dict[str, Any], hireconvert: Cli, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    recipe = str(converted["out"] / "recipe.yaml")
    ended = hireconvert("convert", str(converted["model"]), again, "--recipe", recipe)
    assert ended.code == 0, ended.err
    weights = {name: made for name, made in contents(again).items() if "safetensors" in name}
    assert weights and all(contents(converted["out"])[name] == weights[name] for name in weights)


def test_a_killed_conversion_goes_on_with_the_rule(
    converted: dict[str, Any], hireconvert: Cli, tmp_path: Path
) -> None:
    chosen = converted["events"].index(("os.rename", "out.work/rule.partial"))
    for number in (chosen, chosen + 1):  # before it is chosen, and after
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        arguments = ("convert", str(converted["model"]), out, "-r", "tiny-ci", *LEVEL)
        hooks = [["signal_at", str(out), number, "SIGKILL"]]
        assert hireconvert(*arguments, hooks=hooks).signal == signal.SIGKILL
        ended = hireconvert(*arguments, "--resume")
        assert ended.code == 0, ended.err
        assert is_complete(out) and contents(out) == contents(converted["out"])


def test_a_dry_run_says_that_the_rule_is_chosen_later(
    converted: dict[str, Any], hireconvert: Cli, tmp_path: Path
) -> None:
    arguments = (str(converted["model"]), tmp_path / "out", "-r", "tiny-ci", *LEVEL)
    ended = hireconvert("convert", *arguments, "--dry-run")
    assert ended.code == 0, ended.err
    assert "threshold or relative is chosen on the text" in ended.out + ended.err


def test_a_level_needs_estimates(
    converted: dict[str, Any], hireconvert: Cli, tmp_path: Path
) -> None:
    wrong = ("--set", "ffn.selection=level", "--set", "ffn.over_select=2")
    ended = hireconvert("convert", str(converted["model"]), tmp_path / "o", "-r", "tiny-ci", *wrong)
    assert ended.code == 2
    assert "level goes by estimates alone: it needs ffn.keep candidates, not top_k" in ended.err
