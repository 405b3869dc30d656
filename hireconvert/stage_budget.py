"""The budget stage of a conversion: the list of shares that every later stage goes by.

budget_state (scores so far, until the search is done) -> budget -> the run's recipe
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from hireconvert.accounting import token_bytes
from hireconvert.allocation import Allocation, Keeps
from hireconvert.budget import Bytes, Found, Memo, Trials, evenly, search_budget
from hireconvert.data import TokenData
from hireconvert.lowbit import LiveCopies, ffn_inputs, live_copies
from hireconvert.masked import MaskedModel, as_selected
from hireconvert.memory import SEARCH_WINDOW
from hireconvert.planning import Skeleton, planned_hire
from hireconvert.recipe import FfnRecipe, Recipe
from hireconvert.schema_budget import BudgetRecipe
from hireconvert.stages import RESULT, Run, steps
from hireconvert.workspace import write_json

STAGE, STATE, SCORES = "budget", "budget_state", "scores.jsonl"
ARTIFACTS = (STATE, STAGE)


def searches(recipe: Recipe) -> bool:
    """Whether the recipe asks for a search."""
    ffn = recipe.ffn
    return ffn is not None and ffn.budget is not None and ffn.budget.mode == "search"


def with_shares(recipe: Recipe, keeps: Keeps) -> Recipe:
    """The recipe with an explicit list in place of whatever made it."""
    assert recipe.ffn is not None
    changes = {"keep_fraction": list(keeps), "budget": BudgetRecipe(mode="list")}
    return recipe.model_copy(update={"ffn": recipe.ffn.model_copy(update=changes)})


def bytes_of_shares(skeleton: Skeleton, recipe: Recipe) -> Bytes:
    """Bytes per token of a list of shares, and with the FFN left as it is; the head counts."""

    def sums(keeps: Keeps) -> dict[str, Any]:
        hire = planned_hire(skeleton, with_shares(recipe, keeps))
        return token_bytes(hire, skeleton.tensors, skeleton.config)

    assert recipe.ffn is not None
    layers = planned_hire(skeleton, recipe)["ffn"]["layers"]
    start = sums(Allocation(tuple(layer["num_neurons"] for layer in layers), recipe.ffn).start)
    dense = start["converted"] - start["ffn"]["converted"] + start["ffn"]["dense"]
    return Bytes(lambda keeps: int(sums(keeps)["converted"]), dense)


def share_out(run: Run, fingerprint: Mapping[str, Any], tokens: TokenData) -> dict[str, Any] | None:
    """What a search measured, the run's recipe then listing what it found; None without one."""
    if not searches(run.recipe) or run.hire["ffn"] is None:
        return None
    if not run.space.is_done(STAGE, fingerprint):
        if not run.space.is_done(STATE, fingerprint):
            with run.space.building(STATE, fingerprint):
                pass  # what lies in it from now on was made from these parts
        _search(run, fingerprint, tokens)
    run.space.discard(STATE)
    result = json.loads((run.space.path(STAGE) / RESULT).read_text(encoding="utf-8"))
    run.recipe = with_shares(run.recipe, tuple(result["keep_fraction"]))
    run.hire = planned_hire(run.skeleton, run.recipe)
    report: dict[str, Any] = result["report"]
    run.reporter.note(told(report))
    return report


def told(report: Mapping[str, Any]) -> str:
    """One line on what a search came to."""
    start, found = report["start"], report["found"]
    rest = ", neurons left out by estimate" if report["unselected"] == "estimate" else ""
    line = (
        f"budget search{rest}: mean keep {report['mean_keep']:.3f}, on held-out text KL "
        f"{found['kl_held']:.4f} (before the search {start['kl_held']:.4f}), perplexity "
        f"{found['perplexity_increase_held']:+.2%} ({start['perplexity_increase_held']:+.2%})"
    )
    if not report["agreed"]:
        line += "; the list searched did no better there and was not taken"
    if report["reached"]:
        return line
    aim = next(f"{key} {value:g}" for key, value in report["target"].items() if value is not None)
    return f"warning: {line}; the target {aim} was not reached"


@contextmanager
def _masked(
    run: Run, ffn: FfnRecipe, texts: list[torch.Tensor]
) -> Iterator[tuple[MaskedModel, ...]]:
    """The dense model on each text, selecting by exact scores; the rest as the recipe says."""
    copies: Sequence[LiveCopies] = ()
    if ffn.unselected is not None:
        # Moments of every layer's inputs are large: nothing holds them once the copies are made.
        copies = live_copies(
            run.model, run.layout, ffn, inputs=ffn_inputs(run.model, run.layout, texts[0])
        )
    with ExitStack() as stack:
        models = [MaskedModel.of(run.model, run.layout, ids_WT, ffn, copies) for ids_WT in texts]
        entered = tuple(stack.enter_context(model) for model in models)
        as_selected(ffn, entered)
        yield entered


def _search(run: Run, fingerprint: Mapping[str, Any], tokens: TokenData) -> None:
    ffn, skeleton = run.recipe.ffn, run.skeleton
    assert ffn is not None and ffn.budget is not None
    budget, memo = ffn.budget, Memo(run.space.path(STATE) / SCORES, fingerprint)
    texts = [
        evenly(ids_WT, budget.num_tokens, SEARCH_WINDOW)
        for ids_WT in (tokens.fit_WT, tokens.held_WT)
    ]
    rounds = {
        "evolution": budget.generations,
        "greedy": budget.sweeps,
        "second_order": len(texts[0]),
    }[budget.method]
    with (
        run.stage(STAGE, fingerprint, "budget search", rounds) as (folder, advance),
        _masked(run, ffn, texts) as (searched, held),
    ):
        allocation = Allocation(searched.neurons, ffn)
        found: Found = search_budget(
            Trials("search", searched, allocation, memo),
            Trials("held", held, allocation, memo),
            budget,
            bytes_=bytes_of_shares(skeleton, run.recipe),
            seed=run.recipe.seed,
            progress=steps(advance, rounds),
        )
        report = {**found.report, "unselected": "zero" if ffn.unselected is None else "estimate"}
        facts = {"keep_fraction": found.keep_fraction, "report": report}
        write_json(folder / RESULT, facts)
