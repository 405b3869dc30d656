"""Recall of estimates softened by their own error, hard against soft, over 1.3 at keep 0.5.

    python tools/research/soften.py --model DIR --acts FILE.pt [--layers 3 15 26]

Soft: sqrt(act(z_gate)^2 + s_gate^2) * sqrt(z_up^2 + s_up^2) * norm, s the standard deviations of
the predictor's errors in act(gate) and in up, per neuron, on calibration rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from codes import recall
from perplexity import ffn_weights
from twin import load_twin

from hireconvert.distill import distill_layer
from hireconvert.recipe import FfnRecipe, PredictorRecipe
from hireconvert.runtime.hire_predict import Predictor
from hireconvert.scoring import exact_scores, kth_score, round_half_up

KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "lr", "rank": 128},
    {"kind": "lr", "rank": 276, "factor_bits": 8},
    {"kind": "q", "bits": 3, "input_keep": 0.5},
    {"kind": "q", "bits": 2},
    {"kind": "q", "bits": 4},
)


def main() -> None:
    """Prints hard and soft recall of every kind and layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--model", "--acts"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 15, 26])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, _ = load_twin(args.model)
    acts = torch.load(args.acts, mmap=True)
    recipe = FfnRecipe(keep_fraction=0.5, over_select=1.3)
    for i in args.layers:
        weights = ffn_weights(model.model.layers[i].mlp)
        x = torch.cat([acts["wiki"][i], acts["c4"][i]])
        fit, held = acts["fit"][i], acts["held"][i][::4].contiguous()
        norms = weights.down_FD.norm(dim=1)
        truth = exact_scores(weights, x, norms)
        kept = round_half_up(0.5 * truth.shape[1])
        member = truth >= kth_score(truth, kept)
        some = fit[::4]
        gate, up = some @ weights.gate_FD.T, some @ weights.up_FD.T
        for kind in KINDS:
            fields = PredictorRecipe(**kind)
            result = distill_layer(weights, fit, held, recipe, fields, 0.5, seed=0)
            predictor = Predictor(result.spec["predictor"], result.tensors, x.shape[1])
            near_gate, near_up = predictor.estimate(some).chunk(2, 1)
            gate_error = (weights.act(gate) - weights.act(near_gate)).std(0)
            up_error = (up - near_up).std(0)
            zg, zu = predictor.estimate(x).chunk(2, 1)
            hard = (weights.act(zg) * zu).abs() * norms
            soft = (weights.act(zg) ** 2 + gate_error**2).sqrt()
            soft = soft * (zu**2 + up_error**2).sqrt() * norms
            count = result.spec["num_candidates"]
            found = [round(recall(scores, member, kept, count), 4) for scores in (hard, soft)]
            print(i, kind, *found, flush=True)


if __name__ == "__main__":
    main()
