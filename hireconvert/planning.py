"""The plan of a conversion from headers alone: what each layer keeps, bytes, disk, memory, time.

D width, F neurons, M predictor outputs, L layers.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hireconvert.accounting import (
    ITEM_BYTES,
    TensorTable,
    head_entry,
    head_width,
    hire_tensors,
    layer_rows,
    table_bytes,
    token_bytes,
)
from hireconvert.checkpoint import read_source_headers
from hireconvert.errors import InputError, UsageError
from hireconvert.families import LAYOUTS, Layout, ffn_parts, is_mixture_of_experts, num_layers
from hireconvert.masked import LOGITS_AT_ONCE, PROBABILITIES_KEPT
from hireconvert.recipe import FfnRecipe, Recipe, per_layer
from hireconvert.schema_budget import BudgetRecipe
from hireconvert.scoring import head_spec, layer_counts, predictor_spec

LIBRARIES_BYTES = 600_000_000  # Python with torch and transformers loaded
SMALL_FILES_BYTES = 50_000_000  # tokenizer, report, runtime
# Float operations beside plain products, as multiples of the products; from runs on two cores.
SAMPLING_COST, FITTING_COST, SCOPES_COST, BUDGET_COST = 4.0, 3.0, 8.0, 1.3


@dataclass(frozen=True)
class Skeleton:
    """A model without weights: what its config and headers say."""

    model: PreTrainedModel
    layout: Layout | None
    tensors: TensorTable
    moe: bool

    @property
    def config(self) -> Any:
        """The text configuration."""
        return self.model.config.get_text_config()


def make_skeleton(raw: Mapping[str, Any], tensors: TensorTable) -> Skeleton:
    """The skeleton of a native causal language model. Raises InputError when there is none."""
    if raw.get("model_type") not in CONFIG_MAPPING:
        raise InputError(
            f"model_type {raw.get('model_type')!r} is not a class of Transformers, so a converted "
            "model could not load it. Models with their own modeling code are not supported."
        )
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    moe = is_mixture_of_experts(model)
    return Skeleton(model, None if moe else layout_by_names(model), tensors, moe)


def layout_by_names(model: PreTrainedModel) -> Layout | None:
    """The first layout of the table whose parts all exist; the proof needs weights."""
    for layout in LAYOUTS:
        try:
            found = [
                isinstance(part.module, nn.Linear | Conv1D)
                for index in range(num_layers(model))
                for part in ffn_parts(model, layout, index).matrices()
            ]
        except (AttributeError, IndexError, TypeError):
            continue
        if all(found):
            return dict(layout)
    return None


def converts_ffn(skeleton: Skeleton, recipe: Recipe) -> bool:
    """Whether the FFN is converted; false for experts. Raises InputError when it cannot be."""
    if recipe.ffn is None or skeleton.moe:
        return False
    if skeleton.layout is None:
        raise InputError(
            f"model_type {skeleton.model.config.model_type!r}: no FFN of the form act(gate x) * "
            "up x -> down or act(up x) -> down lies where one is known to lie. Convert the head "
            "only (recipe lossless)."
        )
    return True


def planned_hire(skeleton: Skeleton, recipe: Recipe) -> dict[str, Any]:
    """`config.hire` as far as it is known before anything is measured."""
    layers = None
    if recipe.ffn is not None and converts_ffn(skeleton, recipe):
        layers = _planned_layers(skeleton, recipe.ffn)
    _, (vocabulary, width) = head_entry(skeleton.tensors, skeleton.config.vocab_size)
    if recipe.head is not None and recipe.head.kind == "lr" and recipe.head.rank > width:
        raise UsageError(f"head.rank: {recipe.head.rank} is more than the head's width, {width}.")
    return {
        "layout": skeleton.layout if layers else None,
        "ffn": {"layers": layers} if layers else None,
        "head": None if recipe.head is None else head_spec(recipe.head, vocabulary),
    }


def _planned_layers(skeleton: Skeleton, ffn: FfnRecipe) -> list[dict[str, Any]]:
    layout = skeleton.layout
    assert layout is not None
    count = num_layers(skeleton.model)
    keeps = per_layer(ffn.keep_fraction, count, "ffn.keep_fraction")
    predictors = per_layer(ffn.predictor, count, "ffn.predictor")
    layers = []
    for index, (keep, predictor) in enumerate(zip(keeps, predictors, strict=True)):
        parts = ffn_parts(skeleton.model, layout, index)
        num_neurons, width = parts.up.weight_out_in().shape
        counts = layer_counts(num_neurons, ffn, keep)
        if predictor.kind == "auto":
            # What is chosen depends on the text; this is the kind that usually wins.
            predictor = predictor.model_copy(update={"kind": "q", "distill": None})
        spec = predictor_spec(predictor, width, len(parts.matrices()), counts)
        layers.append({**counts, "predictor": spec})
    return layers


def plan(skeleton: Skeleton, recipe: Recipe, *, source_bytes: int = 0) -> dict[str, Any]:
    """The plan; `source_bytes` is what opening the model writes. Raises UsageError, InputError."""
    config, tensors = skeleton.config, skeleton.tensors
    hire = planned_hire(skeleton, recipe)
    dtype, _ = head_entry(tensors, config.vocab_size)
    predictors = table_bytes(hire_tensors(hire, config.hidden_size, head_width(config)))
    activations = _activation_bytes(hire, recipe, config)
    return {
        "architecture": type(skeleton.model).__name__,
        "model_type": skeleton.model.config.model_type,
        "recipe": recipe.name,
        "layers": layer_rows(hire, config.hidden_size, ITEM_BYTES[dtype]),
        "head": hire["head"],
        "bytes_per_token": token_bytes(hire, tensors, config),
        "predictor_bytes": predictors,
        "disk_bytes": source_bytes
        + table_bytes(tensors)
        + activations
        + 2 * predictors
        + SMALL_FILES_BYTES,
        "peak_memory_bytes": _peak_memory(skeleton, hire, recipe, activations),
        "notes": _notes(skeleton, recipe),
    }


def make_plan(
    model: str, recipe: Recipe, *, revision: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The plan of `convert --dry-run`, with an estimated time; reads headers only.

    Raises whatever `read_source_headers` raises, UsageError where the recipe does not fit.
    """
    source = read_source_headers(model, revision=revision, trust_remote_code=trust_remote_code)
    tensors = {name: (header.dtype, header.shape) for name, header in source.headers.items()}
    skeleton = make_skeleton(source.config, tensors)
    result = plan(skeleton, recipe, source_bytes=source.disk_bytes)
    result["notes"] = [*source.warnings, *result["notes"]]
    return {**result, "estimated_seconds": round(_seconds(skeleton, result, recipe), 3)}


def needs_text(hire: Mapping[str, Any]) -> bool:
    """Whether a conversion takes statistics, and so needs tokens and a forward pass."""
    return hire["ffn"] is not None or (hire["head"] is not None and hire["head"]["kind"] == "lr")


def _rows(recipe: Recipe) -> int:
    return recipe.data.num_tokens + recipe.data.num_held_tokens + 2 * recipe.data.window


def _activation_bytes(hire: Mapping[str, Any], recipe: Recipe, config: Any) -> int:
    if not needs_text(hire):
        return 0
    layers = len(hire["ffn"]["layers"]) if hire["ffn"] else 0
    head = bool(hire["head"]) and hire["head"]["kind"] == "lr"
    return _rows(recipe) * 4 * (layers * config.hidden_size + head * head_width(config))


def _numel(tensors: TensorTable) -> int:
    return sum(prod(shape) for _, shape in tensors.values())


def _peak_memory(
    skeleton: Skeleton, hire: Mapping[str, Any], recipe: Recipe, activations: int
) -> int:
    """Bytes: the model in float32, plus the larger of all activations and one layer's fitting."""
    if not needs_text(hire):
        return LIBRARIES_BYTES + table_bytes(skeleton.tensors)
    neurons = max(
        (layer["num_neurons"] for layer in (hire["ffn"] or {"layers": []})["layers"]), default=0
    )
    width = skeleton.config.hidden_size
    fitting = 4 * neurons * (10 * width + 3 * 2048) + 8 * 4 * width * width
    budget = _budget_memory(skeleton, recipe, neurons)
    return LIBRARIES_BYTES + 4 * _numel(skeleton.tensors) + max(activations, fitting, budget)


def _search(recipe: Recipe) -> BudgetRecipe | None:
    budget = None if recipe.ffn is None else recipe.ffn.budget
    return budget if budget is not None and budget.mode == "search" else None


def _budget_memory(skeleton: Skeleton, recipe: Recipe, neurons: int) -> int:
    """Bytes of a budget search: dense probabilities of two texts, logits, and either what the
    layers returned in four passes or, for slopes, what a pass back needs of one window."""
    budget, config = _search(recipe), skeleton.config
    if budget is None:
        return 0
    rows, layers, width = budget.num_tokens, config.num_hidden_layers, config.hidden_size
    kept = sum(
        count * config.vocab_size
        for count in (rows, min(rows, recipe.data.num_held_tokens))
        if count * config.vocab_size <= PROBABILITIES_KEPT
    )
    per_token = layers * (16 * width + 8 * neurons)
    passes = 4 * rows * layers * width if budget.method == "evolution" else 256 * per_token
    return 4 * (kept + 4 * LOGITS_AT_ONCE + passes)


def _budget_tokens(recipe: Recipe) -> int:
    """Tokens that a budget search runs forward, a pass back counting as two; two texts at the end.

    A quality target adds about 20 passes over the held-out text.
    """
    budget = _search(recipe)
    if budget is None:
        return 0
    rounds = budget.sweeps * 8 * budget.num_tokens
    if budget.method == "evolution":
        probes = budget.offspring * budget.probe_tokens
        rounds = budget.generations * (probes + 2 * budget.num_tokens)
    quality = budget.target is not None and budget.target.bytes_per_token is None
    return rounds + (20 if quality else 4) * recipe.data.num_held_tokens


def _notes(skeleton: Skeleton, recipe: Recipe) -> list[str]:
    notes = []
    if recipe.ffn is not None and skeleton.moe:
        notes.append("mixture of experts: the FFN stays dense, only the head is converted")
        if recipe.finetune is not None:
            notes.append("mixture of experts: nothing is trained (finetune)")
    predictors: Sequence[Any] = []
    if recipe.ffn is not None:
        given = recipe.ffn.predictor
        predictors = given if isinstance(given, list) else [given]
    if any(predictor.kind == "auto" for predictor in predictors):
        notes.append("predictor kind auto: shown as q; the kind is chosen on the text")
    if _search(recipe) is not None:
        notes.append("budget search: shown with the shares it starts from")
    if recipe.head is not None and recipe.head.certified:
        notes.append("certified head: counted at certify_top rows; a token may need more")
    return notes


def _seconds(skeleton: Skeleton, result: Mapping[str, Any], recipe: Recipe) -> float:
    """Estimated seconds: float operations over the speed of a small product measured now."""
    weights = _numel(skeleton.tensors)
    rate = measured_rate()
    operations = 2.0 * weights * 2  # opening, checking, copying
    layers = [row for row in result["layers"] if row["kind"]]
    if layers:
        per_token = 2.0 * weights
        rows = _rows(recipe)
        operations += per_token * rows
        if recipe.data.source == "self":
            operations += SAMPLING_COST * per_token * rows
        operations += FITTING_COST * sum(
            _fitting_operations(row, skeleton, recipe) for row in layers
        )
        operations += SCOPES_COST * per_token * recipe.evaluate.num_tokens
        operations += BUDGET_COST * per_token * _budget_tokens(recipe)
    return operations / rate


def _fitting_operations(row: Mapping[str, Any], skeleton: Skeleton, recipe: Recipe) -> float:
    """Moments, error feedback, scores on held-out rows, and training steps of one layer."""
    assert recipe.ffn is not None
    width, outputs, rows = skeleton.config.hidden_size, 2 * row["neurons"], _rows(recipe)
    given = recipe.ffn.predictor
    predictor = given[row["layer"]] if isinstance(given, list) else given
    total = 2.0 * rows * width * width + 2.0 * outputs * width * width
    total += 2.0 * 2 * recipe.data.num_held_tokens * outputs * width
    if predictor.distill is not None:
        rank = row["rank"] or predictor.rank
        steps = predictor.distill.steps * predictor.distill.batch_rows
        total += 2.0 * steps * (3 * rank * (width + outputs) + outputs * width)
    return total


def measured_rate(size: int = 768) -> float:
    """Float operations a second of a float32 product on this machine, best of a few."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
