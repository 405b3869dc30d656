"""A whole conversion: checks, the ordered stages, the report, and OUT by one rename.

A stage's fingerprint holds that of the stage before it and the recipe sections it reads, so a
changed section is noticed at the first stage that it concerns.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hireconvert import planning, stage_budget, stage_rule
from hireconvert.accounting import token_bytes
from hireconvert.checkpoint import open_checkpoint
from hireconvert.data import TokenData
from hireconvert.errors import InputError, UsageError
from hireconvert.export import public_recipe, write_documents
from hireconvert.loading import REPORT, RUNTIME_FOLDER
from hireconvert.recipe import Recipe
from hireconvert.runtime import RUNTIME_FILES
from hireconvert.runtime.hire_config import FORMAT_VERSION
from hireconvert.stage_finetune import (
    ARTIFACTS,
    finetune_weights,
    training_device,
    training_text,
)
from hireconvert.stages import (
    Fitted,
    Reporter,
    Run,
    evaluate_export,
    export_model,
    fit_attention_codes,
    fit_head,
    fit_predictors,
    make_tokens,
)
from hireconvert.version import __version__
from hireconvert.workspace import (
    Workspace,
    differences,
    file_sha256,
    open_workspace,
    publish,
    require_disk,
)

DEVICE = "cpu"


@dataclass(frozen=True)
class Job:
    """What is converted into what, and how."""

    model: str
    out: Path
    recipe: Recipe
    revision: str | None = None
    trust_remote_code: bool = False


def convert(
    job: Job, reporter: Reporter, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """The report of the finished conversion, with `status` "converted" or "already complete".

    Raises a HireError for whatever the user can mend; the work folder stays for --resume.
    """
    out = _checked_out(job)
    _check_text_sources(job.recipe)
    with open_workspace(out, resume=resume, overwrite=overwrite) as space:
        with reporter.stage("reading the model"):
            checkpoint = open_checkpoint(
                job.model,
                work=space.root,
                revision=job.revision,
                trust_remote_code=job.trust_remote_code,
            )
        for warning in checkpoint.warnings:
            reporter.note(f"warning: {warning}")
        tensors = {name: (head.dtype, head.shape) for name, head in checkpoint.headers.items()}
        skeleton = planning.make_skeleton(checkpoint.config, tensors)
        hire = planning.planned_hire(skeleton, job.recipe)
        run = Run(job.recipe, space, checkpoint, skeleton, hire, reporter)
        finished = _finished_report(run, out) if resume else None
        if finished is not None:
            space.remove()
            return {**finished, "status": "already complete"}
        plan = planning.plan(skeleton, job.recipe)
        for note in plan["notes"]:
            reporter.note(f"note: {note}")
        require_disk(space.root, plan["disk_bytes"] - _finished_bytes(space))
        report = _run_stages(run, plan)
        publish(space.path("export") / "model", out)
        space.remove()
        return {**report, "status": "converted"}


def _checked_out(job: Job) -> Path:
    """OUT as an absolute path. Raises UsageError where writing it would destroy the model."""
    given = job.out.expanduser()
    if given.is_symlink():
        raise UsageError(f"OUT {given} is a symbolic link; name the folder it points to.")
    out, model = given.resolve(), Path(job.model).expanduser()
    if model.exists() and (out == model.resolve() or out in model.resolve().parents):
        raise UsageError(f"OUT {out} holds MODEL {job.model}; name another folder.")
    if not out.name:
        raise UsageError(f"OUT {out} cannot be created; name a folder below it.")
    return out


def _check_text_sources(recipe: Recipe) -> None:
    sources = {}
    if recipe.ffn is not None or (recipe.head is not None and recipe.head.kind == "lr"):
        sources["data.source"] = recipe.data.source
    if recipe.finetune is not None and recipe.finetune.source is not None:
        sources["finetune.source"] = recipe.finetune.source
    for key, source in sources.items():
        local = source != "self" and not source.startswith("hub:")
        if local and not Path(source).expanduser().exists():
            raise InputError(
                f"{key} {source!r} does not exist; expected a file, a folder, hub:org/name or "
                f"self (--set {key}=...)."
            )


def _finished_bytes(space: Workspace) -> int:
    """Bytes of the artifacts that a resumed conversion need not write again."""
    stages = (stage_rule.STAGE, *stage_budget.ARTIFACTS, *ARTIFACTS)
    folders = ("tokens", *stages, "activations", "predictors", "attention", "export")
    files = (file for name in folders for file in space.path(name).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def _finished_report(run: Run, out: Path) -> dict[str, Any] | None:
    """The report in OUT when it is complete and of the same conversion, None when OUT is absent.

    Raises InputError naming what differs, unless this conversion was started to replace it.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return None
    try:
        report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
        lines = differences(report["fingerprint"], _fingerprints(run)["evaluation"])
    except (OSError, ValueError, KeyError, TypeError):
        lines = [f"{REPORT}: found nothing readable, expected that of a finished conversion"]
    if not lines:
        return report
    if run.space.replaces_out:
        return None
    raise InputError(
        f"cannot resume: OUT {out} holds something else:\n  "
        + "\n  ".join(lines)
        + "\nName another OUT, or give --overwrite to replace it."
    )


# --------------------------------------------------------------------------- fingerprints


def _fingerprints(run: Run) -> dict[str, dict[str, Any]]:
    """The fingerprint of every stage; each holds the one before it."""
    recipe = public_recipe(run.recipe).model_dump(mode="json")
    base: dict[str, Any] = {
        "model": run.checkpoint.fingerprint,
        "versions": {
            "hireconvert": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "device": DEVICE,
        },
        "seed": recipe["seed"],
    }
    tokens = rule = budget = tuned = activations = predictors = attention = base
    if planning.needs_text(run.hire):
        data = {**recipe["data"], "sha256": _source_digest(run.recipe.data.source)}
        tokens = {**base, "recipe": {"data": data}}
        rule = {**base, "recipe": {"data": data, "ffn": recipe["ffn"]}}
        budget = {**base, "recipe": {"data": data, "ffn": recipe["ffn"], "head": recipe["head"]}}
        tuned, tuning = tokens, _tuning(run, recipe)
        if tuning:
            tuned = {**base, "recipe": {"data": data, "ffn": recipe["ffn"], **tuning}}
            tuned["machine"] = {**base["machine"], "finetune_device": training_device()}
        activations = {**tuned, "with_head": run.low_rank_head}
        sections = {"data": data, "ffn": recipe["ffn"], **tuning}
        predictors = {**activations, "recipe": sections}
        attention = {**tuned, "recipe": {**tuned["recipe"], "attention": recipe["attention"]}}
    made_from = {**predictors.get("recipe", {}), "name": recipe["name"]}
    made_from |= {
        key: recipe[key] for key in ("description", "head", "attention", "decode", "output")
    }
    export = {**predictors, "recipe": {"ffn": recipe["ffn"], **made_from}}
    export["runtime"] = {name: file_sha256(RUNTIME_FOLDER / name) for name in RUNTIME_FILES}
    evaluation = {**export, "recipe": {**export["recipe"], "evaluate": recipe["evaluate"]}}
    return {
        "tokens": tokens,
        "rule": rule,
        "budget": budget,
        "finetune": tuned,
        "activations": activations,
        "predictors": predictors,
        "attention": attention,
        "export": export,
        "evaluation": evaluation,
    }


def _tuning(run: Run, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section and the digest of its text, as one part; empty where none applies."""
    if run.recipe.finetune is None or run.hire["ffn"] is None:
        return {}
    digest = _source_digest(training_text(run.recipe).source)
    return {"finetune": {**recipe["finetune"], "sha256": digest}}


def _source_digest(source: str) -> str | None:
    """A digest over the files of a local source; None where the name says all."""
    if source == "self" or source.startswith("hub:"):
        return None
    path = Path(source).expanduser()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digests = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()


def _run_stages(run: Run, plan: Mapping[str, Any]) -> dict[str, Any]:
    prints = _fingerprints(run)
    tokens = rule = budget = training = results = head = None
    if planning.needs_text(run.hire):
        tokens = make_tokens(run, prints["tokens"])
        rule = stage_rule.choose_rule(run, prints["rule"], tokens)
        budget = stage_budget.share_out(run, prints["budget"], tokens)
        training = finetune_weights(run, prints["finetune"], tokens)
        results = fit_predictors(run, prints, tokens)
        head = fit_head(run, prints, tokens)
        fit_attention_codes(run, prints["attention"], tokens)
    folder = export_model(run, prints["export"], results or [], head)
    evaluation = evaluate_export(run, prints["evaluation"], folder, tokens)
    report = _report(run, prints["evaluation"], tokens, results or [], head)
    report["rule"] = rule
    report["budget"] = budget
    report["finetune"] = training
    report["evaluation"] = evaluation
    report["notes"] = [*run.checkpoint.warnings, *plan["notes"]]
    report["timings"] = dict(run.timings)
    write_documents(folder, source=run.checkpoint.folder, recipe=run.recipe, report=report)
    return report


# --------------------------------------------------------------------------- the report


def _report(
    run: Run,
    fingerprint: Mapping[str, Any],
    tokens: TokenData | None,
    results: list[Fitted],
    head: Fitted | None,
) -> dict[str, Any]:
    config = run.skeleton.config
    layers = [{"layer": index, **result.report} for index, result in enumerate(results)]
    hire = {**run.hire, "ffn": {"layers": [r.spec for r in results]} if results else None}
    source = run.checkpoint.source
    return {
        "format_version": FORMAT_VERSION,
        "recipe": run.recipe.name,
        "seed": run.recipe.seed,
        "model": {
            "source": source,
            "base_model": run.checkpoint.base_model,
            "architecture": type(run.skeleton.model).__name__,
            "model_type": run.skeleton.model.config.model_type,
        },
        "versions": {**fingerprint["versions"], "python": platform.python_version()},
        "fingerprint": dict(fingerprint),
        "data": None if tokens is None else _data_report(tokens),
        "layers": layers,
        "recall": _recall(layers),
        "head": head.report if head else None,
        "bytes_per_token": token_bytes(hire, run.skeleton.tensors, config),
    }


def _data_report(tokens: TokenData) -> dict[str, Any]:
    return {
        "source": tokens.source,
        "text_sha256": tokens.text_sha256,
        "num_documents": tokens.num_documents,
        "num_tokens": tokens.fit_WT.numel(),
        "num_held_tokens": tokens.held_WT.numel(),
        "starts_with_bos": tokens.starts_with_bos,
    }


def _recall(layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not layers:
        return None
    worst = min(layers, key=lambda layer: layer["recall"])
    mean = sum(layer["recall"] for layer in layers) / len(layers)
    return {"mean": mean, "worst": worst["recall"], "worst_layer": worst["layer"]}
