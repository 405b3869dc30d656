"""Low-bit copies of a live FFN, for simulating on a dense model what a converted one estimates.

Grids are fitted once; what lies on them follows the live weights, which training moves, at every
`refresh`. Given the inputs of a text, copies are fitted to it as a conversion fits its own, until
the first refresh; without, they are rounded plainly, which loses about three times as much.

Shape suffixes: N rows (tokens), D width, F neurons, W windows, T tokens of a window.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hireconvert.families import Layout, base_model, ffn_parts, num_layers
from hireconvert.quantize import (
    Grid,
    GridFormat,
    column_scales,
    decode_codes,
    fit_grid,
    fitted_codes,
    round_codes,
)
from hireconvert.recipe import FfnRecipe, per_layer
from hireconvert.runtime.hire_ffn import FfnParts
from hireconvert.runtime.hire_predict import Predictor, expected_errors
from hireconvert.scoring import down_error

Key = TypeVar("Key", bound=Hashable)
ERROR_ROWS = 64  # of a batch, that typical errors of copies in training are taken on


@dataclass(frozen=True)
class Estimate:
    """What the copies of one FFN are and what they serve.

    `first` cuts gate and up; `down` the output vectors, through which neurons left out count by
    estimate (None: they count as zero). `over_select` candidates for every active neuron are
    computed exactly; at 1 all of them are active. The copies name them `by_error` (the score
    `error`: by how far estimates are expected to be off), or where `selects`, by estimated sizes;
    else the exact scores do. `centre` and `column_scale` are the recipe's, for copies fitted to
    inputs.
    """

    first: GridFormat
    down: GridFormat | None = None
    over_select: float = 1.0
    selects: bool = False
    by_error: bool = False
    centre: bool = True
    column_scale: bool = True


@dataclass(frozen=True)
class Inputs:
    """What a module receives, float32: mean [D], and second moment [D, D] about zero."""

    mean_D: torch.Tensor
    moment_DD: torch.Tensor


@torch.no_grad()
def received(
    model: PreTrainedModel,
    modules: Mapping[Key, nn.Module],
    ids_WT: torch.Tensor,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[Key, Inputs]:
    """What modules receive over the windows, on the CPU; the model runs dense.

    Modules that receive the same tensor, as queries, keys and values do, share what is noted; those
    that are never called are missing. `progress` is called with the windows done.
    """
    sums: dict[Key, tuple[torch.Tensor, torch.Tensor]] = {}
    source: dict[Key, Key] = {}
    last: tuple[torch.Tensor, Key] | None = None

    def noting(key: Key) -> Callable[..., None]:
        def note(
            _module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]
        ) -> None:
            nonlocal last
            given = (args or tuple(kwargs.values()))[0]
            if last is not None and last[0] is given:
                source[key] = last[1]
                return
            x_ND = given.detach().flatten(0, -2).float()
            if key not in sums:
                width = x_ND.shape[1]
                sums[key] = x_ND.new_zeros(width), x_ND.new_zeros(width, width)
            mean_D, moment_DD = sums[key]
            mean_D += x_ND.sum(0)
            moment_DD.addmm_(x_ND.T, x_ND)
            source[key], last = key, (given, key)

        return note

    hooks = [
        module.register_forward_pre_hook(noting(key), with_kwargs=True)
        for key, module in modules.items()
    ]
    try:
        for done, ids_T in enumerate(ids_WT, start=1):
            base_model(model)(input_ids=ids_T[None].to(model.device), use_cache=False)
            last = None
            progress(done)
    finally:
        for hook in hooks:
            hook.remove()
    rows = ids_WT.numel()
    found = {key: Inputs(*(t.div_(rows).cpu() for t in both)) for key, both in sums.items()}
    return {key: found[own] for key, own in source.items()}


def ffn_inputs(model: PreTrainedModel, layout: Layout, ids_WT: torch.Tensor) -> list[Inputs]:
    """The inputs of every layer's FFN over the windows, on the CPU; the model runs dense."""
    layers = range(num_layers(model))
    modules = {index: ffn_parts(model, layout, index).up.module for index in layers}
    found = received(model, modules, ids_WT)
    return [found[index] for index in layers]


def estimates_of(ffn: FfnRecipe, count: int, *, selects: bool = False) -> list[Estimate]:
    """The estimates of a recipe for `count` layers, as far as rounded copies stand for them.

    Raises UsageError where the recipe lists predictors of another number of layers.
    """
    rest = ffn.unselected
    down = None if rest is None else GridFormat.of(rest)
    over_select = ffn.over_select if ffn.keep == "top_k" else 1.0
    return [
        Estimate(
            GridFormat.of(own),
            down,
            over_select,
            selects,
            ffn.score == "error",
            centre=own.centre,
            column_scale=own.column_scale,
        )
        for own in per_layer(ffn.predictor, count, "ffn.predictor")
    ]


class LiveCopies:
    """Low-bit copies of one FFN's matrices in float32, rounded from its weights as they are.

    Raises InputError where a weight is not finite.
    """

    def __init__(self, parts: FfnParts, estimate: Estimate, inputs: Inputs | None = None) -> None:
        self.parts, self.estimate = parts, estimate
        self._mean_D: torch.Tensor | None = None  # of inputs, where the copies stand for the rest
        if inputs is not None and estimate.centre:
            self._mean_D = inputs.mean_D.to(parts.down_FD().device)
        self._grids: dict[str, Grid] = {}
        self._scales: dict[str, torch.Tensor] = {}  # of columns, 1 without inputs
        self._copies: dict[str, torch.Tensor] = {}
        self._soft: dict[str, torch.Tensor] = {}  # typical errors [F], of copies fitted to inputs
        self._rest_error = 0.0  # of the output vectors' copy, as a share of their length
        self._constants: dict[str, torch.Tensor] = {}  # what the mean adds
        if inputs is not None:
            self._fit(inputs)
        else:
            for name in self._first:
                self._round(name, estimate.first)
        if estimate.down is not None:
            self._round("down", estimate.down)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights as they are now to the grids."""
        self._soft.clear()  # of other copies
        for name, grid in self._grids.items():
            scaled_FD = self._weight(name).float() * self._scales[name]
            self._hold(name, decode_codes(round_codes(scaled_FD, grid), grid))

    def release_first(self) -> None:
        """Give up the copies of gate and up: something else estimates hidden values from now on."""
        for name in ("gate", "up"):
            self._grids.pop(name, None)
            self._copies.pop(name, None)

    def estimated(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden values, how far each is expected to be off or None) for inputs [N, D].

        Both float32 [N, F]; errors where the copies name candidates by them.
        """
        act, gated, x_ND = self.parts.act, self.parts.gate is not None, x_ND.float()
        z_NM = torch.cat([self._product(name, x_ND) for name in self._first], dim=-1)
        value_NF = Predictor.values(z_NM, act, gated=gated)
        if not self.estimate.by_error:
            return value_NF, None
        with torch.no_grad():
            soft_M = torch.cat([self._typical_error(name, x_ND) for name in self._first])
            return value_NF, expected_errors(z_NM, soft_M, act, self._rest_error, gated=gated)

    @property
    def _first(self) -> tuple[str, ...]:
        return ("up",) if self.parts.gate is None else ("gate", "up")

    def _product(self, name: str, x_ND: torch.Tensor) -> torch.Tensor:
        part: Any = getattr(self.parts, name)
        if self._mean_D is None:
            return F.linear(x_ND, self._copies[name], part.bias())
        y_NF = F.linear(x_ND - self._mean_D, self._copies[name], part.bias())
        return y_NF + self._constants[name]

    def _typical_error(self, name: str, x_ND: torch.Tensor) -> torch.Tensor:
        """Standard deviation [F] of a product's error: over the inputs fitted to, or these."""
        if name in self._soft:
            return self._soft[name]
        rows_ND = x_ND[:: math.ceil(len(x_ND) / ERROR_ROWS)]
        off_FD = self._weight(name).float() - self._copies[name]
        return F.linear(rows_ND, off_FD).std(dim=0, correction=0)

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
    def _fit(self, inputs: Inputs) -> None:
        """Copies of gate and up, fitted to what they receive."""
        weights = {name: self._weight(name).detach().float().cpu() for name in self._first}
        moment_DD = inputs.moment_DD.double()
        if self.estimate.centre:
            moment_DD = moment_DD - torch.outer(inputs.mean_D, inputs.mean_D)
        scale_D = torch.ones(moment_DD.shape[0])
        if self.estimate.column_scale:  # one for both, which a conversion rounds as one matrix
            scale_D = column_scales(torch.cat(list(weights.values())), moment_DD)
        spread_DD = inputs.moment_DD - torch.outer(inputs.mean_D, inputs.mean_D)
        for name, weight_FD in weights.items():
            codes_FD, grid = fitted_codes(weight_FD, self.estimate.first, moment_DD, scale_D)
            self._keep(name, codes_FD, grid, scale_D)
            if self.estimate.by_error:
                off_FD = self._weight(name).float() - self._copies[name]
                square_F = ((off_FD @ spread_DD.to(off_FD.device)) * off_FD).sum(dim=1)
                self._soft[name] = square_F.clamp_min(0).sqrt()

    @torch.no_grad()
    def _round(self, name: str, form: GridFormat) -> None:
        """A copy rounded plainly."""
        weight_FD = self._weight(name).detach().float().cpu()
        grid = fit_grid(weight_FD, form)
        self._keep(name, round_codes(weight_FD, grid), grid, torch.ones(weight_FD.shape[1]))

    def _keep(self, name: str, codes_FD: torch.Tensor, grid: Grid, scale_D: torch.Tensor) -> None:
        """Keep a new grid, and the copy of these codes."""
        device = self.parts.down_FD().device
        self._grids[name], self._scales[name] = grid.to(device), scale_D.to(device)
        self._hold(name, decode_codes(codes_FD, grid).to(device))

    def _hold(self, name: str, scaled_FD: torch.Tensor) -> None:
        """Keep a decoded copy, and what goes with it."""
        self._copies[name] = scaled_FD / self._scales[name]
        if name == "down" and self.estimate.by_error:
            self._rest_error = down_error(self._weight(name), self._copies[name])
        if name != "down" and self._mean_D is not None:
            self._constants[name] = self._weight(name).float() @ self._mean_D


def live_copies(
    model: PreTrainedModel,
    layout: Layout,
    ffn: FfnRecipe,
    *,
    selects: bool = False,
    inputs: Sequence[Inputs] = (),
) -> list[LiveCopies]:
    """The copies of every layer that stand for what the recipe estimates; see `estimates_of`.

    They are fitted to `inputs` where these are given, one a layer.
    """
    estimates = estimates_of(ffn, num_layers(model), selects=selects)
    return [
        LiveCopies(ffn_parts(model, layout, index), estimate, inputs[index] if inputs else None)
        for index, estimate in enumerate(estimates)
    ]
