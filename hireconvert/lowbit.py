"""Low-bit copies of a live FFN, for simulating on a dense model what a converted one estimates.

Grids are fitted once, as plain rounding makes them; what lies on them follows the live weights,
which training moves, at every `refresh`. A conversion fits its copies to the text besides, so that
they are better than these.

Shape suffixes: N rows (tokens), D width, F neurons.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hireconvert.families import Layout, ffn_parts, num_layers
from hireconvert.quantize import Grid, GridFormat, decode_codes, fit_grid, round_codes
from hireconvert.recipe import FfnRecipe, per_layer
from hireconvert.runtime.hire_ffn import FfnParts


@dataclass(frozen=True)
class Estimate:
    """What the copies of one FFN are and what they serve.

    `first` cuts gate and up; `down` the output vectors, through which neurons left out count by
    estimate (None: they count as zero). `over_select` candidates for every active neuron are
    computed exactly; at 1 all of them are active. The copies name them where `selects`, else the
    exact scores do.
    """

    first: GridFormat
    down: GridFormat | None = None
    over_select: float = 1.0
    selects: bool = False


def estimates_of(ffn: FfnRecipe, count: int, *, selects: bool = False) -> list[Estimate]:
    """The estimates of a recipe for `count` layers, as far as rounded copies stand for them.

    Raises UsageError where the recipe lists predictors of another number of layers.
    """
    rest = ffn.unselected
    down = None if rest is None else GridFormat(rest.bits, rest.block, rest.symmetric)
    over_select = ffn.over_select if ffn.keep == "top_k" else 1.0
    return [
        Estimate(GridFormat(own.bits, own.block, own.symmetric), down, over_select, selects)
        for own in per_layer(ffn.predictor, count, "ffn.predictor")
    ]


class LiveCopies:
    """Low-bit copies of one FFN's matrices in float32, rounded from its weights as they are.

    Raises InputError where a weight is not finite.
    """

    def __init__(self, parts: FfnParts, estimate: Estimate) -> None:
        self.parts, self.estimate = parts, estimate
        forms = {"up": estimate.first}
        if parts.gate is not None:
            forms["gate"] = estimate.first
        if estimate.down is not None:
            forms["down"] = estimate.down
        self._grids = {name: self._fit(name, form) for name, form in forms.items()}
        self._copies: dict[str, torch.Tensor] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights as they are now to the grids."""
        for name, grid in self._grids.items():
            weight_FD = self._weight(name).float()
            self._copies[name] = decode_codes(round_codes(weight_FD, grid), grid)

    def release_first(self) -> None:
        """Give up the copies of gate and up: something else estimates hidden values from now on."""
        for name in ("gate", "up"):
            self._grids.pop(name, None)
            self._copies.pop(name, None)

    def values(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Estimated hidden values float32 [N, F] for inputs [N, D]."""
        parts, x_ND = self.parts, x_ND.float()
        up_NF = F.linear(x_ND, self._copies["up"], parts.up.bias())
        if parts.gate is None:
            return parts.act(up_NF)
        return parts.act(F.linear(x_ND, self._copies["gate"], parts.gate.bias())) * up_NF

    @property
    def down_FD(self) -> torch.Tensor | None:
        """The copy of the output vectors, None where neurons left out count as zero."""
        return self._copies.get("down")

    def _weight(self, name: str) -> torch.Tensor:
        if name == "down":
            return self.parts.down_FD()
        part: Any = getattr(self.parts, name)
        return part.weight_out_in()

    @torch.no_grad()
    def _fit(self, name: str, form: GridFormat) -> Grid:
        weight_FD = self._weight(name)
        grid = fit_grid(weight_FD.float().cpu(), form)
        offset = None if grid.offset is None else grid.offset.to(weight_FD.device)
        return Grid(form, grid.scale.to(weight_FD.device), offset)


def live_copies(
    model: PreTrainedModel, layout: Layout, ffn: FfnRecipe, *, selects: bool = False
) -> list[LiveCopies]:
    """The copies of every layer that stand for what the recipe estimates; see `estimates_of`."""
    estimates = estimates_of(ffn, num_layers(model), selects=selects)
    return [
        LiveCopies(ffn_parts(model, layout, index), estimate)
        for index, estimate in enumerate(estimates)
    ]
