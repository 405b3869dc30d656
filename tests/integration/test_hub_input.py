"""Opening models from a Hub: what is downloaded, what is recorded, and how failure is told."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fake_hub import FakeHub

ROOT = Path(__file__).parents[2]

# Runs in a process of its own: huggingface_hub reads its environment on import. Each line of
# stdin is a call; each line of stdout says what came of it.
CLIENT = """
import json, sys, time
from pathlib import Path
from hireconvert.checkpoint import open_checkpoint, read_source_headers
from hireconvert.errors import HireError

for line in sys.stdin:
    call = json.loads(line)
    try:
        if call.pop("dry_run"):
            found = read_source_headers(**call)
            answer = {"disk_bytes": found.disk_bytes}
        else:
            found = open_checkpoint(work=Path("work"), **call)
            answer = {
                "files": sorted(path.name for path in found.folder.iterdir()),
                "dtype": str(found.load_model().dtype),
            }
        answer |= {
            "source": found.source, "base_model": found.base_model, "config": found.config,
            "shapes": {name: header.shape for name, header in found.headers.items()},
        }
    except HireError as error:
        answer = {"exit_code": error.exit_code, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


def ask(calls: dict[str, dict[str, Any]], env: dict[str, str], cwd: Path) -> dict[str, Any]:
    """The client's answer to each call."""
    lines = [json.dumps({"dry_run": False} | call) for call in calls.values()]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input="\n".join(lines),
        env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(calls, map(json.loads, done.stdout.splitlines()), strict=True))


def write_model(folder: Path, *, num_layers: int = 1) -> Path:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Everything asked of one Hub, online and then, with the same cache, after it has gone."""
    home = tmp_path_factory.mktemp("hub")
    whole = write_model(home / "whole")
    (whole / "pytorch_model.bin").write_bytes(b"a pickle")
    (whole / "own.py").write_text("raise SystemExit('run')\n")
    for extra in ("additional_chat_templates/tools.jinja", "onnx/config.json"):
        (whole / extra).parent.mkdir()
        (whole / extra).write_text("{}")
    sharded = write_model(home / "sharded", num_layers=2)
    LlamaForCausalLM.from_pretrained(sharded).save_pretrained(sharded, max_shard_size="2KB")
    (sharded / "model.safetensors").unlink()
    tensors = load_file(whole / "model.safetensors")
    pickled = write_model(home / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    wrong = write_model(home / "wrong")
    tensors["model.norm.weight"] = torch.ones(9)
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    with FakeHub() as hub:
        commits = {
            "whole": hub.add("org/whole", whole),
            "old": hub.add("org/whole", sharded, branch="old"),
            "sharded": hub.add("org/sharded", sharded),
        }
        hub.add("org/dry", whole)
        hub.add("org/pickled", pickled)
        hub.add("org/wrong", wrong)
        hub.add("org/gated", whole, gated=True)
        env = hub.environment(home / "cache")
        online = ask(
            {
                "dry": {"model": "org/dry", "dry_run": True},
                "whole": {"model": "org/whole"},
                "old": {"model": "org/whole@old"},
                "pinned": {"model": "org/whole", "revision": commits["old"]},
                "sharded dry": {"model": "org/sharded", "dry_run": True},
                "sharded": {"model": "org/sharded"},
                "pickled": {"model": "org/pickled"},
                "wrong": {"model": "org/wrong"},
                "absent": {"model": "org/absent"},
                "gated": {"model": "org/gated"},
                "bad revision": {"model": "org/whole@never"},
            },
            env,
            home,
        )
        requests = list(hub.requests)
    offline = ask(
        {
            "cached": {"model": "org/whole"},
            "uncached": {"model": "org/other"},
            "half cached": {"model": "org/wrong"},
        },
        env,
        home,
    )
    flag = ask({"flag": {"model": "org/other"}}, env | {"HF_HUB_OFFLINE": "1"}, home)
    yield {"commits": commits, "requests": requests, **online, **offline, **flag}


def test_a_hub_model_opens_with_its_commit_on_record(story: dict[str, Any]) -> None:
    found = story["whole"]
    assert found["source"] == f"hub:org/whole@{story['commits']['whole']}"
    assert found["base_model"] == "org/whole"
    assert found["dtype"] == "torch.bfloat16"
    assert found["shapes"]["model.norm.weight"] == [8]


def test_pickles_and_code_are_not_downloaded(story: dict[str, Any]) -> None:
    assert "model.safetensors" in story["whole"]["files"]
    assert not {"pytorch_model.bin", "own.py", "onnx"} & set(story["whole"]["files"])
    assert "additional_chat_templates" in story["whole"]["files"]
    assert not [line for line in story["requests"] if line.endswith((".bin", ".py"))]


def test_revisions_by_name_and_by_commit(story: dict[str, Any]) -> None:
    assert story["old"]["source"] == f"hub:org/whole@{story['commits']['old']}"
    assert story["pinned"] == story["old"]
    assert "model.layers.1.mlp.up_proj.weight" in story["old"]["shapes"]
    assert "model.layers.1.mlp.up_proj.weight" not in story["whole"]["shapes"]


def test_a_dry_run_reads_headers_only(story: dict[str, Any]) -> None:
    served = [line for line in story["requests"] if "org/dry/resolve" in line]
    weights = [line for line in served if line.endswith(".safetensors")]
    # One question whether the file exists, one read of its first bytes.
    assert len(weights) == 2 and weights[0].startswith("HEAD")
    assert story["dry"]["shapes"] == story["whole"]["shapes"]
    assert story["dry"]["config"] == story["whole"]["config"]
    assert story["dry"]["source"] == f"hub:org/dry@{story['commits']['whole']}"
    sizes = [torch.Size(shape).numel() for shape in story["dry"]["shapes"].values()]
    assert story["dry"]["disk_bytes"] == 2 * sum(sizes)


def test_shards_are_followed(story: dict[str, Any]) -> None:
    assert story["sharded"]["shapes"] == story["sharded dry"]["shapes"]
    assert sum(name.endswith(".safetensors") for name in story["sharded"]["files"]) > 1


@pytest.mark.parametrize(
    ("name", "exit_code", "message"),
    [
        ("pickled", 4, "only pickle weights (pytorch_model.bin)"),
        ("wrong", 4, "shape of model.norm.weight: found (9,), expected (8,)"),
        ("absent", 5, "the Hub has no model 'org/absent'"),
        ("gated", 5, "org/gated is gated"),
        ("bad revision", 5, "has no revision 'never'"),
        ("uncached", 5, "cannot be reached"),
        ("half cached", 5, "cannot be reached"),
        ("flag", 5, "HF_HUB_OFFLINE"),
    ],
)
def test_failures_name_themselves(
    name: str, exit_code: int, message: str, story: dict[str, Any]
) -> None:
    assert story[name]["exit_code"] == exit_code
    assert message in story[name]["message"]


def test_a_mis_shaped_model_is_refused_before_its_weights_are_downloaded(
    story: dict[str, Any],
) -> None:
    served = [line for line in story["requests"] if "org/wrong/resolve" in line]
    assert sum("model.safetensors" in line for line in served) == 2
    assert not any("GET /api/models/org/pickled/tree" in line for line in story["requests"])


def test_the_cache_serves_when_the_hub_is_gone(story: dict[str, Any]) -> None:
    assert story["cached"] == story["whole"]
