"""The typed tree of a recipe: every key with its unit, its limits and what it must agree with.

`recipe.py` reads and writes its YAML form and exports these names.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import Discriminator, Field, Tag

from hireconvert.schema_budget import BudgetRecipe
from hireconvert.schema_finetune import FinetuneLossRecipe as FinetuneLossRecipe
from hireconvert.schema_finetune import FinetuneRecipe as FinetuneRecipe
from hireconvert.sections import Count, CountOrZero, Positive, Share, Text, source_problems
from hireconvert.sections import In as In
from hireconvert.sections import Problem as Problem
from hireconvert.sections import Section as Section

T = TypeVar("T")

Block: TypeAlias = Annotated[int, In(1, 2**24)]  # as long as the format lets one be
LONGEST_NORMAL_BLOCK = 2**16  # likewise
Levels: TypeAlias = Annotated[
    Literal["even", "normal"],
    Field(
        description="what codes stand for: even steps, or (4 bits, symmetric) levels spaced as "
        "weights lie with 8-bit scales, which are as near as even ones with offsets in fewer bytes"
    ),
]
Rows: TypeAlias = Annotated[int, In(1, 2**20)]
ONE, LIST = "<one>", "<list>"  # tags of a per-layer union, cut out of the key paths of errors
_BY_SHAPE = Discriminator(lambda value: LIST if isinstance(value, list) else ONE)


def _each(key: str, value: T | list[T]) -> list[tuple[str, T]]:
    if isinstance(value, list):
        return [(f"{key}.{index}", one) for index, one in enumerate(value)]
    return [(key, value)]


class DataRecipe(Section):
    """The text that statistics are taken on."""

    source: Text = Field(
        default="self",
        description="`self` (sampled from the model), `hub:org/name`, or a local .txt, .jsonl, "
        ".jsonl.gz or .parquet file, or a folder of them",
    )
    config: Text | None = Field(
        default=None, description="configuration of the Hub dataset, a name"
    )
    split: Text = Field(default="train", description="split of the Hub dataset, a name")
    revision: Text | None = Field(
        default=None, description="revision of the Hub dataset: commit or branch"
    )
    text_column: Text = Field(default="text", description="column that holds the text, a name")
    chat_column: Text | None = Field(
        default=None,
        description="column that holds chat messages, a name; read instead of text_column",
    )
    num_tokens: Count = Field(default=16384, description="tokens to calibrate on")
    num_held_tokens: Count = Field(
        default=4096, description="tokens held out to measure recall on, from other documents"
    )
    window: Annotated[int, In(2)] = Field(
        default=1024, description="tokens per packed window, BOS included"
    )

    def _problems(self) -> Iterator[Problem]:
        for key in ("num_tokens", "num_held_tokens"):
            if (count := getattr(self, key)) < self.window:
                yield key, f"{count} is less than one window of {self.window} tokens (data.window)"
        yield from source_problems(self.source)
        if self.source.startswith("hub:"):
            return
        for key in ("config", "revision"):
            if getattr(self, key) is not None:
                yield key, f"only a hub: source has one; the source is {self.source!r}"
        if self.source == "self" and self.chat_column is not None:
            yield "chat_column", "text sampled from the model (source: self) has no columns"


class DistillRecipe(Section):
    """Training of predictor factors on calibration activations, layer by layer."""

    loss: Literal["bce", "regression", "listwise"] = Field(
        default="regression",
        description="what is fitted: membership of the true top-k, the logarithms of the scores, "
        "or the order of the scores",
    )
    steps: Count = Field(default=500, description="optimizer steps per layer")
    batch_rows: Count = Field(default=1024, description="activation rows (tokens) per step")
    learning_rate: Positive = Field(
        default=1.0e-3, description="peak learning rate, a plain number"
    )


def _level_problems(levels: Levels, bits: int, block: int, symmetric: bool) -> Iterator[Problem]:
    """What a copy with normal levels cannot have."""
    if levels == "even":
        return
    if bits != 4:
        yield "levels", f"normal levels are those of 4 bits, not of {bits}; set levels=even"
    if not symmetric:
        yield "levels", "normal levels go without offsets; set symmetric=true, or levels=even"
    if block > LONGEST_NORMAL_BLOCK:
        most = f"at most {LONGEST_NORMAL_BLOCK} weights"
        yield "levels", f"blocks of normal levels have {most}, not {block}; set levels=even"


class PredictorRecipe(Section):
    """How the scores of the FFN neurons are predicted."""

    kind: Literal["lr", "q", "qlr", "auto"] = Field(
        default="q",
        description="low-rank factors, low-bit copies, low bits with a low-rank correction, or "
        "per layer the cheapest that reaches target_recall",
    )
    bits: Literal[2, 3, 4, 8] = Field(
        default=4, description="bits per weight of the copies (q, qlr)"
    )
    block: Block = Field(default=64, description="weights per scale (q, qlr)")
    symmetric: bool = Field(
        default=True, description="codes around zero; otherwise each block has an offset"
    )
    levels: Levels = "even"
    rank: Count = Field(default=128, description="rank of the factors (lr, qlr)")
    factor_bits: Literal[16, 8, 4] = Field(
        default=16, description="bits per weight of the factors (lr, qlr)"
    )
    input_keep: Share = Field(
        default=1.0,
        description="share of the input channels read per token, the loudest; in (0, 1]",
    )
    centre: bool = Field(
        default=True, description="subtract the mean input; the product with it is a bias"
    )
    column_scale: bool = Field(
        default=True, description="scale columns by their size and their inputs' before rounding"
    )
    group_scores: bool = Field(
        default=False, description="predict one score per group of neurons directly"
    )
    soften: bool = Field(
        default=False, description="count with the typical error of each estimate, 2 bytes each"
    )
    distill: DistillRecipe | None = Field(
        default=None, description="training; null leaves it untrained"
    )
    target_recall: Share | None = Field(
        default=None, description="recall to reach on held-out tokens (kind auto), in (0, 1]"
    )

    def _problems(self) -> Iterator[Problem]:
        yield from _level_problems(self.levels, self.bits, self.block, self.symmetric)
        if self.kind == "auto" and self.levels == "normal":
            yield "levels", "kind auto tries copies of several widths; set levels=even"
        if self.kind == "auto" and self.target_recall is None:
            yield "target_recall", "kind auto needs the recall to reach, for example 0.95"
        if self.kind != "auto" and self.target_recall is not None:
            yield "target_recall", f"kind {self.kind} aims at no recall; use kind auto or null"
        if self.kind == "q" and self.distill is not None and not self.group_scores:
            yield "distill", "kind q has no factors to train; use lr, qlr or auto, or null"
        if self.soften and self.group_scores:
            yield "soften", "group_scores predicts no gate and up values to soften; use one of them"


class UnselectedRecipe(Section):
    """A low-bit copy of the down projection, through which neurons left out count by estimate."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="bits per weight of the copy")
    block: Block = Field(default=32, description="weights per scale")
    symmetric: bool = Field(
        default=False, description="codes around zero; otherwise each block has an offset"
    )
    levels: Levels = "even"

    def _problems(self) -> Iterator[Problem]:
        yield from _level_problems(self.levels, self.bits, self.block, self.symmetric)


def _beyond_copies(predictor: PredictorRecipe) -> str | None:
    """What of a predictor leaves no 4-bit copy of every weight of gate and up."""
    if predictor.kind != "q" or predictor.bits != 4:
        return f"kind {predictor.kind} of {predictor.bits} bits"
    if predictor.input_keep < 1:
        return f"input_keep {predictor.input_keep:g}"
    return "group_scores" if predictor.group_scores else None


class FfnRecipe(Section):
    """The FFN: which share of the neurons a token keeps, and how they are found."""

    keep_fraction: Annotated[
        Annotated[Share, Tag(ONE)] | Annotated[list[Share], Field(min_length=1), Tag(LIST)],
        _BY_SHAPE,
    ] = Field(
        description="share of the neurons kept per token, in (0, 1]; one number or one a layer"
    )
    budget: BudgetRecipe | None = Field(
        default=None, description="how shares differ between layers; null: as keep_fraction says"
    )
    over_select: Annotated[float, In(1)] = Field(
        default=1.25, description="candidates per kept neuron, at least 1"
    )
    score: Literal["norm", "plain", "error"] = Field(
        default="norm",
        description="a neuron's score: |h_i| * ||down_i||, or |h_i| alone; `error` names those "
        "whose estimate, as which they would count when left out, is expected to be furthest off",
    )
    keep: Literal["top_k", "candidates"] = Field(
        default="top_k",
        description="of the candidates keep the best by exact score, or all of them",
    )
    selection: Literal["fixed", "threshold", "relative", "level", "mean_std", "score_mass"] = Field(
        default="fixed",
        description="keep keep_fraction always, or on average: what reaches a level of score, of "
        "score relative to the token's output (where a norm follows the FFN), of the one of these "
        "two that the model's gradients go with, of standard deviations above the token's mean, or "
        "of the token's squared scores",
    )
    unselected: UnselectedRecipe | None = Field(
        default=None,
        description="neurons that are not kept count by their estimated values; null: as zero",
    )
    rows: Literal["stored", "refined", "copies"] = Field(
        default="stored",
        description="what is computed exactly: weights as the model stores them, rounded to the "
        "4-bit copies and 4 bits more, which alone are read for a candidate, or rounded to the "
        "copies: then every neuron counts by these, and over_select, score, keep and "
        "predictor.centre have no part",
    )
    group_size: Count = Field(default=1, description="neurons selected together")
    common_path: Annotated[float, In(0, 1, open_high=True)] = Field(
        default=0.0, description="share of the neurons that is always active, in [0, 1)"
    )
    predictor: Annotated[
        Annotated[PredictorRecipe, Tag(ONE)]
        | Annotated[list[PredictorRecipe], Field(min_length=1), Tag(LIST)],
        _BY_SHAPE,
    ] = Field(default=PredictorRecipe(), description="one predictor, or one a layer")

    def _problems(self) -> Iterator[Problem]:
        for key, keep in _each("keep_fraction", self.keep_fraction):
            if self.common_path >= keep:
                yield "common_path", f"{self.common_path:g} is not below {key} ({keep:g})"
        if self.budget is not None:
            yield from self._budget_problems(self.budget)
        if self.score == "error":
            yield from self._error_problems()
        if self.selection != "fixed":
            yield from self._varying_problems()
        else:
            yield from self._all_problems()
        for key, predictor in _each("predictor", self.predictor):
            if predictor.group_scores and self.group_size == 1:
                yield f"{key}.group_scores", "needs ffn.group_size above 1"
            if predictor.group_scores and self.selection not in ("fixed", "threshold"):
                yield "selection", f"{self.selection} needs neuron scores, not {key}.group_scores"
            if predictor.group_scores and self.unselected is not None:
                yield "unselected", f"needs estimates of neurons, not {key}.group_scores"
        if self.rows != "stored":
            yield from self._rows_problems()
        if self.rows == "copies":
            yield from self._selection_problems()

    @property
    def _tries_kinds(self) -> bool:
        """Whether a predictor's kind, and with it the number of candidates, is found by trying."""
        return any(one.kind == "auto" for _, one in _each("predictor", self.predictor))

    def _varying_problems(self) -> Iterator[Problem]:
        if self.over_select == 1 and not self._tries_kinds:
            why = "with as many candidates as are kept on average no row can keep more"
            yield "over_select", f"selection {self.selection} needs more than 1: {why}"
        if self.selection in ("relative", "level") and self.keep != "candidates":
            why = "goes by estimates alone: it needs ffn.keep candidates"
            yield "selection", f"{self.selection} {why}, not {self.keep}"

    def _all_problems(self) -> Iterator[Problem]:
        """Whether as many candidates as a selection by level has would all be kept."""
        keeps = [keep for _, keep in _each("keep_fraction", self.keep_fraction) if keep < 1]
        if self.keep != "candidates" or not keeps or self._tries_kinds:
            return
        if min(keeps) * self.over_select >= 1:
            yield (
                "over_select",
                f"with {self.over_select:g} times keep_fraction and keep: candidates every neuron "
                "is computed; give 1 (--set ffn.over_select=1), or a selection by level",
            )

    def _rows_problems(self) -> Iterator[Problem]:
        """What of a recipe gives no copies to round weights to."""
        for key, predictor in _each("predictor", self.predictor):
            if found := _beyond_copies(predictor):
                needed = f"{key} to be kind q of 4 bits for neurons"
                yield "rows", f"{self.rows} needs {needed}, not {found}"
        if self.unselected is None or self.unselected.bits != 4:
            role = "is refined as well" if self.rows == "refined" else "is what down is rounded to"
            yield "rows", f"{self.rows} needs unselected.bits 4: its copy of down {role}"

    def _selection_problems(self) -> Iterator[Problem]:
        """What of a recipe selects, where every neuron counts by its copies."""
        why = "with rows: copies every neuron counts and none is selected"
        # Rules that choose among neurons (`selection`, `score`, `over_select`) have no say then.
        wanted = {"keep_fraction": 1, "group_size": 1, "common_path": 0}
        for key, value in wanted.items():
            if (found := getattr(self, key)) != value:
                yield key, f"{found}, but {why}; give {value} (--set ffn.{key}={value})"
        if self.budget is not None and self.budget.mode != "uniform":
            yield "budget", f"mode {self.budget.mode}, but {why}; give null (--set ffn.budget=null)"
        for key, predictor in _each("predictor", self.predictor):
            if predictor.soften:
                yield f"{key}.soften", f"true, but {why}: no estimate has an error; give false"

    def _error_problems(self) -> Iterator[Problem]:
        if self.unselected is None:
            yield (
                "score",
                "error ranks by how far estimates are off; it needs ffn.unselected, else use norm",
            )
        for key, predictor in _each("predictor", self.predictor):
            if predictor.kind == "auto":
                yield "score", f"error finds no top k, whose recall {key}.kind auto aims at"

    def not_simulated(self) -> str | None:
        """What forbids trying on the dense model what `unselected` estimates; None: nothing."""
        if self.unselected is None:
            return None
        for key, predictor in _each("predictor", self.predictor):
            wanted = "simulates estimates by rounded copies of gate and up; it needs"
            if predictor.kind not in ("q", "qlr"):
                return f"{wanted} kind q or qlr, not {key}.kind {predictor.kind}"
            if predictor.input_keep < 1:
                return f"{wanted} {key}.input_keep 1, not {predictor.input_keep:g}"
        return None

    def _budget_problems(self, budget: BudgetRecipe) -> Iterator[Problem]:
        listed = isinstance(self.keep_fraction, list)
        if budget.mode == "uniform" and listed:
            yield "budget.mode", "uniform, but keep_fraction is a list; give one number"
        if budget.mode == "list" and not listed:
            yield "budget.mode", "list, but keep_fraction is one number; give one a layer"
        if budget.mode == "search" and (self.group_size > 1 or self.common_path > 0):
            found = f"group_size {self.group_size} and common_path {self.common_path:g}"
            yield "budget.mode", f"search measures single neurons; needs 1 and 0, not {found}"
        if budget.mode == "search" and (why := self.not_simulated()):
            yield "unselected", f"budget.mode search {why}"


class AttentionRecipe(Section):
    """The matrices of the attention: read whole by every token, so what counts is their type."""

    weights: Literal["int8", "int4"] = Field(
        default="int8", description="rounded to 8 or 4 bits, a scale a block of each row"
    )
    block: Block | None = Field(
        default=None, description="weights per scale; null: 64 with int8, 32 with int4"
    )
    int8: list[str] | None = Field(
        default=None,
        description="with int4, the matrices that keep 8 bits, by the last part of their names; "
        "null: what holds keys or values",
    )

    def _problems(self) -> Iterator[Problem]:
        if self.int8 is not None and self.weights == "int8":
            yield "int8", "names what keeps 8 bits among 4; give weights: int4, or int8: null"


class HeadRecipe(Section):
    """The output head: how the rows worth computing exactly are found."""

    kind: Literal["q", "lr"] = Field(default="q", description="low-bit copy, or low-rank factors")
    bits: Literal[8, 4] = Field(default=8, description="bits per weight of the copy (q)")
    block: Annotated[int, In(0, 2**24)] = Field(
        default=0, description="weights per scale (q); 0 is one scale per row"
    )
    rank: Count = Field(default=256, description="rank of the factors (lr)")
    num_candidates: Count = Field(
        default=128, description="rows rescored exactly per token, at least"
    )
    unselected: Literal["estimate", "-inf"] = Field(
        default="estimate", description="logit of a row that is not rescored"
    )
    certified: bool = Field(
        default=False, description="rescore every row that can still be among the best certify_top"
    )
    certify_top: Count = Field(
        default=64, description="best rows that are provably those of the reference"
    )
    on_uncertified: Literal["dense", "estimate"] = Field(
        default="dense", description="what runs where more rows are needed than were certified"
    )

    def _problems(self) -> Iterator[Problem]:
        if self.certified and self.kind == "q" and (self.bits, self.block) != (8, 0):
            found = f"bits {self.bits} and block {self.block}"
            yield "certified", f"kind q needs bits 8 and block 0 (one scale per row), not {found}"


class DecodeRecipe(Section):
    """When the selecting path runs."""

    max_decode_queries: Rows = Field(
        default=32,
        description="tokens; a longer query after cached ones is prefill, which is dense",
    )
    max_sparse_rows: Rows = Field(
        default=32, description="rows (batch times query tokens); more run dense"
    )


class EvaluateRecipe(Section):
    """The evaluation after conversion."""

    num_tokens: CountOrZero = Field(default=4096, description="tokens to evaluate on; 0 skips it")


class OutputRecipe(Section):
    """The files written."""

    max_shard_gb: Positive = Field(
        default=5.0, description="largest weight file, in GB (10^9 bytes)"
    )


class Recipe(Section):
    """Everything that decides what a conversion makes of a model."""

    name: Text = Field(description="short name, kept in the checkpoint")
    description: str = Field(default="", description="one line for people")
    seed: Annotated[int, In(0, 2**63 - 1)] = Field(
        default=0, description="seed of every random choice"
    )
    data: DataRecipe = Field(default=DataRecipe(), description="calibration text")
    ffn: FfnRecipe | None = Field(default=None, description="the FFN; null leaves it dense")
    head: HeadRecipe | None = Field(
        default=None, description="the output head; null leaves it dense"
    )
    attention: AttentionRecipe | None = Field(
        default=None, description="the attention's matrices; null leaves them as stored"
    )
    finetune: FinetuneRecipe | None = Field(
        default=None, description="training of the selecting model; null leaves the weights alone"
    )
    decode: DecodeRecipe = Field(default=DecodeRecipe(), description="when selection runs")
    evaluate: EvaluateRecipe = Field(default=EvaluateRecipe(), description="evaluation")
    output: OutputRecipe = Field(default=OutputRecipe(), description="files written")

    @property
    def rounds_weights(self) -> bool:
        """Whether the checkpoint's dense weights are others than the source's for being rounded."""
        rounded = self.ffn is not None and self.ffn.rows != "stored"
        return rounded or self.attention is not None

    def _problems(self) -> Iterator[Problem]:
        if self.ffn is None and self.head is None:
            yield "", "nothing to convert: give ffn, head or both"
        if self.ffn is None and self.attention is not None:
            yield "attention", "is rounded beside an FFN that selects; give ffn, or attention: null"
        if self.ffn is None and self.finetune is not None:
            yield "finetune", "trains the selecting FFN; give ffn, or finetune: null"
        if self.ffn is not None and self.ffn.rows == "copies" and self.finetune is not None:
            found = "trains a model that selects, but with ffn.rows: copies none does"
            yield "finetune", f"{found}; give finetune: null, or other ffn.rows"
        if self.ffn is not None and self.finetune is not None and (why := self.ffn.not_simulated()):
            yield "ffn.unselected", f"finetune {why}"
