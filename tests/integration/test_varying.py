"""A recipe whose number of neurons varies and whose estimates are softened, through every verb."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hireconvert.cli import app
from hireconvert.loading import load
from tests.tiny_files import save_tiny

SETTINGS = ("ffn.selection=threshold", "ffn.over_select=1.6", "ffn.predictor.soften=true")


@pytest.fixture(scope="module", params=["top_k", "candidates"])
def converted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion by the command line."""
    folder = tmp_path_factory.mktemp("varying")
    source, out = save_tiny(folder / "tiny"), folder / "out"
    changes = [part for s in (*SETTINGS, f"ffn.keep={request.param}") for part in ("--set", s)]
    arguments = ["convert", str(source), str(out), "--recipe", "tiny-ci", *changes]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return out


def test_the_report_and_inspect_tell_the_distribution(converted: Path) -> None:
    report = json.loads((converted / "hire_report.json").read_text())
    hire = json.loads((converted / "config.json").read_text())["hire"]
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(converted), "--json"]).stdout)
    for measured, layer, row in zip(
        report["layers"], hire["ffn"]["layers"], shown["layers"], strict=True
    ):
        kept = measured["kept"]
        assert set(kept) == {"mean", "p10", "p50", "p90", "max"}
        assert kept["p10"] < kept["p90"] <= kept["max"] <= layer["num_candidates"]
        assert layer["selection"]["mean_kept"] == kept["mean"]
        assert row["kept_per_token"] == kept and row["selection"] == "threshold"
        assert row["kept"] == int(kept["mean"] + 0.5)
    text = CliRunner().invoke(app, ["inspect", str(converted)]).stdout
    kept = report["layers"][0]["kept"]
    assert f"mean {int(kept['mean'] + 0.5)} ({kept['p10']}-{kept['p90']})" in text


def test_bytes_are_those_of_the_mean(converted: Path) -> None:
    report = json.loads((converted / "hire_report.json").read_text())
    layers = json.loads((converted / "config.json").read_text())["hire"]["ffn"]["layers"]
    config = json.loads((converted / "config.json").read_text())
    row = config["hidden_size"] * (4 if config["dtype"] == "float32" else 2)
    ffn = report["bytes_per_token"]["ffn"]
    kept = sum(int(layer["selection"]["mean_kept"] + 0.5) for layer in layers)
    exact = sum(layer["num_candidates"] for layer in layers)
    assert ffn["kept"] == kept * row
    assert ffn["candidates"] == 2 * row * (exact if layers[0]["keep"] == "top_k" else kept)


def test_it_verifies_in_a_fresh_process_and_counts_what_it_keeps(converted: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(converted)])
    assert done.exit_code == 0, done.output
    model: Any = load(converted, dtype=torch.float32)
    ids = torch.arange(3, 33)[None] % model.config.vocab_size
    cache, numbers = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            counts = model.hire_stats(reset=True)["layers"][0]
            assert counts["rows"] == (position > 0) and counts["dense_rows"] == 0
            numbers.append(counts["kept"])
    assert len(set(numbers[1:])) > 3
    assert max(numbers) <= model.config.hire["ffn"]["layers"][0]["num_candidates"]
