"""Recall of softened estimates in three forms, over 1.3, on FFN inputs of the test texts.

    python tools/research/soften.py --model DIR --acts FILE.pt [--layers 3 15 26] [--keep 0.5 0.35]

hard       |act(z_gate) * z_up|
added      act(z_gate) and z_up each with the standard deviation of its own error added in squares
two-point  what the runtime ships: act one standard deviation of z's error above and below

Errors are taken per neuron on calibration rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from codes import recall
from perplexity import ffn_weights
from twin import load_twin

from hireconvert.distill import LayerResult, distill_layer
from hireconvert.families import FfnWeights
from hireconvert.recipe import FfnRecipe, PredictorRecipe
from hireconvert.runtime.hire_predict import Predictor, kth_score
from hireconvert.scoring import exact_scores, round_half_up

ROWS = 768
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "q", "bits": 4, "block": 96, "symmetric": False},
    {"kind": "q", "bits": 3, "input_keep": 0.5},
    {"kind": "q", "bits": 2},
    {"kind": "lr", "rank": 128},
)


def sizes(
    weights: FfnWeights, result: LayerResult, fit_ND: torch.Tensor, x_ND: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Estimated sizes [N, F] of the hidden values, in each form."""
    act, spec = weights.act, result.spec["predictor"]
    soft = Predictor(spec, result.tensors, x_ND.shape[1])
    hard = Predictor({**spec, "soften": False}, result.tensors, x_ND.shape[1])
    gate_NF, up_NF = fit_ND @ weights.gate_FD.T, fit_ND @ weights.up_FD.T
    near_gate_NF, near_up_NF = hard.estimate(fit_ND).chunk(2, dim=1)
    gate_error_F = (act(gate_NF) - act(near_gate_NF)).std(0)
    up_error_F = (up_NF - near_up_NF).std(0)
    gate_NF, up_NF = hard.estimate(x_ND).chunk(2, dim=1)
    added = torch.hypot(act(gate_NF), gate_error_F) * torch.hypot(up_NF, up_error_F)
    return {
        "hard": hard.sizes(hard.estimate(x_ND), act, gated=True),
        "added": added,
        "two-point": soft.sizes(soft.estimate(x_ND), act, gated=True),
    }


def main() -> None:
    """Prints recall without and with over-selection of every form, kind, layer and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--acts"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 15, 26])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.35])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, _ = load_twin(args.model)
    acts = torch.load(args.acts, mmap=True)
    for i in args.layers:
        weights = ffn_weights(model.model.layers[i].mlp)
        x = torch.cat([acts[text][i][:ROWS] for text in ("wiki", "c4")])
        fit, held = acts["fit"][i][::4].contiguous(), acts["held"][i][::16].contiguous()
        norms = weights.down_FD.norm(dim=1)
        truth = exact_scores(weights, x, norms)
        for keep in args.keep:
            kept = round_half_up(keep * truth.shape[1])
            member = truth >= kth_score(truth, kept)
            recipe = FfnRecipe(keep_fraction=keep, over_select=1.3)
            for kind in KINDS:
                fields = PredictorRecipe(**kind, soften=True)
                result = distill_layer(weights, fit, held, recipe, fields, keep, seed=0)
                wide = result.spec["num_candidates"]
                found = [
                    f"{name} {recall(size * norms, member, kept, kept):.4f} / "
                    f"{recall(size * norms, member, kept, wide):.4f}"
                    for name, size in sizes(weights, result, fit, x).items()
                ]
                print(i, keep, kind, *found, sep="  ", flush=True)


if __name__ == "__main__":
    main()
