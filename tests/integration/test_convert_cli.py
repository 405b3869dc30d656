"""The command line on tiny models: what it writes, refuses, resumes and survives."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import hireconvert
from hireconvert import cli, stages, workspace
from hireconvert.export import write_checksums
from hireconvert.runtime import RUNTIME_FILES
from tests.tiny_files import SIZES, save_tiny, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hireconvert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished conversion, shared by the tests that only read."""
    out = tmp_path_factory.mktemp("out") / "converted"
    arguments = ["hireconvert", "convert", str(source), str(out), "--recipe", "tiny-ci"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", arguments)
        cli.main()
    assert ended.value.code in (0, None)
    return out


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """A copy of the finished conversion that a test may break."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of the report, all but the timings."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("hire_report.json", "SHA256SUMS"):
            content[path.relative_to(folder).as_posix()] = path.read_bytes()
    report = json.loads((folder / "hire_report.json").read_text())
    del report["timings"]
    content["hire_report.json"] = json.dumps(report).encode()
    return content


# --------------------------------------------------------------------------- what is written


def test_folder_holds_what_the_format_says(source: Path, converted: Path) -> None:
    names = {
        path.relative_to(converted).as_posix() for path in converted.rglob("*") if path.is_file()
    }
    tokenizer = {path.name for path in source.iterdir() if path.name.startswith("tokenizer")}
    documents = {"README.md", "SHA256SUMS", "hire_report.json", "recipe.yaml"}
    weights = {"model.safetensors", "hire/predictors.safetensors"}
    settings = {"config.json", "generation_config.json"}
    assert names == documents | weights | settings | tokenizer | set(RUNTIME_FILES)
    same = converted / "model.safetensors"
    assert same.read_bytes() == (source / "model.safetensors").read_bytes()
    runtime = Path(hireconvert.__file__).parent / "runtime"
    for name in RUNTIME_FILES:
        assert (converted / name).read_bytes() == (runtime / name).read_bytes()
    listed = (converted / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in listed} == names - {"SHA256SUMS"}
    assert not converted.with_name("converted.work").exists()


def test_config_is_native_with_two_entries_and_one_object(source: Path, converted: Path) -> None:
    before = json.loads((source / "config.json").read_text())
    after = json.loads((converted / "config.json").read_text())
    hire, auto_map = after.pop("hire"), after.pop("auto_map")
    assert after == before
    assert auto_map == {
        "AutoModel": "modeling_hire.HireLlamaModel",
        "AutoModelForCausalLM": "modeling_hire.HireLlamaForCausalLM",
    }
    assert hire["format_version"] == 1 and len(hire["ffn"]["layers"]) == 2
    assert hire["ffn"]["layers"][0]["num_kept"] == 32


def test_nothing_written_names_this_machine(source: Path, converted: Path) -> None:
    for name in ("hire_report.json", "README.md", "recipe.yaml", "config.json"):
        text = (converted / name).read_text()
        assert str(source.parent) not in text and str(converted.parent) not in text
        assert os.uname().nodename not in text


def test_report_is_complete(converted: Path) -> None:
    report = json.loads((converted / "hire_report.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert 0.5 < report["recall"]["worst"] <= report["recall"]["mean"] <= 1
    assert report["evaluation"]["dense"]["perplexity"] > 1
    assert report["evaluation"]["all"]["perplexity"] != report["evaluation"]["dense"]["perplexity"]
    assert report["data"]["num_tokens"] >= 256
    tokens = report["bytes_per_token"]
    assert tokens["speedup_bound"] == round(tokens["dense"] / tokens["converted"], 4)


def test_both_views_load_with_every_key(converted: Path, source: Path) -> None:
    ids = torch.arange(2, 40)[None]
    dense, info = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert type(dense).__name__ == "LlamaForCausalLM"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        assert torch.equal(dense(ids).logits, original(ids).logits)
        sparse = hireconvert.load(converted)
        assert type(sparse).__name__ == "HireLlamaForCausalLM"
        assert torch.equal(sparse(ids).logits, original(ids).logits)  # a prefill is dense


def test_groups_reorder_neurons_and_keep_the_function(
    run: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    code, _, err = run(
        *("convert", source, tmp_path / "out", "-r", "tiny-ci", "--set", "ffn.group_size=4"),
        *("--set", "ffn.common_path=0.25", "--set", "evaluate.num_tokens=0"),
    )
    assert code == 0, err
    name = "model.layers.0.mlp.gate_proj.weight"
    before = load_file(source / "model.safetensors")[name]
    after = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert not torch.equal(before, after)
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        old = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
        new = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(
            ids
        ).logits
    assert torch.allclose(old, new, rtol=1e-4, atol=1e-4)
    assert run("verify", tmp_path / "out")[0] == 0


def test_small_shards_and_local_text(run: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    text = tmp_path / "private" / "notes.txt"
    text.parent.mkdir()
    text.write_text("\n\n\n".join(f"Note {n}: the quick brown fox, {n * 7}." for n in range(200)))
    code, _, err = run(
        *("convert", source, tmp_path / "out", "-r", "tiny-ci", "--set", f"data.source={text}"),
        *("--set", "output.max_shard_gb=3.0e-5", "--set", "evaluate.num_tokens=0"),
    )
    assert code == 0, err
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "source: notes.txt" in recipe and "private" not in recipe
    assert "private" not in (tmp_path / "out" / "hire_report.json").read_text()
    assert run("inspect", tmp_path / "out")[0] == 0


def test_lossless_calibrates_nothing(
    run: Callable[..., Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("lossless must not load weights")

    monkeypatch.setattr(stages.DenseCheckpoint, "load_model", never)
    code, out, _ = run("convert", source, tmp_path / "out", "-r", "lossless", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["layers"] == [] and report["data"] is None
    assert not (tmp_path / "out" / "hire").exists()
    assert run("verify", tmp_path / "out")[0] == 0


def test_low_rank_head_is_fitted_and_verified(
    run: Callable[..., Any], source: Path, tmp_path: Path
) -> None:
    code, _, err = run(
        *("convert", source, tmp_path / "out", "-r", "tiny-ci", "--set", "head.kind=lr"),
        *("--set", "head.rank=8", "--set", "head.certified=false", "--set", "ffn=null"),
    )
    assert code == 0, err
    tensors = load_file(tmp_path / "out" / "hire" / "predictors.safetensors")
    assert set(tensors) == {"head.factor_in", "head.lift"}
    assert run("verify", tmp_path / "out")[0] == 0


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def test_mixture_of_experts_converts_the_head_only(
    run: Callable[..., Any], mixture: Path, tmp_path: Path
) -> None:
    code, _, err = run("convert", mixture, tmp_path / "out", "-r", "tiny-ci")
    assert code == 0 and "only the head is converted" in err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hire"]["ffn"] is None and config["hire"]["head"]


def test_mixture_of_experts_loads_from_its_own_code(
    run: Callable[..., Any], mixture: Path, tmp_path: Path
) -> None:
    assert run("convert", mixture, tmp_path / "out", "-r", "lossless")[0] == 0
    assert run("verify", tmp_path / "out")[0] == 0


# --------------------------------------------------------------------------- the other verbs


def test_inspect_agrees_with_the_plan(
    run: Callable[..., Any], source: Path, converted: Path, tmp_path: Path
) -> None:
    code, out, _ = run("inspect", converted, "--json")
    assert code == 0
    found = json.loads(out)
    code, out, _ = run("convert", source, tmp_path / "x", "-r", "tiny-ci", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.work").exists()
    assert plan["bytes_per_token"] == found["bytes_per_token"]
    for planned, real in zip(plan["layers"], found["layers"], strict=True):
        assert real.pop("recall") > 0.5
        assert real.pop("kept_per_token") is None  # the number is fixed
        assert planned == real
    tensors = load_file(converted / "hire" / "predictors.safetensors")
    assert plan["predictor_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert plan["estimated_seconds"] > 0 and plan["peak_memory_bytes"] > plan["predictor_bytes"]


def test_dry_run_reads_no_weights(run: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(source, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    assert run("convert", bad, tmp_path / "out", "-r", "tiny-ci", "--dry-run")[0] == 0
    code, _, err = run("convert", bad, tmp_path / "out", "-r", "tiny-ci")
    assert code == 4 and "NaN" in err and "model.norm.weight" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_human_tables_name_every_layer(run: Callable[..., Any], converted: Path) -> None:
    code, out, _ = run("inspect", converted)
    assert code == 0
    for word in ("layer", "neurons", "candidates", "recall", "speed-up bound", "certified"):
        assert word in out


def test_verify_proves_the_sparse_path(run: Callable[..., Any], converted: Path) -> None:
    code, out, _ = run("verify", converted, "--json")
    assert code == 0
    checks = {check["name"]: check["detail"] for check in json.loads(out)["checks"]}
    assert checks["fresh process"] == "loads as HireLlamaForCausalLM without hireconvert"
    assert checks["sparse path"].startswith("2 FFN layers kept 32 neurons per token; head rescored")


def test_generate_streams_the_same_text_for_a_seed(
    run: Callable[..., Any], converted: Path
) -> None:
    arguments = ("generate", converted, "-p", "hello", "--max-new-tokens", "12")
    code, first, _ = run(*arguments, "--temperature", "1", "--seed", "3")
    assert code == 0 and first.endswith("\n") and len(first) > 1
    assert run(*arguments, "--temperature", "1", "--seed", "3")[1] == first
    assert run(*arguments, "--temperature", "1", "--seed", "4")[1] != first
    assert run(*arguments)[1] == run(*arguments)[1]
    assert run("generate", converted, "-p", "  ")[0] == 4


def test_eval_prints_one_document(run: Callable[..., Any], converted: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words to be scored. " * 40)
    code, out, _ = run("eval", converted, "--text", text, "--tokens", "128", "--json")
    assert code == 0
    assert json.loads(out)["texts"]["text.txt"]["dense"]["perplexity"] > 1
    code, _, err = run("eval", converted, "--text", tmp_path / "absent.txt")
    assert code == 4 and "absent.txt" in err


def test_recipes_and_schema(run: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = run("recipes", "ls", "--json")
    assert code == 0 and {"demo", "lossless", "balanced", "aggressive"} <= set(json.loads(out))
    assert run("recipes", "cp", "balanced", tmp_path)[0] == 0
    assert run("recipes", "validate", tmp_path / "balanced.yaml")[0] == 0
    code, _, err = run("recipes", "cp", "balanced", tmp_path)
    assert code == 2 and "exists" in err
    assert run("recipes", "cp", "nothing", tmp_path)[0] == 2
    code, out, _ = run("recipes", "show", "lossless", "--set", "seed=7")
    assert code == 0 and "seed: 7" in out
    assert "$schema" in json.loads(run("schema")[1])
    assert run("--version")[1].startswith("hireconvert ")
    assert "Exit codes" in run("--help")[1]


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        (["-r", "no-such"], 2, "no-such"),
        (["-r", "tiny-ci", "--set", "ffn.keep=1"], 2, "ffn.keep"),
        (["-r", "tiny-ci", "--set", "ffn.keep_fraction=[0.5,0.5,0.5]"], 2, "2 layers"),
        (["-r", "tiny-ci", "--set", "ffn.group_size=7"], 2, "ffn.group_size"),
        (["-r", "tiny-ci", "--set", "data.source=/no/such.txt"], 4, "data.source"),
        (["-r", "tiny-ci", "--revision", "main"], 2, "--revision"),
        (["-r", "tiny-ci", "--resume", "--overwrite"], 2, "contradict"),
        ([], 2, "--recipe"),
        (["-r", "tiny-ci", "--no-such-flag"], 2, "no-such-flag"),
    ],
)
def test_refused_before_anything_is_written(
    run: Callable[..., Any],
    source: Path,
    tmp_path: Path,
    arguments: list[str],
    expected: int,
    message: str,
) -> None:
    code, out, err = run("convert", source, tmp_path / "out", *arguments)
    assert code == expected and message in err
    assert out == "" and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_missing_model_and_converted_model(
    run: Callable[..., Any], converted: Path, tmp_path: Path
) -> None:
    code, _, err = run("convert", tmp_path / "absent", tmp_path / "out", "-r", "lossless")
    assert code == 4 and "absent" in err
    code, _, err = run("convert", converted, tmp_path / "out", "-r", "lossless")
    assert code == 4 and "already converted" in err


def test_out_is_never_the_model(run: Callable[..., Any], source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "folder" / "model"))
    for out in (model, tmp_path / "folder", model / ".." / "model"):
        code, _, err = run("convert", model, out, "-r", "lossless", "--overwrite")
        assert code == 2 and "holds MODEL" in err
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    code, _, err = run("convert", model, tmp_path / "link", "-r", "lossless", "--overwrite")
    assert code == 2 and "symbolic link" in err
    assert (model / "model.safetensors").exists()


def test_our_own_bugs_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("hireconvert.pipeline.open_checkpoint", broken)
    monkeypatch.setattr(
        sys, "argv", ["hireconvert", "convert", str(source), str(tmp_path / "o"), "-r", "lossless"]
    )
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.main()


def test_not_enough_disk_is_said_before_work(
    run: Callable[..., Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage)
    code, _, err = run("convert", source, tmp_path / "out", "-r", "tiny-ci")
    assert code == 4 and "not enough disk space" in err
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- resume


def test_finished_folder_is_left_alone(
    run: Callable[..., Any], source: Path, copy: Path, converted: Path
) -> None:
    code, _, err = run("convert", source, copy, "-r", "tiny-ci")
    assert code == 2 and "--overwrite" in err and "--resume" in err
    code, out, _ = run("convert", source, copy, "-r", "tiny-ci", "--resume")
    assert code == 0 and "already complete" in out
    code, _, err = run("convert", source, copy, "-r", "tiny-ci", "--resume", "--set", "seed=5")
    assert code == 4 and "seed: found 0, expected 5" in err
    assert (copy / "SHA256SUMS").read_bytes() == (converted / "SHA256SUMS").read_bytes()
    assert not copy.with_name("copy.work").exists()


def test_overwrite_replaces_at_the_end(
    run: Callable[..., Any], source: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "mine.txt").write_text("x")
    arguments = ("convert", source, copy, "-r", "tiny-ci", "--set", "evaluate.num_tokens=0")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hireconvert.pipeline.publish", stop)
        code, _, err = run(*arguments, "--overwrite")
    assert code == 130 and "--resume continues" in err
    assert (copy / "mine.txt").exists()
    assert run(*arguments, "--resume")[0] == 0
    assert not (copy / "mine.txt").exists()
    assert not copy.with_name("copy.work").exists()
    assert run("verify", copy)[0] == 0


def test_resume_refuses_what_differs(
    run: Callable[..., Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, calls = stages.distill_layer, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "distill_layer", interrupted)
        code, _, err = run("convert", source, out, "-r", "tiny-ci")
    assert code == 130 and "--resume" in err and not out.exists()
    code, _, err = run("convert", source, out, "-r", "tiny-ci")
    assert code == 2 and "unfinished" in err
    other = ("--set", "ffn.keep_fraction=0.25")
    code, _, err = run("convert", source, out, "-r", "tiny-ci", "--resume", *other)
    assert code == 4 and "recipe.ffn.keep_fraction: found 0.5, expected 0.25" in err
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        code, _, err = run("convert", source, out, "-r", "tiny-ci", "--resume")
    assert code == 4 and "machine.threads: found 1, expected 99" in err
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(stages, "distill_layer", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
        assert run("convert", source, out, "-r", "tiny-ci", "--resume")[0] == 0
    assert len(calls) == 1  # the first layer was kept


# --------------------------------------------------------------------------- hostile folders


def edit_hire(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["hire"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "hire" / "predictors.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def layer_of(hire: dict[str, Any]) -> dict[str, Any]:
    layer: dict[str, Any] = hire["ffn"]["layers"][0]
    return layer


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "too many candidates": (
        lambda f: edit_hire(f, lambda h: layer_of(h).update(num_candidates=65)),
        "num_candidates",
    ),
    "negative kept": (
        lambda f: edit_hire(f, lambda h: layer_of(h).update(num_kept=-1)),
        "num_kept",
    ),
    "kept is text": (
        lambda f: edit_hire(f, lambda h: layer_of(h).update(num_kept="32")),
        "num_kept",
    ),
    "more neurons than the weights": (
        lambda f: edit_hire(f, lambda h: layer_of(h).update(num_neurons=128)),
        "layers.0",
    ),
    "unknown kind": (
        lambda f: edit_hire(f, lambda h: layer_of(h)["predictor"].update(kind="evil")),
        "kind",
    ),
    "huge rank": (
        lambda f: edit_hire(f, lambda h: layer_of(h)["predictor"].update(kind="lr", rank=10**6)),
        "layers.0",
    ),
    "missing layers": (lambda f: edit_hire(f, lambda h: h["ffn"]["layers"].pop()), "ffn.layers"),
    "layers no list": (lambda f: edit_hire(f, lambda h: h["ffn"].update(layers=3)), "ffn.layers"),
    "layout no names": (lambda f: edit_hire(f, lambda h: h.update(layout={})), "layout"),
    "future format": (lambda f: edit_hire(f, lambda h: h.update(format_version=2)), "version"),
    "head of text": (lambda f: edit_hire(f, lambda h: h.update(head="yes")), "head"),
    "absurd certify_top": (
        lambda f: edit_hire(f, lambda h: h["head"].update(certify_top=0)),
        "certify_top",
    ),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("layers.1.scale")),
        "layers.1.scale",
    ),
    "tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
        "extra",
    ),
    "tensor of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"layers.0.mean": torch.zeros(31)})),
        "layers.0.mean",
    ),
    "tensor of NaN": (
        lambda f: edit_tensors(f, lambda t: t["layers.0.bias"].fill_(float("nan"))),
        "layers.0.bias",
    ),
    "truncated predictors": (
        lambda f: os.truncate(f / "hire" / "predictors.safetensors", 3000),
        "predictors.safetensors",
    ),
    "no predictors": (
        lambda f: (f / "hire" / "predictors.safetensors").unlink(),
        "predictors.safetensors",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / "model.safetensors", 3000),
        "model.safetensors",
    ),
    "foreign code": (
        lambda f: (f / "modeling_hire.py").write_text("print('mine')"),
        "modeling_hire.py",
    ),
    "extra code": (lambda f: (f / "evil.py").write_text("print('mine')"), "evil.py"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused(run: Callable[..., Any], copy: Path, name: str) -> None:
    damage, message = HOSTILE[name]
    damage(copy)
    write_checksums(copy)
    for verb in (("verify", copy), ("generate", copy, "-p", "x", "--max-new-tokens", "2")):
        code, out, err = run(*verb)
        assert code == 4, (verb, err)
        assert message in err and "Traceback" not in err and out == ""


def test_changed_file_fails_its_checksum(run: Callable[..., Any], copy: Path) -> None:
    with (copy / "recipe.yaml").open("a") as stream:
        stream.write("# mine\n")
    code, _, err = run("verify", copy)
    assert code == 4 and "recipe.yaml was changed" in err
    (copy / "recipe.yaml").unlink()
    code, _, err = run("verify", copy)
    assert code == 4 and "recipe.yaml is listed" in err


def test_console_script_in_a_process_of_its_own(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "hireconvert", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 4
    assert process.stderr.startswith("error: ") and "Traceback" not in process.stderr
    assert process.stdout == ""
