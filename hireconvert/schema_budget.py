"""The recipe section `ffn.budget`: how the neurons kept are shared out among the layers."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from hireconvert.sections import Count, In, Positive, Problem, Section


class BudgetTargetRecipe(Section):
    """What a budget search aims at; one of the keys."""

    bytes_per_token: Count | None = Field(
        default=None, description="bytes read per decoded token, head and attention included"
    )
    perplexity_increase: Positive | None = Field(
        default=None, description="perplexity on held-out text over that of the dense model, less 1"
    )
    kl: Positive | None = Field(
        default=None, description="mean KL(dense || selecting) on held-out text, in nats"
    )

    def _problems(self) -> Iterator[Problem]:
        given = [key for key, value in self if value is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            yield "", f"give one of {', '.join(type(self).model_fields)}; found {found}"


class BudgetRecipe(Section):
    """How the neurons kept are shared out among the layers."""

    mode: Literal["uniform", "list", "search"] = Field(
        default="search",
        description="one share for every layer, those that ffn.keep_fraction lists, or a list "
        "found by measuring the whole model, which starts from ffn.keep_fraction",
    )
    target: BudgetTargetRecipe | None = Field(
        default=None,
        description="what the search aims at; null keeps the mean of ffn.keep_fraction",
    )
    method: Literal["evolution", "greedy", "second_order"] = Field(
        default="greedy",
        description="random trades between layers, the best trades by slopes of every layer, or "
        "the best list by what every share costs to second order, from one pass forward and back",
    )
    step: Annotated[float, In(0, 0.5, open_low=True)] = Field(
        default=0.05,
        description="share of its neurons that a layer gains or gives in one trade; the distance "
        "of the shares that are weighed (second_order)",
    )
    generations: Count = Field(default=40, description="rounds of random trades (evolution)")
    offspring: Count = Field(default=8, description="lists tried in a generation (evolution)")
    sweeps: Count = Field(default=6, description="times that slopes are taken, at most (greedy)")
    num_tokens: Count = Field(
        default=8192,
        description="calibration tokens a list is scored on; those of the pass (second_order)",
    )
    probe_tokens: Count = Field(
        default=512, description="tokens on which offspring are compared before that (evolution)"
    )

    def _problems(self) -> Iterator[Problem]:
        if self.mode != "search" and self.target is not None:
            yield "target", f"mode {self.mode} aims at nothing; use mode search, or target: null"
