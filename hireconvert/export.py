"""Write the finished folder that docs/format.md specifies, in two steps around the evaluation.

`write_model` makes what loads: dense weights, config, predictors, runtime, tokenizer.
`write_documents` adds what tells: recipe, report, card, checksums.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from hireconvert.accounting import head_width, hire_tensors
from hireconvert.errors import InputError
from hireconvert.headers import INDEX_FILE, read_headers
from hireconvert.loading import CHECKSUMS, PREDICTORS, REPORT, RUNTIME_FOLDER
from hireconvert.recipe import Recipe, dump_recipe
from hireconvert.runtime import RUNTIME_FILES
from hireconvert.runtime.hire_config import FORMAT_VERSION, check_hire_config
from hireconvert.runtime.modeling_hire import hire_class
from hireconvert.schema import DataRecipe, FfnRecipe, FinetuneRecipe
from hireconvert.workspace import file_sha256, flatten, write_json

# What travels from the source folder besides weights and config. A list of what is taken, so
# that code, pickles and private files of the source never do.
CARRIED = (
    "tokenizer*.json",
    "tokenizer.model",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)

_WHAT_SELECTION_DOES = (
    "Decoding reads fewer bytes per token: cheap predictors say which FFN neurons and which",
    "rows of the output head matter, and those are computed exactly. Prefill is dense.",
)
_WHAT_COPIES_DO = (
    "Decoding reads fewer bytes per token: FFN weights are rounded to 4 bits, and of the output",
    "head the rows that can matter are read alone. Prefill is dense.",
)


@dataclass(frozen=True)
class Conversion:
    """Everything that decides the bytes of a finished model."""

    source: Path
    model_class: type[PreTrainedModel]
    base_class: type[PreTrainedModel]
    hire: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rewritten: PreTrainedModel | None = None  # saved instead of copying the source's files


def hire_dict(
    recipe: Recipe,
    *,
    layout: Mapping[str, Any] | None,
    layers: list[Mapping[str, Any] | None] | None,
    head: Mapping[str, Any] | None,
    attention: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """`config.hire` of docs/format.md."""
    return {
        "format_version": FORMAT_VERSION,
        "layout": None if layers is None or layout is None else dict(layout),
        "ffn": None if layers is None else {"layers": layers},
        "head": None if head is None else dict(head),
        **({} if attention is None else {"attention": dict(attention)}),
        "max_decode_queries": recipe.decode.max_decode_queries,
        "max_sparse_rows": recipe.decode.max_sparse_rows,
    }


def write_model(conversion: Conversion, folder: Path, *, max_shard_gb: float) -> None:
    """Write everything that loads into the empty `folder`. Raises InputError."""
    if conversion.rewritten is not None:
        conversion.rewritten.save_pretrained(folder, max_shard_size=f"{max_shard_gb}GB")
    else:
        _copy_weights(conversion.source, folder)
    copy_companions(conversion.source, folder)
    _write_config(conversion, folder)
    _write_predictors(conversion, folder)
    for name in RUNTIME_FILES:
        shutil.copyfile(RUNTIME_FOLDER / name, folder / name)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files of a dense folder that travel with weights and config."""
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _copy_weights(source: Path, folder: Path) -> None:
    """Byte-identical files, so that a Hub stores them once for base and converted model."""
    files = {header.file for header in read_headers(source).values()}
    if len(files) > 1:
        files.add(INDEX_FILE)
    for name in sorted(files):
        shutil.copyfile(source / name, folder / name)


def needs_resharding(source: Path, max_shard_gb: float) -> bool:
    """Whether a weight file of the source is larger than the recipe allows."""
    files = {header.file for header in read_headers(source).values()}
    return any((source / name).stat().st_size > max_shard_gb * 1e9 for name in files)


def _write_config(conversion: Conversion, folder: Path) -> None:
    config = json.loads((conversion.source / "config.json").read_text(encoding="utf-8"))
    native, base = conversion.model_class.__name__, conversion.base_class.__name__
    for cls in (conversion.model_class, conversion.base_class):
        try:
            hire_class(cls)
        except AttributeError as error:
            raise InputError(
                f"{cls.__name__} is not a class of Transformers, so the converted model could not "
                "load it. Models with their own modeling code are not supported."
            ) from error
    config["architectures"] = [native]
    config["auto_map"] = {
        "AutoModel": f"modeling_hire.Hire{base}",
        "AutoModelForCausalLM": f"modeling_hire.Hire{native}",
    }
    config["hire"] = dict(conversion.hire)
    write_json(folder / "config.json", config)
    check_hire_config(AutoConfig.from_pretrained(folder))


def _write_predictors(conversion: Conversion, folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder).get_text_config()
    expected = hire_tensors(conversion.hire, config.hidden_size, head_width(config))
    found = {name: tuple(tensor.shape) for name, tensor in conversion.tensors.items()}
    wanted = {name: shape for name, (_, shape) in expected.items()}
    assert found == wanted, f"predictors differ from their specs: {found.items() ^ wanted.items()}"
    if found:
        (folder / PREDICTORS).parent.mkdir()
        ordered = {name: conversion.tensors[name].contiguous() for name in sorted(found)}
        save_file(ordered, folder / PREDICTORS, {"format": "pt"})


# --------------------------------------------------------------------------- documents


def write_documents(
    folder: Path, *, source: Path, recipe: Recipe, report: Mapping[str, Any]
) -> None:
    """Write recipe, report, card and checksums into a folder from `write_model`."""
    (folder / "recipe.yaml").write_text(dump_recipe(public_recipe(recipe)), encoding="utf-8")
    write_json(folder / REPORT, report)
    card = render_card(report, license_of(source), recipe.ffn)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_checksums(folder)


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe with local text paths cut to file names: paths tell of private machines."""

    def public(section: DataRecipe | FinetuneRecipe | None) -> Any:
        source = None if section is None else section.source
        if section is None or source is None or source == "self" or source.startswith("hub:"):
            return section
        return section.model_copy(update={"source": Path(source).name})

    changes = {"data": public(recipe.data), "finetune": public(recipe.finetune)}
    return recipe.model_copy(update=changes)


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS, in the form of sha256sum, over every other file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def license_of(source: Path) -> str | None:
    """The licence that the source's own model card declares, or None."""
    try:
        text = (source / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    value = front.get("license") if isinstance(front, dict) else None
    return value if isinstance(value, str) else None


def render_card(report: Mapping[str, Any], license_name: str | None, ffn: FfnRecipe | None) -> str:
    """The model card: metadata that the Hub reads, how to load, what was measured."""
    base = report["model"]["base_model"]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if license_name:
        metadata["license"] = license_name
    if base:
        metadata["base_model"] = base
        metadata["base_model_relation"] = "finetune" if report["finetune"] else "quantized"
    metadata["tags"] = ["hireconvert", "activation-sparsity", "custom_code"]
    what = _WHAT_COPIES_DO if ffn is not None and ffn.rows == "copies" else _WHAT_SELECTION_DOES
    title = f"{base or report['model']['architecture']} with HiRE ({report['recipe']})"
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        f"# {title}",
        "",
        *what,
        f"Converted by hireconvert {report['versions']['hireconvert']}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
        "```",
        "",
        "Without `trust_remote_code` the folder loads as the ordinary dense model.",
        "",
        "| measured | value |",
        "|---|--:|",
        *(f"| {name} | {value} |" for name, value in _card_rows(report, ffn)),
        "",
        "All measurements: `hire_report.json`. Recipe: `recipe.yaml`. Checksums: `SHA256SUMS`.",
        "",
    ]
    return "\n".join(lines)


def _card_rows(report: Mapping[str, Any], ffn: FfnRecipe | None) -> Iterator[tuple[str, str]]:
    read = report["bytes_per_token"]
    yield "bytes read per token, dense", f"{read['dense']:,}"
    yield "bytes read per token, converted", f"{read['converted']:,}"
    copies = ffn is not None and ffn.rows == "copies"
    if ffn is not None and ffn.unselected is not None and not copies and report["layers"]:
        name = f"of these for neurons left out, by {ffn.unselected.bits}-bit estimate"
        yield name, f"{read['ffn']['unselected']:,}"
    yield "speed-up bound from bytes", f"{read['speedup_bound']:.2f}"
    if report["recall"] and not copies:
        recall = report["recall"]
        yield "recall of the true top k, mean", f"{recall['mean']:.4f}"
        yield f"recall, worst layer ({recall['worst_layer']})", f"{recall['worst']:.4f}"
    if report["finetune"]:
        yield "tokens the weights were trained on", f"{report['finetune']['text']['num_tokens']:,}"
    for key, value in flatten(report["evaluation"] or {}).items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            yield key, f"{value:.6g}" if isinstance(value, float) else str(value)
