"""The real SmolLM2-135M from GGUF through every verb, and loaded where this library is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from tests.cli import ENVIRONMENT, ROOT, Cli, is_complete

pytestmark = pytest.mark.real
MODEL = ROOT / "models" / "smollm2.gguf"
PROMPT = "The capital of France is"
CERTAIN = "1, 2, 3, 4, 5, 6,"  # what follows is no matter of roundings, which differ by path
NUM_LAYERS, NUM_NEURONS = 30, 1536

# As a stranger would: the library cannot be imported, the code is what the folder ships.
STRANGER = """
import json, sys
sys.modules["hireconvert"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
text = tokenizer.decode(ids[0, inputs.input_ids.shape[1]:])
stats = model.hire_stats()
print(json.dumps({"class": type(model).__name__, "text": text, "stats": stats}))
"""


@pytest.fixture(scope="module")
def converted(hireconvert: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: run `make models/smollm2.gguf` to fetch it")
    folder = tmp_path_factory.mktemp("smollm2")
    text = folder / "topics.txt"
    text.write_text("\n\n\n".join(topics[name] for name in sorted(topics)[:40]))
    out = folder / "out"
    changes = (f"data.source={text}", "ffn.predictor.block=64", "head.certify_top=64")
    sets = [part for change in changes for part in ("--set", change)]
    ended = hireconvert("convert", MODEL, out, "-r", "tiny-ci", *sets)
    assert ended.code == 0, ended.err
    return out


def answer(hireconvert: Cli, *arguments: str | Path) -> dict[str, Any]:
    ended = hireconvert(*arguments, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_folder_is_complete_and_names_no_path(converted: Path) -> None:
    assert is_complete(converted)
    assert not converted.with_name("out.work").exists()
    report = json.loads((converted / "hire_report.json").read_text())
    assert report["model"]["source"] == "gguf:smollm2.gguf"
    assert report["model"]["architecture"] == "LlamaForCausalLM"
    assert str(converted.parent) not in (converted / "hire_report.json").read_text()
    assert set(report["timings"]) >= {"tokens", "activations", "export", "evaluation"}


def test_verify_and_inspect(converted: Path, hireconvert: Cli) -> None:
    checks = answer(hireconvert, "verify", converted)["checks"]
    details = {check["name"]: check["detail"] for check in checks}
    assert details["fresh process"] == "loads as HireLlamaForCausalLM without hireconvert"
    assert f"{NUM_LAYERS} FFN layers kept {NUM_NEURONS // 2} neurons" in details["sparse path"]
    found = answer(hireconvert, "inspect", converted)
    assert [layer["kept"] for layer in found["layers"]] == [NUM_NEURONS // 2] * NUM_LAYERS
    assert min(layer["recall"] for layer in found["layers"]) > 0.7
    assert found["bytes_per_token"]["speedup_bound"] > 1.2


def test_eval_stays_near_dense(converted: Path, hireconvert: Cli) -> None:
    answered = answer(hireconvert, "eval", converted, "--tokens", "300")
    (found,) = answered["texts"].values()
    dense, sparse = found["dense"]["perplexity"], found["all"]["perplexity"]
    assert 1 < dense < 100
    assert 0.9 * dense < sparse < 2 * dense and sparse != dense
    assert found["head"]["top1_agreement_reference"] == 1


def test_a_stranger_decodes_the_same_text(converted: Path, hireconvert: Cli) -> None:
    ended = hireconvert(
        *("generate", converted, "-p", CERTAIN, "--max-new-tokens", "8", "--no-chat")
    )
    assert ended.code == 0, ended.err
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(converted), CERTAIN],
        env=os.environ | ENVIRONMENT | {"HF_MODULES_CACHE": str(converted.parent / "modules")},
        cwd=converted.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"] == "HireLlamaForCausalLM"
    assert found["stats"]["layers"]["0"]["rows"] == 7
    assert found["text"] == ended.out.removesuffix("\n") == " 7, 8, 9"
