"""A checkpoint in processes of its own, without hireconvert: loading, saving, mixing versions."""

import hashlib
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

from hireconvert.runtime import RUNTIME_FILES, hire_io, modeling_hire
from tests.tiny import hire_model, stepwise, tiny_model, tokens

RUNTIME = Path(modeling_hire.__file__).parent
FAMILIES = ("llama", "llama_bias", "gemma2", "gemma3_text", "phi3", "opt_post_norm", "gpt2")
PROLOGUE = """
import json, sys
sys.modules["hireconvert"] = None  # any import of it fails
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)

def stepwise(model, ids):
    cache, logits = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            out = model(ids[:, position:position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1)

def clean(info):
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
"""


def run(code: str, *arguments: Path | str, home: Path) -> dict[str, Any]:
    """The JSON that a fresh process prints last; it cannot see this repository or the Hub."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(HF_HOME=str(home), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, *map(str, arguments)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "stderr": done.stderr}


def saved(family: str, folder: Path, **settings: Any) -> Any:
    settings = settings or {"ffn": {"keep_fraction": 0.4}, "head": {}}
    model = hire_model(tiny_model(family), **settings)
    model.save_pretrained(folder)
    return model


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_family_loads_alone_and_reloads_bit_equal(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_NATIVE", "off")  # alone there are no native kernels
    ids = tokens(1, 10)
    expected, report = {}, []
    for family in FAMILIES:
        model = saved(family, tmp_path / family)
        expected[family] = stepwise(model, ids)
        report.append(family)
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    code = """
from pathlib import Path
from safetensors.torch import load_file, save_file
root, out = Path(sys.argv[1]), {}
ids, logits = load_file(root / "ids.safetensors")["ids"], {}
for family in sys.argv[2].split(","):
    model, info = AutoModelForCausalLM.from_pretrained(
        root / family, trust_remote_code=True, output_loading_info=True)
    assert clean(info), info
    stats = model.hire_stats()
    assert not any(stats["ffn"].values()) and not any(stats["head"].values()), stats
    logits[family] = stepwise(model, ids)
    assert model.hire_stats()["ffn"]["rows"] == 9 * len(stats["layers"])
    model.save_pretrained(root / (family + "_again"))
    again, info = AutoModelForCausalLM.from_pretrained(
        root / (family + "_again"), trust_remote_code=True, output_loading_info=True)
    assert clean(info), info
    assert torch.equal(stepwise(again, ids), logits[family])
    base, info = AutoModel.from_pretrained(
        root / family, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}, info
    assert type(base).__name__.startswith("Hire") and base.hire_layers
    native, info = AutoModelForCausalLM.from_pretrained(
        root / family, trust_remote_code=False, output_loading_info=True)
    assert clean(info) and type(native).__module__.startswith("transformers."), info
    with torch.no_grad():
        assert torch.equal(native(ids).logits, model(ids).logits)
save_file(logits, root / "logits.safetensors")
print(json.dumps({"done": True}))
"""
    result = run(code, tmp_path, ",".join(FAMILIES), home=tmp_path)
    assert result["stderr"].count("hire: decoding with") == 3 * len(FAMILIES)
    got = load_file(tmp_path / "logits.safetensors")
    for family in FAMILIES:
        assert torch.equal(got[family], expected[family]), family
        # Saved again by shipped code alone: the same files, to the byte.
        assert file_hashes(tmp_path / family) == file_hashes(tmp_path / f"{family}_again"), family


def test_what_a_saved_folder_holds(tmp_path):
    saved("llama", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoModel": "modeling_hire.HireLlamaModel",
        "AutoModelForCausalLM": "modeling_hire.HireLlamaForCausalLM",
    }
    assert config["hire"]["format_version"] == 1
    for name in RUNTIME_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (RUNTIME / name).read_bytes()
    native = set(tiny_model("llama").state_dict())
    weights = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert weights == native - {"lm_head.weight"}  # tied
    assert RUNTIME_FILES == hire_io.RUNTIME_FILES
    shipped = {p.name for p in RUNTIME.glob("*.py")} - {"__init__.py"}
    assert shipped == set(RUNTIME_FILES)


def test_a_base_model_saved_alone_keeps_both_entries(tmp_path):
    saved("llama", tmp_path / "out")
    code = """
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
base.save_pretrained(sys.argv[2])
again, info = AutoModel.from_pretrained(
    sys.argv[2], trust_remote_code=True, output_loading_info=True)
assert clean(info), info
ids = torch.arange(3, 9)[None]
with torch.no_grad():
    cache = again(ids, use_cache=True).past_key_values
    again(ids[:, :1], past_key_values=cache)
print(json.dumps({"rows": int(again.hire_layers[0].counts[1])}))
"""
    result = run(code, tmp_path / "out", tmp_path / "base", home=tmp_path)
    assert result["rows"] == 1
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_hire.HireLlamaModel"
    assert config["architectures"] == ["LlamaForCausalLM"]  # what the entries name


def test_two_runtime_versions_live_in_one_process(tmp_path):
    saved("llama", tmp_path / "one" / "model")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    edited = tmp_path / "two" / "model" / "hire_predict.py"
    old = "_BITS_IN_BYTE = 8"
    assert old in edited.read_text()
    edited.write_text(edited.read_text().replace(old, old + "\nEDITED = True"))
    code = """
from pathlib import Path
models = [AutoModelForCausalLM.from_pretrained(Path(sys.argv[1]) / name / "model",
                                               trust_remote_code=True)
          for name in ("one", "two", "one")]
def module(model):
    layer = model.model.hire_layers[0]
    return sys.modules[type(layer).__init__.__globals__["Widened"].__module__]
edited = [hasattr(module(model), "EDITED") for model in models]
for model in models:
    model.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
    assert model.hire_stats()["ffn"]["rows"]
models[1].save_pretrained(Path(sys.argv[1]) / "three")
print(json.dumps({"edited": edited}))
"""
    assert run(code, tmp_path, home=tmp_path)["edited"] == [False, True, False]
    assert (tmp_path / "three" / "hire_predict.py").read_bytes() == edited.read_bytes()


def test_a_remote_model_pushes_all_of_itself(tmp_path):
    saved("llama", tmp_path / "out")
    code = """
from types import SimpleNamespace
from huggingface_hub import HfApi
from transformers.utils import hub
sent, uploads = [], []
def create_commit(self, *args, operations, **kwargs):
    sent.extend(operation.path_in_repo for operation in operations)
HfApi.create_repo = lambda self, repo_id, **k: SimpleNamespace(repo_id=repo_id)
HfApi.create_commit = create_commit
HfApi.upload_folder = lambda self, **k: uploads.append(k)
hub.create_and_tag_model_card = lambda *a, **k: SimpleNamespace(save=lambda path: None)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.push_to_hub("me/model", token="none")
folder = sys.argv[1] + "_pushed"
model.save_pretrained(folder, push_to_hub=True, repo_id="me/other", token="none", private=True)
(upload,) = uploads
print(json.dumps({"sent": sorted(sent), "repo": upload["repo_id"],
                  "folder": str(upload["folder_path"])}))
"""
    result = run(code, tmp_path / "out", home=tmp_path)
    files = set(file_hashes(tmp_path / "out"))
    assert files <= set(result["sent"]) and "hire/predictors.safetensors" in files
    assert result["repo"] == "me/other" and result["folder"] == str(tmp_path / "out_pushed")
    assert file_hashes(tmp_path / "out_pushed") == file_hashes(tmp_path / "out")


def test_low_bit_types_and_narrow_loading(tmp_path):
    saved("qwen2", tmp_path / "out", head={}, ffn={"predictor": {"kind": "qlr", "factor_bits": 4}})
    code = """
for dtype in (torch.float32, torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], trust_remote_code=True, dtype=dtype).eval()
    assert model.dtype == dtype
    out = model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False,
                         eos_token_id=None)
    assert model.hire_stats()["ffn"]["rows"] == 6 and out.shape == (1, 10)
kinds = {n: str(t.dtype) for n, t in model.model.hire_layers[0].predictor_tensors.items()}
print(json.dumps(kinds))
"""
    kinds = run(code, tmp_path / "out", home=tmp_path)
    assert kinds["planes"] == "torch.uint8" and kinds["factor_in_codes"] == "torch.int8"


def test_broken_predictor_files_are_refused(tmp_path):
    model = saved("llama", tmp_path)
    path = tmp_path / "hire" / "predictors.safetensors"
    good = path.read_bytes()
    load = type(model).from_pretrained
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match="predictors"):
        load(tmp_path)
    path.write_bytes(good)
    load(tmp_path)
