"""The finetune stage of a conversion: text to train on, training, the weights all later stages use.

finetune_text -> finetune (its state lies beside it until it is done) -> the run's weights

Shape suffixes: W windows, T tokens of a window.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hireconvert.data import TokenData, load_tokens, save_tokens, training_tokens
from hireconvert.errors import InputError
from hireconvert.export import copy_companions
from hireconvert.finetune import finetune
from hireconvert.sampling import sample_from_model
from hireconvert.schema import DataRecipe, Recipe
from hireconvert.stages import RESULT, Run, steps
from hireconvert.workspace import write_json

TEXT, STAGE, STATE, MODEL = "finetune_text", "finetune", "finetune_state", "model"


def training_text(recipe: Recipe) -> DataRecipe:
    """Where the text to train on comes from, as a data section."""
    wanted, data = recipe.finetune, recipe.data
    assert wanted is not None
    source = wanted.source or data.source
    changes = {"source": source, "num_tokens": wanted.num_tokens, "window": wanted.window}
    if source != data.source:
        changes |= {"config": None, "revision": None}
    if source == "self":
        changes["chat_column"] = None
    return data.model_copy(update=changes)


def finetune_weights(
    run: Run, fingerprint: Mapping[str, Any], tokens: TokenData
) -> dict[str, Any] | None:
    """What the training measured, the run then being on the trained weights; None without one."""
    if run.recipe.finetune is None or run.hire["ffn"] is None:
        return None
    folder = run.space.path(STAGE)
    if not run.space.is_done(STAGE, fingerprint):
        _train(run, fingerprint, _text(run, fingerprint, tokens))
    run.space.discard(STATE)
    run.use_weights(folder / MODEL)
    report: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return report


def _text(run: Run, fingerprint: Mapping[str, Any], tokens: TokenData) -> TokenData:
    if not run.space.is_done(TEXT, fingerprint):
        tokenizer, total = run.checkpoint.load_tokenizer(), 1000
        with run.stage(TEXT, fingerprint, "text to train on", total) as (folder, advance):
            progress = steps(advance, total)

            def sample(count: int, seed: int) -> torch.Tensor:
                return sample_from_model(run.model, tokenizer, count, seed=seed, progress=progress)

            text = training_tokens(
                training_text(run.recipe),
                tokenizer,
                tokens.held_from,
                seed=run.recipe.seed,
                sample=sample,
                progress=progress,
            )
            save_tokens(text, folder)
    return load_tokens(run.space.path(TEXT))


def _train(run: Run, fingerprint: Mapping[str, Any], text: TokenData) -> None:
    """Train from the last checkpoint of an earlier run, or from the start."""
    recipe, ffn = run.recipe.finetune, run.recipe.ffn
    assert recipe is not None and ffn is not None
    if not run.space.is_done(STATE, fingerprint):
        with run.space.building(STATE, fingerprint):
            pass  # what lies in it from now on was made from these parts
    total = len(text.fit_WT) // recipe.step_windows
    with run.stage(STAGE, fingerprint, "finetune", total) as (folder, advance):
        report = finetune(
            run.model,
            run.layout,
            text.fit_WT,
            recipe=recipe,
            ffn=ffn,
            seed=run.recipe.seed,
            checkpoint=run.space.path(STATE),
            progress=steps(advance, total),
        )
        _write_weights(run, folder / MODEL)
        facts = {
            "source": text.source,
            "text_sha256": text.text_sha256,
            "num_documents": text.num_documents,
            "num_tokens": text.fit_WT.numel(),
        }
        write_json(folder / RESULT, {"text": facts, **report})


@torch.no_grad()
def _write_weights(run: Run, folder: Path) -> None:
    """The trained weights in the source's dtype, with the files that go with them."""
    trained = dict(run.model.named_parameters())
    stored = run.checkpoint.load_model()
    for name, parameter in stored.named_parameters():
        parameter.copy_(trained[name])
        if not parameter.isfinite().all():
            raise InputError(
                f"the finetune diverged: {name} is not finite as {parameter.dtype}. Lower "
                "finetune.learning_rate, then start again with --overwrite."
            )
    folder.mkdir()
    stored.save_pretrained(folder, max_shard_size=f"{run.recipe.output.max_shard_gb}GB")
    copy_companions(run.checkpoint.folder, folder)
    write_json(folder / "config.json", run.checkpoint.config)
