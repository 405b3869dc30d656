"""The rule stage of a conversion: what scores are compared with where a level is asked for.

tokens -> rule -> the run's recipe
"""

import json
from collections.abc import Mapping
from typing import Any

from hireconvert.budget import evenly
from hireconvert.data import TokenData
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
from hireconvert.stages import RESULT, Run, steps
from hireconvert.workspace import write_json

STAGE = "rule"


def choose_rule(
    run: Run, fingerprint: Mapping[str, Any], tokens: TokenData
) -> dict[str, Any] | None:
    """What was measured, the run's recipe then naming the rule; None where none is to be chosen."""
    if run.hire["ffn"] is None or not is_asked(run.hire["ffn"]["layers"]):
        return None
    if not run.space.is_done(STAGE, fingerprint):
        ids_WT = evenly(tokens.fit_WT, NUM_TOKENS, LENGTH)
        title, total = "rule of selection", len(ids_WT)
        with run.stage(STAGE, fingerprint, title, total) as (folder, advance):
            costs = rule_costs(
                run.model,
                run.layout,
                ids_WT,
                [layer["num_kept"] for layer in run.hire["ffn"]["layers"]],
                seed=run.recipe.seed,
                progress=steps(advance, total),
            )
            write_json(folder / RESULT, {"selection": cheapest_rule(costs), "costs": costs})
    found: dict[str, Any] = json.loads((run.space.path(STAGE) / RESULT).read_text(encoding="utf-8"))
    run.recipe = with_rule(run.recipe, found["selection"])
    run.hire = planned_hire(run.skeleton, run.recipe)
    run.reporter.note(told(found["costs"]))
    return found
