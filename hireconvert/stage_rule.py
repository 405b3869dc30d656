"""The rule stage of a conversion: what scores are compared with where a level is asked for.

tokens -> rule -> the run's recipe
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hireconvert.budget import evenly
from hireconvert.data import TokenData
from hireconvert.families import Layout
from hireconvert.planning import planned_hire
from hireconvert.rules import (
    LENGTH,
    NUM_TOKENS,
    cheapest_rule,
    is_asked,
    rule_costs,
    told,
    with_rule,
)
from hireconvert.stages import RESULT, Advance, Run, steps
from hireconvert.workspace import write_json

STAGE, TITLE = "rule", "rule of selection"
STEPS = NUM_TOKENS // LENGTH


def weigh_rules(
    model: Any,
    layout: Layout,
    ids_WT: torch.Tensor,
    layers: Sequence[Mapping[str, Any]],
    *,
    seed: int,
    advance: Advance,
) -> dict[str, float]:
    """What each rule costs layers as planned (`rule_costs`), on a few of the windows, in STEPS."""
    kept = [layer["num_kept"] for layer in layers]
    few_WT = evenly(ids_WT, NUM_TOKENS, LENGTH)
    return rule_costs(model, layout, few_WT, kept, seed=seed, progress=steps(advance, STEPS))


def choose_rule(
    run: Run, fingerprint: Mapping[str, Any], tokens: TokenData
) -> dict[str, Any] | None:
    """What was measured, the run's recipe then naming the rule; None where none is to be chosen."""
    if run.hire["ffn"] is None or not is_asked(run.hire["ffn"]["layers"]):
        return None
    if not run.space.is_done(STAGE, fingerprint):
        with run.stage(STAGE, fingerprint, TITLE, STEPS) as (folder, advance):
            layers, seed = run.hire["ffn"]["layers"], run.recipe.seed
            costs = weigh_rules(
                run.model, run.layout, tokens.fit_WT, layers, seed=seed, advance=advance
            )
            write_json(folder / RESULT, {"selection": cheapest_rule(costs), "costs": costs})
    found: dict[str, Any] = json.loads((run.space.path(STAGE) / RESULT).read_text(encoding="utf-8"))
    run.recipe = with_rule(run.recipe, found["selection"])
    run.hire = planned_hire(run.skeleton, run.recipe)
    run.reporter.note(told(found["costs"]))
    return found
