"""The finetune stage of a conversion: text to train on, training, the weights all later stages use.

finetune_text, neuron_order -> finetune (its state lies beside it until it is done) -> the run's
weights

Shape suffixes: W windows, T tokens of a window, N rows, D width, F neurons.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from hireconvert.calibrate import calibrate, layer_file, load_rows
from hireconvert.data import TokenData, load_tokens, save_tokens, training_tokens
from hireconvert.distill import distill_layer, final_order
from hireconvert.errors import InputError
from hireconvert.export import copy_companions
from hireconvert.families import FfnWeights, num_layers, permute_ffn, read_ffn_weights
from hireconvert.finetune import Fit, finetune
from hireconvert.recipe import per_layer
from hireconvert.sampling import sample_from_model
from hireconvert.schema import DataRecipe, Recipe
from hireconvert.stages import RESULT, Run, steps
from hireconvert.workspace import write_json

TEXT, STAGE, STATE, MODEL = "finetune_text", "finetune", "finetune_state", "model"
ORDER, ORDER_FILE = "neuron_order", "order.safetensors"
ARTIFACTS = (TEXT, ORDER, STATE, STAGE)


def training_device() -> str:
    """The kind of device that Accelerate will train on."""
    return str(Accelerator().device.type)


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
        text = _text(run, fingerprint, tokens)
        _order_neurons(run, fingerprint, tokens)
        _train(run, fingerprint, text)
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


def _order_neurons(run: Run, fingerprint: Mapping[str, Any], tokens: TokenData) -> None:
    """Reorder the model's neurons where groups or a common path ask for it, to train them so."""
    ffn = run.recipe.ffn
    assert ffn is not None
    if ffn.group_size == 1 and ffn.common_path == 0:
        return
    count, fit_WT = num_layers(run.model), tokens.fit_WT
    keeps = per_layer(ffn.keep_fraction, count, "ffn.keep_fraction")
    if not run.space.is_done(ORDER, fingerprint):
        total = len(fit_WT) + 1
        with run.stage(ORDER, fingerprint, "order of the neurons", total) as (folder, advance):
            progress = steps(advance, total)
            calibrate(run.model, run.layout, fit_WT, fit_WT[:1], out=folder, progress=progress)
            orders = {}
            for index, keep in enumerate(keeps):
                fit_ND, _ = load_rows(folder, layer_file(index))
                weights = read_ffn_weights(run.model, run.layout, index)
                order_F = final_order(weights, fit_ND, ffn, keep)
                if order_F is not None:
                    orders[str(index)] = order_F.contiguous()
                (folder / layer_file(index)).unlink()
            save_file(orders, folder / ORDER_FILE)
    for name, order_F in load_file(run.space.path(ORDER) / ORDER_FILE).items():
        permute_ffn(run.model, run.layout, int(name), order_F)


def _predictor_fit(run: Run) -> Fit:
    """What makes the predictors that select in training: as the export's are made."""
    ffn, count = run.recipe.ffn, num_layers(run.model)
    assert ffn is not None
    predictors = per_layer(ffn.predictor, count, "ffn.predictor")
    keeps = per_layer(ffn.keep_fraction, count, "ffn.keep_fraction")

    def fit(
        index: int, weights: FfnWeights, fit_ND: torch.Tensor, held_ND: torch.Tensor
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        predictor, keep, seed = predictors[index], keeps[index], run.recipe.seed + index
        result = distill_layer(
            weights, fit_ND, held_ND, ffn, predictor, keep, seed=seed, ordered=True
        )
        return result.spec, result.tensors

    return fit


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
            fit=_predictor_fit(run),
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
    stored.save_pretrained(folder)  # the export cuts files to the recipe's size
    copy_companions(run.checkpoint.folder, folder)
    write_json(folder / "config.json", run.checkpoint.config)
