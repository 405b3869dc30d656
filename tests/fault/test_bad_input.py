"""Inputs that cannot be used: one clear message, its exit code, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPTJConfig, GPTJForCausalLM

from tests.cli import ENVIRONMENT, Cli, digests
from tests.tiny_files import save_tiny, tiny_llama, tiny_tokenizer, write_gguf

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """A folder with a good model that a case may break, and a finished conversion of it."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def done(self) -> Path:
        return self.root / "done"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def convert(self, *flags: str, **over: str | Path) -> list[str | Path]:
        model, out = over.get("model", self.model), over.get("out", self.out)
        return ["convert", model, out, "-r", over.get("recipe", "tiny-ci"), *flags]

    def change(self, *changes: str) -> list[str | Path]:
        return self.convert(*(part for change in changes for part in ("--set", change)))


Prepare = Callable[[Place], Sequence[str | Path]]


@dataclass(frozen=True)
class Bad:
    """What is given, the exit code, and what the message must say: found, expected, to do."""

    given: Prepare
    code: int
    says: tuple[str, ...]


@pytest.fixture(scope="module")
def good(hireconvert: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    save_tiny(root / "model")
    ended = hireconvert("convert", root / "model", root / "done", "-r", "tiny-ci")
    assert ended.code == 0, ended.err
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Place:
    return Place(Path(shutil.copytree(good, tmp_path / "place")))


def check(hireconvert: Cli, place: Place, bad: Bad) -> None:
    """Run it, and assert message, exit code, and that nothing on disk came or went."""
    arguments = bad.given(place)
    before = digests(place.root)
    ended = hireconvert(*arguments, environment={"COLUMNS": "300"})
    message = " ".join(ended.err.split())
    assert (ended.code, ended.out) == (bad.code, ""), ended.err
    for words in bad.says:
        assert words in message, (words, message)
    assert "Traceback" not in ended.err
    assert "error: " in ended.err or "Error" in ended.err
    assert digests(place.root) == before
    assert not (place.root / "out.work").exists()


# --------------------------------------------------------------------------- the model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def with_config(**changes: Any) -> Prepare:
    def given(place: Place) -> list[str | Path]:
        edit_config(place.model, **changes)
        return place.convert()

    return given


def with_model(change: Callable[[Path], object]) -> Prepare:
    def given(place: Place) -> list[str | Path]:
        change(place.model)
        return place.convert()

    return given


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def poison(folder: Path) -> None:
    edit_weights(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, :5].fill_(torch.nan))


def lose_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def make_encoder(folder: Path) -> None:
    config = BertConfig(hidden_size=8, num_attention_heads=2, architectures=["BertForMaskedLM"])
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def make_other_ffn(folder: Path) -> None:
    empty(folder)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = GPTJConfig(**sizes, rotary_dim=4, bos_token_id=0, eos_token_id=1)
    GPTJForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def with_gguf(keys: dict[str, Any], kept: int | None = None) -> Prepare:
    def given(place: Place) -> list[str | Path]:
        path = write_gguf(place.root / "tiny.gguf", keys=keys)
        path.write_bytes(path.read_bytes()[:kept])
        return place.convert(model=path)

    return given


MODELS = {
    "no such path": Bad(
        lambda p: p.convert(model=p.root / "absent"), 4, ("absent does not exist", "Hub id")
    ),
    "empty folder": Bad(with_model(empty), 4, ("is empty", "expected config.json")),
    "no config": Bad(
        with_model(lambda f: (f / "config.json").unlink()), 4, ("has no config.json", "expected")
    ),
    "config cut short": Bad(
        with_model(lambda f: os.truncate(f / "config.json", 40)),
        4,
        ("config.json is not valid JSON", "fetch it again"),
    ),
    "unknown model type": Bad(with_config(model_type="lama"), 4, ("'lama'", "upgrade")),
    "no such class": Bad(with_config(hidden_size="wide"), 4, ("no valid llama config", "wide")),
    "only pickles": Bad(
        with_model(lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin")),
        4,
        ("only pickle weights (pytorch_model.bin)", "Expected safetensors", "save_pretrained"),
    ),
    "truncated weights": Bad(
        with_model(lambda f: os.truncate(f / WEIGHTS, 20_000)),
        4,
        ("model.safetensors is truncated", "declares", "Fetch it again"),
    ),
    "missing shard": Bad(
        with_model(lose_a_shard), 4, ("names the shard 'model-00002", "missing", "Fetch")
    ),
    "mis-shaped weights": Bad(
        with_config(intermediate_size=65), 4, ("found (32, 64), expected (32, 65)",)
    ),
    "missing tensor": Bad(
        with_model(lambda f: edit_weights(f, lambda t: t.pop("model.norm.weight"))),
        4,
        ("missing: model.norm.weight", "different models, or one of them is damaged"),
    ),
    "NaN weights": Bad(
        with_model(poison),
        4,
        ("'model.layers.1.mlp.up_proj.weight' in model.safetensors has 5 values", "again"),
    ),
    "no tokenizer": Bad(
        with_model(lambda f: (f / "tokenizer.json").unlink()),
        4,
        ("has no tokenizer", "tokenizer.save_pretrained"),
    ),
    "tokenizer of nonsense": Bad(
        with_model(lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}')),
        4,
        ("tokenizer", "cannot be loaded"),
    ),
    "code of its own": Bad(
        with_config(model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"}),
        4,
        ("needs code", "--trust-remote-code"),
    ),
    "encoder": Bad(
        with_model(make_encoder),
        4,
        ("not a causal language model", "decoder-only text model such as"),
    ),
    "another kind of FFN": Bad(
        with_model(make_other_ffn), 4, ("'gptj'", "no FFN of the form", "recipe lossless")
    ),
    "already converted": Bad(
        lambda p: p.convert(model=p.done), 4, ("already converted", "dense model it was made from")
    ),
    "quantized": Bad(
        with_config(quantization_config={"quant_method": "awq", "bits": 4}),
        4,
        ("quantized", "method awq", "unquantized"),
    ),
    "a text as GGUF": Bad(
        lambda p: p.convert(model=p.file("x.gguf", "not a model at all" * 20)),
        4,
        ("x.gguf is not a complete GGUF file", "Fetch it again"),
    ),
    "half a GGUF": Bad(with_gguf({}, 50_000), 4, ("not a complete GGUF file", "Fetch it again")),
    "scaled rope in GGUF": Bad(
        with_gguf({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}),
        4,
        ("rope.scaling", "does not carry over", "safetensors repository instead"),
    ),
    "some other file": Bad(
        lambda p: p.convert(model=p.file("model.bin", b"x")), 4, (".bin", "expected a folder")
    ),
    "revision of a folder": Bad(
        lambda p: p.convert("--revision", "main"), 2, ("--revision main", "is a local path")
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_that_cannot_be_converted(name: str, hireconvert: Cli, place: Place) -> None:
    check(hireconvert, place, MODELS[name])


# --------------------------------------------------------------------------- OUT


def fill_out(place: Place) -> list[str | Path]:
    place.out.mkdir()
    (place.out / "mine.txt").write_text("precious")
    return place.convert()


def with_out(make: Callable[[Place], str | Path]) -> Prepare:
    return lambda place: place.convert(out=make(place))


OUTS = {
    "not empty": Bad(fill_out, 2, ("is not empty", "--overwrite", "--resume")),
    "a file": Bad(with_out(lambda p: p.file("out", "x")), 2, ("is a file", "name a folder")),
    "below a file": Bad(
        with_out(lambda p: p.file("file", "x") / "out"), 4, ("cannot write", "Choose an OUT")
    ),
    "where nobody may write": Bad(
        with_out(lambda p: "/proc/hireconvert/out"), 4, ("cannot write", "Choose an OUT")
    ),
    "the model": Bad(with_out(lambda p: p.model), 2, ("holds MODEL", "name another folder")),
    "two wishes": Bad(
        lambda p: p.convert("--resume", "--overwrite"), 2, ("contradict", "give one of them")
    ),
}


@pytest.mark.parametrize("name", OUTS)
def test_out_that_cannot_be_written(name: str, hireconvert: Cli, place: Place) -> None:
    check(hireconvert, place, OUTS[name])


# --------------------------------------------------------------------------- the recipe


def with_recipe(text: str) -> Prepare:
    return lambda place: place.convert(recipe=place.file("mine.yaml", text))


def with_change(*changes: str) -> Prepare:
    return lambda place: place.change(*changes)


RECIPES = {
    "unknown name": Bad(
        lambda p: p.convert(recipe="losless"), 2, ("losless", "did you mean lossless?", "balanced")
    ),
    "no such file": Bad(
        lambda p: p.convert(recipe=p.root / "mine.yaml"), 2, ("mine.yaml", "no such recipe file")
    ),
    "unknown key": Bad(
        with_change("ffn.keep_fractoin=0.5"), 2, ("ffn.keep_fractoin", "did you mean keep_fraction")
    ),
    "key twice": Bad(
        with_recipe("name: x\nhead: {}\nname: y\n"),
        2,
        ("mine.yaml, line 3", "duplicate key"),
    ),
    "no YAML": Bad(with_recipe("name: [x\n"), 2, ("mine.yaml", "not a valid recipe")),
    "nothing to do": Bad(with_recipe("name: x\n"), 2, ("nothing to convert", "give ffn, head")),
    "wrong type": Bad(
        with_change("data.num_tokens=many"), 2, ("data.num_tokens", "'many' is not a whole number")
    ),
    "out of range": Bad(
        with_change("ffn.keep_fraction=1.5"), 2, ("ffn.keep_fraction", "1.5 is not in (0, 1]")
    ),
    "one value too many": Bad(
        with_change("ffn.keep_fraction=[0.5, 0.5, 0.5]"),
        2,
        ("ffn.keep_fraction: 3 values for 2 layers", "list of 2"),
    ),
    "groups that do not divide": Bad(
        with_change("ffn.group_size=7"), 2, ("ffn.group_size", "64", "7")
    ),
    "no equals sign": Bad(
        with_change("ffn.keep_fraction"), 2, ("--set", "KEY=VALUE", "ffn.keep_fraction=0.5")
    ),
    "no recipe": Bad(lambda p: ["convert", p.model, p.out], 2, ("no recipe", "--recipe")),
    "a certificate that cannot be": Bad(
        with_change("head.bits=4"), 2, ("head.certified", "needs bits 8", "not bits 4")
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_that_is_wrong(name: str, hireconvert: Cli, place: Place) -> None:
    check(hireconvert, place, RECIPES[name])


# --------------------------------------------------------------------------- the text


def with_text(name: str, content: str | bytes, *changes: str) -> Prepare:
    return lambda place: place.change(f"data.source={place.file(name, content)}", *changes)


def with_empty_folder(place: Place) -> list[str | Path]:
    (place.root / "texts").mkdir()
    return place.change(f"data.source={place.root / 'texts'}")


TEXTS = {
    "no such file": Bad(
        with_change("data.source=/no/such.txt"), 4, ("'/no/such.txt' does not exist", "expected")
    ),
    "missing column": Bad(
        with_text("x.jsonl", '{"body": "some text"}\n'),
        4,
        ("x.jsonl, line 1", "no column 'text'", "the columns are: body"),
    ),
    "column of numbers": Bad(
        with_text("x.jsonl", '{"text": 3}\n'), 4, ("line 1", "holds int", "expected text")
    ),
    "broken line": Bad(
        with_text("x.jsonl", '{"text": "a"}\n{"text": \n'), 4, ("x.jsonl, line 2", "not valid JSON")
    ),
    "too little": Bad(
        with_text("x.txt", "Hello there."), 4, ("too little text", "minimum is 384", "num_tokens")
    ),
    "empty": Bad(with_text("x.txt", ""), 4, ("x.txt", "the file is empty")),
    "only blanks": Bad(with_text("x.txt", "  \n\n \n"), 4, ("no text in it",)),
    "not UTF-8": Bad(with_text("x.txt", b"caf\xe9 au lait"), 4, ("not UTF-8 text (byte 3)",)),
    "unknown ending": Bad(
        with_text("x.csv", "text\nhello\n"), 4, ("unknown kind of file", "expected .txt, .jsonl")
    ),
    "no parquet": Bad(
        with_text("x.parquet", b"PAR1 not really"), 4, ("x.parquet", "not a readable parquet file")
    ),
    "folder without text": Bad(with_empty_folder, 4, ("texts", "holds no .txt, .jsonl")),
    "chat without a template": Bad(
        with_text("x.jsonl", '{"messages": []}\n', "data.chat_column=messages"),
        4,
        ("chat column 'messages'", "no chat template"),
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_used(name: str, hireconvert: Cli, place: Place) -> None:
    check(hireconvert, place, TEXTS[name])


# --------------------------------------------------------------------------- a finished folder

VERBS: dict[str, tuple[str, ...]] = {
    "eval": (),
    "inspect": (),
    "verify": (),
    "generate": ("-p", "x", "--max-new-tokens", "2"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_on_what_is_not_converted(verb: str, hireconvert: Cli, place: Place) -> None:
    (place.root / "empty").mkdir()
    said = {
        "absent": "holds no config.json",
        "empty": "holds no config.json",
        "model": "this is not a converted model",
    }
    for name, message in said.items():
        given = [verb, place.root / name, *VERBS[verb]]
        check(hireconvert, place, Bad(lambda p, given=given: given, 4, (name, message)))


def spoil(name: str, change: Callable[[Path], object], *arguments: str) -> Prepare:
    def given(place: Place) -> list[str | Path]:
        change(place.done / name)
        return [arguments[0], place.done, *arguments[1:]]

    return given


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def set_format(path: Path) -> None:
    config = json.loads(path.read_text())
    config["hire"]["format_version"] = 2
    path.write_text(json.dumps(config))


def with_eval(*arguments: str, text: str) -> Prepare:
    return lambda place: ["eval", place.done, "--text", place.file("t.txt", text), *arguments]


FINISHED = {
    "one bit flipped": Bad(
        spoil(WEIGHTS, flip_last_byte, "verify"), 4, ("model.safetensors was changed", "SHA256SUMS")
    ),
    "a file gone": Bad(
        spoil("recipe.yaml", Path.unlink, "verify"), 4, ("recipe.yaml is listed", "missing")
    ),
    "a file more": Bad(
        spoil("more.txt", Path.touch, "verify"), 4, ("more.txt is not listed in SHA256SUMS",)
    ),
    "no checksums": Bad(spoil("SHA256SUMS", Path.unlink, "verify"), 4, ("SHA256SUMS", "cannot be")),
    "runtime edited": Bad(
        spoil("hire_ffn.py", flip_last_byte, *("generate", "-p", "x")),
        4,
        ("hire_ffn.py is not a runtime file", "Read it before", "upgrade"),
    ),
    "runtime gone": Bad(
        spoil("modeling_hire.py", Path.unlink, "inspect"), 4, ("modeling_hire.py",)
    ),
    "a format to come": Bad(
        spoil("config.json", set_format, "inspect"), 4, ("format_version is 2", "reads 1")
    ),
    "predictors gone": Bad(
        spoil("hire/predictors.safetensors", Path.unlink, "eval"), 4, ("is missing", "calls for")
    ),
    "tokenizer gone": Bad(
        spoil("tokenizer.json", Path.unlink, *("generate", "-p", "x")), 4, ("tokenizer",)
    ),
    "no words to go on": Bad(lambda p: ["generate", p.done, "-p", " "], 4, ("prompt is empty",)),
    "text too short": Bad(with_eval(text="a"), 4, ("has 1 tokens", "expected")),
    "text absent": Bad(lambda p: ["eval", p.done, "--text", p.root / "no.txt"], 4, ("no.txt",)),
    "one token": Bad(
        with_eval("--tokens", "1", text="abc"), 2, ("'--tokens'", "greater than or equal to 2")
    ),
    "recipe in the way": Bad(
        lambda p: ["recipes", "cp", "balanced", p.file("b.yaml", "x")], 2, ("b.yaml exists",)
    ),
}


@pytest.mark.parametrize("name", FINISHED)
def test_finished_folder_that_cannot_be_used(name: str, hireconvert: Cli, place: Place) -> None:
    check(hireconvert, place, FINISHED[name])


# --------------------------------------------------------------------------- a process of its own


def run_alone(place: Place, *arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hireconvert", *map(str, arguments)],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        cwd=place.root,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_hub_that_cannot_be_reached(place: Place) -> None:
    """Port 9 of the loopback interface refuses; nothing is cached."""
    code, out, err = run_alone(
        place,
        *("convert", "org/name", "out", "-r", "lossless"),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
        HF_HOME=str(place.root / "cache"),
    )
    assert (code, out) == (5, "")
    assert "Hub cannot be reached" in err and "org/name" in err and "network" in err
    assert "Traceback" not in err
    assert not place.out.exists() and not (place.root / "out.work").exists()


def test_bad_model_in_a_process_of_its_own(place: Place) -> None:
    poison(place.model)
    code, out, err = run_alone(place, "convert", "model", "out", "-r", "tiny-ci")
    assert (code, out) == (4, "")
    assert "has 5 values that are NaN" in err and "Traceback" not in err
    assert not place.out.exists() and not (place.root / "out.work").exists()
