"""A recipe for a limit on KL: shipped settings tried on the model itself, beside dense rounding.

Neurons are selected as a conversion would select them, by low-bit copies fitted to the text that is
tried, and count by them where the recipe lets neurons left out count by estimate.

Shape suffixes: W windows, T tokens of a window.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hireconvert.accounting import ITEM_BYTES, dense_bytes, head_entry, token_bytes
from hireconvert.allocation import Allocation
from hireconvert.budget import evenly
from hireconvert.checkpoint import DenseCheckpoint, open_checkpoint
from hireconvert.data import build_tokens
from hireconvert.errors import InputError, UsageError
from hireconvert.families import find_layout
from hireconvert.figures import size
from hireconvert.lowbit import ffn_inputs, live_copies
from hireconvert.masked import PROBABILITIES_KEPT, MaskedModel, as_selected
from hireconvert.planning import Skeleton, converts_ffn, make_skeleton, planned_hire
from hireconvert.recipe import Recipe, load_recipe
from hireconvert.rules import cheapest_rule, is_asked, told, with_rule
from hireconvert.sampling import sample_from_model
from hireconvert.schema_budget import BudgetRecipe
from hireconvert.stage_rule import STEPS, TITLE, weigh_rules
from hireconvert.stages import Reporter

WINDOW, MOST_TOKENS = 256, 4096
WITHOUT_FFN = "lossless"
CHOSEN = "ffn.keep_fraction"
# Shipped recipes and the shares tried with them, from the most to the fewest neurons.
CANDIDATES = (
    *(("balanced", keep) for keep in (0.5, 0.4, 0.3, 0.25, 0.2)),
    *(("aggressive", keep) for keep in (0.15, 0.1, 0.05)),
)
# Plain rounding of every matrix: name, bits a weight, weights per 16-bit scale (0: one a row).
ROUNDINGS = (("dense, int8", 8, 0), ("dense, 4 bits in groups of 32", 4, 32))


@dataclass(frozen=True)
class Source:
    """The model to convert, as the command line names it."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Tried:
    """One setting: bytes it reads per token, its mean KL to the dense model in nats."""

    name: str
    keep: float | None
    bytes_per_token: int
    kl: float
    recipe: Recipe | None  # None: nothing this program makes


@dataclass(frozen=True)
class Choice:
    """The recipe chosen, everything tried, and one line of advice."""

    recipe: Recipe
    tried: tuple[Tried, ...]
    chosen: Tried
    limit: float
    advice: str

    def facts(self) -> dict[str, Any]:
        """What a reader is shown, without the recipes."""
        keys = ("name", "keep", "bytes_per_token", "kl")
        rows = [
            {**{key: getattr(one, key) for key in keys}, "chosen": one is self.chosen}
            for one in self.tried
        ]
        return {"limit": self.limit, "tried": rows, "advice": self.advice}


def choose(
    source: Source, overrides: Sequence[str], reporter: Reporter, *, max_kl: float, out: Path
) -> Choice:
    """The setting that reads least within the limit; its shares are then searched per layer.

    `overrides` change every recipe tried; temporary files lie on the disk of `out` and are
    removed. Raises UsageError for an override of what is chosen here, and whatever opening the
    model and reading its text raise.
    """
    keys = [one.partition("=")[0].strip() for one in overrides]
    if CHOSEN in keys or "ffn" in keys:
        raise UsageError(f"--auto chooses {CHOSEN}; set keys below ffn, but not that one.")
    with _temporary(out) as folder:
        with reporter.stage("reading the model"):
            checkpoint = open_checkpoint(
                source.model,
                work=folder,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
            )
        tensors = {name: (head.dtype, head.shape) for name, head in checkpoint.headers.items()}
        skeleton = make_skeleton(checkpoint.config, tensors)
        tried = _tried(checkpoint, skeleton, overrides, reporter, max_kl)
    own = [one for one in tried if one.recipe is not None and one.kl <= max_kl]
    if not tried:
        raise UsageError("--auto has nothing to choose: head is null and no FFN can be converted.")
    if not own:
        raise InputError(
            f"nothing tried keeps within KL {max_kl:g}: "
            + ", ".join(f"{one.name} {one.keep or ''}: {one.kl:.4f}" for one in tried)
            + ". Raise --max-kl, or convert the head (recipe lossless)."
        )
    chosen = min(own, key=lambda one: one.bytes_per_token)
    assert chosen.recipe is not None
    return Choice(chosen.recipe, tuple(tried), chosen, max_kl, _advice(chosen, tried, max_kl))


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A folder on the disk of `out`, removed in the end. Raises InputError where none can be."""
    work = next(folder for folder in out.expanduser().resolve().parents if folder.is_dir())
    try:
        folder = tempfile.TemporaryDirectory(dir=work, prefix="hireconvert-auto-")
    except OSError as error:
        raise InputError(
            f"cannot write beside OUT, in {work}: {error.strerror}. Choose an OUT in a folder you "
            "may write to."
        ) from error
    with folder as name:
        yield Path(name)


def _tried(
    checkpoint: DenseCheckpoint,
    skeleton: Skeleton,
    overrides: Sequence[str],
    reporter: Reporter,
    max_kl: float,
) -> list[Tried]:
    """Every setting measured: without the FFN, fewer and fewer neurons, plain rounding."""
    first = load_recipe(CANDIDATES[0][0], overrides)
    tried, limit = [], dense_bytes(skeleton.tensors, skeleton.config)
    if first.head is not None:
        plain = load_recipe(WITHOUT_FFN, [one for one in overrides if not _of_ffn(one)])
        limit = _bytes(skeleton, plain)
        tried.append(Tried(WITHOUT_FFN, None, limit, 0.0, plain))
    if first.ffn is None or not converts_ffn(skeleton, first):
        return tried
    recipes = [(keep, _with_keep(load_recipe(name, overrides), keep)) for name, keep in CANDIDATES]
    priced = [(keep, recipe, _bytes(skeleton, recipe)) for keep, recipe in recipes]
    # Where nearly all neurons are read, finding them costs more than it saves.
    priced = [one for one in priced if one[2] < limit]
    model: Any = checkpoint.load_model(dtype=torch.float32)
    ids_WT, layout = _windows(checkpoint, model, first), find_layout(model)
    ffn = first.ffn
    planned = planned_hire(skeleton, first)["ffn"]["layers"]
    if is_asked(planned):
        with reporter.stage(TITLE, STEPS) as advance:
            costs = weigh_rules(model, layout, ids_WT, planned, seed=first.seed, advance=advance)
        reporter.note(told(costs))
        rule = cheapest_rule(costs)
        ffn = ffn.model_copy(update={"selection": rule})
        priced = [(keep, with_rule(one, rule), count) for keep, one, count in priced]
    inputs = ffn_inputs(model, layout, ids_WT)
    copies = live_copies(model, layout, ffn, selects=True, inputs=inputs)
    masks = MaskedModel.of(model, layout, ids_WT, ffn, copies)
    with (
        reporter.stage("trying settings", len(priced) + len(ROUNDINGS)) as advance,
        masks as masked,
    ):
        as_selected(ffn, [masked])
        for keep, recipe, count in priced:
            assert recipe.ffn is not None
            allocation = Allocation(masked.neurons, recipe.ffn)
            kl = masked.measure(allocation.active(allocation.start))[0].kl
            tried.append(Tried(recipe.name, keep, count, kl, recipe))
            advance(f"{recipe.name} {keep:g}: KL {kl:.4f}")
            if kl > max_kl:
                break  # fewer neurons only cost more
        for name, bits, block in ROUNDINGS:
            _round_weights(model, checkpoint.load_model(), bits, block)
            kl = masked.measure(masked.neurons)[0].kl
            tried.append(Tried(name, None, _rounded_bytes(skeleton, bits, block), kl, None))
            advance(f"{name}: KL {kl:.4f}")
    return tried


def _of_ffn(override: str) -> bool:
    """Whether it changes what a recipe without an FFN does not have."""
    return override.partition("=")[0].strip().partition(".")[0] in ("ffn", "finetune")


def _with_keep(recipe: Recipe, keep: float) -> Recipe:
    """The recipe with that mean share, to be distributed by a search where one can be.

    Raises UsageError where rounded copies cannot stand for what its predictors estimate.
    """
    ffn = recipe.ffn
    assert ffn is not None
    if found := ffn.not_simulated():
        raise UsageError(
            f"ffn.unselected: --auto {found}. Change that, or set "
            "ffn.unselected=null and ffn.score=norm."
        )
    searchable = ffn.group_size == 1 and ffn.common_path == 0
    budget = ffn.budget or (BudgetRecipe(mode="search") if searchable else None)
    changed = ffn.model_copy(update={"keep_fraction": keep, "budget": budget})
    return recipe.model_copy(update={"ffn": changed})


def _windows(checkpoint: DenseCheckpoint, model: Any, recipe: Recipe) -> torch.Tensor:
    """Token ids [W, T], as many as dense probabilities can be kept of."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    num_tokens = max(WINDOW, min(MOST_TOKENS, PROBABILITIES_KEPT // vocabulary))
    window = min(recipe.data.window, WINDOW)
    data = recipe.data.model_copy(
        update={"num_tokens": num_tokens, "num_held_tokens": window, "window": window}
    )
    tokenizer = checkpoint.load_tokenizer()

    def sample(count: int, seed: int) -> torch.Tensor:
        return sample_from_model(model, tokenizer, count, seed=seed)

    tokens = build_tokens(data, tokenizer, seed=recipe.seed, sample=sample)
    return evenly(tokens.fit_WT, num_tokens, window)


def _bytes(skeleton: Skeleton, recipe: Recipe) -> int:
    counted = token_bytes(planned_hire(skeleton, recipe), skeleton.tensors, skeleton.config)
    return int(counted["converted"])


@torch.no_grad()
def _round_weights(model: Any, stored: Any, bits: int, block: int) -> None:
    """Put the stored weights into the model, every matrix rounded to the nearest level."""
    for parameter, original in zip(model.parameters(), stored.parameters(), strict=True):
        parameter.copy_(original)
        if parameter.dim() == 2:
            for rows in parameter.split(4096):
                rows.copy_(rounded(rows, bits, block))


def rounded(weight_AB: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """The matrix on a symmetric grid, one scale for `block` weights of a row (0: for the row)."""
    top, width = 2 ** (bits - 1) - 1, weight_AB.shape[1]
    size = block if block and width % block == 0 else width
    blocks = weight_AB.reshape(weight_AB.shape[0], -1, size)
    scale = (blocks.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
    return ((blocks / scale).round() * scale).view_as(weight_AB)


def _rounded_bytes(skeleton: Skeleton, bits: int, block: int) -> int:
    """Bytes per token of the dense model with rounded matrices and 16-bit scales."""
    dtype, (_, width) = head_entry(skeleton.tensors, skeleton.config.vocab_size)
    weights = dense_bytes(skeleton.tensors, skeleton.config) / ITEM_BYTES[dtype]
    return int(weights * (bits / 8 + 2 / (block or width)))


def _advice(chosen: Tried, tried: Sequence[Tried], max_kl: float) -> str:
    better = [
        one
        for one in tried
        if one.recipe is None and one.kl <= max_kl and one.bytes_per_token < chosen.bytes_per_token
    ]
    if not better:
        return "no plain rounding of the dense weights reads fewer bytes within the limit"
    best = min(better, key=lambda one: one.bytes_per_token)
    return (
        "plain quantization would serve better: "
        f"{best.name} reads {size(best.bytes_per_token)} a token at KL {best.kl:.4f}, "
        f"this conversion {size(chosen.bytes_per_token)} at KL {chosen.kl:.4f}"
    )
