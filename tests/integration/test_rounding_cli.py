"""Refined and copied rows and attention in codes through `convert`, `inspect` and generation."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hireconvert.attention import round_rows
from hireconvert.inspection import verify_checkpoint
from hireconvert.loading import load
from tests.cli import Cli
from tests.tiny_files import save_tiny

FORM = "bits: 4, block: 16, symmetric: true, levels: normal"
CHANGES = (
    f"ffn.predictor={{{FORM}}}",
    f"ffn.unselected={{{FORM}}}",
    "ffn.rows=refined",
    "attention={block: 16}",
)
RECIPE = ("-r", "tiny-ci", *(part for change in CHANGES for part in ("--set", change)))
INT4 = (*RECIPE, "--set", "attention={weights: int4}")
COPIES = (*RECIPE, "--set", "ffn.rows=copies", "--set", "ffn.keep_fraction=1")


def converted(hireconvert: Cli, source: Path, name: str, settings: tuple[str, ...]) -> Path:
    """The folder of that name beside the source."""
    out = source.parent / name
    ended = hireconvert("convert", source, out, *settings)
    assert ended.code == 0, ended.err
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, hireconvert: Cli) -> tuple[Path, Path]:
    source = save_tiny(tmp_path_factory.mktemp("rounding") / "tiny")
    return source, converted(hireconvert, source, "out", RECIPE)


@pytest.fixture(scope="module")
def copied(folders: tuple[Path, Path], hireconvert: Cli) -> Path:
    """Nothing but the copies: no neuron is selected."""
    return converted(hireconvert, folders[0], "copied", COPIES)


def test_copies_are_all_that_is_read(
    folders: tuple[Path, Path], copied: Path, hireconvert: Cli
) -> None:
    found = json.loads(hireconvert("inspect", copied, "--json").out)
    plan = json.loads(hireconvert("convert", folders[0], "x", *COPIES, "--dry-run", "--json").out)
    assert plan["bytes_per_token"] == found["bytes_per_token"]
    assert found["bytes_per_token"]["ffn"]["candidates"] == 0
    assert found["bytes_per_token"]["ffn"]["kept"] == 0
    width = 32
    row = width // 2 + 1 * 2 + 4  # codes, two scales, their unit
    for layer in found["layers"]:
        assert layer["kept"] == layer["candidates"] == layer["neurons"]
        assert layer["rows"] == "copies"
        first = 2 * layer["neurons"]
        vectors = 4 * (2 * width + first)
        assert layer["read_bytes"] == (first + layer["neurons"]) * row + vectors
    assert "4-bit copies" in hireconvert("inspect", copied).out
    told = {check["name"]: check["detail"] for check in verify_checkpoint(copied)["checks"]}
    assert "2 FFN layers kept 64 neurons per token" in told["sparse path"]


def test_copies_are_evaluated_against_the_source_and_decode(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = json.loads((copied / "hire_report.json").read_text())["evaluation"]
    # Every view computes the same model, another than the source.
    assert evaluation["dense"]["kl_mean"] == evaluation["all"]["kl_mean"] > 0
    assert evaluation["selection"]["kept_mean"] == 1
    card = (copied / "README.md").read_text()
    assert "FFN weights are rounded to 4 bits" in card and "recall of the true" not in card
    ids = torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with caplog.at_level(logging.WARNING, logger="hire"):
        model = load(copied)
    assert "FFN layers as 4-bit copies and certified" in caplog.text
    found = model.generate(ids, **settings)
    assert model.hire_stats()["ffn"]["kept"] == 64 * model.hire_stats()["ffn"]["rows"] > 0
    model.set_hire_scope("off")
    assert torch.equal(found, model.generate(ids, **settings))


def test_a_converted_folder_names_what_copies_cannot_have(
    copied: Path, tmp_path: Path, hireconvert: Cli
) -> None:
    out = tmp_path / "changed"
    shutil.copytree(copied, out)
    config = json.loads((out / "config.json").read_text())
    config["hire"]["ffn"]["layers"][0]["num_kept"] = 5
    (out / "config.json").write_text(json.dumps(config))
    ended = hireconvert("inspect", out)
    assert ended.code == 4 and "rows is 'copies', by which all 64" in ended.err, ended.err


@pytest.fixture(scope="module")
def short(folders: tuple[Path, Path], hireconvert: Cli) -> Path:
    """The same with queries and outputs of the attention in 4 bits."""
    return converted(hireconvert, folders[0], "short", INT4)


def test_four_bits_are_for_what_the_recipe_leaves_to_them(
    folders: tuple[Path, Path], short: Path, hireconvert: Cli
) -> None:
    attention = json.loads((short / "config.json").read_text())["hire"]["attention"]
    bits = {f"self_attn.{name}_proj": of for name, of in zip("qkvo", (4, 8, 8, 4), strict=True)}
    assert attention == {"block": 32, "matrices": bits}
    source, out = (load_file(f / "model.safetensors") for f in (folders[0], short))
    expected = {"dense": 0, "converted": 0}
    for key, tensor in source.items():
        name = key.removesuffix(".weight").partition(".self_attn.")[2]
        if not name:
            continue
        own = bits[f"self_attn.{name}"]
        error = (out[key].float() - tensor.float()).norm() / tensor.float().norm()
        assert (error < 0.01) == (own == 8) and error < 0.15
        expected["dense"] += tensor.numel() * tensor.element_size()
        expected["converted"] += tensor.numel() * own // 8 + tensor.numel() // 32 * (own // 2)
    inspected = json.loads(hireconvert("inspect", short, "--json").out)["bytes_per_token"]
    assert inspected["attention"] == expected
    arguments = (folders[0], "x", *INT4, "--dry-run", "--json")
    plan = json.loads(hireconvert("convert", *arguments).out)
    assert plan["bytes_per_token"] == inspected


def test_four_bits_are_fitted_to_the_text(short: Path, folders: tuple[Path, Path]) -> None:
    source, out = (load_file(f / "model.safetensors") for f in (folders[0], short))
    key = next(key for key in source if key.endswith("q_proj.weight"))
    plain = round_rows(source[key].float(), 32, 4).to(source[key].dtype)
    assert not torch.equal(out[key], plain)
    model = load(short)
    model.generate(torch.arange(3, 9)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.hire_stats()["ffn"]["kept"] > 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("attention={weights: int4, int8: [x_proj]}", "x_proj"),
        ("attention={int8: [v_proj]}", "attention.int8"),
        ("attention={weights: int2}", "attention.weights"),
    ],
)
def test_what_attention_cannot_be(
    setting: str, said: str, folders: tuple[Path, Path], hireconvert: Cli
) -> None:
    arguments = ("convert", folders[0], folders[0].parent / "no", *RECIPE, "--set", setting)
    ended = hireconvert(*arguments, "--dry-run")
    assert ended.code == 2 and said in ended.err, ended.err


def test_only_ffn_and_attention_are_rounded(folders: tuple[Path, Path]) -> None:
    source, out = (load_file(folder / "model.safetensors") for folder in folders)
    assert source.keys() == out.keys()
    for name, tensor in source.items():
        assert out[name].dtype == tensor.dtype
        rounded = ("mlp" in name or "self_attn" in name) and name.endswith("weight")
        assert torch.equal(out[name], tensor) != rounded, name
        if rounded:
            error = (out[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert error < 0.01, name


def test_bytes_count_what_kernels_read(folders: tuple[Path, Path], hireconvert: Cli) -> None:
    _, out = folders
    found = json.loads(hireconvert("inspect", out, "--json").out)
    plan = json.loads(hireconvert("convert", folders[0], "x", *RECIPE, "--dry-run", "--json").out)
    assert plan["bytes_per_token"] == found["bytes_per_token"]
    width, low_row = 32, 32 // 2 + 2 * 2
    for row in found["layers"]:
        rest = row["neurons"] * (width // 2 + 1 * 2 + 4)  # codes, two scales, their unit
        exact = (2 * row["candidates"] + row["kept"]) * low_row
        assert row["read_bytes"] == row["predictor_bytes"] + rest + exact
    names = json.loads((out / "config.json").read_text())["hire"]["attention"]["matrices"]
    tensors = load_file(out / "model.safetensors")
    mine = [t for key, t in tensors.items() if any(f".{name}.weight" in key for name in names)]
    attention = found["bytes_per_token"]["attention"]
    assert attention["dense"] == sum(t.numel() * t.element_size() for t in mine)
    assert attention["converted"] == sum(t.numel() + t.numel() // 16 * 4 for t in mine)


def test_evaluation_is_against_the_source(folders: tuple[Path, Path]) -> None:
    report = json.loads((folders[1] / "hire_report.json").read_text())
    assert "dense" in report["evaluation"]
    assert report["evaluation"]["dense"]["kl_mean"] > 0  # the rounded dense view is another model


def test_decodes_with_the_rounded_weights(folders: tuple[Path, Path]) -> None:
    _, out = folders
    ids = torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = load(out, dtype=torch.float32)
    model.generate(ids, **settings)
    assert model.hire_stats()["ffn"]["kept"] > 0
    model.set_hire_scope("off")
    native = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(model.generate(ids, **settings), native.generate(ids, **settings))
