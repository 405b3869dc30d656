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
from hireconvert.attention import attention_matrices
from hireconvert.checkpoint import read_source_headers
from hireconvert.errors import InputError, UsageError
from hireconvert.families import LAYOUTS, Layout, ffn_parts, is_mixture_of_experts, num_layers
from hireconvert.memory import (
    Shapes,
    activation_bytes,
    calibration_rows,
    fitted_attention,
    fitted_shapes,
    peak_memory,
    search_of,
    trained_numel,
)
from hireconvert.recipe import FfnRecipe, Recipe, per_layer
from hireconvert.rules import NUM_TOKENS as RULE_TOKENS
from hireconvert.rules import is_asked
from hireconvert.scoring import head_spec, layer_counts, predictor_spec

SMALL_FILES_BYTES = 50_000_000  # tokenizer, report, runtime
# Float operations beside plain products, as multiples of the products; from runs on two cores.
SAMPLING_COST, FITTING_COST, SCOPES_COST, BUDGET_COST, FINETUNE_COST = 4.0, 3.0, 8.0, 1.3, 7.0
FINETUNE_ESTIMATES_COST = 5.0  # of the FFN's products, where neurons left out count by estimate

# Of each type of weights: bits, and weights per scale.
ATTENTION_DEFAULTS = {"int8": (8, 64), "int4": (4, 32)}
# Few weights where heads share them, and they cost a model more than queries do (docs/log.md); last
# parts of names, also of matrices that hold queries besides.
KEYS_AND_VALUES = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "c_attn")


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
        "attention": _planned_attention(skeleton, recipe) if layers else None,
    }


def _planned_attention(skeleton: Skeleton, recipe: Recipe) -> dict[str, Any] | None:
    """`config.hire.attention`."""
    if recipe.attention is None or skeleton.layout is None:
        return None
    given, names = recipe.attention, attention_matrices(skeleton.model, skeleton.layout)
    default_bits, default_block = ATTENTION_DEFAULTS[given.weights]
    wide = KEYS_AND_VALUES if given.int8 is None else given.int8
    known = [name.rpartition(".")[2] for name in names]
    if unknown := sorted(set(given.int8 or ()) - set(known)):
        raise UsageError(f"attention.int8: {unknown} are none of the model's {known}.")
    bits = {n: 8 if n.rpartition(".")[2] in wide else default_bits for n in names}
    return {"block": given.block or default_block, "matrices": bits}


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
    if needs_text(hire):
        _check_windows(skeleton, recipe)
    dtype, _ = head_entry(tensors, config.vocab_size)
    predictors = table_bytes(hire_tensors(hire, config.hidden_size, head_width(config)))
    shapes = Shapes(skeleton.model, skeleton.layout, tensors, hire)
    return {
        "architecture": type(skeleton.model).__name__,
        "model_type": skeleton.model.config.model_type,
        "recipe": recipe.name,
        "layers": layer_rows(hire, config.hidden_size, ITEM_BYTES[dtype]),
        "head": hire["head"],
        "attention": hire["attention"],
        "bytes_per_token": token_bytes(hire, tensors, config),
        "predictor_bytes": predictors,
        "disk_bytes": source_bytes
        + table_bytes(tensors)
        + activation_bytes(shapes, recipe)
        + 2 * predictors
        + _finetune_bytes(shapes, recipe)
        + fitted_attention(shapes)[0]
        + SMALL_FILES_BYTES,
        "peak_memory_bytes": peak_memory(shapes, recipe),
        "notes": _notes(skeleton, recipe, shapes.layers),
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


def _check_windows(skeleton: Skeleton, recipe: Recipe) -> None:
    """Raise UsageError for windows longer than a model with learned positions can read."""
    inputs = skeleton.model.get_input_embeddings()
    most: int = getattr(skeleton.config, "max_position_embeddings", None) or 0
    learned = any(
        isinstance(module, nn.Embedding)
        and module is not inputs
        and module.num_embeddings in (most, most + 2)  # OPT's table has two rows more
        for module in skeleton.model.modules()
    )
    windows = {"data.window": recipe.data.window}
    if recipe.finetune is not None:
        windows["finetune.window"] = recipe.finetune.window
    for key, window in windows.items():
        if learned and window > most:
            raise UsageError(
                f"{key}: {window} tokens, but the model has learned only {most} positions; give "
                f"at most {most} (--set {key}={most})."
            )


def needs_text(hire: Mapping[str, Any]) -> bool:
    """Whether a conversion takes statistics, and so needs tokens and a forward pass."""
    return hire["ffn"] is not None or (hire["head"] is not None and hire["head"]["kind"] == "lr")


def _finetune_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """The trained weights as they are stored, and twice (one is being written) the training state:
    weights and two moments in float32."""
    if recipe.finetune is None or not shapes.layers:
        return 0
    trained, factors = trained_numel(shapes, recipe.finetune)
    state = 3 * 4 * (trained if recipe.finetune.lora_rank is None else factors)
    return table_bytes(shapes.tensors) + 2 * state


def _budget_tokens(recipe: Recipe) -> int:
    """Tokens that a budget search runs forward, a pass back counting as two; two texts at the end.

    A quality target adds about 20 passes over the held-out text.
    """
    budget = search_of(recipe)
    if budget is None:
        return 0
    rounds = budget.sweeps * 8 * budget.num_tokens
    if budget.method == "second_order":  # the pass, and both its lists judged
        rounds = 5 * budget.num_tokens
    if budget.method == "evolution":
        probes = budget.offspring * budget.probe_tokens
        rounds = budget.generations * (probes + 2 * budget.num_tokens)
    quality = budget.target is not None and budget.target.bytes_per_token is None
    return rounds + (20 if quality else 4) * recipe.data.num_held_tokens


def _finetune_tokens(recipe: Recipe) -> float:
    """Tokens that training runs forward, in the teacher's pass, the student's and the one back.

    Text that the model writes itself is sampled first; evaluation runs the original besides.
    """
    finetune = recipe.finetune
    if finetune is None:
        return 0.0
    sampled = SAMPLING_COST if (finetune.source or recipe.data.source) == "self" else 0.0
    return (FINETUNE_COST + sampled) * finetune.num_tokens + recipe.evaluate.num_tokens


def _notes(skeleton: Skeleton, recipe: Recipe, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    if recipe.ffn is not None and skeleton.moe:
        notes.append("mixture of experts: the FFN stays dense, only the head is converted")
        if recipe.finetune is not None:
            notes.append("mixture of experts: nothing is trained (finetune)")
        if search_of(recipe) is not None:
            notes.append("mixture of experts: nothing is searched (ffn.budget)")
    predictors: Sequence[Any] = []
    if recipe.ffn is not None and not skeleton.moe:
        given = recipe.ffn.predictor
        predictors = given if isinstance(given, list) else [given]
    if any(predictor.kind == "auto" for predictor in predictors):
        notes.append("predictor kind auto: shown as q; the kind is chosen on the text")
    if is_asked(layers):
        notes.append("selection level: threshold or relative is chosen on the text")
    if search_of(recipe) is not None and not skeleton.moe:
        notes.append("budget search: shown with the shares it starts from")
    if recipe.head is not None and recipe.head.certified:
        notes.append("certified head: counted at certify_top rows; a token may need more")
    attention = recipe.attention
    if attention is not None and (attention.block or 32) % 32:
        notes.append(
            f"attention.block {attention.block}: kernels read codes in blocks of a multiple of 32; "
            "these are rounded, but read as they are stored"
        )
    return notes


def _seconds(skeleton: Skeleton, result: Mapping[str, Any], recipe: Recipe) -> float:
    """Estimated seconds: float operations over the speed of a small product measured now."""
    weights = sum(prod(shape) for _, shape in skeleton.tensors.values())
    rate = measured_rate()
    operations = 2.0 * weights * 2  # opening, checking, copying
    layers = [row for row in result["layers"] if row["kind"]]
    if layers:
        per_token = 2.0 * weights
        rows = calibration_rows(recipe)
        operations += per_token * rows
        if recipe.data.source == "self":
            operations += SAMPLING_COST * per_token * rows
        operations += FITTING_COST * sum(
            _fitting_operations(row, skeleton, recipe) for row in layers
        )
        operations += SCOPES_COST * per_token * recipe.evaluate.num_tokens
        copies = 2.0 * _copied_weights(skeleton, layers)  # what one pass through copies takes
        operations += BUDGET_COST * (per_token + copies) * _budget_tokens(recipe)
        operations += per_token * _finetune_tokens(recipe)
        if any(row["selection"] == "level" for row in layers):
            operations += 3 * per_token * RULE_TOKENS  # forward and back
        operations += _attention_operations(skeleton, result, recipe)
        if recipe.finetune is not None:
            operations += FINETUNE_ESTIMATES_COST * copies * recipe.finetune.num_tokens
    return operations / rate


def _attention_operations(skeleton: Skeleton, result: Mapping[str, Any], recipe: Recipe) -> float:
    """A pass over the calibration text, moments of inputs, and error feedback under them."""
    shapes = fitted_shapes(result["attention"], skeleton.tensors)
    if not shapes:
        return 0.0
    rows, weights = calibration_rows(recipe), sum(prod(s) for _, s in skeleton.tensors.values())
    fits = sum(2.0 * (rows + outputs + width) * width**2 for outputs, width in shapes)
    return 2.0 * weights * rows + FITTING_COST * fits


def _copied_weights(skeleton: Skeleton, layers: Sequence[Mapping[str, Any]]) -> int:
    """Weights of the FFNs of which search and training run copies, for neurons left out."""
    assert skeleton.layout is not None
    matrices = 3 if skeleton.layout["gate"] else 2
    neurons = sum(row["neurons"] for row in layers if row["unselected"])
    return int(neurons * matrices * skeleton.config.hidden_size)


def _fitting_operations(row: Mapping[str, Any], skeleton: Skeleton, recipe: Recipe) -> float:
    """Moments, error feedback, scores on held-out rows, and training steps of one layer."""
    assert recipe.ffn is not None
    width, outputs, rows = skeleton.config.hidden_size, 2 * row["neurons"], calibration_rows(recipe)
    given = recipe.ffn.predictor
    predictor = given[row["layer"]] if isinstance(given, list) else given
    total = 2.0 * rows * width * width + 2.0 * outputs * width * width
    if recipe.ffn.rows == "copies":  # down's, under the moment of the hidden values
        total += 2.0 * (rows + row["neurons"] + width) * row["neurons"] ** 2
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
