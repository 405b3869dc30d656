"""Opening the input model: what is accepted, and one message for every way it can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_package
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hireconvert import gguf, hub
from hireconvert.checkpoint import find, open_checkpoint, read_source_headers
from hireconvert.errors import HireError, InputError, UsageError
from tests.tiny_files import save_tiny, tiny_llama, tiny_tokenizer, write_gguf

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "saved")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink()


def test_a_good_folder_opens_and_loads_as_stored(model: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(model), work=tmp_path / "work")
    assert (opened.source, opened.base_model, opened.warnings) == ("folder", None, ())
    assert opened.headers["model.norm.weight"].shape == (32,)
    assert sum(header.num_bytes for header in opened.headers.values()) == sum(
        2 * tensor.numel() for tensor in load_file(model / WEIGHTS).values()
    )
    loaded = opened.load_model()
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert opened.load_model(dtype=torch.float32).dtype == torch.float32
    assert opened.load_tokenizer().decode(opened.load_tokenizer()("a b").input_ids) == "a b"
    assert str(tmp_path) not in json.dumps(opened.config) + opened.source


def test_shards_open_with_the_same_tensors_and_dry_run_agrees(model: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(str(model), work=tmp_path)
    shard(model)
    sharded = open_checkpoint(str(model), work=tmp_path)
    assert len({header.file for header in sharded.headers.values()}) > 1
    assert {k: (v.shape, v.dtype) for k, v in whole.headers.items()} == {
        k: (v.shape, v.dtype) for k, v in sharded.headers.items()
    }
    survey = read_source_headers(str(model))
    assert (survey.headers, survey.config) == (sharded.headers, sharded.config)
    assert survey.disk_bytes == 0


def test_fingerprint_follows_contents_and_not_place(model: Path, saved: Path) -> None:
    before = open_checkpoint(str(saved), work=saved).fingerprint
    assert open_checkpoint(str(model), work=model).fingerprint == before
    edit_weights(model, lambda t: t["model.norm.weight"].mul_(1.5))
    changed = open_checkpoint(str(model), work=model).fingerprint
    (model / "tokenizer_config.json").write_text("{}")
    assert len({before, changed, open_checkpoint(str(model), work=model).fingerprint}) == 3


def test_weights_without_the_base_prefix_and_with_old_buffers_open(tmp_path: Path) -> None:
    """As the first GPT-2 checkpoints on the Hub are."""
    config = GPT2Config(
        vocab_size=300, n_embd=8, n_head=2, n_layer=1, bos_token_id=0, eos_token_id=1
    )
    whole = GPT2LMHeadModel(config)
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    old = dict(whole.transformer.state_dict()) | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = open_checkpoint(str(tmp_path), work=tmp_path).load_model()
    assert torch.equal(loaded.lm_head.weight, whole.lm_head.weight)


def test_safetensors_win_over_pickles_beside_them(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"a pickle that would run code")
    assert open_checkpoint(str(model), work=model).headers


def test_own_code_is_not_run_where_transformers_has_the_class(model: Path) -> None:
    (model / "modeling_own.py").write_text("raise SystemExit('this code was run')\n")
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    opened = open_checkpoint(str(model), work=model, trust_remote_code=True)
    assert "auto_map" in opened.warnings[0]
    assert type(opened.load_model(trust_remote_code=True)) is LlamaForCausalLM


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_own_code_runs_where_it_must_and_may(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    (model / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(model, model_type="own", auto_map=classes)
    opened = open_checkpoint(str(model), work=model, trust_remote_code=True)
    assert type(opened.load_model(trust_remote_code=True)).__name__ == "OwnForCausalLM"
    (model / "own.py").write_text(OWN_CODE + "CHANGED = True\n")
    changed = open_checkpoint(str(model), work=model, trust_remote_code=True)
    assert changed.fingerprint != opened.fingerprint


def _truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _corrupt_header(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[8:40] = b"\xff" * 32
    (folder / WEIGHTS).write_bytes(bytes(content))


def _rename_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def _lose_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _misplace(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    (folder / INDEX).write_text(json.dumps(index))


def _nan(folder: Path) -> None:
    edit_weights(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 5:].fill_(torch.nan))


def _infinite(folder: Path) -> None:
    edit_weights(folder, lambda t: t["model.norm.weight"][:1].fill_(torch.inf))


def _drop_tensor(folder: Path) -> None:
    edit_weights(folder, lambda t: t.pop("model.layers.0.mlp.down_proj.weight"))


def _extra_tensor(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"model.layers.7.foo": torch.zeros(3)}))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _half_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _quantized(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})


def _float8(folder: Path) -> None:
    edit_weights(
        folder,
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}),
    )


def _bert(folder: Path) -> None:
    config = BertConfig(hidden_size=8, num_attention_heads=2, architectures=["BertForMaskedLM"])
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty folder": (_empty, "is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{'a"), "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "no model_type": (_config(model_type=None), "no `model_type`"),
    "unknown model_type": (_config(model_type="lama"), "'lama' is unknown to Transformers"),
    "own code": (
        _config(model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"}),
        "--trust-remote-code",
    ),
    "encoder": (_bert, "not a causal language model"),
    "encoder head": (_config(architectures=["LlamaForSequenceClassification"]), "not a causal"),
    "already converted": (_config(hire={"format_version": 1}), "already converted"),
    "quantized": (_quantized, "quantized (quantization_config, method awq)"),
    "float8": (_float8, "stores tensors as F8_E4M3"),
    "ill-typed config": (_config(hidden_size="wide"), "no valid llama config"),
    "impossible config": (_config(num_attention_heads=0), "config"),
    "too many layers": (_config(num_hidden_layers=10**9), "asks for 1000000000 layers"),
    "only pickles": (_rename_weights, "only pickle weights (pytorch_model.bin)"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "found no weight file"),
    "missing shard": (_lose_shard, "names the shard 'model-00002"),
    "tensor not in its shard": (_misplace, "but it is not there"),
    "truncated": (_truncate, "is truncated"),
    "cut in the header": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:100]),
        "not a complete safetensors file",
    ),
    "corrupt header": (_corrupt_header, "is corrupt"),
    "NaN": (_nan, "'model.layers.1.mlp.up_proj.weight' in model.safetensors has 27 values"),
    "infinity": (_infinite, "'model.norm.weight' in model.safetensors has 1 values"),
    "mis-shaped": (_config(intermediate_size=65), "found (32, 64), expected (32, 65)"),
    "missing tensor": (_drop_tensor, "missing: model.layers.0.mlp.down_proj.weight"),
    "unexpected tensor": (_extra_tensor, "unexpected: model.layers.7.foo"),
    "no tokenizer": (_no_tokenizer, "has no tokenizer"),
    "truncated tokenizer": (_half_tokenizer, "tokenizer.json is not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_naming_what_is_wrong(case: str, model: Path) -> None:
    breaks, expected = BROKEN[case]
    breaks(model)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(model), work=model)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_a_tokenizer_that_cannot_be_built(content: str, model: Path) -> None:
    (model / "tokenizer.json").write_text(content)
    opened = open_checkpoint(str(model), work=model)
    with pytest.raises(InputError, match="the tokenizer of folder cannot be loaded"):
        opened.load_tokenizer()


def test_a_dry_run_refuses_what_headers_can_tell(model: Path) -> None:
    edit_config(model, intermediate_size=65)
    with pytest.raises(InputError, match="expected"):
        read_source_headers(str(model))


@pytest.mark.parametrize(
    ("name", "revision", "kind", "message"),
    [
        ("{here}/absent", None, InputError, "does not exist"),
        ("{here}/absent.gguf", None, InputError, "does not exist"),
        ("gpt2", None, InputError, "org/name"),
        ("{here}/model/config.json", None, InputError, "is a file of type .json"),
        ("{here}/model", "main", UsageError, "is a local path"),
        ("org/name@one", "two", UsageError, "names the revision one"),
    ],
)
def test_names_that_are_no_model(
    name: str, revision: str | None, kind: type[HireError], message: str, model: Path
) -> None:
    with pytest.raises(kind, match=message):
        find(name.format(here=model.parent), revision)


def test_hub_ids_carry_their_revision() -> None:
    assert find("org/name") == hub.HubRepo("org/name", None, None, None)
    assert find("org/name@v1.0") == find("org/name", "v1.0") == find("org/name@v1.0", "v1.0")


# GGUF


def test_gguf_becomes_a_safetensors_folder_and_is_reused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        keys={
            "general.base_model.0.repo_url": "https://huggingface.co/org/base",
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.pre": "smollm",
            "llama.new_key": 3,
        },
    )
    survey = read_source_headers(str(path))
    opened = open_checkpoint(str(path), work=tmp_path / "work")
    assert (opened.source, opened.base_model) == ("gguf:tiny.gguf", "org/base")
    assert opened.folder == tmp_path / "work" / "source"
    assert opened.config["architectures"] == ["LlamaForCausalLM"]
    assert str(tmp_path) not in json.dumps(opened.config)
    assert {name: (h.shape, h.num_bytes) for name, h in survey.headers.items()} == {
        name: (h.shape, h.num_bytes) for name, h in opened.headers.items()
    }
    assert survey.disk_bytes == sum(h.num_bytes for h in opened.headers.values())
    assert any("llama.new_key = 3" in warning for warning in opened.warnings)
    assert any("rounded to bfloat16" in warning for warning in opened.warnings)

    loaded = opened.load_model()
    original = tiny_llama().state_dict()
    assert loaded.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.generation_config.eos_token_id == [1, 5]
    tokenizer = opened.load_tokenizer()
    assert tokenizer.chat_template
    # Digits stand alone: GPT-2's rule would join the second space to the 4.
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  42")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "4", "2"]

    weights = opened.folder / WEIGHTS
    stamp = weights.stat().st_mtime_ns
    again = open_checkpoint(str(path), work=tmp_path / "work")
    assert (again.fingerprint, again.warnings) == (opened.fingerprint, opened.warnings)
    assert weights.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="gguf_sha256"):
        open_checkpoint(str(write_gguf(path)), work=tmp_path / "work")


@pytest.mark.parametrize(
    ("keys", "drop", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "", "rope.scaling"),
        ({"rope_freqs": True}, "", "rope_freqs.weight"),
        ({"llama.attention.key_length": 16}, "", "llama.attention.key_length = 16"),
        ({"llama.attention.sliding_window": 32}, "", "llama.attention.sliding_window = 32"),
        ({"split.count": 2}, "", "one part of a split model"),
        ({"general.alignment": 0}, "", "not a complete GGUF file"),
        ({}, "blk.1.ffn_up", "holds 0 values for model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_gguf_that_would_convert_wrongly_is_refused(
    keys: dict[str, Any], drop: str, message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", keys=keys, drop=drop)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(path), work=tmp_path / "work")
    assert message in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_harmless_gguf_keys_pass_silently(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}
    file = gguf.read_gguf(write_gguf(tmp_path / "tiny.gguf", keys=keys))
    warnings = gguf.check_metadata(file, gguf.gguf_config(file))
    assert warnings == ["float16 or float32 matrices of the GGUF file are rounded to bfloat16"]


@pytest.mark.parametrize("kept", [0, 3, 24, 200, 3000, -100])
def test_a_cut_gguf_is_refused(kept: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="not a complete GGUF file"):
        gguf.read_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": 10**9}, "declares 1000000000 blocks"),
        ({"attention.head_count": 0}, "cannot read|can be built"),
        ({"embedding_length": 48}, "values for"),
    ],
)
def test_gguf_metadata_that_contradicts_its_tensors(
    change: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    content = bytearray(path.read_bytes())
    for key, value in change.items():
        start = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
        content[start : start + 4] = value.to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(path), work=tmp_path / "work")


def test_a_missing_gguf_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install hireconvert\[gguf\]"):
        gguf.read_gguf(path)


def test_an_architecture_transformers_cannot_read(tmp_path: Path) -> None:
    writer = gguf_package.GGUFWriter(tmp_path / "x.gguf", "bert")
    writer.add_uint32("bert.context_length", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="'bert' model, which Transformers cannot read"):
        open_checkpoint(str(tmp_path / "x.gguf"), work=tmp_path / "work")
