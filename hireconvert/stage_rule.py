"""The rule stage of a conversion: what scores are compared with where a level is asked for.

tokens -> rule -> the run's recipe
"""

import json
from collections.abc import Mapping
from typing import Any

from hireconvert.budget import evenly
from hireconvert.data import TokenData
from hireconvert.planning import planned_hire
from hireconvert.rules import LENGTH, NUM_TOKENS, rule_of, size_power, with_rule
from hireconvert.stages import RESULT, Run, steps
from hireconvert.workspace import write_json

STAGE = "rule"


def choose_rule(
    run: Run, fingerprint: Mapping[str, Any], tokens: TokenData
) -> dict[str, Any] | None:
    """What was measured, the run's recipe then naming the rule; None where none is to be chosen."""
    ffn = run.recipe.ffn
    if ffn is None or run.hire["ffn"] is None or ffn.selection != "level":
        return None
    if not run.space.is_done(STAGE, fingerprint):
        ids_WT = evenly(tokens.fit_WT, NUM_TOKENS, LENGTH)
        title, total = "rule of selection", len(ids_WT)
        with run.stage(STAGE, fingerprint, title, total) as (folder, advance):
            power = size_power(
                run.model,
                run.layout,
                ids_WT,
                seed=run.recipe.seed,
                progress=steps(advance, total),
            )
            write_json(folder / RESULT, {"selection": rule_of(power), "size_power": power})
    found: dict[str, Any] = json.loads((run.space.path(STAGE) / RESULT).read_text(encoding="utf-8"))
    run.recipe = with_rule(run.recipe, found["selection"])
    run.hire = planned_hire(run.skeleton, run.recipe)
    run.reporter.note(
        f"ffn.selection: {found['selection']}, as gradients go with the size of a layer's output "
        f"to the power {found['size_power']:+.2f}"
    )
    return found
