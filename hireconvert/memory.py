"""Peak memory of a conversion from shapes alone, by stage: statistics, training, evaluation.

A process's peak is the libraries and the largest stage, since each stage frees what it loaded.
Factors of activations are fitted to measured peaks (docs/log.md); weights are counted exactly.

D width, F neurons, L layers, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from transformers import PreTrainedModel

from hireconvert.accounting import TensorTable, attention_tensors, head_width
from hireconvert.families import Layout
from hireconvert.masked import PROBABILITIES_KEPT
from hireconvert.measures import LOGITS_AT_ONCE
from hireconvert.objectives import LOGITS_AT_ONCE as TRAINING_LOGITS
from hireconvert.recipe import Recipe
from hireconvert.rules import LENGTH, is_asked
from hireconvert.runtime.hire_predict import is_copied
from hireconvert.schema import FinetuneRecipe
from hireconvert.schema_budget import BudgetRecipe
from hireconvert.student import trained_weights

LIBRARIES_BYTES = 450_000_000  # Python with torch and transformers loaded
# Float32 values that a pass back needs of one token and layer, in widths and in neurons.
KEPT_WIDTHS, KEPT_NEURONS = 24, 8
# Besides, where neurons left out count by estimate: in training, and for slopes, which go back
# through the estimates too.
TRAINED_BY_ESTIMATE, SLOPES_BY_ESTIMATE = 1, 4
# Tensors of the size of a chunk of logits that live together.
LOGITS_IN_TRAINING, LOGITS_IN_EVALUATION = 10, 5
RANKED_NEURONS = 16  # values for each neuron of one layer, whose costs are taken behind a pass back
SEARCH_WINDOW = 256  # tokens that a budget search runs at once: short, so that many texts count
HEAD_ROWS, HEAD_VALUES = 16384, 8  # rows of the head copied at once, float32 values for each weight


@dataclass(frozen=True)
class Shapes:
    """What the plan knows of a model: a copy without weights, and what will be put beside it."""

    model: PreTrainedModel
    layout: Layout | None
    tensors: TensorTable
    hire: Mapping[str, Any]

    @property
    def config(self) -> Any:
        """The text configuration."""
        return self.model.config.get_text_config()

    @property
    def numel(self) -> int:
        """Weights in all."""
        return sum(prod(shape) for _, shape in self.tensors.values())

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """The converted layers."""
        return list(self.hire["ffn"]["layers"]) if self.hire["ffn"] else []

    @property
    def neurons(self) -> int:
        """F of the widest converted layer, 0 without one."""
        return max((layer["num_neurons"] for layer in self.layers), default=0)

    @property
    def matrices(self) -> int:
        """First matrices of an FFN: gate and up, or up alone."""
        return 2 if self.layout and self.layout["gate"] else 1

    @property
    def by_estimate(self) -> bool:
        """Whether neurons left out count by estimate."""
        return any(layer.get("unselected") for layer in self.layers)

    @property
    def live_copies(self) -> int:
        """Numbers in the low-bit copies that stand for estimates on the dense model."""
        if not self.by_estimate:
            return 0
        neurons = sum(layer["num_neurons"] for layer in self.layers)
        return int(neurons * self.config.hidden_size * (self.matrices + 1))


def beginnings(num_windows: int, window: int, num_tokens: int, length: int) -> tuple[int, int]:
    """How many of the windows, and tokens of each, make up about `num_tokens` of many texts.

    `length` tokens of a window or fewer; more where there are too few windows.
    """
    length = min(length, window)
    wanted = max(1, num_tokens // length)
    if wanted > num_windows:
        return num_windows, min(window, num_tokens // num_windows)
    return wanted, length


def calibration_rows(recipe: Recipe) -> int:
    """Tokens that statistics are taken on, rounded up to whole windows."""
    return recipe.data.num_tokens + recipe.data.num_held_tokens + 2 * recipe.data.window


def activation_bytes(shapes: Shapes, recipe: Recipe) -> int:
    """Bytes of the inputs that calibration keeps, on disk and in memory."""
    head = bool(shapes.hire["head"]) and shapes.hire["head"]["kind"] == "lr"
    widths = len(shapes.layers) * shapes.config.hidden_size + head * head_width(shapes.config)
    return calibration_rows(recipe) * 4 * widths


def fitted_shapes(
    attention: Mapping[str, Any] | None, tensors: TensorTable
) -> list[tuple[int, ...]]:
    """[outputs, inputs] of the attention's matrices that are fitted to their inputs."""
    return [shape for bits, _, shape in attention_tensors(attention, tensors) if bits == 4]


def fitted_attention(shapes: Shapes) -> tuple[int, int]:
    """Bytes of those matrices in float32, and of what fitting them needs.

    That is the moments of their inputs, of which those that are shared are counted apart, and the
    largest matrix with its grid and the decompositions of its moment.
    """
    found = fitted_shapes(shapes.hire.get("attention"), shapes.tensors)
    moments = sum(4 * width * width for _, width in found)
    work = max((4 * (10 * prod(shape) + 11 * shape[1] ** 2) for shape in found), default=0)
    return 4 * sum(map(prod, found)), moments + work


def peak_memory(shapes: Shapes, recipe: Recipe) -> int:
    """Bytes that the whole conversion needs on a CPU, libraries included."""
    if not shapes.layers and activation_bytes(shapes, recipe) == 0:
        return LIBRARIES_BYTES + 2 * shapes.numel
    statistics = max(
        activation_bytes(shapes, recipe),
        _fitting(shapes),
        fitted_attention(shapes)[1],
        _choosing_rule(shapes),
        _searching(shapes, recipe),
    )
    stages = [4 * shapes.numel + statistics, _evaluating(shapes, recipe)]
    if recipe.finetune is not None and shapes.layers:
        stages.append(4 * shapes.numel + _training(shapes, recipe.finetune))
    return LIBRARIES_BYTES + max(stages)


def _fitting(shapes: Shapes) -> int:
    width, neurons = shapes.config.hidden_size, shapes.neurons
    # Copies of down that are fitted to the hidden values: decompositions of their moment.
    moments = 8 * 5 * neurons**2 if any(map(is_copied, shapes.layers)) else 0
    return 4 * neurons * (10 * width + 3 * 2048) + 8 * 4 * width * width + moments


def _training(shapes: Shapes, recipe: FinetuneRecipe) -> int:
    """What a training step holds besides the student's weights.

    That is the teacher's copy of the trained weights, gradients and two moments; with low-rank
    updates the products in place of the weights and their gradients, and no copy; and low-bit
    copies where neurons left out count by them. Checkpoints copy nothing.
    """
    trained, factors = trained_numel(shapes, recipe)
    weights = trained + 3 * trained
    if recipe.lora_rank is not None:
        weights = 2 * trained + 4 * factors
    weights += shapes.live_copies
    vocabulary, tokens = shapes.config.vocab_size, recipe.window
    per_token = shapes.config.num_hidden_layers * (
        KEPT_WIDTHS * shapes.config.hidden_size
        + (KEPT_NEURONS + TRAINED_BY_ESTIMATE * shapes.by_estimate) * shapes.neurons
    )
    logits = 0
    if recipe.loss.kl or recipe.loss.lm:
        logits = LOGITS_IN_TRAINING * min(tokens * vocabulary, TRAINING_LOGITS)
    return 4 * (weights + tokens * per_token + logits)


def trained_numel(shapes: Shapes, recipe: FinetuneRecipe) -> tuple[int, int]:
    """Numbers in the weights that the recipe trains, and in their low-rank factors."""
    assert shapes.layout is not None
    trained = factors = 0
    for module, name in trained_weights(shapes.model, shapes.layout, recipe.parameters):
        shape = getattr(module, name).shape
        trained += prod(shape)
        if recipe.lora_rank is not None:
            factors += recipe.lora_rank * sum(shape) if len(shape) == 2 else prod(shape)
    return trained, factors


def _evaluating(shapes: Shapes, recipe: Recipe) -> int:
    """The converted model, its predictors in float32, and what it is compared against.

    On top comes the larger of what the head needs while its copy is made, and chunks of logits.
    """
    if recipe.evaluate.num_tokens == 0:
        return 0
    config = shapes.config
    others = recipe.finetune is not None or recipe.rounds_weights
    models = 2 if others and shapes.layers else 1
    beside = sum(_beside_layer(shapes, layer) for layer in shapes.layers)
    width = head_width(config) if shapes.hire["head"] else 0
    tokens = min(recipe.evaluate.num_tokens, recipe.data.num_held_tokens)
    chunk = LOGITS_IN_EVALUATION * min(tokens * config.vocab_size, LOGITS_AT_ONCE)
    head = HEAD_VALUES * min(config.vocab_size, HEAD_ROWS) * width
    hidden = (2 + models) * tokens * config.hidden_size
    kept = 4 * (models * shapes.numel + beside + hidden) + config.vocab_size * width
    return kept + 4 * max(chunk, head)


def _beside_layer(shapes: Shapes, layer: Mapping[str, Any]) -> int:
    """Float32 values beside one layer's weights: its predictor, and the down matrix by rows.

    Where neurons left out count by estimate, the low-bit copy of that matrix too.
    """
    width, predictor = shapes.config.hidden_size, layer["predictor"]
    outputs = shapes.matrices * layer["num_neurons"]
    copies = 0 if predictor["kind"] == "lr" else outputs * width
    factors = (predictor["rank"] or 0) * (outputs + width)
    downs = 2 if layer.get("unselected") else 1
    return copies + factors + downs * layer["num_neurons"] * width


# --------------------------------------------------------------------------- the budget search


def search_of(recipe: Recipe) -> BudgetRecipe | None:
    """The search that the recipe asks for, if it does."""
    budget = None if recipe.ffn is None else recipe.ffn.budget
    return budget if budget is not None and budget.mode == "search" else None


def _choosing_rule(shapes: Shapes) -> int:
    """Bytes of a pass forward and back of one window."""
    if not is_asked(shapes.layers):
        return 0
    config = shapes.config
    widths = 16 * config.hidden_size + KEPT_NEURONS * shapes.neurons
    logits = 4 * min(LENGTH * config.vocab_size, LOGITS_AT_ONCE)
    return 4 * (logits + LENGTH * config.num_hidden_layers * widths)


def _searching(shapes: Shapes, recipe: Recipe) -> int:
    """Bytes of a budget search: dense probabilities of two texts, logits, low-bit copies where
    neurons left out count by them, and either what the layers returned in four passes or, for
    slopes and for costs to second order, what a pass back needs of one window."""
    budget, config = search_of(recipe), shapes.config
    if budget is None or not shapes.layers:
        return 0
    rows, layers, width = budget.num_tokens, config.num_hidden_layers, config.hidden_size
    num_windows, window = -(-recipe.data.num_tokens // recipe.data.window), recipe.data.window
    length = beginnings(num_windows, window, rows, SEARCH_WINDOW)[1]
    kept = sum(
        count * config.vocab_size
        for count in (rows, min(rows, recipe.data.num_held_tokens))
        if count * config.vocab_size <= PROBABILITIES_KEPT
    )
    by_estimate = SLOPES_BY_ESTIMATE * shapes.by_estimate
    per_token = layers * (16 * width + (KEPT_NEURONS + by_estimate) * shapes.neurons)
    if budget.method == "second_order":  # a dense pass: estimates come behind it
        per_token -= (layers * by_estimate - RANKED_NEURONS) * shapes.neurons
    passes = 4 * rows * layers * width if budget.method == "evolution" else length * per_token
    logits = 4 * min(length * config.vocab_size, LOGITS_AT_ONCE)
    return 4 * (kept + logits + passes + shapes.live_copies)
