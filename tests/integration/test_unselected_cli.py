"""A recipe whose neurons left out count by estimate, through every verb and without the library."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hireconvert.figures import size
from hireconvert.loading import load
from tests.cli import Cli, Ended
from tests.tiny_files import save_tiny

# 64 neurons of 32 weights in each of 2 layers, in bfloat16; half of them kept
NEURONS, KEPT, CANDIDATES, LAYERS, ROW = 64, 32, 40, 2, 32 * 2
LOW_ROW = 3 * 4 + 2 * 2 * 2  # 3 planes of 32 bits, 2 blocks of 16 with scale and offset
SETTINGS = ("ffn.unselected={bits: 3, block: 16}", "ffn.predictor.block=16", "ffn.over_select=1.25")
RECIPE = ("-r", "tiny-ci", *(part for setting in SETTINGS for part in ("--set", setting)))
PREDICTORS = Path("hire") / "predictors.safetensors"
ALONE = """
import json, sys
sys.modules["hireconvert"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True, dtype=torch.float32)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
out = model.generate(torch.arange(3, 9)[None], max_new_tokens=12, do_sample=False,
                     eos_token_id=None, pad_token_id=0)
print(json.dumps({"ids": out.tolist(), "ffn": model.hire_stats()["ffn"]}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("unselected") / "tiny")


@pytest.fixture(scope="module")
def converted(source: Path, hireconvert: Cli) -> Path:
    good(hireconvert("convert", source, source.parent / "out", *RECIPE))
    return source.parent / "out"


def good(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


def test_sizes_planned_are_those_written(source: Path, converted: Path, hireconvert: Cli) -> None:
    ended = good(hireconvert("convert", source, "x", *RECIPE, "--dry-run", "--json"))
    plan = json.loads(ended.out)
    found = json.loads(good(hireconvert("inspect", converted, "--json")).out)
    tensors = load_file(converted / PREDICTORS)
    assert plan["predictor_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert plan["bytes_per_token"] == found["bytes_per_token"]
    copies = {name: t for name, t in tensors.items() if ".down_" in name}
    assert len(copies) == 3 * LAYERS
    assert sum(t.numel() * t.element_size() for t in copies.values()) == LAYERS * NEURONS * LOW_ROW
    for planned, real in zip(plan["layers"], found["layers"], strict=True):
        assert {key: real[key] for key in planned} == planned


def test_bytes_are_shown_wherever_bytes_are(converted: Path, hireconvert: Cli) -> None:
    rest = (NEURONS - KEPT) * LOW_ROW
    found = json.loads(good(hireconvert("inspect", converted, "--json")).out)
    for row in found["layers"]:
        assert row["unselected"] == {"bits": 3, "block": 16, "symmetric": False}
        assert row["unselected_bytes"] == rest
        exact = 2 * CANDIDATES * ROW + KEPT * ROW
        assert row["read_bytes"] == row["predictor_bytes"] + exact + rest
    ffn = found["bytes_per_token"]["ffn"]
    assert ffn["unselected"] == LAYERS * rest
    parts = ("predictor", "candidates", "kept", "unselected")
    assert ffn["converted"] == sum(ffn[part] for part in parts)
    report = json.loads((converted / "hire_report.json").read_text())
    assert report["bytes_per_token"] == found["bytes_per_token"]
    assert [layer["bytes"]["unselected"] for layer in report["layers"]] == [rest] * LAYERS
    text = good(hireconvert("inspect", converted)).out
    assert "3-bit estimate" in text and size(rest) in text
    card = (converted / "README.md").read_text()
    assert f"| of these for neurons left out, by 3-bit estimate | {LAYERS * rest:,} |" in card


def test_the_page_shows_it(converted: Path, hireconvert: Cli, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    good(hireconvert("report", converted, "-o", page))
    words = page.read_text()
    assert "3-bit estimate" in words and size((NEURONS - KEPT) * LOW_ROW) in words


def test_a_fresh_process_generates_what_the_library_does(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(converted)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the rest by estimate" in done.stderr
    alone = json.loads(done.stdout.splitlines()[-1])
    assert alone["ffn"]["kept"] == 11 * LAYERS * KEPT and alone["ffn"]["dense_rows"] == 0
    model: Any = load(converted, dtype=torch.float32)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = model.generate(torch.arange(3, 9)[None], **settings)
    assert alone["ids"] == ids.tolist()
    dense = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert torch.equal(dense(ids).logits, original(ids).logits)  # that view is what it was


def test_quality_is_better_and_eval_tells_the_bytes(
    source: Path, converted: Path, hireconvert: Cli, tmp_path: Path
) -> None:
    good(hireconvert("verify", converted))
    plain = tmp_path / "plain"
    good(hireconvert("convert", source, plain, *RECIPE, "--set", "ffn.unselected=null"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} says {n * n % 97} and {n * 7 % 31}.\n" for n in range(60)))
    results = []
    for folder in (converted, plain):
        ended = good(hireconvert("eval", folder, "--text", text, "--json"))
        results.append(json.loads(ended.out))
    rest = [result["bytes_per_token"]["ffn"]["unselected"] for result in results]
    assert rest == [LAYERS * (NEURONS - KEPT) * LOW_ROW, 0]
    divergence = [result["texts"]["text.txt"]["all"]["kl_mean"] for result in results]
    assert divergence[0] < 0.5 * divergence[1]
    kept = [result["texts"]["text.txt"]["selection"]["kept_overall"] for result in results]
    assert kept == [0.5, 0.5]


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate"])
def test_a_bad_copy_ends_with_its_name(
    converted: Path, hireconvert: Cli, tmp_path: Path, verb: str
) -> None:
    bad = Path(shutil.copytree(converted, tmp_path / "bad"))
    tensors = load_file(bad / PREDICTORS)
    tensors["layers.1.down_scale"] = tensors["layers.1.down_scale"][:, :1].contiguous()
    save_file(tensors, bad / PREDICTORS)
    (tmp_path / "text.txt").write_text("some words\n" * 80)
    more = {"eval": ("--text", tmp_path / "text.txt"), "generate": ("-p", "hello")}.get(verb, ())
    ended = hireconvert(verb, bad, *more)
    assert ended.code == 4 and "layers.1.down_scale" in ended.err
    config = json.loads((converted / "config.json").read_text())
    config["hire"]["ffn"]["layers"][1]["unselected"]["bits"] = 5
    (bad / "config.json").write_text(json.dumps(config))
    ended = hireconvert(verb, bad, *more)
    assert ended.code == 4 and "ffn.layers[1].unselected.bits is 5" in ended.err
